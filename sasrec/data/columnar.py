"""Parquet files and JSON lines, read by pyarrow."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sasrec.config import Columns
from sasrec.data.categories import BadCategory, Categories, per_item
from sasrec.data.columns import Found, find
from sasrec.data.explain import bad_line, open_text, quote
from sasrec.data.table import Table, encode, to_numpy
from sasrec.data.timestamps import to_integers
from sasrec.errors import UserError

JSON_BLOCK = 32 << 20  # bytes; one line must fit
KINDS = {list: "a list", str: "text", int: "a number", float: "a number", dict: "an object", bool: "a truth value"}


def read_parquet(path: Path, columns: Columns, category_separator: str | None = None) -> Table:
    """Read a parquet file with named columns. Raises UserError naming the column or the first bad row."""
    import pyarrow.parquet  # here: no other format needs it

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        found = find(columns, names, path)
        parsed = file.read([names[position] for _, position in found.present()])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not a readable parquet file ({' '.join(str(error).split())[:200]})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); get it again") from None
    return _table(path, {what: parsed.column(names[position]) for what, position in found.present()}, "row", category_separator)


def read_jsonl(path: Path, columns: Columns, own: bool = True, category_separator: str | None = None) -> Table:
    """Read one JSON object per line, plain or .gz, with named keys. Raises UserError naming the first bad line."""
    import pyarrow.json

    found, names = _keys(path, columns, own)
    wanted = {what: names[position] for what, position in found.present()}
    kinds = {"timestamp": pa.int64(), "rating": pa.float64()}
    reason = ""
    # Ids may be written as numbers and times as fractions or text: the common case first, the types of the file then.
    for schema in (pa.schema([(name, kinds.get(what, pa.string())) for what, name in wanted.items()]), None):
        options = pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="ignore" if schema is not None else "infer"
        )
        compression = "gzip" if path.name.lower().endswith(".gz") else None
        try:
            with pa.input_stream(str(path), compression=compression) as stream:
                parsed = pyarrow.json.read_json(stream, pyarrow.json.ReadOptions(block_size=JSON_BLOCK), options)
            return _table(path, {what: parsed.column(name) for what, name in wanted.items()}, "line", category_separator)
        except (pa.ArrowInvalid, KeyError) as error:
            reason = str(error)
        except OSError as error:
            if error.errno is not None:
                raise
            reason = str(error)
        except _BadRow:
            break
    raise _explain_jsonl(path, wanted, reason)


class _BadRow(Exception):
    """A value is missing or is not of its kind; the slow pass names it."""


def _table(path: Path, at: Mapping[str, pa.ChunkedArray], unit: str, category_separator: str | None) -> Table:
    """The table of the columns `at`; `unit`: what a row is called in messages."""

    def bad(what: str, wrong: np.ndarray | None, problem: str) -> Exception:
        if unit == "line":
            return _BadRow()
        place = f", row {int(np.flatnonzero(wrong)[0]) + 1}" if wrong is not None and wrong.any() else ""
        return UserError(f"{path}{place}: the {what} {problem}; correct or remove the row and run again")

    if not len(at["user"]):
        raise UserError(f"{path} is empty: it has no interactions; give a file with at least one")
    coded = {}
    for what in ("user", "item"):
        column = at[what]
        if column.null_count:
            raise bad(what, _missing(column), "id is missing")
        if not (pa.types.is_dictionary(column.type) and pa.types.is_string(column.type.value_type)):
            if pa.types.is_floating(column.type):
                raise UserError(f"{path}: the {what} ids are fractions ({column.type}); write them as text or integers")
            column = column.cast(pa.string())
        codes, ids = encode(column)
        if "" in ids:
            raise bad(what, codes == ids.index(""), "id is empty")
        coded[what] = codes, ids
    timestamps = None
    if "timestamp" in at:
        missing = _missing(at["timestamp"])
        try:
            timestamps = to_integers(at["timestamp"])
        except (ValueError, pa.ArrowInvalid) as error:
            raise bad("timestamp", missing, f"is missing or not a time ({error})") from None
    ratings = None
    if "rating" in at:
        try:
            values = to_numpy(at["rating"].cast(pa.float64()).fill_null(float("nan")))
        except pa.ArrowInvalid as error:
            raise bad("rating", None, f"is not a number ({error})") from None
        if not np.isfinite(values).all():
            raise bad("rating", ~np.isfinite(values), "is missing or not a finite number")
        ratings = values.astype(np.float32)
    (users, user_ids), (items, item_ids) = coded["user"], coded["item"]
    categories: Categories = {}
    note = ""
    if "category" in at:
        try:
            categories, note = per_item(items, item_ids, at["category"], category_separator)
        except BadCategory as error:
            # Lines that are blank have no row.
            place = f"row {error.row + 1}" if unit == "row" else f"object {error.row + 1}"
            raise UserError(f"{path}, {place}: {error.problem}: {quote(error.cell)}; correct it and run again") from None
    return Table(users, user_ids, items, item_ids, timestamps, ratings, categories=categories, note=note)


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    """bool (rows,)"""
    return to_numpy(column.is_null().cast(pa.int8())).astype(bool)


def _keys(path: Path, columns: Columns, own: bool) -> tuple[Found, list[str]]:
    """Where the wanted keys are among those of the first line."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    first = json.loads(line)
                    if not isinstance(first, dict):
                        raise bad_line(path, number, "not a JSON object", line)
                    return find(columns, list(first), path, own), list(first)
    except ValueError as error:
        raise bad_line(path, number, f"not JSON ({error})", line) from None
    except EOFError:
        raise UserError(f"{path} is not a whole gzip file; get it again") from None
    raise UserError(f"{path} is empty: it has no interactions; give a file with at least one line of data")


def _explain_jsonl(path: Path, wanted: Mapping[str, str], reason: str) -> UserError:
    """The first line that is not an object with the wanted keys and kinds of values."""
    from sasrec.data.explain import PROBLEMS

    kinds: set[type] = set()
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
                for what, name in wanted.items():
                    value = values.get(name)
                    if what == "category":
                        if value is not None and value != []:
                            kind = type(value)
                            if kinds and kind not in kinds:
                                return bad_line(
                                    path, number, f"'{name}' is {KINDS.get(kind, 'a value')}, unlike those before", line
                                )
                            kinds.add(kind)
                        continue
                    if value is None or isinstance(value, bool | list | dict):
                        return bad_line(path, number, f"'{name}' is missing or is not a single value", line)
                    if problem := PROBLEMS[what](str(value)):
                        return bad_line(path, number, problem.format(what=what), line)
    except EOFError:
        return UserError(f"{path} is not a whole gzip file; get it again")
    return UserError(f"{path} cannot be read: {' '.join(reason.split())[:300]}")


def amazon_2023(columns: Columns) -> Columns:
    """The names in Amazon Reviews 2023; products that differ in size or colour share `parent_asin`."""
    return dataclasses.replace(
        columns, user="user_id", item="parent_asin", timestamp="timestamp", rating="rating", category=None
    )
