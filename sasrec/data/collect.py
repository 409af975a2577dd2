"""Rows that come a group at a time become a table, in memory that does not grow with them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sasrec.data.categories import Categories, per_item
from sasrec.data.spool import Array, Column
from sasrec.data.table import Numbers, Table, numbers
from sasrec.data.timestamps import one_by_one, to_integers

GROUP = 1 << 20  # rows that are handled together, at least


class Codes:
    """The distinct values of a column by first appearance, as they become known."""

    def __init__(self) -> None:
        self.ids = pa.nulls(0, pa.string())  # pa.array would import pandas

    def encode(self, column: pa.ChunkedArray) -> Array:
        """int32 (rows,): the place of each value in `ids`. No value may be null."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        # A dictionary of integers has far fewer values to write as text than the column.
        column = column.cast(pa.dictionary(pa.int32(), pa.string()))
        # Unified in the order of the chunks: what was known keeps its place, what is new follows.
        known = pa.DictionaryArray.from_arrays(pa.nulls(0, pa.int32()), self.ids)
        unified = pa.chunked_array([known, *column.chunks]).unify_dictionaries()
        self.ids = unified.chunk(0).dictionary
        return np.concatenate([numbers(chunk.indices) for chunk in unified.chunks])


class Collector:
    """Takes groups of rows, checked by the reader of the format; the columns go to temporary files in `folder`.

    Times that have to be seen together to become whole numbers (fractions, text) stay in memory until the end.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.users, self.items, self.categories = Codes(), Codes(), Codes()
        self.columns: dict[str, Column] = {}
        self.times: list[pa.Array] = []

    def __len__(self) -> int:
        return len(self.columns["users"]) if self.columns else 0

    def distinct(self) -> int:
        """Ids known so far."""
        return len(self.users.ids) + len(self.items.ids)

    def add(
        self,
        users: pa.ChunkedArray,
        items: pa.ChunkedArray,
        timestamps: pa.ChunkedArray | None,
        ratings: Array | None,
        categories: pa.ChunkedArray | None,
    ) -> None:
        """users, items: ids as text, integers, or dictionaries of them. categories: text (`categories.as_text`). Raises
        ValueError where a timestamp is missing or is not a time."""
        self._append("users", self.users.encode(users), np.int32)
        codes = self.items.encode(items)
        self._append("items", codes, np.int32)
        if timestamps is not None:
            if one_by_one(timestamps.type):
                self._append("timestamps", to_integers(timestamps), np.int64)
            else:
                self.times += timestamps.chunks
        if ratings is not None:
            self._append("ratings", ratings, np.float32)
        if categories is not None:
            self._append("categories", self.categories.encode(categories), np.int32)

    def _append(self, name: str, values: Array, dtype: type) -> None:
        if name not in self.columns:
            self.columns[name] = Column(dtype, self.folder)
        self.columns[name].append(values)

    def table(self, category_separator: str | None = None) -> Table:
        """Raises ValueError where the times cannot be read together, and BadCategory."""
        times: Numbers | None = self.columns.get("timestamps")
        if self.times:
            times = to_integers(pa.chunked_array(self.times))
        item_ids = self.items.ids.to_pylist()
        categories: Categories = {}
        note = ""
        if "categories" in self.columns:
            cells = self.categories.ids.to_pylist()
            categories, note = per_item(self.columns["items"], item_ids, self.columns["categories"], cells, category_separator)
        return Table(
            self.columns["users"],
            self.users.ids.to_pylist(),
            self.columns["items"],
            item_ids,
            times,
            self.columns.get("ratings"),
            categories=categories,
            note=note,
        )


def groups(batches: Iterable[pa.RecordBatch], distinct: Callable[[], int]) -> Iterator[pa.Table]:
    """The batches in groups of `GROUP` rows or more: coding a group goes once through the ids that are known, `distinct`, so
    that there are at least twice as many rows."""
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += batch.num_rows
        if rows >= max(GROUP, 2 * distinct()):
            yield pa.Table.from_batches(pending)
            pending, rows = [], 0
    if rows:
        yield pa.Table.from_batches(pending)
