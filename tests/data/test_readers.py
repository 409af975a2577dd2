"""Every format, written by hand and by hypothesis, read back."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.config import Columns, DatasetParams
from sasrec.data import columnar, delimited, titles
from sasrec.data.readers import READERS
from sasrec.data.table import Table, in_order_of_appearance
from sasrec.errors import UserError

ANY_FILE = DatasetParams(name="file")
Row = tuple[str, str, int, int]


def as_rows(table: Table) -> list[tuple[Any, ...]]:
    """(user, item, rating, timestamp) in the order of the file; what is not there is None."""
    n = len(table)
    ratings = [None] * n if table.ratings is None else table.ratings[:].tolist()
    times = [None] * n if table.timestamps is None else table.timestamps[:].tolist()
    users = [table.user_ids[code] for code in table.users[:].tolist()]
    items = [table.item_ids[code] for code in table.items[:].tolist()]
    return list(zip(users, items, ratings, times, strict=True))


def read(path: Path, format_name: str, params: DatasetParams = ANY_FILE) -> Table:
    return READERS[format_name](path, params, None)


def write(path: Path, rows: list[Row], format_name: str) -> None:
    """`rows` in the given format."""
    if format_name == "parquet":
        columns = dict(zip(("user", "item", "rating", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pa.table(columns), path)
        return
    if format_name in ("jsonl", "amazon-2023-jsonl"):
        user, item = ("user", "item") if format_name == "jsonl" else ("user_id", "parent_asin")
        objects = [{"text": 'a, "b"', user: u, item: i, "rating": float(r), "timestamp": t} for u, i, r, t in rows]
        path.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
        return
    separator = {"movielens-dat": "::", "movielens-tab": "\t"}.get(format_name, ",")
    headers = {
        "movielens-csv": "userId,movieId,rating,timestamp\n",
        "amazon-2023-csv": "user_id,parent_asin,rating,timestamp\n",
        "table": "user,item,rating,timestamp\n",
    }
    order = (1, 0, 2, 3) if format_name == "amazon-2018" else range(4)
    lines = [separator.join(str(row[place]) for place in order) + "\n" for row in rows]
    path.write_text(headers.get(format_name, "") + "".join(lines), encoding="utf-8", newline="")


@pytest.mark.parametrize(
    ("format_name", "line", "other"),
    [
        ("amazon-2014", "B00005N7P0,AH2IFH762VY5U,5.0,1005177600", "amazon-2018"),
        ("amazon-2014", "030700080X,A1B2C3D4E5F6G,5.0,1005177600", "amazon-2018"),
        ("amazon-2018", "A39HTATAQ9V7YF,0205616461,5.0,1369699200", "amazon-2014"),
    ],
)
def test_users_and_items_that_have_changed_places_are_not_taken_for_each_other(
    tmp_path: Path, format_name: str, line: str, other: str
) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text(f"{line}\n" * 2)
    with pytest.raises(UserError, match=f"'{line}' has an item .* set dataset.name to file and dataset.format to {other}"):
        read(path, format_name)
    item, user = sorted(line.split(",")[:2], key=len)
    assert {row[:2] for row in as_rows(read(path, other))} == {(user, item)}


IDS = st.text(st.characters(codec="utf-8", categories=("L", "N"), exclude_characters="\x85"), min_size=1, max_size=8)
ROWS = st.lists(st.tuples(IDS, IDS, st.integers(1, 5), st.integers(-(10**12), 10**15)), min_size=1, max_size=30)


@pytest.mark.parametrize(
    "format_name",
    [
        "movielens-dat",
        "movielens-tab",
        "movielens-csv",
        "amazon-2014",
        "amazon-2018",
        "amazon-2023-csv",
        "amazon-2023-jsonl",
        "table",
        "parquet",
        "jsonl",
    ],
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_what_is_written_is_read_back(tmp_path: Path, format_name: str, rows: list[Row]) -> None:
    path = tmp_path / "data.csv"
    write(path, rows, format_name)
    # A last line without an end and with a much shorter time is taken for a cut file, so all lines end here.
    assert as_rows(read(path, format_name)) == rows


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=5)), min_size=1, max_size=10))
def test_lines_of_users(tmp_path: Path, pairs: list[tuple[str, list[str]]]) -> None:
    flat = [(user, item, None, None) for user, items in pairs for item in items]
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in pairs), encoding="utf-8")
    assert as_rows(read(path, "sequences")) == flat
    path.write_text("".join(f"{user} {item}\n" for user, item, _, _ in flat), encoding="utf-8")
    assert as_rows(read(path, "user-item")) == flat


def test_ids_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('user,item\n007,0\n7,NA\nnull,"x,y"\n"say ""hi""", z\n', encoding="utf-8")
    table = read(path, "table")
    assert table.user_ids == ["007", "7", "null", 'say "hi"']
    assert table.item_ids == ["0", "NA", "x,y", " z"]


@pytest.mark.parametrize(
    ("line", "item"),
    [
        ('u,12" vinyl', '12" vinyl'),
        ('u,the "A" side', 'the "A" side'),
        ('u,"the ""A"" side"', 'the "A" side'),
        ('u,"""A"" side"', '"A" side'),
        ('"u","a,b"', "a,b"),
    ],
)
def test_quotes_are_letters_where_no_field_begins_with_them_and_are_written_twice_elsewhere(
    tmp_path: Path, line: str, item: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"user,item\n{line}\nv,b\n")
    assert as_rows(read(path, "table")) == [("u", item, None, None), ("v", "b", None, None)]


def test_quotes_can_be_letters_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('"user"\titem\nu\t"A" side\nv\t"open\nw\t"a"\n')
    plain = DatasetParams(name="file", quotes=False, columns=Columns(user='"user"'))
    assert as_rows(read(path, "table", plain)) == [
        (user, item, None, None) for user, item in zip("uvw", ('"A" side', '"open', '"a"'), strict=True)
    ]


@given(st.text('a" ,\n', max_size=12), st.lists(st.integers(1, 3), min_size=12, max_size=12))
def test_odd_quotes_are_seen_wherever_a_block_ends(text: str, sizes: list[int]) -> None:
    def odd(*blocks: int) -> bool:
        lines = delimited._Lines(io.BytesIO(text.encode()), ",")
        for size in blocks:
            lines.read(size)
        return lines.odd_quotes

    before, after = (" \n" + text)[1:-1], text[1:]
    expected = any(b not in '\n,"' and q == '"' and a not in '\n,"' for b, q, a in zip(before, text, after, strict=False))
    assert odd(100) == odd(*sizes, 100) == expected


def test_windows_csv_with_bom_crlf_and_extra_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('note;Who;What;When\r\né;u-1;ü;20\r\n"a\r\nb";u-2;ü;10\r\n'.encode("utf-8-sig"))
    columns = Columns(user="Who", item="What", timestamp="When")
    table = read(path, "table", DatasetParams(name="file", columns=columns))
    assert as_rows(table) == [("u-1", "ü", None, 20), ("u-2", "ü", None, 10)]


@pytest.mark.parametrize(
    "text", ["one\ntwo", "one\n\nu,i\n", "nice\ncheap, fast, good", "one, two\nu,i", "u,i,t\r\n u,i,t", "\n"]
)
def test_quoted_text_with_line_ends(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    for name, line in (("user,item,text", "u,i,{}\n"), ("text,user,item", "{},u,i\n"), ("user,text,item", "u,{},i\n")):
        path.write_text(f"{name}\n\n" + line.format(f'"{text}"') * 3 + line.format("none"), newline="")
        assert as_rows(read(path, "table")) == [("u", "i", None, None)] * 4


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_separator_is_found(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(separator.join(row) for row in (["item", "user"], ["i", "u"])), encoding="utf-8")
    assert as_rows(read(path, "table")) == [("u", "i", None, None)]


@pytest.mark.parametrize("given_as", [";", None])
def test_gzip(tmp_path: Path, given_as: str | None) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"user;item;timestamp\na;b;5\n"))
    assert as_rows(read(path, "table", DatasetParams(name="file", separator=given_as))) == [("a", "b", None, 5)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["978300760", "5"], [978300760, 5]),
        (["1602133857705"], [1602133857705]),
        (["1.5", "1.25"], [1_500_000, 1_250_000]),
        (["1600000000.0", "1600000001"], [1600000000, 1600000001]),
        (["1600000000.1234567", "1600000000.1234568"], [1600000000123456700, 1600000000123456800]),
        (["1e-12", "3e-12", "2e-12"], [0, 2, 1]),
        (["2020-01-01", "2020-01-02"], [1577836800000000, 1577923200000000]),
        (["2020-01-01 00:00:01", "2020-01-01T00:00:02"], [1577836801000000, 1577836802000000]),
        (["2020-01-01T00:00:01Z"], [1577836801000000]),
        (["2020-01-01T00:00:01.000000001Z"], [1577836801000000001]),
        (["-3", "+4"], [-3, 4]),
    ],
)
def test_times_keep_their_order(tmp_path: Path, written: list[str], expected: list[int]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"u,i,{time}\n" for time in written), encoding="utf-8")
    table = read(path, "table")
    assert table.timestamps is not None
    assert table.timestamps[:].tolist() == expected


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.floats(0, 2e9), min_size=1, max_size=20))
def test_fractions_of_seconds_are_never_merged(tmp_path: Path, times: list[float]) -> None:
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    csv.write_text("user,item,timestamp\n" + "".join(f"u,i,{time!r}\n" for time in times), encoding="utf-8")
    table = pa.table({"user": ["u"] * len(times), "item": ["i"] * len(times), "timestamp": times})
    pyarrow.parquet.write_table(table, parquet)
    for path, format_name in ((csv, "table"), (parquet, "parquet")):
        read_back = read(path, format_name).timestamps
        assert read_back is not None
        assert np.array_equal(np.unique(read_back[:], return_inverse=True)[1], np.unique(times, return_inverse=True)[1])


def test_parquet_with_integer_ids_dates_and_categories(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([1_000_000_123, 999], pa.timestamp("ns"))
    columns = {"user": pa.array([7, 8]), "item": pa.array([0, 1]), "timestamp": times, "category": ["a|b", None]}
    pyarrow.parquet.write_table(pa.table(columns), path)
    table = read(path, "parquet")
    assert as_rows(table) == [("7", "0", None, 1_000_000_123), ("8", "1", None, 999)]
    assert table.categories == {"0": ("a", "b")}


def test_jsonl_with_numbers_as_ids_and_keys_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": 1, "item": "x", "timestamp": 1.5}\n\n{"item": "y", "timestamp": 2, "user": 2}\n')
    assert as_rows(read(path, "jsonl")) == [("1", "x", None, 1_500_000), ("2", "y", None, 2_000_000)]


def test_category_of_an_item_is_that_of_its_first_row_that_has_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item,category\nu,i,\nu,i,Toys|Games\nv,i,Books\nv,j,\n", encoding="utf-8")
    assert read(path, "table").categories == {"i": ("Toys", "Games")}


def test_codes_are_in_order_of_appearance() -> None:
    codes, ids = in_order_of_appearance(np.array([2, 0, 2, 3], np.int32), ["a", "b", "c", "d"])
    assert codes.tolist() == [0, 1, 0, 2] and ids == ["c", "a", "d"]


def test_titles_and_genres(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_bytes("1::Léon: The :: Cut (1994)::Crime|Drama\n".encode("latin-1"))
    assert titles.read(tmp_path, ["movies.dat"]) == ({"1": "Léon: The :: Cut (1994)"}, {"1": ("Crime", "Drama")})
    (tmp_path / "u.genre").write_text("unknown|0\nAction|1\n\n")
    (tmp_path / "u.item").write_text("1|A|01-Jan-1995||http://x|0|1\n")
    assert titles.read(tmp_path, ["u.item", "u.genre"]) == ({"1": "A"}, {"1": ("Action",)})
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n1,"A, B",Drama\n2,C,(no genres listed)\n')
    assert titles.read(tmp_path, ["movies.csv"]) == ({"1": "A, B", "2": "C"}, {"1": ("Drama",), "2": ()})
    (tmp_path / "movies.dat").write_text("1::A::x\n2;B\n")
    with pytest.raises(UserError, match="line 2"):
        titles.read(tmp_path, ["movies.dat"])


@pytest.mark.parametrize("user", ['"u"', "1"])
def test_jsonl_ids_that_look_like_times_stay_text(tmp_path: Path, user: str) -> None:
    path = tmp_path / "a.jsonl"
    items = ["2020-01-01", "2020-01-01 00:00:00", "2020-01-01T00:00:00Z", "2020-01-02"]
    path.write_text("".join(f'{{"user": {user}, "item": "{item}", "timestamp": "{item}"}}\n' for item in items[::3]))
    assert read(path, "jsonl").item_ids == items[::3]
    path.write_text("".join(f'{{"user": {user}, "item": "{item}"}}\n' for item in items))
    assert read(path, "jsonl").item_ids == items


def test_jsonl_keys_that_are_not_wanted_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": 1, "item": "a", "meta": 1}\n{"user": 2, "item": "b", "meta": "x"}\n')
    assert as_rows(read(path, "jsonl")) == [("1", "a", None, None), ("2", "b", None, None)]


def test_jsonl_with_escaped_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"caf\\u00e9": 1, "item": 2}\n')
    assert as_rows(read(path, "jsonl", DatasetParams(name="file", columns=Columns(user="café")))) == [("1", "2", None, None)]


def test_jsonl_category_that_comes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "SEEN", 2)
    path = tmp_path / "a.jsonl"
    first = '{"user": 1, "item": "a"}\n{"user": 1, "item": "a", "category": []}\n{"user": 1, "item": "a", "category": null}\n'
    path.write_text(first + '{"user": 1, "item": "a", "category": [["x"]]}\n')
    assert read(path, "jsonl").categories == {"a": ("x",)}
    path.write_text(first)
    assert read(path, "jsonl").categories == {}
    path.write_text(first + '{"user": 1, "item": "a", "category": [1]}\n{"user": 1, "item": "b", "category": [1.5]}\n')
    assert read(path, "jsonl").categories == {"a": ("1.0",), "b": ("1.5",)}
    first = first.replace("[]", "null")
    path.write_text(first + '{"user": 1, "item": "a", "category": 1}\n{"user": 1, "item": "b", "category": 1.5}\n')
    assert read(path, "jsonl").categories == {"a": ("1",), "b": ("1.5",)}
