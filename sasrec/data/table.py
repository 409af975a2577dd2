"""The common form that every reader gives: one row per interaction, in the order of the file."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from sasrec.data.spool import Array, Column

Numbers = Array | Column  # in memory, or in a temporary file; both are read by slices


@dataclass(frozen=True)
class Table:
    """`users`, `items`: int32 (rows,), codes from 0 in order of first appearance; `user_ids[code]` is the id as it is
    written in the file. `timestamps`: int64 (rows,) or None when file order is all there is. `ratings`: float32 (rows,)
    or None. Each is in memory or in a temporary file. `titles`, `categories`: by item id, possibly for items without
    interactions, possibly empty. `note`: what a person should know of how the categories were read, or ""."""

    users: Numbers
    user_ids: list[str]
    items: Numbers
    item_ids: list[str]
    timestamps: Numbers | None = None
    ratings: Numbers | None = None
    titles: dict[str, str] = field(default_factory=dict)
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.users)


def in_order_of_appearance(codes: Array, ids: list[str]) -> tuple[Array, list[str]]:
    """Renumber `codes` by first appearance; ids that no row uses are dropped."""
    highest = np.maximum.accumulate(codes)
    if len(codes) and codes[0] == 0 and (np.diff(highest) <= 1).all() and highest[-1] == len(ids) - 1:
        return codes, ids
    first = np.full(len(ids), len(codes), np.int64)
    # With repeated indices the last assignment stays, so in reverse it is the first row.
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    order = np.argsort(first, kind="stable")[: int((first < len(codes)).sum())]
    new = np.zeros(len(ids), np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], [ids[code] for code in order.tolist()]


def encode(column: pa.ChunkedArray) -> tuple[Array, list[str]]:
    """Codes and ids of a column of strings, dictionary-encoded or not. No value may be null."""
    if not (pa.types.is_dictionary(column.type) and column.type.index_type == pa.int32()):
        column = column.cast(pa.string()).dictionary_encode()
    column = column.unify_dictionaries()
    if not column.num_chunks:
        return np.zeros(0, np.int32), []
    codes = np.concatenate([numbers(chunk.indices) for chunk in column.chunks])
    # After unification every chunk has the dictionary of them all.
    return in_order_of_appearance(codes, column.chunk(0).dictionary.to_pylist())


def to_numpy(column: pa.ChunkedArray) -> Array:
    """The numbers of a column without nulls."""
    return np.concatenate([numbers(chunk) for chunk in column.chunks])


def numbers(chunk: pa.Array) -> Array:
    """A view of the buffer. Not pyarrow's own to_numpy: that imports pandas, which costs a third of a second."""
    kind = "f" if pa.types.is_floating(chunk.type) else "i"
    dtype = np.dtype(f"{kind}{chunk.type.bit_width // 8}")
    return np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
