"""Categories of the user's own file: every way in which one column holds several, and what cannot be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec.config import DatasetParams
from sasrec.data import categories
from sasrec.data.categories import MISSING, BadCategory, Categories, as_text, per_item
from sasrec.data.collect import Codes
from sasrec.data.readers import READERS
from sasrec.data.sequences import joined, parted
from sasrec.deploy.recommender.model import parted as parted_by_runtime
from sasrec.errors import UserError


def of_rows(
    items: np.ndarray, names: list[str], column: pa.ChunkedArray, separator: str | None = None
) -> tuple[Categories, str]:
    cells = Codes()
    codes = cells.encode(as_text(column))
    return per_item(items, names, codes, cells.ids.to_pylist(), separator)


def read(column: list[Any], separator: str | None = None) -> tuple[list[tuple[str, ...]], str]:
    """Of items 0, 1, ... that have one row each."""
    names = [f"i{i}" for i in range(len(column))]
    found, note = of_rows(np.arange(len(column), dtype=np.int32), names, pa.chunked_array([pa.array(column)]), separator)
    return [found.get(name, ()) for name in names], note


AB = ("A b", "Ü, c")


@pytest.mark.parametrize(
    "cell",
    [
        '["A b", "Ü, c"]',
        "['A b', 'Ü, c']",
        "['A b' 'Ü, c']",  # as numpy writes an array
        "['A b'\n 'Ü, c']",
        '{"A b","Ü, c"}',  # as PostgreSQL does
        '[["A b", "Ü, c"], ["A b"]]',
        "['A b', nan, None, 'Ü, c', 'A b']",
        r'["A b", "\u00dc, c", null]',
    ],
)
def test_a_list_in_a_cell(cell: str) -> None:
    assert read([cell]) == ([AB], "")


def test_lists_of_bare_words_quotes_and_numbers() -> None:
    cells = ["[Action, Children's]", """["Rock 'n' Roll", 'The "Best"']""", "[]", "['x|y; z']", "[3, 4.5]", "[sic] one", '"A"']
    expected = [
        ("Action", "Children's"),
        ("Rock 'n' Roll", 'The "Best"'),
        (),
        ("x|y; z",),
        ("3", "4.5"),
        ("[sic] one",),
        ('"A"',),
    ]
    assert read(cells) == (expected, "")


@pytest.mark.parametrize(
    ("cells", "expected", "by"),
    [
        (["A|B, c", "B, c"], [("A", "B, c"), ("B, c",)], ""),
        (["Home > Pans", "Home > Pots"], [("Home", "Pans"), ("Home", "Pots")], ">"),
        (["A; B", "B;C", "A"], [("A", "B"), ("B", "C"), ("A",)], ";"),
        (["A,B", "B,C", "A"], [("A", "B"), ("B", "C"), ("A",)], ","),
        (["Clothing, Shoes", "Home, Kitchen", "Toys"], [("Clothing, Shoes",), ("Home, Kitchen",), ("Toys",)], ""),
        (["Toys &amp; Games", "Arts &amp; Crafts"], [("Toys &amp; Games",), ("Arts &amp; Crafts",)], ""),
    ],
)
def test_a_separator_is_told_from_what_is_part_of_a_name(cells: list[str], expected: list[tuple[str, ...]], by: str) -> None:
    found, note = read(cells)
    assert found == expected
    assert note == (
        f"categories are split at '{by}'; if that is part of their names, set dataset.category_separator to none" if by else ""
    )


@pytest.mark.parametrize(("separator", "expected"), [("none", ("A|B/C",)), ("/", ("A|B", "C")), ("pipe", ("A", "B/C"))])
def test_a_separator_that_is_given_is_taken(separator: str, expected: tuple[str, ...]) -> None:
    assert read(["A|B/C"], separator) == ([expected], "")


def test_what_stands_for_none_is_none() -> None:
    assert read([*sorted(MISSING), None]) == ([()] * (len(MISSING) + 1), "")
    assert read([1.0, float("nan"), None]) == ([("1",), (), ()], "")


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_the_first_row_that_has_any_counts_and_a_note_says_of_how_many_items_others_differ(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are gone through at a time."""
    monkeypatch.setattr(categories, "CHUNK", rows)
    items = np.array([0, 0, 1, 0, 1, 2], np.int32)
    found, note = of_rows(items, ["a", "b", "c"], pa.chunked_array([[None, "X", "Y"], ["Z", "Y", ""]]))
    assert found == {"a": ("X",), "b": ("Y",)}
    assert note == "1 of 3 items have other categories in other rows; those of the first row count"


NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda s: s.strip() == s), max_size=4)


@given(lists=st.lists(NAMES, min_size=1, max_size=6))
def test_any_name_survives_in_a_list(lists: list[list[str]]) -> None:
    expected = [tuple(dict.fromkeys(name for name in own if name not in MISSING)) for own in lists]
    assert read(pa.array(lists, pa.list_(pa.string())).to_pylist())[0] == expected
    assert read([json.dumps(own) for own in lists])[0] == expected
    assert read([repr(own) for own in lists])[0] == expected
    assert [parted(joined(own)) for own in expected] == expected
    # The exported model reads what is written for it with code of its own.
    assert [parted_by_runtime(joined(own)) for own in expected] == expected


ROWS = [("u", "i", ["A", "B|C"]), ("u", "j", None), ("v", "k", []), ("v", "l", [["A"], ["D", None]])]


def test_lists_of_parquet_and_of_json_lines(tmp_path: Path) -> None:
    file = DatasetParams(name="file")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("user", "item", "category"), row, strict=True))) + "\n" for row in ROWS[:3]))
    assert READERS["jsonl"](path, file, None).categories == {"i": ("A", "B|C")}
    table = pa.table({"user": ["u", "v"], "item": ["i", "l"], "category": [[["A"], ["B|C"]], ROWS[3][2]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert READERS["parquet"](tmp_path / "a.parquet", file, None).categories == {"i": ("A", "B|C"), "l": ("A", "D")}


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("[{'id': 1, 'name': 'A'}]", "neither a list of names"),
        ('[{"id": 1, "name": "A"}]', "an object, not a name"),
        ("['A', 'B", "a list without an end"),
        ("['A'B]", "neither a list of names"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, cell: str, problem: str) -> None:
    with pytest.raises(BadCategory, match=problem):
        read(["A", cell])
    path = tmp_path / "a.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'user,item,category\nu,i,A\nu,j,"{quoted}"\n')
    with pytest.raises(UserError, match=rf"a\.csv, line 3: .*{problem}"):
        READERS["table"](path, DatasetParams(name="file"), None)


@pytest.mark.parametrize("timestamp", [True, False])
@pytest.mark.parametrize(("name", "words"), [("category", "category is not text"), ("item", "item ids are not text")])
def test_bytes_that_are_no_text_are_blamed_on_their_column(name: str, words: str, timestamp: bool, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"user": ["u", "u"], "item": [b"i", b"j"], "category": [b"a", b"b"]}
    columns[name] = [b"a", b"\xff\xfe"]
    pyarrow.parquet.write_table(pa.table(columns | ({"timestamp": [1, 2]} if timestamp else {})), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: the {words} \(Invalid UTF8"):
        READERS["parquet"](tmp_path / "a.parquet", DatasetParams(name="file"), None)


def test_objects_in_parquet_and_lists_beside_names_in_json_lines_are_named_by_their_row(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"user": ["u"], "item": ["i"], "category": [{"id": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: the category is an object"):
        READERS["parquet"](tmp_path / "a.parquet", DatasetParams(name="file"), None)
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": "u", "item": "i", "category": ["A"]}\n{"user": "u", "item": "j", "category": "A"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: 'category' is text, unlike those before"):
        READERS["jsonl"](path, DatasetParams(name="file"), None)
