"""Rows handled in parts, in temporary files: the same bytes as all at once, and nothing that stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.config import DatasetParams, PrepareParams
from sasrec.data import candidates, collect, columnar, delimited, interactions, split, spool, store
from sasrec.data.sequences import user_ranges
from sasrec.data.spool import Column
from sasrec.data.store import prepare
from sasrec.errors import UserError
from sasrec.files import write_json
from tests.conftest import ROOT

Row = tuple[str, str, int, float, str]
# Ties, repeated pairs and exact copies are likely; ids are text, some of it digits, some of it not ASCII.
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u", "v", "0", "007", "é"]),
        st.sampled_from(["a", "b", "c", "1", "01", "ñ"]),
        st.sampled_from([0, 1, 2, 3, 10**9, 2**40]),
        st.sampled_from([1.0, 2.5, 5.0]),
        st.sampled_from(["", "x", "x|y"]),
    ),
    min_size=20,
    max_size=60,
)
PARAMS = st.fixed_dictionaries(
    {
        "min_user": st.integers(1, 3),
        "min_item": st.integers(1, 3),
        "min_rating": st.sampled_from([None, 2.0]),
        "filter": st.sampled_from(["once", "k_core"]),
        "duplicates": st.sampled_from(["keep", "first", "last"]),
        "split": st.sampled_from(["leave_one_out", "temporal"]),
        "target": st.sampled_from(["last", "first"]),
        "candidates": st.sampled_from([1, 3]),
    }
)


def small_parts(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Every number of rows at a time that does not change what is drawn becomes `rows`."""
    monkeypatch.setattr(interactions, "ROWS", rows)
    monkeypatch.setattr(candidates, "ROWS", rows)
    monkeypatch.setattr(collect, "GROUP", rows)
    monkeypatch.setattr(columnar, "BATCH", rows)
    monkeypatch.setattr(delimited, "BLOCK", 40 * rows)
    for module in (spool, interactions, split, store, delimited, columnar):
        monkeypatch.setattr(module, "CHUNK", rows)


def write(path: Path, rows: list[Row], times: bool, ratings: bool) -> None:
    names = ["user", "item", *["timestamp"] * times, *["rating"] * ratings, "category"]
    kept: list[list[Any]] = [[row[0], row[1], *[row[2]] * times, *[row[3]] * ratings, row[4]] for row in rows]
    if path.suffix == ".parquet":
        columns = {name: [row[i] for row in kept] for i, name in enumerate(names)}
        pa.parquet.write_table(pa.table(columns), path, row_group_size=7)
    else:
        lines = [names, *kept]
        path.write_text("".join(",".join(str(value) for value in line) + "\n" for line in lines), encoding="utf-8")


def allowed(params: dict[str, Any], times: bool, ratings: bool) -> dict[str, Any]:
    """Most of the tables are to be prepared, not refused."""
    return params | ({} if times else {"split": "leave_one_out"}) | ({} if ratings else {"min_rating": None})


def prepared(folder: Path, file: str, params: dict[str, Any]) -> dict[str, bytes] | str:
    """The files of the store, or the error. Nothing else may be left in the folder."""
    raw, out = folder / "raw", folder / "prepared"
    kind = "parquet" if file.endswith(".parquet") else "table"
    source = {"name": "file", "format": kind, "file": file, "extras": [], "original": file, "sha256": "0", "local": True}
    write_json(raw / "source.json", source | {"times": "comparable"})
    try:
        prepare(raw, DatasetParams(name="file"), PrepareParams(**params), out)
    except UserError as error:
        return str(error)
    finally:
        assert {path.name for path in folder.iterdir()} <= {"raw", "prepared"}
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, params=PARAMS, times=st.booleans(), ratings=st.booleans(), parquet=st.booleans(), size=st.integers(1, 9))
def test_parts_of_any_size_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    params: dict[str, Any],
    times: bool,
    ratings: bool,
    parquet: bool,
    size: int,
) -> None:
    """And the same error where there is one."""
    folder = tmp_path_factory.mktemp("parts")
    params = allowed(params, times, ratings)
    file = "rows.parquet" if parquet else "rows.csv"
    (folder / "raw").mkdir()
    write(folder / "raw" / file, rows, times, ratings)
    whole = prepared(folder, file, params)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_parts(monkeypatch, size)
        assert prepared(folder, file, params) == whole


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_bad_line_far_into_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    small_parts(monkeypatch, size)
    (tmp_path / "raw").mkdir()
    lines = [f"u{i % 4},i{i % 5},{i},3" for i in range(20)]
    for damaged, words in (("u,i,7", "expected 4 fields"), ("u,,7,3", "item id is empty"), ("u,i,7,x", "rating is not")):
        text = "\n".join(["user,item,timestamp,rating", *lines[:13], damaged, *lines[13:]])
        (tmp_path / "raw" / "rows.csv").write_text(text + "\n")
        message = prepared(tmp_path, "rows.csv", {})
        assert isinstance(message, str) and "rows.csv, line 15: " in message and words in message


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_bad_row_far_into_a_parquet_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    small_parts(monkeypatch, size)
    (tmp_path / "raw").mkdir()
    for what, value in (("item", None), ("user", ""), ("timestamp", None), ("rating", float("inf"))):
        columns: dict[str, list[Any]] = {
            "user": [f"u{i % 4}" for i in range(20)],
            "item": [f"i{i % 5}" for i in range(20)],
            "timestamp": list(range(20)),
            "rating": [3.0] * 20,
        }
        columns[what][13] = value
        pa.parquet.write_table(pa.table(columns), tmp_path / "raw" / "rows.parquet", row_group_size=6)
        message = prepared(tmp_path, "rows.parquet", {})
        assert isinstance(message, str) and f"row 14: the {what} " in message


def test_a_column_reads_as_an_array_does(tmp_path: Path) -> None:
    column = Column(np.int32, tmp_path)
    column.append(np.arange(5))
    column.append(np.array([9, 8]))
    column.write(1, np.array([70]))
    expected = np.array([0, 70, 2, 3, 4, 9, 8], np.int32)
    assert len(column) == 7 and column[:].dtype == np.int32
    for rows in (slice(None), slice(2, 4), slice(5, 100), slice(6, 2), np.array([6, 0, 0]), np.zeros(0, np.int64)):
        assert column[rows].tolist() == expected[rows].tolist()
    assert np.concatenate(list(column.chunks())).tolist() == expected.tolist()
    assert not list(tmp_path.iterdir()), "the file has no name"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_ranges_cover_all_users_and_hold_no_more_rows_than_asked(lengths: list[int], rows: int) -> None:
    offsets = np.cumsum([0, *lengths])
    ranges = list(user_ranges(offsets, rows))
    assert [user for begin, end in ranges for user in range(begin, end)] == list(range(len(lengths)))
    assert all(end == begin + 1 or offsets[end] - offsets[begin] <= rows for begin, end in ranges)


def test_a_killed_process_leaves_no_temporary_columns(tmp_path: Path) -> None:
    code = (
        "import sys, time; import numpy as np; from pathlib import Path; from sasrec.data.spool import Column\n"
        f"column = Column(np.int64, Path({str(tmp_path)!r})); column.append(np.arange(1000))\n"
        "print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.iterdir())
