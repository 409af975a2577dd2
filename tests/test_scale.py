"""python -m stages.scale: what it writes, what it refuses, and the table that the documents show."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from sasrec.errors import UserError
from sasrec.measurements import as_csv
from sasrec.report.scale import scale_table, slopes
from stages import scale as command


def test_rows_are_measured_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    table = tmp_path / "scale.csv"
    monkeypatch.setattr(command, "TABLE", table)
    kept = dict.fromkeys(command.COLUMNS, "1") | {"rows": "20000", "users": "2", "cpu": "one"}
    table.write_text(as_csv([kept | {"rows": "10000"}, kept], command.COLUMNS))
    monkeypatch.setattr(sys, "argv", ["scale", "10000", "--folder", str(tmp_path)])
    command.main()
    first, second = csv.DictReader(table.read_text().splitlines())
    assert second == kept
    assert (first["rows"], first["users"]) == ("10000", "99") and 300 < int(first["items"]) < 1000
    assert float(first["cpu_seconds"]) > 0 and float(first["peak_mb"]) > 30 and int(first["prepared_bytes"]) > 20 * 9_000
    assert float(first["peak_mb"]) < 200, "not the memory of this process"
    assert {path.name for path in tmp_path.iterdir()} == {"scale.csv", "scale.png"}, "made files are removed"


def test_the_same_rows_are_made_each_time(tmp_path: Path) -> None:
    for name in ("one.csv", "other.csv"):
        command.write(tmp_path / name, 2000)
    one, other = ((tmp_path / name).read_bytes() for name in ("one.csv", "other.csv"))
    assert one == other and one.count(b"\n") == 2001


def test_too_few_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", "10"])
    with pytest.raises(SystemExit, match="starts at 10000"):
        command.main()


def test_the_table_compares_with_linear(tmp_path: Path) -> None:
    rows = [
        dict.fromkeys(command.COLUMNS, "7") | {"rows": str(n), "cpu_seconds": seconds}
        for n, seconds in ((1000, "2"), (10_000, "10"), (20_000, "26"))
    ]
    assert slopes(rows, "cpu_seconds") == pytest.approx([0.5, 1.3])
    (tmp_path / "scale.csv").write_text(as_csv(rows, command.COLUMNS))
    text = scale_table(tmp_path / "scale.csv", tmp_path / "README.md")
    assert text.startswith("![") and "(scale.png)" in text
    assert "| 20,000 | 7 | 7 | 0 | 26.0 | 7.0 | 1.30 | 7 | 0 |" in text
    with pytest.raises(UserError, match="stages.scale makes it"):
        scale_table(tmp_path / "none.csv", tmp_path / "README.md")
