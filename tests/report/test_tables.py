"""The summary file and the printed table."""

import csv
from pathlib import Path

import pytest

from sasrec.config import Study
from sasrec.errors import UserError
from sasrec.files import write_text
from sasrec.report.results import load_results
from sasrec.report.show import stored_rows
from sasrec.report.tables import percent_text, results_table, size_text, summary_csv, summary_rows

TABLE = """\
variant     bits     size  NDCG@10    95% interval   HR@10  sampled   change  against  verdict
----------  ----  -------  -------  --------------  ------  -------  -------  -------  ------------
popularity    32  80.0 kB   0.0602  0.0000..0.1204  0.2000   0.5000  -89.4 %  sasrec   worse
sasrec        32  80.0 kB   0.5667  0.2667..0.8667  0.8000   0.7000
lsq            4  10.0 kB   0.6262  0.3262..0.9262  0.8000   0.7262   +4.4 %  control  within noise
"""


def row(
    name: str, bits: int, size: int, ndcg: float, low: float, high: float, hr: float, sampled: float, **more: object
) -> dict[str, object]:
    values: dict[str, object] = {
        "name": name,
        "bits": bits,
        "bytes": size,
        "ndcg@10": ndcg,
        "ndcg@10_low": low,
        "ndcg@10_high": high,
    }
    return {**values, "hr@10": hr, "sampled_ndcg@10": sampled, **more}


def test_table_text() -> None:
    rows = [
        row(
            "popularity",
            32,
            80_000,
            0.0602,
            0,
            0.1204,
            0.2,
            0.5,
            reference="sasrec",
            relative_percent=-89.4,
            verdict="worse",
        ),
        row("sasrec", 32, 80_000, 0.5667, 0.2667, 0.8667, 0.8, 0.7, reference=None),
        row(
            "lsq",
            4,
            10_000,
            0.6262,
            0.3262,
            0.9262,
            0.8,
            0.7262,
            reference="control",
            relative_percent=4.4,
            verdict="within noise",
        ),
    ]
    assert results_table(rows) == TABLE


def test_table_without_comparisons_has_fewer_columns() -> None:
    assert results_table([row("a", 8, 1, 0.1, 0, 0.2, 0.3, 0.4)]).splitlines()[0].split()[-1] == "sampled"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (950, "950 B"),
        (9_994, "9.99 kB"),
        (64_321, "64.3 kB"),
        (99_960, "100 kB"),
        (999_900, "1.00 MB"),
        (5e9, "5.00 GB"),
    ],
)
def test_sizes_have_three_digits(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.25, "+1.2 %"), (-0.044, "-0.04 %"), (-0.001, "0 %"), (0, "0 %"), (-12.34, "-12.3 %"), (None, "?")],
)
def test_percentages_are_signed(value: float | None, text: str) -> None:
    assert percent_text(value) == text


def test_summary_has_all_metrics_and_the_comparison(folder: Path, study: Study) -> None:
    rows = list(csv.DictReader(summary_csv(summary_rows(load_results(study))).splitlines()))
    assert [(r["name"], r["kind"]) for r in rows] == [
        ("popularity", "baseline"), ("markov", "baseline"), ("sasrec", "model"), ("control", "control"),
        ("ptq", "method"), ("lsq", "method"),
    ]  # fmt: skip
    lsq, sasrec = rows[-1], rows[2]
    assert {"hr@1", "sampled_mrr", "valid_ndcg@10", "coverage@10", "embedding_bytes", "card"} <= lsq.keys()
    assert (lsq["reference"], lsq["verdict"], lsq["difference"]) == ("control", "within noise", "0.03333")
    assert float(lsq["relative_percent"]) == pytest.approx(100 * (1 / 30) / ((2 + 0.63093 + 1 / 3) / 5), abs=1e-3)
    assert sasrec["reference"] == sasrec["difference"] == ""


def test_show_prints_the_same_table_again(folder: Path, study: Study) -> None:
    rows = summary_rows(load_results(study))
    write_text("plots/summary.csv", summary_csv(rows))
    assert results_table(stored_rows([])) == results_table(rows)


def test_show_without_a_summary_or_with_an_old_one(folder: Path, study: Study) -> None:
    assert [r["name"] for r in stored_rows([])] == ["control", "lsq", "markov", "popularity", "ptq", "sasrec"]
    assert [r["name"] for r in stored_rows(["ptq", "lsq"])] == ["ptq", "lsq"]
    write_text("plots/summary.csv", "name,ndcg@10,reference\nlsq,0.9,control\n")
    assert "reference" not in stored_rows(["lsq"])[0]
    with pytest.raises(UserError, match="metrics/apot.json does not exist"):
        stored_rows(["apot"])
