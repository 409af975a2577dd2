"""The table of what was timed, to the letter; and which clock it shows."""

import csv
from pathlib import Path

import pytest

from sasrec.report.speed import COLUMNS, draw, groups, read, speed

COMMON = {
    "data": "toy", "setting": "s", "rounds": "3", "users": "1200", "items": "50", "interactions": "9000", "bits": "8",
    "shape": "length 50", "cpu": "Some CPU", "flags": "avx2", "versions": "torch 1",
}  # fmt: skip


def row(what: str, variant: str, measure: str, unit: str, values: str, of_plain: str = "", of_full: str = "") -> dict[str, str]:
    """values and ratios: median, first and third quartile, separated by blanks."""
    made = COMMON | {"threads": "1", "what": what, "variant": variant, "measure": measure, "unit": unit}
    for name, given in (("", values), ("of_plain", of_plain), ("of_full", of_full)):
        columns = (name, f"{name}_q1", f"{name}_q3") if name else ("median", "q1", "q3")
        made |= dict(zip(columns, given.split(), strict=False))
    return made


ROWS = [
    row("step", "plain", "wall", "s", "9 9 9"),
    row("step", "float32", "wall", "s", "9 9 9", "1 1 1"),
    row("step", "plain", "cpu", "s", "0.06 0.055 0.0652"),
    row("step", "float32", "cpu", "s", "0.03 0.029 0.031", "0.5 0.48 0.512"),
    row("step", "lsq", "cpu", "s", "0.036 0.035 0.037", "0.6 0.6 0.6", "1.2 1.19 1.215"),
    row("epoch", "plain", "cpu", "s", "120.4 119 121"),
    row("epoch", "float32", "cpu", "s", "60.25 60 61", "0.5 0.5 0.5"),
    row("epoch", "bfloat16", "cpu", "s", "50 50 50", "0.42 0.42 0.42", "0.83 0.83 0.83"),
    row("quantize", "ptq", "cpu", "s", "0.4 0.4 0.4"),
    row("train process", "plain", "peak", "MiB", "500 499.6 501"),
    row("train process", "float32", "peak", "MiB", "400 400 400", "0.8 0.8 0.8"),
]

EXPECTED = """\
| data, setting | what | plain | here | here / plain |
|---|---|---:|---:|---:|
| `toy`, s | training step | 60 ms (55 to 65.2) | 30 ms (29 to 31) | 0.50 (0.48 to 0.51) |
| `toy`, s | training epoch | 120 s (119 to 121) | 60.2 s (60 to 61) | 0.50 (0.50 to 0.50) |
| `toy`, s | training epoch, bfloat16 products | 120 s (119 to 121) | 50 s (50 to 50) | 0.42 (0.42 to 0.42) |
| `toy`, s | peak memory of training | 500 MiB (500 to 501) | 400 MiB (400 to 400) | 0.80 (0.80 to 0.80) |

| data, setting | method | step | step / full precision | epoch / full precision | without training |
|---|---|---:|---:|---:|---:|
| `toy`, s | lsq | 36 ms (35 to 37) | 1.20 (1.19 to 1.22) |  |  |
| `toy`, s | ptq |  |  |  | 400 ms (400 to 400) |

`toy`, s: 1,200 users, 50 items, 9,000 interactions; length 50; methods at 8 bits. 1 thread of Some CPU (avx2); torch 1.
"""


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_table(tmp_path: Path) -> None:
    assert speed(written(tmp_path / "speed.csv", ROWS)) == EXPECTED


def test_with_more_threads_it_shows_the_wall(tmp_path: Path) -> None:
    path = written(tmp_path / "speed.csv", [own | {"threads": "2"} for own in ROWS])
    assert "| training step | 9 s (9 to 9) | 9 s (9 to 9) | 1.00 (1.00 to 1.00) |" in speed(path)
    assert "2 threads of Some CPU" in speed(path)


@pytest.mark.parametrize("shown", [slice(None), slice(2, 3)])  # all, or a group with nothing to compare
def test_a_row_of_panels_for_each_group(shown: slice, tmp_path: Path) -> None:
    rows = read(written(tmp_path / "speed.csv", [*ROWS, *(own | {"setting": "p"} for own in ROWS[shown])]))
    assert list(groups(rows)) == [("toy", "s", "1"), ("toy", "p", "1")]
    figure = draw(rows)
    assert len(figure.axes) == 4
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "training step", "training epoch", "peak memory of training",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[1].texts] == ["1.20"]
