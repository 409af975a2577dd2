"""What is read as it stands, but looks as if something else were meant: notes for the person who prepares the data."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sasrec.config import DatasetParams, PrepareParams
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
YEAR = 31_556_952  # seconds
# Share of the rows or users from which on something is said of them, and from how many users on.
SHARE, FEW = 0.01, 10


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


def of_rows(stats: dict[str, Any], params: PrepareParams, timed: bool) -> list[str]:
    """One sentence each, of rows that repeat others or cannot be told apart. stats: what is known of the data (`store`).
    timed: whether it has times."""
    copies, rows, users = stats["raw"]["exact_duplicates"], stats["raw"]["interactions"], stats["evaluated"]
    found = []
    if timed and params.duplicates == "keep" and _many(copies, rows):
        found.append(
            f"{copies} of {rows} rows are the same as others in user, item, time and rating; if these are copies, set "
            "prepare.duplicates to first"
        )
    if users >= FEW and params.split == "leave_one_out" and _many(stats["last_two_tie"], users):
        found.append(
            f"the last two events of {stats['last_two_tie']} of {users} users have the same time, so that the order of the "
            "file decides which of them is for test"
        )
    if users >= FEW and _many(stats["repeated_targets"], users):
        found.append(
            f"{stats['repeated_targets']} of {users} test targets are items that the user has had before; they are ranked "
            "among those that the user has not had, but a recommendation leaves them out unless exclude_seen is false; to "
            "count first times alone set prepare.duplicates to first, to rank all items evaluate.exclude_seen to false"
        )
    return found


def _many(some: int, of: int) -> bool:
    return some >= SHARE * of


def _of_ids(what: str, ids: Sequence[str]) -> str:
    if all(own.endswith(".0") for own in ids):
        return (
            f"all {what} ids end in .0, such as {quote(ids[0])}, as whole numbers do that were written as decimals; they are "
            "kept so, and are other ids than those without"
        )
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
    if unit == "s" and 0 < largest < USUAL[0]:
        said = f"the last time is {largest}, which as seconds since 1970 is {datetime.fromtimestamp(largest, UTC).date()}"
    elif largest >= USUAL[1] * UNITS[unit]:
        said = f"the last time, taken as {unit} since 1970, is in the year {1970 + largest // UNITS[unit] // YEAR}"
    else:
        return ""
    return (
        f"{said}: their order counts, but how long ago something was may be wrong; write dates as 2010-04-18 or "
        "2010-04-18T15:41:48"
    )


def _within(times: Numbers, unit: str) -> int:
    """How many are of usual size in that unit."""
    low, high = (bound * UNITS[unit] for bound in USUAL)
    return sum(int(np.count_nonzero((chunk >= low) & (chunk < high))) for chunk in _chunks(times))


def _chunks(times: Numbers) -> Iterator[Array]:
    return (times[begin : begin + CHUNK] for begin in range(0, len(times), CHUNK))
