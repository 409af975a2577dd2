"""Committed references agree with the ranks beside them, and a reference that does not is noticed."""

import contextlib
import json
import shlex
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sasrec import reference
from sasrec.config import Study
from sasrec.errors import UserError
from sasrec.files import read_json, sha256, write_json, write_text
from sasrec.mapping import from_mapping
from sasrec.merged import changed
from stages import reference as command
from tests.conftest import ROOT
from tests.report.conftest import folder, study, writer  # noqa: F401


@given(st.lists(st.integers(2, 200_000).map(lambda doubled: doubled / 2), max_size=40))
def test_ranks_survive_packing(tmp_path_factory: pytest.TempPathFactory, ranks: list[float]) -> None:
    path = tmp_path_factory.mktemp("ranks") / "x.npy.gz"
    content = reference.packed(np.array(ranks))
    path.write_bytes(content)
    assert reference.unpacked(path).tolist() == ranks
    assert content == reference.packed(np.array(ranks))


@pytest.mark.parametrize("ranks", [[0.5], [1.25], [np.nan]])
def test_what_is_no_rank_is_not_packed(ranks: list[float]) -> None:
    with pytest.raises(ValueError, match="whole or half"):
        reference.packed(np.array(ranks))


def test_ml_1m_takes_12_kilobytes() -> None:
    ranks = np.minimum(np.random.default_rng(0).zipf(1.3, 6040), 3416)
    assert len(reference.packed(ranks)) < 13_000


# The stages that the toy study's results come from.
MADE_OF = ("fetch", "prepare", "baselines", *(f"quantize@{name}-0" for name in ("control", "ptq", "lsq")))
MADE_OF += tuple(f"{stage}@{name}" for stage in ("export", "evaluate") for name in ("sasrec", "control", "ptq", "lsq"))


@pytest.fixture
def kept(folder: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A reference made of the toy study."""
    params = {
        "models": ["sasrec"], "quantized": ["control", "ptq", "lsq"], "variants": ["sasrec", "control", "ptq", "lsq"],
        "seeds": [0], "quant": {"model": "sasrec"}, "evaluate": {"bootstrap": 200, "seed": 0},
    }  # fmt: skip
    write_text("params.yaml", yaml.safe_dump(params))
    write_text(
        "dvc.lock",
        yaml.safe_dump(
            {
                "schema": "2.0",
                "stages": {
                    **dict.fromkeys(MADE_OF, {}),
                    "train@sasrec-0": {"params": {"params.yaml": {"quant.model": "sasrec", "seeds": [0]}}},
                    "train@old-0": {"params": {"params.yaml": {"quant.model": "old"}}},
                    "report": {},
                },
            }
        ),
    )
    write_text("raw.txt", "1 1\n")
    write_json("data/prepared/stats.json", read_json("data/prepared/stats.json") | {"sha256": sha256("raw.txt")})
    write_json("metrics/item_knn.json", dict.fromkeys(read_json("metrics/markov.json")))
    write_json("metrics/recent_popularity.json", dict.fromkeys(read_json("metrics/markov.json")))
    monkeypatch.setattr(command, "read_study", lambda: study)
    notes = {
        "configurations": [{"params": {"train.lr": 0.1}, "valid_ndcg@10": 0.2}],
        "published": [{"source": "x", "hr@10": 0.3}],
    }
    write_text("notes.yaml", yaml.safe_dump(notes))
    command.keep(SimpleNamespace(name="toy", data="raw.txt", seconds=3, command="dvc repro", notes="notes.yaml"))  # type: ignore[arg-type]
    return folder / "metrics/reference/toy.json"


def test_what_cannot_be_kept_whole_leaves_the_old_reference(kept: Path) -> None:
    before = {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()}
    Path("plots/curves/lsq-0.csv").unlink()
    with pytest.raises(FileNotFoundError):
        command.keep(SimpleNamespace(name="toy", data="raw.txt", seconds=3, command="dvc repro", notes=None))  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()} == before


def test_a_kill_while_comparisons_are_made_leaves_the_old_reference(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr(reference, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kept_anew(seconds=4)
    assert {path: path.read_bytes() for path in kept.parent.rglob("*") if path.is_file()} == before


def test_results_of_a_stage_that_the_lock_does_not_name_are_not_kept(kept: Path) -> None:
    content = yaml.safe_load(Path("dvc.lock").read_text())
    del content["stages"]["quantize@lsq-0"]
    write_text("dvc.lock", yaml.safe_dump(content))
    with pytest.raises(UserError, match="dvc.lock does not say what quantize@lsq-0 ran with"):
        kept_anew()


def kept_anew(**options: Any) -> None:
    given = {"name": "toy", "data": "raw.txt", "seconds": 3, "command": "dvc repro", "notes": None} | options
    command.keep(Namespace(**given))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "-a"])
def test_a_name_that_would_replace_another_folder_is_refused(kept: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in kept.parents[1].rglob("*") if path.is_file()}
    for attempt in (lambda: kept_anew(name=name), lambda: command.merge(name, ["toy"]), lambda: command.check([name])):
        with pytest.raises(UserError, match="is no name for a reference"):
            attempt()
    assert {path: path.read_bytes() for path in kept.parents[1].rglob("*") if path.is_file()} == before


def test_what_was_not_made_from_this_file_or_these_parameters_is_not_kept(kept: Path) -> None:
    before = kept.read_bytes()
    write_text("other.txt", "1 2\n")
    with pytest.raises(UserError, match="--data other.txt has sha256 .* but data/prepared is of"):
        kept_anew(data="other.txt")
    params = yaml.safe_load(Path("params.yaml").read_text())
    write_text("params.yaml", yaml.safe_dump(params | {"quant": {"model": "gsasrec"}}))
    with pytest.raises(UserError, match=r"quant.model is gsasrec, but train@sasrec-0 ran with sasrec \(dvc.lock\)"):
        kept_anew()
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"configurations: [", "is not YAML in UTF-8"),
        (b"published: \xe9", "is not YAML in UTF-8"),
        (b"configurations: 5", "configurations must be a list, not 5"),
        (b"- a", "write keys with values"),
        (b"tried: []", "unknown key tried"),
    ],
)
def test_notes_that_say_nothing_are_refused(kept: Path, content: bytes, said: str) -> None:
    Path("notes.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"--notes notes.yaml.*{said}"):
        kept_anew(notes="notes.yaml")
    with pytest.raises(UserError, match="--notes nothing is not a file"):
        kept_anew(notes="nothing")
    Path("notes.yaml").write_bytes(b"")
    kept_anew(notes="notes.yaml")
    assert read_json(kept)["tried"] == {"count": 0, "configurations": [], "test_reads": 1}


def test_what_is_no_kept_reference_is_not_merged(kept: Path) -> None:
    with pytest.raises(UserError, match="metrics/lsq.json is not what `python -m stages.reference keep` writes"):
        command.merge("grid", ["metrics/lsq.json"])


def test_a_kept_reference_agrees_with_its_ranks(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.check([])
    assert "1 references agree" in capsys.readouterr().out
    content = read_json(kept)
    assert content["tried"] == {
        "count": 1, "configurations": [{"params": {"train.lr": 0.1}, "valid_ndcg@10": 0.2}], "test_reads": 1,
    }  # fmt: skip
    assert list(content["variants"]) == ["popularity", "markov", "sasrec", "control", "ptq", "lsq"]
    assert {(row["variant"], row["reference"]) for row in content["comparisons"]} >= {("lsq", "control"), ("lsq", "ptq")}
    assert (kept.parent / "toy/lsq-0.csv").exists()
    lock = yaml.safe_load((kept.parent / "toy/dvc.lock").read_text())
    assert set(lock["stages"]) == {*MADE_OF, "train@sasrec-0"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("variants", "lsq", "ndcg@10"), 0.9, r"lsq: ndcg@10 is 0\.9, the ranks give"),
        (("variants", "lsq", "card"), "00000000", "not that of the card"),
        (("comparisons", 0, "low"), -9.0, r"low is -9\.0, the ranks give"),
        (("comparisons", 1, "verdict"), "sure", "verdict is sure"),
    ],
)
def test_a_figure_that_the_ranks_do_not_give_is_named(kept: Path, path: tuple[str, ...], value: object, message: str) -> None:
    content = read_json(kept)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    kept.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        command.check(["toy"])


def test_damaged_and_missing_ranks_are_named(kept: Path) -> None:
    path = kept.parent / "toy/ranks/lsq-0.full.npy.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"lsq-0\.full\.npy\.gz is damaged"):
        command.check(["toy"])
    whole = reference.packed(np.arange(1.0, 200.0))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            reference.unpacked(path)
    path.unlink()
    with pytest.raises(UserError, match=r"lsq-0\.full\.npy\.gz does not exist"):
        command.check(["toy"])
    with pytest.raises(UserError, match="references: toy"):
        command.check(["other"])


def test_committed_references_agree_with_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert reference.names()
    command.check([])


FILES = sorted((ROOT / "metrics/reference").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_command_of_a_reference_still_sets_its_parameters(file: Path) -> None:
    """A default that changed since has to be set by the command, or it would give other results. Of a merged one, each part."""
    content = read_json(file)
    for part in content.get("parts", ()):
        sets_its_parameters({"command": part["command"], "params": changed(content["params"], part["params"])})
    sets_its_parameters(content)


def sets_its_parameters(content: dict[str, Any]) -> None:
    set_now: Any = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for setting in (word for flag, word in pairwise(shlex.split(content["command"])) if flag == "-S"):
        key, value = setting.removeprefix("+").split("=", 1)
        *path, last = key.split(".")
        section = set_now
        for name in path:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    now, then = (from_mapping(Study, params, "") for params in (set_now, content["params"]))
    assert (now.models, now.variants, now.seeds) == (then.models, then.variants, then.seeds)
    for model in then.models:
        assert now.of_model(model) == then.of_model(model)
    for name in ("threads", "dataset", "prepare", "evaluate", *(("quant",) if then.quantized else ())):
        assert getattr(now, name) == getattr(then, name), name
    for method in then.quantized:
        assert now.methods[method] == then.methods[method], method


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_committed_references_are_whole(file: Path) -> None:
    content = read_json(file)
    assert {"command", "params", "environment", "data", "card", "tried", "published", "variants", "comparisons"} <= set(content)
    assert content["command"].startswith("dvc ") and content["tried"]["test_reads"] >= 1
    own = file.with_suffix("")
    locks = [own / "locks" / f"{part['name']}.lock.gz" for part in content.get("parts", ())] or [own / "dvc.lock"]
    assert all(lock.exists() for lock in locks)
    sizes = [path.stat().st_size for path in file.with_suffix("").rglob("*") if path.is_file()]
    assert max(sizes) < 1_000_000
