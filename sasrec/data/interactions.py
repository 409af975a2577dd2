"""From the table of a file to the sequences that are studied: filter, order, renumber, count.

The rows are first brought into files of `ROWS` rows of neighbouring users each, and then handled one such part after the
other, so that memory does not grow with the rows. What is counted over all of them is one number a user or an item.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sasrec.config import PrepareParams
from sasrec.data.sequences import user_ranges
from sasrec.data.spool import CHUNK, Array, Column
from sasrec.data.table import Numbers, Table
from sasrec.errors import UserError

EVALUABLE = 3  # interactions of a user for leave-one-out: one to test on, one to validate on, one to start from
# Rows handled at a time. Small parts sort faster: place, time and user of a row fit together in one 64-bit key.
ROWS = 1 << 20


@dataclass(frozen=True)
class Interactions:
    """`items`: int32 (interactions,), ids 1..n, users one after the other, each in time order. `offsets`: int64
    (users + 1,). `timestamps`: int64, `ratings`: float32, aligned with `items`, or None. `user_codes`, `item_codes`:
    for each new id, in order, its code in the table. `stats`: what stats.json says of them."""

    items: Numbers
    offsets: Array
    timestamps: Numbers | None
    ratings: Numbers | None
    user_codes: Array
    item_codes: Array
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Rows of some users; `users` counts from the first of them."""

    users: Array
    items: Array
    timestamps: Array | None
    ratings: Array | None

    def take(self, which: Array) -> "_Rows":
        """The rows at the places, or where the mask is true, that `which` is."""
        if which.dtype == bool and which.all():
            return self
        times = None if self.timestamps is None else self.timestamps[which]
        return _Rows(self.users[which], self.items[which], times, None if self.ratings is None else self.ratings[which])

    def pairs(self, n_items: int) -> Array:
        """One int64 per row that is the same for the same (user, item)."""
        return self.users.astype(np.int64) * n_items + self.items


class _Stored:
    """Rows in temporary files, users one after the other."""

    def __init__(self, table: Table, folder: Path | None, length: int = 0) -> None:
        self.items = Column(np.int32, folder, length)
        self.timestamps = None if table.timestamps is None else Column(np.int64, folder, length)
        self.ratings = None if table.ratings is None else Column(np.float32, folder, length)

    def append(self, rows: _Rows) -> None:
        for name in ("items", "timestamps", "ratings"):
            column = getattr(self, name)
            if column is not None:
                column.append(getattr(rows, name))

    def read(self, users: tuple[int, int], offsets: Array) -> _Rows:
        part = slice(int(offsets[users[0]]), int(offsets[users[1]]))
        times = None if self.timestamps is None else self.timestamps[part]
        ratings = None if self.ratings is None else self.ratings[part]
        return _Rows(_owners(users, offsets), self.items[part], times, ratings)


def _owners(users: tuple[int, int], offsets: Array) -> Array:
    """int32 (rows,): the user of each row, from 0 for users[0]."""
    return np.repeat(np.arange(users[1] - users[0], dtype=np.int32), np.diff(offsets[users[0] : users[1] + 1]))


@dataclass(frozen=True)
class _Counts:
    """Rows left of each user and of each item, by their codes."""

    users: Array
    items: Array

    @classmethod
    def none(cls, table: Table) -> "_Counts":
        return cls(np.zeros(len(table.user_ids), np.int64), np.zeros(len(table.item_ids), np.int64))

    def add(self, users: tuple[int, int], owners: Array, items: Array) -> None:
        self.users[users[0] : users[1]] += np.bincount(owners, minlength=users[1] - users[0])
        found = np.bincount(items)
        self.items[: len(found)] += found

    def distinct(self) -> tuple[int, int, int]:
        """Rows, users, items."""
        return int(self.users.sum()), int(np.count_nonzero(self.users)), int(np.count_nonzero(self.items))

    def less(self, after: "_Counts") -> dict[str, int]:
        return {n: a - b for n, a, b in zip(("rows", "users", "items"), self.distinct(), after.distinct(), strict=True)}


def build(table: Table, params: PrepareParams, folder: Path | None = None) -> Interactions:
    """Filter, in this order: `min_rating`; `duplicates` (the first or last of a (user, item) in time); `min_user` and
    `min_item`, counted once on what is left so far, or iterated to a k-core. Ids are given in order of first appearance
    in the file, without gaps; 0 is padding. folder: where temporary files go, by default where the system keeps them.

    Raises UserError when nothing, or under leave-one-out nobody who can be evaluated, is left.
    """
    if params.min_rating is not None and table.ratings is None:
        raise UserError("prepare.min_rating is set, but the data has no ratings; set it to null")
    counts = [_Counts.none(table) for _ in range(3)]  # of the file, after min_rating, after duplicates
    raw = {"duplicates": 0, "exact_duplicates": 0, "ties": 0}
    stored = _Stored(table, folder)
    ranges: list[tuple[int, int]] = []
    highest = -np.inf
    for users, unsorted in _parts(table, folder):
        ranges.append(users)
        rows = unsorted.take(_order(unsorted.users, unsorted.timestamps))
        counts[0].add(users, rows.users, rows.items)
        for name, count in _repeats(rows, len(table.item_ids)).items():
            raw[name] += count
        if params.min_rating is not None and rows.ratings is not None:
            highest = max(highest, float(rows.ratings.max()))
            rows = rows.take(rows.ratings >= params.min_rating)
            counts[1].add(users, rows.users, rows.items)
        if params.duplicates != "keep":
            rows = rows.take(_one_of_each(rows.pairs(len(table.item_ids)), params.duplicates))
            counts[2].add(users, rows.users, rows.items)
        stored.append(rows)
    before, dropped = counts[0], {}
    for name, active, after in (
        ("min_rating", params.min_rating is not None, counts[1]),
        ("duplicates", params.duplicates != "keep", counts[2]),
    ):
        if active:
            dropped[name] = before.less(after)
            before = after
        if name == "min_rating" and active and not len(stored.items):
            raise UserError(f"no rating reaches prepare.min_rating = {params.min_rating}: the highest is {highest:g}; lower it")
    offsets = _offsets(before.users)
    left, enough, rounds = _thresholds(stored, offsets, ranges, before, params)
    dropped["thresholds"] = before.less(left) | {
        "users_below": _below(before.users, params.min_user),
        "items_below": _below(before.items, params.min_item),
        "rounds": rounds,
    }
    _refuse_nothing(before, left, params)
    n, n_users, n_items = counts[0].distinct()
    stats = {"raw": {"users": n_users, "items": n_items, "interactions": n, **raw}, "dropped": dropped}
    return _renumber(table, stored, offsets, ranges, left, enough, stats, folder)


def _offsets(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _parts(table: Table, folder: Path | None) -> Iterator[tuple[tuple[int, int], _Rows]]:
    """Ranges of users, and their rows in the order of the file."""
    n_users, n = len(table.user_ids), len(table)
    counts = np.zeros(n_users, np.int64)
    for begin in range(0, n, CHUNK):
        counts += np.bincount(table.users[begin : begin + CHUNK], minlength=n_users)
    offsets = _offsets(counts)
    ranges = list(user_ranges(offsets, ROWS))
    columns = {name: getattr(table, name) for name in ("users", "items", "timestamps", "ratings")}
    columns = {name: column for name, column in columns.items() if column is not None}
    if len(ranges) > 1:
        columns = _scattered(columns, n, ranges, offsets, folder)
    for users in ranges:
        part = slice(int(offsets[users[0]]), int(offsets[users[1]]))
        rows = {name: column[part] for name, column in columns.items()}
        yield users, _Rows(rows["users"] - users[0], rows["items"], rows.get("timestamps"), rows.get("ratings"))


def _scattered(
    columns: dict[str, Any], n: int, ranges: list[tuple[int, int]], offsets: Array, folder: Path | None
) -> dict[str, Any]:
    """The columns with the rows of each range together, in each the order of the file."""
    scattered = {name: Column(column.dtype, folder, n) for name, column in columns.items()}
    widths = [end - begin for begin, end in ranges]
    range_of = np.repeat(np.arange(len(ranges), dtype=np.uint16 if len(ranges) < 1 << 16 else np.uint32), widths)
    places = offsets[[begin for begin, _ in ranges]]  # where the next row of each range goes
    for begin in range(0, n, CHUNK):
        rows = {name: column[begin : begin + CHUNK] for name, column in columns.items()}
        target = range_of[rows["users"]]
        order = np.argsort(target, kind="stable")
        counts = np.bincount(target, minlength=len(ranges))
        ends = np.cumsum(counts)
        for name, values in rows.items():
            in_order = values[order]
            for which in np.flatnonzero(counts).tolist():
                scattered[name].write(int(places[which]), in_order[ends[which] - counts[which] : ends[which]])
        places += counts
    return scattered


def _order(users: Array, timestamps: Array | None) -> Array:
    """Places of the rows by (user, timestamp), file order on ties."""
    n = len(users)
    first = 0 if timestamps is None else int(timestamps.min())
    span = 1 if timestamps is None else int(timestamps.max()) - first + 1
    groups = int(users.max()) + 1
    if span * groups >= 2**63:
        assert timestamps is not None
        return np.lexsort((timestamps, users))  # stable, the last key first
    key = users.astype(np.int64)
    if timestamps is not None:
        key *= span
        key += timestamps - first
    if span * groups * n >= 2**63:
        return np.argsort(key, kind="stable")
    # The place of the row makes every key different: sorting the keys themselves takes a tenth of sorting places by them.
    key *= n
    key += np.arange(n)
    key.sort()
    key %= n
    return key


def _tied(rows: _Rows) -> Array:
    """bool (rows - 1,): row and next row share user and timestamp."""
    if rows.timestamps is None:
        return np.zeros(max(len(rows.users) - 1, 0), bool)
    tied: Array = (rows.users[1:] == rows.users[:-1]) & (rows.timestamps[1:] == rows.timestamps[:-1])
    return tied


def _repeats(rows: _Rows, n_items: int) -> dict[str, int]:
    """`duplicates`: rows whose (user, item) came before; `exact_duplicates`: rows whose timestamp and rating are the same too;
    `ties`: rows that share (user, timestamp) with another."""
    pairs = rows.pairs(n_items)
    in_order = np.sort(pairs)
    duplicates = int((in_order[1:] == in_order[:-1]).sum())
    tied = _tied(rows)
    # Rows that are equal in everything share the timestamp too, and those are fewer.
    shared = np.append(tied, False) | np.append(False, tied)
    exact = 0
    if duplicates:
        some = slice(None) if rows.timestamps is None else shared
        columns = [column[some] for column in (pairs, rows.timestamps, rows.ratings) if column is not None]
        order = np.lexsort(columns)
        exact = int(np.logical_and.reduce([c[order][1:] == c[order][:-1] for c in columns]).sum())
    return {"duplicates": duplicates, "exact_duplicates": exact, "ties": int(shared.sum())}


def _one_of_each(pairs: Array, which: str) -> Array:
    """bool (rows,): the first or the last row of each pair."""
    mask = np.zeros(len(pairs), bool)
    if which == "first":
        mask[np.unique(pairs, return_index=True)[1]] = True
    else:
        mask[len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]] = True
    return mask


def _thresholds(
    stored: _Stored, offsets: Array, ranges: list[tuple[int, int]], before: _Counts, params: PrepareParams
) -> tuple[_Counts, tuple[Array, Array], int]:
    """What is left of each, bool by code for the users and for the items whose rows stay, and the rounds of counting."""
    current, rounds = before, 0
    enough = np.ones(len(before.users), bool), np.ones(len(before.items), bool)
    while True:
        rounds += 1
        enough = enough[0] & (current.users >= params.min_user), enough[1] & (current.items >= params.min_item)
        left = _Counts(np.zeros_like(before.users), np.zeros_like(before.items))
        for users in ranges:
            owners, items = _owners(users, offsets), stored.items[int(offsets[users[0]]) : int(offsets[users[1]])]
            stays = _stays(users, owners, items, enough)
            left.add(users, owners[stays], items[stays])
        rows = int(left.users.sum())
        if params.filter == "once" or rows == int(current.users.sum()) or not rows:
            return left, enough, rounds
        current = left


def _stays(users: tuple[int, int], owners: Array, items: Array, enough: tuple[Array, Array]) -> Array:
    stays: Array = enough[0][users[0] : users[1]][owners] & enough[1][items]
    return stays


def _below(counts: Array, least: int) -> int:
    return int(((counts > 0) & (counts < least)).sum())


def _refuse_nothing(before: _Counts, left: _Counts, params: PrepareParams) -> None:
    n, users, items = before.distinct()
    seen = (
        f"the file has {n} interactions of {users} users with {items} items; the most active user has "
        f"{int(before.users.max())}, the most frequent item {int(before.items.max())}"
    )
    advice = "lower prepare.min_user and prepare.min_item, or give more data"
    if not left.users.any():
        raise UserError(
            f"nothing is left after prepare.min_user = {params.min_user} and prepare.min_item = {params.min_item} "
            f"({params.filter}): {seen}; {advice}"
        )
    if params.split == "leave_one_out" and left.users.max() < EVALUABLE:
        raise UserError(f"no user has the {EVALUABLE} interactions that evaluation needs after filtering: {seen}; {advice}")
    if np.count_nonzero(left.items) < 2:
        raise UserError(f"only one item is left after filtering: {seen}; {advice}")


def _renumber(
    table: Table,
    stored: _Stored,
    offsets: Array,
    ranges: list[tuple[int, int]],
    left: _Counts,
    enough: tuple[Array, Array],
    stats: dict[str, Any],
    folder: Path | None,
) -> Interactions:
    """Codes of the table are in order of first appearance and the rows are sorted by them, so leaving out those that no
    row has keeps the order."""
    user_codes, item_codes = np.flatnonzero(left.users), np.flatnonzero(left.items)
    new = np.zeros(len(left.items), np.int32)
    new[item_codes] = np.arange(1, len(item_codes) + 1, dtype=np.int32)
    kept = _Stored(table, folder)
    ties = last_two = 0
    for users in ranges:
        rows = stored.read(users, offsets)
        rows = rows.take(_stays(users, rows.users, rows.items, enough))
        kept.append(_Rows(rows.users, new[rows.items], rows.timestamps, rows.ratings))
        tied = np.append(False, _tied(rows))
        ties += int((tied | np.append(tied[1:], False)).sum())
        lengths = left.users[users[0] : users[1]]
        last_two += int(tied[(np.cumsum(lengths) - 1)[lengths >= EVALUABLE]].sum())
    lengths = left.users[user_codes]
    summary = {
        "users": len(user_codes),
        "items": len(item_codes),
        "interactions": len(kept.items),
        "length": _quantiles(lengths),
        "duplicates": stats["raw"]["duplicates"],
        "exact_duplicates": stats["raw"]["exact_duplicates"],
        "ties": stats["raw"]["ties"],
        "ties_kept": ties,
        "last_two_tie": last_two,
    }
    return Interactions(kept.items, _offsets(lengths), kept.timestamps, kept.ratings, user_codes, item_codes, summary | stats)


def _quantiles(lengths: Array) -> dict[str, float]:
    """Interactions per user; whole numbers as such."""
    values = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).tolist()
    names = ("min", "quarter", "median", "three_quarters", "max")
    return {name: int(v) if v == int(v) else v for name, v in zip(names, values, strict=True)}


def looks_ranked(interactions: Interactions) -> bool:
    """Whether timestamps are only places in each user's own order: more than half of the users begin at the very same
    moment, which real times of 10 or more people do not."""
    if interactions.timestamps is None or len(interactions.user_codes) < 10:
        return False
    _, counts = np.unique(interactions.timestamps[interactions.offsets[:-1]], return_counts=True)
    return bool(2 * counts.max() > len(interactions.user_codes))
