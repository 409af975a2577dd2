"""python -m stages.catalogues: what it measures, keeps and refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest

from sasrec.errors import UserError
from sasrec.measurements import read_rows
from stages import catalogues as command


def test_a_row_has_every_column_measured_in_processes_of_their_own() -> None:
    row = command.row_of(300, 8, 6, 3)
    assert set(row) == set(command.COLUMNS)
    assert (row["items"], row["hidden"], row["validation_users"]) == ("300", "8", "6")
    measured = [name for name in row if name.endswith(("_ms", "_s", "_mb"))]
    assert len(measured) == 6 and all(float(row[name]) > 0 for name in measured if name.endswith("_ms"))  # of six users 0.0 s
    assert all(float(row[name]) > 50 for name in measured if name.endswith("_mb"))  # Python and torch alone take more


def test_what_a_process_says_when_it_fails_is_passed_on() -> None:
    with pytest.raises(UserError, match="steps of 300 items, in a process of its own: .*hidden"):
        command.row_of(300, -8, 6, 3)


def test_rows_of_the_same_size_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TABLE", tmp_path / "catalogues.csv")
    times = iter("123")

    def row_of(items: int, hidden: int, *rest: Any) -> dict[str, str]:
        made = dict.fromkeys(command.COLUMNS, "0")
        return made | {"items": str(items), "hidden": str(hidden), "dense_step_ms": next(times)}

    monkeypatch.setattr(command, "row_of", row_of)
    for arguments in (["200", "100"], ["200"]):
        monkeypatch.setattr(sys, "argv", ["catalogues", *arguments])
        command.main()
    rows = read_rows(command.TABLE, command.COLUMNS)
    assert [(row["items"], row["dense_step_ms"]) for row in rows] == [("100", "2"), ("200", "3")]


@pytest.mark.parametrize("arguments", [["0"], ["--hidden", "0"], ["--rounds", "2"]])
def test_sizes_that_cannot_be_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["catalogues", *arguments])
    with pytest.raises(SystemExit, match="start at 1, and --rounds at 3"):
        command.main()
