"""Tables of measurements: a later one replaces its own rows, and nothing else."""

from pathlib import Path

import pytest

from sasrec.errors import UserError
from sasrec.measurements import read_rows, replace_rows

COLUMNS = ("machine", "items", "ms")


def table(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_rows_that_agree_in_the_keys_are_replaced_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    first = [{"machine": "a", "items": "10", "ms": "1.5"}, {"machine": "b", "items": "9", "ms": "2"}]
    replace_rows(path, first, ("machine", "items"), COLUMNS)
    assert table(path) == ["machine,items,ms", "a,10,1.5", "b,9,2"]
    found = [{"machine": "b", "items": "10", "ms": "4"}, {"machine": "a", "items": "10", "ms": "3"}]
    replace_rows(path, found, ("machine", "items"), COLUMNS)
    assert table(path) == ["machine,items,ms", "a,10,3", "b,9,2", "b,10,4"]


def test_rows_are_sorted_by_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "scale.csv"
    for items in ("10", "9", "100"):
        replace_rows(path, [{"items": items, "ms": "1"}], ("items",), COLUMNS, order=lambda row: int(row["items"]))
    assert table(path) == ["machine,items,ms", ",9,1", ",10,1", ",100,1"]
    assert [row["machine"] for row in read_rows(path, COLUMNS)] == ["", "", ""]


def test_a_table_of_other_columns_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    path.write_text("machine,ms\na,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"speed\.csv has other columns than this command writes; delete it and measure again"):
        replace_rows(path, [], ("machine",), COLUMNS)
    assert table(path) == ["machine,ms", "a,1"]
