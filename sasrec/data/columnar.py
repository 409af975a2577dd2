"""Parquet files and JSON lines, read by pyarrow."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from sasrec.config import Columns
from sasrec.data.categories import BadCategory, as_text
from sasrec.data.collect import Collector, groups
from sasrec.data.columns import Found, find
from sasrec.data.explain import LARGEST, NO_NEED, PROBLEMS, bad_line, open_text, quote, time_kind
from sasrec.data.spool import CHUNK
from sasrec.data.table import Numbers, Table, to_numpy
from sasrec.errors import UserError

JSON_BLOCK = 32 << 20  # bytes; one line must fit
BATCH = 1 << 18  # rows decoded at a time
SEEN = 10_000  # lines of JSON whose values tell the types, if these are not the usual ones
JSON_TYPES = {
    "user": pa.string(),
    "item": pa.string(),
    "timestamp": pa.int64(),
    "rating": pa.float64(),
    "category": pa.string(),
}
MIXED = " of different kinds of values"
KINDS = {str: "text", int: "a number", float: "a number", dict: "an object", bool: "a truth value"}


def read_parquet(path: Path, columns: Columns, folder: Path | None = None, category_separator: str | None = None) -> Table:
    """Read a parquet file with named columns. Raises UserError naming the column or the first bad row. folder: where the
    columns go, in temporary files; by default where the system keeps them."""
    import pyarrow.parquet  # here: no other format needs it

    try:
        # Not buffered ahead: one row group's columns are enough memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            wanted = {what: names[position] for what, position in find(columns, names, path).present()}
            batches = file.iter_batches(BATCH, columns=list(wanted.values()))
            return _table(path, batches, wanted, "row", folder, category_separator)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not a readable parquet file ({' '.join(str(error).split())[:200]})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); get it again") from None


def read_jsonl(
    path: Path, columns: Columns, own: bool = True, folder: Path | None = None, category_separator: str | None = None
) -> Table:
    """Read one JSON object per line, plain or .gz, with named keys. Raises UserError naming the first bad line. folder: as for
    parquet."""
    import pyarrow.json

    found, names = _keys(path, columns, own)
    wanted = {what: names[position] for what, position in found.present()}
    optional = {what: getattr(columns, what) for what in ("timestamp", "rating", "category")}
    # Objects need not have the same keys: what the first one lacks is looked for in all of them.
    late = {what: name for what, name in optional.items() if what not in wanted and name is not None}
    if "category" in late:  # which any object may lack
        wanted["category"] = late.pop("category")
    compression = "gzip" if path.name.lower().endswith(".gz") else None
    size = pyarrow.json.ReadOptions(block_size=JSON_BLOCK)
    reason = ""
    # Ids may be written as numbers and times as fractions or text: the common case first, the types of the file then.
    for lines in (0, SEEN, None):
        types = _types(path, wanted | late, lines)
        schema = pa.schema([(name, types[what]) for what, name in (wanted | late).items()])
        # Not inferred: that takes text for times.
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            with pa.input_stream(str(path), compression=compression) as stream:
                reader = pyarrow.json.open_json(stream, size, options)
                return _table(path, reader, wanted, "line", folder, category_separator, late)
        except pa.ArrowInvalid as error:
            reason = str(error)
        except OSError as error:
            if error.errno is not None:
                raise
            reason = str(error)
        except _BadRow:
            break
    raise _explain_jsonl(path, wanted, late, reason)


def _types(path: Path, wanted: Mapping[str, str], lines: int | None) -> dict[str, pa.DataType]:
    """The type of each column by its first value in so many lines. None: in all lines, and every number may be a fraction."""
    types: dict[str, pa.DataType] = {}
    empty: dict[str, pa.DataType] = {}  # of lists that have had no elements so far
    try:
        with open_text(path) as file:
            for line in itertools.islice(file, lines):
                if len(types) == len(wanted):
                    break
                # Parsed only where it may tell: a key that no line has would cost the whole file. Escaped keys are found, too.
                if "\\" not in line and not any(name in line for what, name in wanted.items() if what not in types):
                    continue
                values = json.loads(line)
                for what, name in wanted.items():
                    if what not in types and values.get(name) is not None:
                        kind = pa.infer_type([values[name]])
                        empty[what] = _typed(kind, pa.types.is_null, pa.string())
                        if empty[what] == kind:
                            types[what] = kind
    except (ValueError, EOFError, OverflowError, AttributeError):
        pass  # the slow pass names the line
    types = empty | types
    for what, kind in types.items():
        if what != "category" and pa.types.is_nested(kind):
            types[what] = JSON_TYPES[what]
        elif what in ("user", "item"):
            types[what] = kind if pa.types.is_integer(kind) else pa.string()
        elif what == "rating" or lines is None:
            types[what] = _typed(kind, pa.types.is_integer, pa.float64())
    return JSON_TYPES | types


def _typed(kind: pa.DataType, is_old: Callable[[pa.DataType], bool], new: pa.DataType) -> pa.DataType:
    """The type with another one in place of those that `is_old` names, which may be that of a list's elements."""
    if pa.types.is_list(kind):
        return pa.list_(_typed(kind.value_type, is_old, new))
    return new if is_old(kind) else kind


class _BadRow(Exception):
    """A value is missing or is not of its kind; the slow pass names it."""


def _table(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    wanted: Mapping[str, str],
    unit: str,
    folder: Path | None,
    category_separator: str | None,
    late: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The table of the columns `wanted`, named by what they hold; `unit`: what a row is called in messages. late: columns that
    the first row lacks, so that every other has to lack them."""
    found = Collector(folder)

    def bad(what: str, row: int | None, problem: str) -> Exception:
        if unit == "line":
            return _BadRow()
        place = "" if row is None else f", row {row + 1}"
        return UserError(f"{path}{place}: the {what} {problem}; correct or remove the row and run again")

    for group in groups(batches, found.distinct):
        for what, name in late.items():
            if group.column(name).null_count < len(group):
                raise bad(what, 0, "is missing")
        at = {what: group.column(name) for what, name in wanted.items()}
        for what in ("user", "item"):
            if at[what].null_count:
                raise bad(what, _first(_missing(at[what]), len(found)), "id is missing")
            try:
                at[what] = _ids(path, what, at[what])
            except pa.ArrowInvalid as error:
                raise bad(what, None, f"ids are not text ({error})") from None
        ratings = None
        if "rating" in at:
            ratings = _ratings(at["rating"], len(found), bad)
        if "category" in at:
            try:
                at["category"] = as_text(at["category"])
            except (ValueError, pa.ArrowInvalid) as error:
                raise bad("category", None, f"is not text ({error})") from None
        begin = len(found)
        try:
            found.add(at["user"], at["item"], at.get("timestamp"), ratings, at.get("category"))
        except (ValueError, pa.ArrowInvalid) as error:
            row = _first(_missing(at["timestamp"]), begin)
            raise bad("timestamp", row, f"is missing or not a time ({error})") from None
    if not len(found):
        raise UserError(f"{path} is empty: it has no interactions; give a file with at least one")
    try:
        table = found.table(category_separator)
    except BadCategory as error:
        # Lines that are blank have no row.
        place = f"row {error.row + 1}" if unit == "row" else f"object {error.row + 1}"
        raise UserError(f"{path}, {place}: {error.problem}: {quote(error.cell)}; correct it and run again") from None
    except (ValueError, pa.ArrowInvalid) as error:
        row = _first(_missing(pa.chunked_array(found.times)), 0)
        raise bad("timestamp", row, f"is missing or not a time ({error})") from None
    for what, codes, ids in (("user", table.users, table.user_ids), ("item", table.items, table.item_ids)):
        if "" in ids:
            raise bad(what, _where(codes, ids.index("")), "id is empty")
    return table


def _ids(path: Path, what: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text, integers, or dictionaries with the values by first appearance."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        raise UserError(f"{path}: the {what} ids are lists; write a row for each interaction, as `explode` of pandas does")
    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        kind = "stored as decimals" if pa.types.is_floating(column.type) else "truth values"
        raise UserError(f"{path}: the {what} ids are {kind} ({column.type}); write them as text or integers")
    return column if pa.types.is_integer(column.type) else column.cast(pa.string())


def _ratings(column: pa.ChunkedArray, begin: int, bad: Callable[[str, int | None, str], Exception]) -> np.ndarray:
    """float32 (rows,); begin: the rows before."""
    try:
        values = to_numpy(column.cast(pa.float64()).fill_null(float("nan")))
    except pa.ArrowInvalid as error:
        advice = "if this column is none of numbers, set dataset.columns.rating to null"
        raise bad("rating", None, f"is not a number ({error}; {advice})") from None
    if not np.isfinite(values).all():
        raise bad("rating", _first(~np.isfinite(values), begin), f"is missing or not a finite number; {NO_NEED}")
    if (large := np.abs(values) > LARGEST).any():
        raise bad("rating", _first(large, begin), "is too large, beyond 3.4e38")
    return values.astype(np.float32)


def _first(wrong: np.ndarray, begin: int) -> int | None:
    """The first row that is wrong; `begin`: the rows before."""
    return begin + int(np.argmax(wrong)) if wrong.any() else None


def _where(codes: Numbers, code: int) -> int | None:
    for begin in range(0, len(codes), CHUNK):
        if (row := _first(codes[begin : begin + CHUNK] == code, begin)) is not None:
            return row
    return None


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    """bool (rows,)"""
    return to_numpy(column.is_null().cast(pa.int8())).astype(bool)


def _keys(path: Path, columns: Columns, own: bool) -> tuple[Found, list[str]]:
    """Where the wanted keys are among those of the first line."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if line.lstrip().startswith("["):
                        raise UserError(
                            f"{path}, line {number}: a JSON array begins here; write its objects one a line, without brackets "
                            f"around them or commas between: {quote(line)}"
                        )
                    first = json.loads(line)
                    if not isinstance(first, dict):
                        raise bad_line(path, number, "not a JSON object", line)
                    return find(columns, list(first), path, own), list(first)
    except ValueError as error:
        raise bad_line(path, number, f"not JSON ({error})", line) from None
    except EOFError:
        raise UserError(f"{path} is not a whole gzip file; get it again") from None
    raise UserError(f"{path} is empty: it has no interactions; give a file with at least one line of data")


def _explain_jsonl(path: Path, wanted: Mapping[str, str], late: Mapping[str, str], reason: str) -> UserError:
    """The first line that is not an object with the wanted keys and kinds of values. late: keys that the first object lacks."""
    kinds: dict[str, str] = {}
    first: tuple[int, str] | None = None
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    values: Any = json.loads(line)
                except ValueError as error:
                    return bad_line(path, number, f"not JSON ({error})", line)
                if not isinstance(values, dict):
                    return bad_line(path, number, "not a JSON object", line)
                first = first or (number, line)
                for name in late.values():
                    if values.get(name) is not None:
                        return bad_line(path, first[0], f"'{name}' is missing, but line {number} has it", first[1])
                for what, name in wanted.items():
                    if problem := _value_problem(what, name, values.get(name), kinds):
                        return bad_line(path, number, problem, line)
    except EOFError:
        return UserError(f"{path} is not a whole gzip file; get it again")
    return UserError(f"{path} cannot be read: {' '.join(reason.split())[:300]}")


def _value_problem(what: str, name: str, value: Any, kinds: dict[str, str]) -> str | None:
    """What is wrong with a value; `kinds`: of the first value of each column so far, added to."""
    if what == "category":
        if value is None or not _kind(value):
            return None
    elif value is None or isinstance(value, bool | list | dict):
        return f"'{name}' is missing or is not a single value"
    elif problem := PROBLEMS[what](str(value)):
        return problem.format(what=what)
    elif what in ("user", "item") and isinstance(value, float):
        return f"'{name}' is a fraction; write ids as text or integers"
    elif what in ("user", "item") and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"'{name}' is too large a number; write ids as text"
    kind = _kind(value)
    if kind.endswith(MIXED):
        return f"'{name}' is {kind}"
    if what == "timestamp" and isinstance(value, str):
        kind = f"{time_kind(value)} as text"
    if kinds.setdefault(what, kind) != kind:
        return f"'{name}' is {kind}, unlike those before"
    return None


def _kind(value: Any) -> str:
    """What to call a value; nothing for a list without elements, which fits any."""
    if not isinstance(value, list):
        return KINDS.get(type(value), "a value")
    inner = {kind for element in value if element is not None and (kind := _kind(element))}
    return "a list" + (f" with {inner.pop()}" if len(inner) == 1 else MIXED) if inner else ""


def amazon_2023(columns: Columns) -> Columns:
    """The names in Amazon Reviews 2023; products that differ in size or colour share `parent_asin`."""
    return dataclasses.replace(
        columns, user="user_id", item="parent_asin", timestamp="timestamp", rating="rating", category=None
    )
