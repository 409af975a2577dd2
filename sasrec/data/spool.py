"""Columns of numbers that may be too many for memory, in temporary files that nothing leaves behind."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CHUNK = 1 << 22  # numbers read at a time where the whole column is gone through


class Column:
    """Numbers of one type in a file without a name, which the system removes when the process ends, however it ends.

    Reads as a one-dimensional array does: `len(column)`, `column[a:b]` (a copy in memory), `column[places]`.
    folder: where the file lies; None: where the system keeps its temporary files.
    """

    def __init__(self, dtype: Any, folder: Path | None, length: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as the column)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, rows: slice | Array) -> Array:
        if not isinstance(rows, slice):
            return self._looked_up(rows)
        begin, end, step = rows.indices(self._length)
        values = np.empty(max(0, end - begin), self.dtype)
        _read(self._file.fileno(), values.view(np.uint8).data, begin * self.dtype.itemsize)
        return values if step == 1 else values[::step]

    def _looked_up(self, places: Array) -> Array:
        """The values at `places`, in one pass through the column."""
        values = np.empty(len(places), self.dtype)
        order = np.argsort(places, kind="stable")
        ascending = places[order]
        for begin in range(0, self._length, CHUNK):
            first, last = np.searchsorted(ascending, [begin, begin + CHUNK])
            if first < last:
                values[order[first:last]] = self[begin : begin + CHUNK][ascending[first:last] - begin]
        return values

    def append(self, values: Array) -> None:
        self.write(self._length, values)
        self._length += len(values)

    def write(self, begin: int, values: Array) -> None:
        """Put `values` at `begin`; within the length, or at its end by `append`."""
        data = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        place = begin * self.dtype.itemsize
        while data:
            written = os.pwrite(self._file.fileno(), data, place)
            data, place = data[written:], place + written

    def chunks(self) -> Iterator[Array]:
        """The whole column in order, some at a time."""
        return (self[begin : begin + CHUNK] for begin in range(0, self._length, CHUNK))


def _read(descriptor: int, into: memoryview, place: int) -> None:
    while into:
        count = os.preadv(descriptor, [into], place)
        if not count:
            raise EOFError("a temporary file is shorter than what was written to it")
        into, place = into[count:], place + count
