"""Details of comparisons and choices, on studies of a few numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sasrec import metrics
from sasrec.compared import Compared
from sasrec.config import EvaluateParams, Study
from sasrec.merged import Facts, Grid, Run
from sasrec.metrics import Floats
from sasrec.report import widths
from sasrec.report.results import Comparison, Results, Variant, compare
from sasrec.report.tables import COMPARED, summary_rows
from sasrec.report.widths import undominated
from stages.ablation import percents

PARAMS = EvaluateParams(bootstrap=200, seed=3)
STUDY = Study(("sasrec",), (), ("sasrec",), (0,), evaluate=PARAMS)


def variant(name: str, ranks: Floats) -> Variant:
    return Variant(name, "method", {}, metrics.ndcg(ranks, 10), np.log2(ranks), {}, None)


def test_intervals_of_a_comparison_resample_seeds_and_users_of_each_measure() -> None:
    """Seeds differ far more than users do; ranks beyond ten tell nothing by NDCG@10."""
    rng = np.random.default_rng(0)
    one, other = (rng.integers(1, 9, (3, 40)).astype(float) for _ in range(2))
    one[1] += 4
    a, b = variant("a", one), variant("b", other)
    found = compare([(a, b), (b, a)], PARAMS)
    for (first, second), own in (((a, b), found["a", "b"]), ((b, a), found["b", "a"])):
        gains, log2_ranks = first.gains - second.gains, first.log2_ranks - second.log2_ranks
        assert own.difference == pytest.approx(gains.mean()) and own.log2_rank == pytest.approx(log2_ranks.mean())
        assert (own.low, own.high) == pytest.approx(metrics.bootstrap_interval(gains, 200, 3))
        assert (own.log2_rank_low, own.log2_rank_high) == pytest.approx(metrics.bootstrap_interval(log2_ranks, 200, 3))
        assert own.base == pytest.approx(second.gains.mean())
    pooled = metrics.bootstrap_interval((a.gains - b.gains).mean(0), 200, 3)
    assert found["a", "b"].high - found["a", "b"].low > pooled[1] - pooled[0]


def grid_of(runs: Mapping[str, tuple[Facts, Mapping[int, tuple[float, float]]]]) -> Grid:
    """Of each variant by seed: NDCG@10 on validation, and the rank of every user on test."""
    grid = Grid({}, {"data": "toy"})
    for name, (facts, by_seed) in runs.items():
        for seed, (valid, rank) in by_seed.items():
            values = {"valid_ndcg@10": valid, "coverage@10": 0.5, "bits": 4.0, "bytes": 100}
            ranks = dict.fromkeys(("full", "sampled"), np.full(6, rank))
            grid.add(name, facts, seed, Run("a", values | {"embedding_bytes": 1, "weight_bytes": 1}, ranks))
    return grid


MODEL = Facts("model")
PTQ, LSQ = (Facts("method", method, 4, "all", "sasrec") for method in ("ptq", "lsq"))


def test_the_method_of_a_cell_is_chosen_on_validation() -> None:
    """`ptq` is the better one there, `lsq` on the test items."""
    runs = {"sasrec": (MODEL, {0: (0.5, 1.0)}), "ptq-4": (PTQ, {0: (0.4, 5.0)}), "lsq-4": (LSQ, {0: (0.3, 2.0)})}
    (choice,) = Compared(grid_of(runs), PARAMS).choices
    assert choice == {"bits": 4, "line": "all", "best": "ptq-4", "tied": [], "behind": [], "ahead": ["lsq-4"]}


def test_the_choice_and_the_comparison_are_over_the_seeds_of_both() -> None:
    """By its mean over both seeds `ptq` would be chosen, and be better."""
    runs = {
        "sasrec": (MODEL, {0: (0.5, 1.0), 1: (0.5, 1.0)}),
        "ptq-4": (PTQ, {0: (0.3, 5.0), 1: (0.9, 1.0)}),
        "lsq-4": (LSQ, {0: (0.4, 2.0)}),
    }
    found = Compared(grid_of(runs), PARAMS)
    (choice,) = found.choices
    assert choice["best"] == "lsq-4" and choice["behind"] == ["ptq-4"]
    (row,) = [row for row in found.comparisons if (row["variant"], row["reference"]) == ("lsq-4", "ptq-4")]
    assert row["seeds"] == 1 and row["difference"] == pytest.approx(1 / np.log2(3) - 1 / np.log2(6), abs=1e-5)
    assert (found.values["ptq-4"]["valid_ndcg@10"], found.values["ptq-4"]["seeds"]) == (0.6, 2)
    assert found.values["ptq-4"]["ndcg@10"] == pytest.approx((1 + 1 / np.log2(6)) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("models", "front"),
    [
        ([("a", 100, 0.3), ("b", 100, 0.2)], ["a"]),
        ([("b", 100, 0.2), ("a", 100, 0.3)], ["a"]),
        ([("a", 200, 0.3), ("b", 100, 0.3)], ["b"]),
        ([("a", 200, 0.3), ("b", 100, 0.2), ("c", 150, 0.1)], ["b", "a"]),
    ],
)
def test_a_model_of_the_same_size_or_quality_is_not_on_the_front_twice(
    models: Sequence[tuple[str, int, float]], front: list[str]
) -> None:
    assert [name for name, *_ in undominated(models)] == front


def test_a_variant_stands_where_its_paired_difference_puts_it() -> None:
    """The interval of the difference around its own quality, and in percent of the reference."""
    row = {"variant": "lsq-4", "reference": "sasrec", "base": 0.2, "difference": -0.02, "low": -0.03, "high": -0.005}
    values = {"bytes": 10, "ndcg@10": 0.18, "ndcg@10_low": 0.1, "ndcg@10_high": 0.3, "valid_ndcg@10": 0.25}
    run: dict[str, Any] = {"kind": "method", "method": "lsq", "bits": 4, "line": "all", "reference": "sasrec"}
    content = {
        "comparisons": [row | {"verdict": "worse"}], "frontier": [], "choices": [], "variants": {"lsq-4": values},
        "runs": {"lsq-4": run | {"seeds": [0, 2], "valid_ndcg@10": [0.2, 0.3]}},
    }  # fmt: skip
    (point,) = widths.load(content).points
    assert (point.quality, point.low, point.high) == pytest.approx((0.18, 0.17, 0.195))
    assert (point.change, point.change_low, point.change_high) == pytest.approx((-10, -15, -2.5))
    assert (point.verdict, point.worth, point.by_seed) == ("worse", None, {0: 0.2, 2: 0.3})


def test_percents_of_an_ablation_are_paired_by_user() -> None:
    """Everyone gains a tenth of the mean: users differ, differences do not."""
    other = np.random.default_rng(0).random(50)
    assert percents(other + 0.1 * other.mean(), other, STUDY) == ["+10.00"] * 3
    own = other.copy()
    own[0] += 1.0
    middle, low, high = map(float, percents(own, other, STUDY))
    assert low == 0 < middle < high and middle == pytest.approx(100 / 50 / other.mean(), abs=0.01)


def test_the_summary_has_the_interval_from_low_to_high() -> None:
    own = Variant("lsq", "method", {}, np.ones((1, 1)), np.ones((1, 1)), {}, "sasrec")
    of = Comparison("sasrec", 0.2, -0.02, -0.03, -0.005, 0.1, 0.05, 0.2)
    (row,) = summary_rows(Results((own,), {("lsq", "sasrec"): of}))
    assert [row[key] for key in COMPARED] == ["sasrec", -0.02, -0.03, -0.005, -10.0, 0.1, 0.05, 0.2, "worse"]
