"""Timestamps as whole numbers that keep the order of the values in the file exactly."""

import re
from datetime import datetime

import numpy as np
import pyarrow as pa

from sasrec.data.spool import Array
from sasrec.data.table import to_numpy

DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:?\d{2})?)?")
SCALES = (1_000_000, 1_000_000_000)  # seconds as microseconds, as nanoseconds
LARGEST = 2.0**63  # of a time as it is stored


def to_integers(column: pa.ChunkedArray) -> Array:
    """int64 (rows,) from a column of integers, floats, decimals, dates or strings of them.

    Whole numbers stay as they are. Fractions become millionths, or billionths where millionths would merge two
    different values; where those would too, ranks. Dates become microseconds since 1970,
    or nanoseconds where they are that fine.
    Raises ValueError where a value is missing or is not a time.
    """
    kind = column.type
    if column.null_count:
        raise ValueError("a timestamp is missing")
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_integer(kind):
        return to_numpy(column.cast(pa.int64()))
    if pa.types.is_date(kind):
        return to_integers(column.cast(pa.timestamp("us")))
    if pa.types.is_timestamp(kind):
        return to_numpy((column.cast(pa.timestamp("us")) if kind.unit in ("s", "ms") else column).cast(pa.int64()))
    if pa.types.is_decimal(kind):
        return _from_decimals(column)
    if pa.types.is_floating(kind):
        return _from_floats(to_numpy(column.cast(pa.float64())))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _from_strings(column)
    raise ValueError(f"a column of type {kind} holds no times")


def one_by_one(kind: pa.DataType) -> bool:
    """Whether each value of this type becomes the same number whatever the others are."""
    return bool(pa.types.is_integer(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def is_time(text: str) -> bool:
    """Whether one value, as text, is a time that `to_integers` reads."""
    try:
        if DATE.fullmatch(text):
            datetime.fromisoformat(text)
            return True
        return abs(float(text)) < LARGEST and "_" not in text
    except ValueError:
        return False


def _from_strings(column: pa.ChunkedArray) -> Array:
    for kind in (
        pa.int64(),
        # As decimals, because a float of seconds since 1970 holds only seven digits after the point.
        pa.decimal128(38, 9),
        pa.float64(),
        pa.timestamp("us"),
        pa.timestamp("us", tz="UTC"),
        pa.timestamp("ns"),
        pa.timestamp("ns", tz="UTC"),
    ):
        try:
            return to_integers(column.cast(kind))
        except (pa.ArrowInvalid, ValueError):
            continue
    raise ValueError("a timestamp is not a number or a date")


def _from_decimals(column: pa.ChunkedArray) -> Array:
    billionths = column.cast(pa.decimal128(38, 9))
    parts = []
    for chunk in billionths.chunks:
        # A decimal is 16 bytes, the low half first; the high half is only the sign where the value fits in 64 bits.
        words = np.frombuffer(chunk.buffers()[1], np.int64)[2 * chunk.offset : 2 * (chunk.offset + len(chunk))]
        low, high = words[0::2], words[1::2]
        if (high != (low >> 63)).any():
            return _from_floats(to_numpy(column.cast(pa.float64())))
        parts.append(low)
    values = np.concatenate(parts)
    if not (values % 1_000_000_000).any():
        return values // 1_000_000_000
    return values // 1_000 if not (values % 1_000).any() else values.copy()


def _from_floats(values: Array) -> Array:
    if not np.isfinite(values).all():
        raise ValueError("a timestamp is not a finite number")
    if np.abs(values).max(initial=0.0) >= LARGEST:
        raise ValueError("a timestamp is too large, beyond 9.2e18")
    if (values == np.floor(values)).all():
        return values.astype(np.int64)
    distinct, ranks = np.unique(values, return_inverse=True)
    for scale in SCALES:
        scaled = np.rint(distinct * scale)
        if np.abs(scaled).max() < LARGEST and (np.diff(scaled) > 0).all():
            whole: Array = scaled.astype(np.int64)[ranks]
            return whole
    return ranks.astype(np.int64)
