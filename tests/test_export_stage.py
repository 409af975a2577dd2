"""The stage export: what of the data and the model it hands on, and what it leaves where it fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasrec.data.sequences import Sequences
from stages import export as stage


class Exporting:
    """data/ of two seeds of a variant, one of which the study no longer has; three users, of whom the last events of two are
    held out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared = Path("data/prepared")
        prepared.mkdir(parents=True)
        for name in stage.TRAINED_ON:
            (prepared / name).write_text(name)
        for seed in (0, 7):
            Path("data/models/some", str(seed)).mkdir(parents=True)
        self.exports: list[tuple[Any, ...]] = []
        items, offsets, ends = np.array([1, 2, 1, 3, 3, 2], np.int32), np.array([0, 4, 5, 6]), np.array([2, 4, 6])
        store = SimpleNamespace(items=items, offsets=offsets, train_ends=ends, items_count=3)
        monkeypatch.setattr(Sequences, "load", lambda path: store)
        monkeypatch.setattr(stage, "read_catalogue", lambda path: [("a", "A", ("x",)), ("b", "B", ()), ("c", "C", ())])
        monkeypatch.setattr(stage, "load_model", lambda path: (path.name, {"model": 1, "items": 3, "valid_ndcg@10": 0.5}))
        monkeypatch.setattr(stage, "export", self.export)
        self.fails = False

    def export(self, folder: Path, *given: Any) -> Any:
        (folder / "file").write_text(f"{len(self.exports)}")
        self.exports.append(given)
        if self.fails:
            raise OSError(28, "No space left on device")
        return SimpleNamespace(bytes=1, bits=8.0)


@pytest.fixture
def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporting:
    monkeypatch.chdir(tmp_path)
    return Exporting(monkeypatch)


STUDY: Any = SimpleNamespace(seeds=[0])


def test_a_model_is_exported_with_what_it_was_trained_on(exporting: Exporting) -> None:
    """Counts are of the training part; seeds of other studies go."""
    stage.main(STUDY, "some")
    ((name, frozen, items, card),) = exporting.exports
    assert (name, frozen) == ("0", {})
    assert [(item.original, item.title, item.categories, item.count) for item in items] == [
        ("a", "A", ("x",), 1), ("b", "B", (), 2), ("c", "C", (), 0),
    ]  # fmt: skip
    assert set(card) == {"valid_ndcg@10", "prepared"}
    assert [path.name for path in Path("data/models/some").iterdir()] == ["0"]
    assert [path.name for path in Path("data/exported/some").iterdir()] == ["0"]


@pytest.mark.parametrize("name", stage.TRAINED_ON)
def test_other_training_data_has_another_hash(name: str, exporting: Exporting) -> None:
    for content in ("one", "other"):
        Path("data/prepared", name).write_text(content)
        stage.main(STUDY, "some")
    assert exporting.exports[0][-1]["prepared"] != exporting.exports[1][-1]["prepared"]


def test_a_failed_export_leaves_the_one_before_it(exporting: Exporting) -> None:
    stage.main(STUDY, "some")
    exporting.fails = True
    with pytest.raises(OSError, match="No space left"):
        stage.main(STUDY, "some")
    assert [str(path) for path in Path("data/exported/some").rglob("*")] == [
        "data/exported/some/0",
        "data/exported/some/0/file",
    ]
    assert Path("data/exported/some/0/file").read_text() == "0"


def test_quantized_tensors_are_exported_where_there_are_any(exporting: Exporting, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data/models/some/0/quantized.safetensors").write_text("")
    monkeypatch.setattr(stage, "load_tensors", lambda path: (path.name, "bits"))
    monkeypatch.setattr(stage, "from_tensors", lambda *given: given)
    stage.main(STUDY, "some")
    assert exporting.exports[0][1] == ("quantized.safetensors", "bits")
