"""Text files with one interaction per line and separated fields, read by pyarrow a block at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sasrec.data.categories import BadCategory, as_text
from sasrec.data.collect import Collector, groups
from sasrec.data.columns import Found
from sasrec.data.explain import bad_line, explain, find_swallowed, find_unescaped, quote, rows
from sasrec.data.spool import CHUNK
from sasrec.data.table import Numbers, Table, to_numpy
from sasrec.errors import UserError

IDS = pa.dictionary(pa.int32(), pa.string())
BLOCK = 4 << 20  # bytes parsed at a time


@dataclass(frozen=True)
class Layout:
    """`fields` per line at least two, separated by `separator`: one character, or one written twice like `::`."""

    separator: str
    fields: int
    columns: Found
    header: bool = False
    quoted: bool = False
    category_separator: str | None = None


def read(path: Path, layout: Layout, folder: Path | None = None) -> Table:
    """Read the file at `path`, plain or .gz. Raises UserError naming the first bad line. folder: where the columns go, in
    temporary files; by default where the system keeps them."""
    try:
        try:
            return _table(path, layout, pa.int64(), folder)
        except pa.ArrowInvalid:
            if layout.columns.timestamp is None:
                raise
            # Not whole numbers: fractions and dates go through their text.
            return _table(path, layout, pa.string(), folder)
    except BadCategory as error:
        raise _bad_category(path, layout, error) from None
    except (pa.ArrowInvalid, ValueError) as error:
        reason = str(error)
    except OSError as error:
        if error.errno is not None:
            raise
        reason = str(error)
    raise explain(path, layout.separator, layout.quoted, layout.header, layout.fields, _checked(layout), reason)


def _checked(layout: Layout) -> list[tuple[str, int]]:
    """(what, position) of the columns whose values have to be of a kind."""
    return [(what, position) for what, position in layout.columns.present() if what != "category"]


class _Lines:
    """A file whose lines are counted as they are read, but for blank ones; `pyarrow` takes it for a file. odd_quotes: whether a
    quote was neither at an end of a field nor beside another, as where text follows the quote that closes a field."""

    closed = False

    def __init__(self, file: Any, separator: str) -> None:
        self.file, self.count, self.at_end, self.odd_quotes = file, 0, True, False
        self.ends = np.zeros(256, bool)  # what may be beside a quote
        self.ends[list(f'\r\n"{separator}'.encode())] = True
        self.before = np.full(2, ord("\n"), np.uint8)  # the last letters of the block before

    def read(self, size: int = -1) -> bytes:
        block: bytes = self.file.read(size)
        letters = np.frombuffer(block, np.uint8)
        end = (letters == ord("\n")) | (letters == ord("\r"))
        if len(end):
            self.count += int(np.count_nonzero(end[:-1] & ~end[1:])) + int(self.at_end and not end[0])
            self.at_end = bool(end[-1])
            letters = np.concatenate([self.before, letters])
            quotes = np.flatnonzero(letters[1:-1] == ord('"'))
            self.odd_quotes |= bool((~self.ends[letters[quotes]] & ~self.ends[letters[quotes + 2]]).any())
            self.before = letters[-2:]
        return block

    def close(self) -> None:
        self.closed = True
        self.file.close()


def _open(path: Path, layout: Layout, timestamps: pa.DataType) -> tuple[pa.csv.CSVStreamingReader, _Lines | None]:
    """The reader, and the lines that it takes its rows from where these may differ in number."""
    # `::` is read as `:` with empty columns between, which the null type insists on.
    step = len(layout.separator)
    names = [f"f{i // step}" if i % step == 0 else f"gap{i // step}" for i in range(step * (layout.fields - 1) + 1)]
    kinds = {"user": IDS, "item": IDS, "timestamp": timestamps, "rating": pa.float32(), "category": IDS}
    types = {f"f{position}": kinds[what] for what, position in layout.columns.present()}
    types |= {name: pa.null() for name in names if name.startswith("gap")}
    compression = "gzip" if path.name.lower().endswith(".gz") else None
    source = pa.input_stream(str(path), compression=compression)
    lines = _Lines(source, layout.separator) if layout.quoted and _has_quotes(path) else None
    reader = pa.csv.open_csv(
        lines or source,
        read_options=pa.csv.ReadOptions(column_names=names, skip_rows=int(layout.header), block_size=BLOCK),
        parse_options=pa.csv.ParseOptions(
            delimiter=layout.separator[0],
            quote_char='"' if layout.quoted else False,
            newlines_in_values=lines is not None,
        ),
        # Only emptiness is null, and never for ids: somebody is called NA.
        convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""]),
    )
    return reader, lines


def _has_quotes(path: Path) -> bool:
    """Whether fields may contain line ends, which costs the parser its threads."""
    if path.name.lower().endswith(".gz"):
        return True
    with open(path, "rb") as file:
        return any(b'"' in block for block in iter(lambda: file.read(1 << 20), b""))


def _table(path: Path, layout: Layout, timestamps: pa.DataType, folder: Path | None) -> Table:
    """Raises ValueError where the slow pass will find the line."""
    found = Collector(folder)
    reader, lines = _open(path, layout, timestamps)
    with reader as batches:
        for group in groups(batches, found.distinct):
            at = {what: group.column(f"f{position}") for what, position in layout.columns.present()}
            ratings = None
            if "rating" in at:
                if at["rating"].null_count:
                    raise ValueError("a rating is missing")
                ratings = to_numpy(at["rating"])
                if not np.isfinite(ratings).all():
                    raise ValueError("a rating is not finite")
            if "category" in at:
                at["category"] = as_text(at["category"])
            found.add(at["user"], at["item"], at.get("timestamp"), ratings, at.get("category"))
    if not len(found):
        raise ValueError("no interactions")
    spanned = lines is not None and lines.count != len(found) + layout.header
    if spanned and (error := find_swallowed(path, layout.separator, _checked(layout))) is not None:
        raise error
    if lines is not None and lines.odd_quotes and (error := find_unescaped(path, layout.separator)) is not None:
        raise error
    table = found.table(layout.category_separator)
    if "" in table.user_ids or "" in table.item_ids:
        raise ValueError("an id is empty")
    if table.timestamps is not None and layout.columns.timestamp == layout.fields - 1:
        _refuse_cut(path, layout, table.timestamps)
    return table


def _bad_category(path: Path, layout: Layout, error: BadCategory) -> UserError:
    """With the number of the first line that has the cell."""
    position = layout.columns.category
    assert position is not None
    for number, fields, line in rows(path, layout.separator, layout.quoted):
        if len(fields) > position and fields[position] == error.cell:
            return bad_line(path, number, error.problem, line)
    return UserError(f"{path}: {error.problem}: {quote(error.cell)}")


def _refuse_cut(path: Path, layout: Layout, timestamps: Numbers) -> None:
    """A file cut in the middle of its last timestamp still parses. Without a line end, a time since 1970 that has fewer
    digits than all others gives it away."""
    if path.name.lower().endswith(".gz") or len(timestamps) < 2:
        return
    with open(path, "rb") as file:
        file.seek(-1, 2)
        if file.read(1) in b"\r\n":
            return
    before = len(timestamps) - 1
    last = abs(int(timestamps[before:][0]))
    shortest = min(int(np.abs(timestamps[a : min(a + CHUNK, before)]).min()) for a in range(0, before, CHUNK))
    if shortest >= 10**8 and len(str(last)) < len(str(shortest)):
        *_, (number, _, line) = rows(path, layout.separator, layout.quoted)
        raise bad_line(path, number, "the last line is cut short, its timestamp has lost digits", line)
