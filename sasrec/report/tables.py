"""The results as rows: the summary file, and the table that is printed on a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sasrec.report.results import Comparison, Results

Row = Mapping[str, Any]

MINUS = "−"

# Columns of the summary that are not in metrics/<variant>.json: the comparison with the variant's reference.
COMPARED = (
    "reference", "difference", "difference_low", "difference_high", "relative_percent",
    "log2_rank_difference", "log2_rank_low", "log2_rank_high", "verdict",
)  # fmt: skip


def _compared(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return dict.fromkeys(COMPARED)
    c = comparison
    numbers = (c.difference, c.low, c.high, c.relative, c.log2_rank, c.log2_rank_low, c.log2_rank_high)
    # 5 digits, as the metrics have; + 0.0 makes minus zero zero.
    rounded = [None if number is None else round(number, 5) + 0.0 for number in numbers]
    return dict(zip(COMPARED, (c.reference, *rounded, c.verdict), strict=True))


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """One row a variant: name, kind, all its metrics, and the columns COMPARED (differences of NDCG@10 and of the mean
    log2 rank from the reference; None where there is none)."""
    return [
        {"name": variant.name, "kind": variant.kind, **variant.metrics, **_compared(results.own(variant))}
        for variant in results.variants
    ]


def summary_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, empty where there is no value."""
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def size_text(size: float) -> str:
    """Bytes in units of 1000 with three digits: 950 B, 64.3 kB, 1.25 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale * 0.9995:
            value = size / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{size:.0f} B"


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def percent_text(value: float | None, minus: str = "-") -> str:
    """A signed percentage with one digit, two below 1 %: +1.2 %, -0.04 %, 0 %."""
    if value is None:
        return "?"
    text = f"{value:+.{2 if abs(value) < 0.995 else 1}f}"
    return ("0" if float(text) == 0 else text.replace("-", minus)) + " %"


def _cells(row: Row) -> list[str]:
    low, high = row["ndcg@10_low"], row["ndcg@10_high"]
    cells = [
        row["name"], f"{row['bits']:g}", size_text(row["bytes"]),
        f"{row['ndcg@10']:.4f}", f"{low:.4f}..{high:.4f}", f"{row['hr@10']:.4f}", f"{row['sampled_ndcg@10']:.4f}",
    ]  # fmt: skip
    if row.get("reference"):
        change = row["relative_percent"]
        cells += [percent_text(change), row["reference"], row["verdict"]]
    return cells


HEADER = ("variant", "bits", "size", "NDCG@10", "95% interval", "HR@10", "sampled", "change", "against", "verdict")
LEFT = frozenset({"variant", "against", "verdict"})


def results_table(rows: Sequence[Row]) -> str:
    """The rows of a summary as an aligned plain-text table: NDCG@10 and HR@10 against all items, sampled NDCG@10, and
    the change of NDCG@10 against the reference; the columns of the change are left out where no row has one."""
    cells = [_cells(row) for row in rows]
    width = max(len(row) for row in cells)
    lines = [list(HEADER[:width])] + [row + [""] * (width - len(row)) for row in cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(size) if name in LEFT else cell.rjust(size)
            for cell, size, name in zip(line, widths, HEADER, strict=False)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([aligned[0], "  ".join("-" * size for size in widths), *aligned[1:]]) + "\n"
