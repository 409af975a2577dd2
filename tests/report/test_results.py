"""Reading results back, and comparing variants user by user."""

from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasrec import metrics
from sasrec.config import QuantParams, Study
from sasrec.errors import UserError
from sasrec.files import read_json, write_json, write_text
from sasrec.report.readme import variants
from sasrec.report.results import Comparison, from_control, load_results, load_stats, reference
from sasrec.report.series import load_curves, load_latencies
from sasrec.report.show import stored_rows
from stages.report import main


def test_paired_difference_of_five_users(folder: Path, study: Study) -> None:
    results = load_results(study)
    found = results.comparisons["lsq", "control"]
    # Gains of ranks 1, 3, 2, 1, 20 against those of 1, 1, 2, 7, 20.
    gains = [0, 1 / log2(4) - 1, 0, 1 - 1 / log2(8), 0]
    assert found.difference == pytest.approx(sum(gains) / 5)
    assert found.base == pytest.approx((1 + 1 + 1 / log2(3) + 1 / log2(8)) / 5)
    assert found.log2_rank == pytest.approx((log2(3) - log2(7)) / 5)
    assert (found.low, found.high) == pytest.approx(
        metrics.bootstrap_interval(np.array(gains), study.evaluate.bootstrap, study.evaluate.seed)
    )
    assert found.verdict == "within noise"


def test_each_variant_has_its_reference(folder: Path, study: Study) -> None:
    references = {variant.name: variant.reference for variant in load_results(study).variants}
    assert references == {
        "popularity": "sasrec", "markov": "sasrec", "sasrec": None, "control": "sasrec", "ptq": "sasrec",
        "lsq": "control",
    }  # fmt: skip


def test_without_control_methods_are_compared_with_the_model(folder: Path, study: Study) -> None:
    results = load_results(replace(study, variants=("sasrec", "lsq")))
    assert [variant.reference for variant in results.of_kind("method")] == ["sasrec"]


def test_a_variant_alone_is_compared_with_nothing(folder: Path, study: Study) -> None:
    for name in ("popularity", "markov"):
        Path(f"metrics/{name}.json").unlink()
    results = load_results(replace(study, variants=("lsq",)))
    assert results.comparisons == {}


def test_seeds_are_averaged_by_user(folder: Path, study: Study, writer: Callable[..., None]) -> None:
    for name in study.variants:
        writer(name, (0, 1))
    one, two = load_results(study), load_results(replace(study, seeds=(0, 1)))
    for pair, comparison in two.comparisons.items():
        assert comparison.difference == pytest.approx(one.comparisons[pair].difference)
    assert [variant.gains.shape for variant in two.variants] == [(1, 5)] * 2 + [(2, 5)] * 4


@pytest.mark.parametrize(
    ("difference", "low", "high", "verdict"),
    [
        (-0.01, -0.02, -0.001, "worse"),
        (0.01, 0.001, 0.02, "better"),
        (-0.01, -0.02, 0.0, "within noise"),
        (0, 0, 0, "within noise"),
    ],
)
def test_noise_is_an_interval_that_includes_zero(difference: float, low: float, high: float, verdict: str) -> None:
    assert Comparison("sasrec", 0.2, difference, low, high, 0, 0, 0).verdict == verdict


def test_percent_of_nothing_is_unknown() -> None:
    assert Comparison("popularity", 0.0, 0.1, 0.05, 0.2, 0, 0, 0).relative is None
    assert Comparison("sasrec", 0.2, -0.01, -0.02, 0, 0, 0, 0).relative == pytest.approx(-5)


def test_intervals_of_many_rows_are_those_of_each() -> None:
    values = np.random.default_rng(1).normal(size=(3, 2, 40))
    each = [metrics.bootstrap_interval(row, 100, 7) for row in values]
    assert np.allclose(metrics.bootstrap_intervals(values, 100, 7), each)


def test_several_seeds_widen_the_interval_by_what_differs_between_them(
    folder: Path, study: Study, writer: Callable[..., None]
) -> None:
    one = np.random.default_rng(1).normal(size=(1, 400))
    same, other = np.concatenate([one, one]), np.concatenate([one - 0.5, one + 0.5])
    narrow, wide = (np.diff(metrics.bootstrap_interval(values, 500, 0)) for values in (same, other))
    assert np.allclose(narrow, np.diff(metrics.bootstrap_interval(one, 500, 0)), rtol=0.1)
    # Half of the resamples hold both seeds, a quarter each only one of them.
    assert narrow + 0.9 < wide < narrow + 1.1


@pytest.mark.parametrize("name", ["metrics/lsq.json", "data/evaluated/lsq/0/full.npy", "data/evaluated/lsq/card.json"])
def test_a_missing_file_is_named(folder: Path, study: Study, name: str) -> None:
    Path(name).unlink()
    with pytest.raises(UserError, match=rf"{name} does not exist; run `dvc repro`"):
        load_results(study)


def test_damaged_files_are_named(folder: Path, study: Study) -> None:
    write_text("metrics/lsq.json", '{"ndcg@10": 0.1')
    with pytest.raises(UserError, match="metrics/lsq.json is not a JSON object"):
        load_results(study)
    write_json("metrics/lsq.json", {"ndcg@10": 0.1})
    with pytest.raises(UserError, match="metrics/lsq.json lacks hr@10"):
        load_results(study)
    Path("data/evaluated/ptq/0/full.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="ptq/0/full.npy is not a whole array"):
        load_results(study)


def test_different_protocols_do_not_compare(folder: Path, study: Study, writer: Callable[..., None]) -> None:
    writer("ptq", card="another")
    with pytest.raises(UserError, match="metrics/ptq.json and metrics/lsq.json were measured under different protocols"):
        load_results(study)


def test_a_variant_that_no_list_has(folder: Path, study: Study) -> None:
    with pytest.raises(UserError, match="variants names lsq, but neither models nor quantized"):
        load_results(replace(study, quantized=("control", "ptq")))


def test_baselines_are_optional(folder: Path, study: Study) -> None:
    Path("metrics/markov.json").unlink()
    assert [variant.name for variant in load_results(study).variants] == [
        "popularity",
        "sasrec",
        "control",
        "ptq",
        "lsq",
    ]


def test_facts_of_the_data_that_are_missing(folder: Path) -> None:
    write_json("data/prepared/stats.json", {"dataset": "toy", "users": 6, "items": 30})
    with pytest.raises(UserError, match="stats.json lacks 'interactions'"):
        load_stats()


def test_curves_of_untrained_variants_are_left_out(folder: Path, study: Study) -> None:
    curves = load_curves(study.variants, study.seeds)
    assert list(curves) == ["sasrec", "control", "lsq"]
    assert curves["lsq"][0].train_loss == [None, 2.0, 2.0, 2.0]


def test_a_broken_series_is_named_with_its_line(folder: Path, study: Study) -> None:
    write_text("plots/benchmark/lsq.csv", "batch,encode_ms,score_ms,sequences_per_second\n1,fast,0.2,588\n")
    with pytest.raises(UserError, match="lsq.csv, line 2: 'fast' is not a number"):
        load_latencies(study.variants)
    write_text("plots/curves/lsq-0.csv", "epoch,lr\n")
    with pytest.raises(UserError, match="lsq-0.csv has no column 'train_loss'"):
        load_curves(study.variants, study.seeds)


def leave_out_recent_popularity() -> None:
    write_json("metrics/recent_popularity.json", dict.fromkeys(read_json("metrics/popularity.json")))
    write_json("data/evaluated/recent_popularity/left_out.json", {"note": "It is left out: no times."})


def test_a_baseline_that_was_left_out_is_a_note(folder: Path, study: Study) -> None:
    names = [variant.name for variant in load_results(study).variants]
    leave_out_recent_popularity()
    results = load_results(study)
    assert results.notes == ("It is left out: no times.",)
    assert [variant.name for variant in results.variants] == names
    main(study)
    page = Path("plots/report.html").read_text(encoding="utf-8")
    assert page.count("It is left out: no times.") == 1
    assert "recent_popularity" not in page + Path("plots/summary.csv").read_text(encoding="utf-8")


def test_a_baseline_that_was_left_out_has_no_row(folder: Path) -> None:
    leave_out_recent_popularity()
    assert "recent_popularity" not in [row["name"] for row in stored_rows([])]
    assert "recent_popularity" not in variants(Path("metrics"))
    with pytest.raises(UserError, match="recent_popularity was left out"):
        stored_rows(["recent_popularity"])


def test_the_least_agreement_of_all_variants_is_told(folder: Path, study: Study) -> None:
    text = load_results(study).agreement
    assert "differ by at most 1 integer step (lsq)" in text
    assert "at least 99.90 % of users" in text
    assert "NDCG@10 differs by at most 0.00010 (ptq)" in text
    # The last digit of a bound is on the safe side.
    write_json(Path("data/evaluated/ptq/agreement.json"), [{"steps": 0, "same_top10": 0.99998, "ndcg@10_difference": 2e-6}])
    write_json(Path("data/evaluated/lsq/agreement.json"), [{"steps": 0, "same_top10": 1.0, "ndcg@10_difference": 0.0}])
    text = load_results(study).agreement
    assert "at least 99.99 % of users" in text and "at most 0.00001 (ptq)" in text
    (folder / "data/evaluated/ptq/agreement.json").write_text("[{}]")
    with pytest.raises(UserError, match="agreement.json is not what evaluate writes"):
        load_results(study)


def test_what_starts_from_the_control_is_compared_with_it(folder: Path, study: Study) -> None:
    def referred(name: str, **changes: Any) -> str | None:
        variant = load_results(replace(study, **changes)).get(name)
        assert variant
        return variant.reference

    assert referred("ptq") == "sasrec" and referred("lsq") == "control"
    assert referred("ptq", quant=QuantParams(init="control")) == "control"
    assert referred("ptq", quant=QuantParams(preset="source")) == "control"
    assert from_control({"init": "checkpoint"}, {"after": "lsq"}) and not from_control({"init": "checkpoint"}, {"after": None})
    assert reference("adaround", "method", ("sasrec", "control"), "sasrec", from_control=True) == "control"
