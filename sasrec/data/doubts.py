"""What is read as it stands, but looks as if something else were meant: notes for the person who prepares the data."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import numpy as np

from sasrec.config import DatasetParams
from sasrec.data.explain import quote
from sasrec.data.source import Source
from sasrec.data.spool import CHUNK, Array
from sasrec.data.table import Numbers, Table

# Formats with columns that the user names.
NAMED = ("table", "parquet", "jsonl")
# Ticks a second of each unit that times may be in.
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Seconds since 1970 that data of people has: 1979 to 2128.
USUAL = (3 * 10**8, 5 * 10**9)


def notes(dataset: DatasetParams, source: Source, table: Table, times: Numbers | None, unit: str | None) -> list[str]:
    """One sentence each. times: of the interactions that are kept; unit: what they are taken for (`store`). None where there
    are none."""
    found = [_of_ids("user", table.user_ids), _of_ids("item", table.item_ids)]
    if source.format in NAMED:
        if times is None or unit is None:
            found.append(_of_no_times(dataset))
        else:
            found += [_of_units(times, unit), "" if dataset.times == "order" else _of_distances(times, unit)]
    return [note for note in found if note]


def _of_ids(what: str, ids: Sequence[str]) -> str:
    spaced = [own for own in ids if own != own.strip()]
    if not spaced:
        return ""
    return (
        f"{len(spaced)} of {len(ids)} {what} ids begin or end with a space, such as {quote(spaced[0])}; they are kept so, and "
        "are other ids than those without"
    )


def _of_no_times(dataset: DatasetParams) -> str:
    name = dataset.columns.timestamp
    if name is None:
        return ""
    return (
        f"there is no column '{name}', so the order of the rows counts; if another column has the times, name it in "
        "dataset.columns.timestamp, or else set that to null"
    )


def _of_units(times: Numbers, unit: str) -> str:
    other = {name: _within(times, name) for name in UNITS if name != unit}
    name, count = max(other.items(), key=lambda each: each[1])
    if not count:
        return ""
    return (
        f"{count} of {len(times)} times look like {name} since 1970, the others like {unit}, and all are read as {unit}; write "
        "them in one unit, or as dates"
    )


def _of_distances(times: Numbers, unit: str) -> str:
    largest = max(int(chunk.max()) for chunk in _chunks(times))
    if unit != "s" or not 0 < largest < USUAL[0]:
        return ""
    last = datetime.fromtimestamp(largest, UTC).date()
    return (
        f"the last time is {largest}, which as seconds since 1970 is {last}: their order counts, but how long ago something "
        "was may be wrong; write dates as 2010-04-18 or 2010-04-18T15:41:48"
    )


def _within(times: Numbers, unit: str) -> int:
    """How many are of usual size in that unit."""
    low, high = (bound * UNITS[unit] for bound in USUAL)
    return sum(int(np.count_nonzero((chunk >= low) & (chunk < high))) for chunk in _chunks(times))


def _chunks(times: Numbers) -> Iterator[Array]:
    return (times[begin : begin + CHUNK] for begin in range(0, len(times), CHUNK))
