"""Text files with one interaction per line and separated fields, read by pyarrow in several threads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sasrec.data.categories import BadCategory, per_item
from sasrec.data.columns import Found
from sasrec.data.explain import bad_line, explain, quote, rows
from sasrec.data.table import Table, encode, to_numpy
from sasrec.data.timestamps import to_integers
from sasrec.errors import UserError

IDS = pa.dictionary(pa.int32(), pa.string())
BLOCK = 4 << 20  # bytes parsed at a time by one thread


@dataclass(frozen=True)
class Layout:
    """`fields` per line at least two, separated by `separator`: one character, or one written twice like `::`."""

    separator: str
    fields: int
    columns: Found
    header: bool = False
    quoted: bool = False
    category_separator: str | None = None


def read(path: Path, layout: Layout) -> Table:
    """Read the file at `path`, plain or .gz. Raises UserError naming the first bad line."""
    try:
        try:
            table = _parse(path, layout, pa.int64())
        except pa.ArrowInvalid:
            if layout.columns.timestamp is None:
                raise
            # Not whole numbers: fractions and dates go through their text.
            table = _parse(path, layout, pa.string())
        return _checked(path, layout, table)
    except BadCategory as error:
        raise _bad_category(path, layout, error) from None
    except (pa.ArrowInvalid, ValueError) as error:
        reason = str(error)
    except OSError as error:
        if error.errno is not None:
            raise
        reason = str(error)
    checks = [(what, position) for what, position in layout.columns.present() if what != "category"]
    raise explain(path, layout.separator, layout.quoted, layout.header, layout.fields, checks, reason)


def _parse(path: Path, layout: Layout, timestamps: pa.DataType) -> pa.Table:
    # `::` is read as `:` with empty columns between, which the null type insists on.
    step = len(layout.separator)
    names = [f"f{i // step}" if i % step == 0 else f"gap{i // step}" for i in range(step * (layout.fields - 1) + 1)]
    kinds = {"user": IDS, "item": IDS, "timestamp": timestamps, "rating": pa.float32(), "category": IDS}
    types = {f"f{position}": kinds[what] for what, position in layout.columns.present()}
    types |= {name: pa.null() for name in names if name.startswith("gap")}
    source: object = str(path)
    if path.name.lower().endswith(".gz"):
        source = pa.input_stream(str(path), compression="gzip")
    return pa.csv.read_csv(
        source,
        read_options=pa.csv.ReadOptions(column_names=names, skip_rows=int(layout.header), block_size=BLOCK),
        parse_options=pa.csv.ParseOptions(
            delimiter=layout.separator[0],
            quote_char='"' if layout.quoted else False,
            newlines_in_values=layout.quoted and _has_quotes(path),
        ),
        # Only emptiness is null, and never for ids: somebody is called NA.
        convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""]),
    )


def _has_quotes(path: Path) -> bool:
    """Whether fields may contain line ends, which costs the parser its threads."""
    if path.name.lower().endswith(".gz"):
        return True
    with open(path, "rb") as file:
        return any(b'"' in block for block in iter(lambda: file.read(1 << 20), b""))


def _checked(path: Path, layout: Layout, parsed: pa.Table) -> Table:
    """Raises ValueError where the slow pass will find the line."""
    if not parsed.num_rows:
        raise ValueError("no interactions")
    at = {what: parsed.column(f"f{position}") for what, position in layout.columns.present()}
    users, user_ids = encode(at["user"])
    items, item_ids = encode(at["item"])
    if "" in user_ids or "" in item_ids:
        raise ValueError("an id is empty")
    timestamps = to_integers(at["timestamp"]) if "timestamp" in at else None
    ratings = None
    if "rating" in at:
        if at["rating"].null_count:
            raise ValueError("a rating is missing")
        ratings = to_numpy(at["rating"])
        if not np.isfinite(ratings).all():
            raise ValueError("a rating is not finite")
    if timestamps is not None and layout.columns.timestamp == layout.fields - 1:
        _refuse_cut(path, layout, timestamps)
    categories, note = per_item(items, item_ids, at["category"], layout.category_separator) if "category" in at else ({}, "")
    return Table(users, user_ids, items, item_ids, timestamps, ratings, categories=categories, note=note)


def _bad_category(path: Path, layout: Layout, error: BadCategory) -> UserError:
    """With the number of the first line that has the cell."""
    position = layout.columns.category
    assert position is not None
    for number, fields, line in rows(path, layout.separator, layout.quoted):
        if len(fields) > position and fields[position] == error.cell:
            return bad_line(path, number, error.problem, line)
    return UserError(f"{path}: {error.problem}: {quote(error.cell)}")


def _refuse_cut(path: Path, layout: Layout, timestamps: np.ndarray) -> None:
    """A file cut in the middle of its last timestamp still parses. Without a line end, a time since 1970 that has fewer
    digits than all others gives it away."""
    if path.name.lower().endswith(".gz") or len(timestamps) < 2:
        return
    with open(path, "rb") as file:
        file.seek(-1, 2)
        if file.read(1) in b"\r\n":
            return
    last, shortest = abs(int(timestamps[-1])), int(np.abs(timestamps[:-1]).min())
    if shortest >= 10**8 and len(str(last)) < len(str(shortest)):
        *_, (number, _, line) = rows(path, layout.separator, layout.quoted)
        raise bad_line(path, number, "the last line is cut short, its timestamp has lost digits", line)
