"""A whole small study of a model that knows of ratings, categories and times, stage by stage: trained with the second task,
quantized with distillation or within a budget, exported, and measured as it ships."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.deploy import Recommender
from sasrec.errors import UserError
from sasrec.files import read_json
from sasrec.mapping import from_mapping
from stages import evaluate, export, fetch, prepare, quantize, train

MODEL = {"max_len": 10, "hidden": 16, "heads": 2, "side": ["rating", "category", "recency"], "time_bias": True}


def study(**sections: object) -> Study:
    lists = {"models": ["sasrec"], "quantized": ["lsq", "adaround"], "variants": ["lsq"], "seeds": [0], "threads": 1}
    base = {
        "sample": {"users": 120, "items": 60},
        "prepare": {"candidates": 10},
        "per_model": {"sasrec": {"model": MODEL, "train": {"rating_weight": 0.5, "epochs": 2, "min_batches": 1}}},
        "quant": {"epochs": 1, "distill": 0.5, "calibration_batches": 2},
        "methods": {"lsq": {}, "adaround": {"iterations": 5, "samples": 500}},
        "evaluate": {"bootstrap": 100},
    }
    return from_mapping(Study, {**lists, **base, **sections}, "")


def test_a_small_study_from_the_data_to_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = study()
    fetch.main(chosen)
    prepare.main(chosen)
    train.main(chosen, "sasrec", "0")
    ratings = Sequences.load("data/prepared").ratings
    assert ratings is not None
    for method, quant in (("lsq", {}), ("adaround", {"budget_kb": 6.0})):
        own = study(quant={"epochs": 1, "distill": 0.5, "calibration_batches": 2, **quant})
        quantize.main(own, method, "0")
        Path("data/models", method, ".DS_Store").write_text("")  # not of a seed, and swept away
        export.main(own, method)
        evaluate.main(own, method)
        model = Recommender.load(Path("data/exported", method, "0"))
        assert model.inputs == ("ratings", "times")
        tensors = model.manifest["tensors"]
        assert {"side.rating_table.weight", "side.category_table.weight", "side.recency_table.weight"} <= tensors.keys()
        assert not any("second" in name or "head" in name for name in tensors)
        (agreement,) = read_json(Path("data/evaluated", method, "agreement.json"))
        assert agreement["users"] > 100
        assert agreement["steps"] <= 1
        assert agreement["same_elements"] >= 0.995
        assert agreement["same_top10"] >= 0.95
        assert abs(agreement["ndcg@10_difference"]) < 0.01
    nothing_of_the_targets_is_measured(own, method)
    # What was measured had the ratings and times of the histories.
    known = model.recommend([model.ids[1], model.ids[2]], ratings=[5, 1], times=[10**9, 10**9 + 60])
    assert known != model.recommend([model.ids[1], model.ids[2]])


def nothing_of_the_targets_is_measured(chosen: Study, variant: str) -> None:
    """Ratings and times of the test items may be anything: what ships ranks the same; those of the events before count."""
    positions = Sequences.load("data/prepared").held("test").positions
    evaluated = Path("data/evaluated", variant)

    def measured(places: NDArray[np.int64]) -> dict[str, bytes]:
        for name, change in (("ratings", lambda own: 6 - own), ("timestamps", lambda own: own + 10**6)):
            path = Path("data/prepared", f"{name}.npy")
            values = np.load(path)
            values[places] = change(values[places])
            np.save(path, values)
        evaluate.main(chosen, variant)
        return {path.name: path.read_bytes() for path in evaluated.rglob("*") if path.is_file()}

    before = measured(positions[:0])
    assert measured(positions) == before
    assert measured(positions - 1) != before


def test_times_that_are_only_an_order_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = study(dataset={"times": "order"})
    fetch.main(chosen)
    prepare.main(chosen)
    with pytest.raises(UserError, match=r"^params\.yaml: model\.side names recency, but the times of this data only order"):
        train.main(chosen, "sasrec", "0")
    assert not Path("data/models").exists()
