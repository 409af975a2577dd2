"""A study that names models which the data lacks something for ends before anything is trained, with what to type instead."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sasrec.config import Study
from sasrec.errors import UserError
from sasrec.mapping import from_mapping
from stages import fetch, preflight, prepare

CAFE = {"model": {"kind": "cafe"}}


def study(**sections: Any) -> Study:
    base = {
        "models": ["sasrec", "gsasrec", "cafe"],
        "quantized": ["lsq"],
        "variants": ["sasrec", "gsasrec", "cafe", "lsq"],
        "seeds": [0],
        "dataset": {"name": "file", "path": "mine.csv"},
        "prepare": {"min_user": 1, "min_item": 1, "candidates": 2},
        "per_model": {"sasrec": {}, "gsasrec": {}, "cafe": CAFE},
    }
    return from_mapping(Study, {**base, **sections}, "")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prepared data of users and items alone."""
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("user,item\n" + "".join(f"u{u},i{(u + i) % 6}\n" for u in range(4) for i in range(4)))
    fetch.main(study())
    prepare.main(study())
    yield
    assert not Path("data/models").exists()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("sections", "why", "typed"),
    [
        ({}, "model.kind is cafe", "'models=[sasrec,gsasrec]' -S 'variants=[sasrec,gsasrec,lsq]', beside your other options"),
        ({"quant": {"model": "cafe"}}, "model.kind is cafe", "'variants=[sasrec,gsasrec,lsq]' -S quant.model=sasrec, beside"),
        (
            {"per_model": {"sasrec": {"model": {"side": ["rating"]}}, "gsasrec": {}, "cafe": CAFE}},
            "model.side names rating",
            "sasrec and cafe: dvc exp run -S 'models=[gsasrec]' -S 'variants=[gsasrec,lsq]' -S quant.model=gsasrec, beside",
        ),
        (
            {"per_model": {"sasrec": {"train": {"rating_weight": 1}}, "gsasrec": {}, "cafe": CAFE}},
            "train.rating_weight",
            "[gsasrec]",
        ),
        (
            {"per_model": {"sasrec": {"model": {"time_bias": True}}, "gsasrec": {}, "cafe": CAFE}},
            "model.time_bias",
            "[gsasrec]",
        ),
    ],
)
def test_what_the_data_lacks_and_the_study_without(sections: dict[str, Any], why: str, typed: str) -> None:
    with pytest.raises(UserError) as refused:
        preflight.main(study(**sections))
    assert why in str(refused.value)
    assert typed in str(refused.value)
    assert not Path("data/preflight.txt").exists()


@pytest.mark.usefixtures("bare")
def test_where_no_model_is_left_there_is_nothing_to_type() -> None:
    with pytest.raises(UserError, match="off the lists models and variants$"):
        preflight.main(study(models=["cafe"], variants=["cafe"], quant={"model": "cafe"}))


@pytest.mark.usefixtures("bare")
def test_what_passes_is_the_same_file_whatever_the_lists() -> None:
    found = set()
    for models in (["sasrec", "gsasrec"], ["sasrec"]):
        preflight.main(study(models=models, variants=models))
        found.add(Path("data/preflight.txt").read_bytes())
    assert len(found) == 1


ALONE: dict[str, Any] = {"models": ["sasrec"], "variants": ["sasrec", "lsq"]}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("quant", "why"),
    [
        ({"overrides": {"item_tabel.weight": 4}}, "item_tabel.weight.*did you mean.*item_table.weight"),
        ({"overrides": {"blocks.0.output": 1}}, "blocks.0.output: an activation takes 2 to 8 bits, not 1"),
        ({"overrides": {"blocks.0.attention.query.weight": 1}}, "query.weight: a weight takes 2 to 8 bits, not 1"),
        ({"overrides": {"output_table.weight": 4}}, "unknown tensor in quant.overrides"),
    ],
)
def test_an_override_that_no_tensor_takes_ends_before_training(quant: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        preflight.main(study(**ALONE, quant=quant))
    assert not Path("data/preflight.txt").exists()


@pytest.mark.usefixtures("bare")
def test_overrides_are_of_the_model_that_is_quantized() -> None:
    preflight.main(study(**ALONE, quant={"overrides": {"item_table.weight": 1, "blocks.0.output": 2}}))
    # The preset scores with a table of its own.
    preflight.main(study(**ALONE, quant={"preset": "source", "overrides": {"output_table.weight": 8}}))
    deep = {"sasrec": {}, "gsasrec": {"model": {"blocks": 3}}, "cafe": CAFE}
    study_of: dict[str, Any] = {"models": ["sasrec", "gsasrec"], "variants": ["sasrec"], "per_model": deep}
    preflight.main(study(**study_of, quant={"model": "gsasrec", "overrides": {"blocks.2.output": 4}}))
    with pytest.raises(UserError, match="blocks.2.output"):
        preflight.main(study(**study_of, quant={"overrides": {"blocks.2.output": 4}}))
