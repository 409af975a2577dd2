"""From the table of a file to the sequences that are studied: filter, order, renumber, count."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sasrec.config import PrepareParams
from sasrec.data.table import Array, Table
from sasrec.errors import UserError

EVALUABLE = 3  # interactions of a user for leave-one-out: one to test on, one to validate on, one to start from


@dataclass(frozen=True)
class Interactions:
    """`items`: int32 (interactions,), ids 1..n, users one after the other, each in time order. `offsets`: int64
    (users + 1,). `timestamps`: int64, `ratings`: float32, aligned with `items`, or None. `user_codes`, `item_codes`:
    for each new id, in order, its code in the table. `stats`: what stats.json says of them."""

    items: Array
    offsets: Array
    timestamps: Array | None
    ratings: Array | None
    user_codes: Array
    item_codes: Array
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Rows sorted by (user, timestamp), file order on ties."""

    users: Array
    items: Array
    timestamps: Array | None
    ratings: Array | None

    def keep(self, mask: Array) -> "_Rows":
        if mask.all():
            return self
        times = None if self.timestamps is None else self.timestamps[mask]
        return _Rows(self.users[mask], self.items[mask], times, None if self.ratings is None else self.ratings[mask])

    def pairs(self, n_items: int) -> Array:
        """One int64 per row that is the same for the same (user, item)."""
        return self.users.astype(np.int64) * n_items + self.items

    def distinct(self) -> tuple[int, int, int]:
        """Rows, users, items."""
        return len(self.users), _distinct(self.users), _distinct(self.items)


def _distinct(codes: Array) -> int:
    return int(np.count_nonzero(np.bincount(codes))) if len(codes) else 0


def build(table: Table, params: PrepareParams) -> Interactions:
    """Filter, in this order: `min_rating`; `duplicates` (the first or last of a (user, item) in time); `min_user` and
    `min_item`, counted once on what is left so far, or iterated to a k-core. Ids are given in order of first appearance
    in the file, without gaps; 0 is padding.

    Raises UserError when nothing, or under leave-one-out nobody who can be evaluated, is left.
    """
    rows = _sort(table)
    raw = _raw_stats(rows, len(table.item_ids))
    dropped: dict[str, dict[str, int]] = {}
    if params.min_rating is not None:
        if rows.ratings is None:
            raise UserError("prepare.min_rating is set, but the data has no ratings; set it to null")
        left = rows.keep(rows.ratings >= params.min_rating)
        dropped["min_rating"] = _difference(rows, left)
        if not len(left.users):
            highest = float(rows.ratings.max())
            raise UserError(f"no rating reaches prepare.min_rating = {params.min_rating}: the highest is {highest:g}; lower it")
        rows = left
    if params.duplicates != "keep":
        left = rows.keep(_one_of_each(rows.pairs(len(table.item_ids)), params.duplicates))
        dropped["duplicates"] = _difference(rows, left)
        rows = left
    left, rounds = _thresholds(rows, params)
    dropped["thresholds"] = _difference(rows, left) | {
        "users_below": _below(rows.users, params.min_user),
        "items_below": _below(rows.items, params.min_item),
        "rounds": rounds,
    }
    _refuse_nothing(rows, left, params)
    return _renumber(left, {"raw": raw, "dropped": dropped})


def _sort(table: Table) -> _Rows:
    order = _order(table.users, table.timestamps)
    times = None if table.timestamps is None else table.timestamps[order]
    return _Rows(table.users[order], table.items[order], times, None if table.ratings is None else table.ratings[order])


def _order(users: Array, timestamps: Array | None) -> Array:
    """Places of the rows by (user, timestamp), file order on ties."""
    if timestamps is None:
        return np.argsort(users, kind="stable")
    first = int(timestamps.min())
    span = int(timestamps.max()) - first + 1
    if span * (int(users.max()) + 1) < 2**63:
        # One key is sorted in a third of the time of two.
        return np.argsort(users.astype(np.int64) * span + (timestamps - first), kind="stable")
    return np.lexsort((timestamps, users))  # stable, the last key first


def _tied(rows: _Rows) -> Array:
    """bool (rows - 1,): row and next row share user and timestamp."""
    if rows.timestamps is None:
        return np.zeros(max(len(rows.users) - 1, 0), bool)
    tied: Array = (rows.users[1:] == rows.users[:-1]) & (rows.timestamps[1:] == rows.timestamps[:-1])
    return tied


def _raw_stats(rows: _Rows, n_items: int) -> dict[str, int]:
    """Counts of the file before any filter. `duplicates`: rows whose (user, item) came before; `exact_duplicates`: rows
    whose timestamp and rating are the same too; `ties`: rows that share (user, timestamp) with another."""
    n, users, items = rows.distinct()
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
    return {
        "users": users,
        "items": items,
        "interactions": n,
        "duplicates": duplicates,
        "exact_duplicates": exact,
        "ties": int(shared.sum()),
    }


def _one_of_each(pairs: Array, which: str) -> Array:
    """bool (rows,): the first or the last row of each pair."""
    mask = np.zeros(len(pairs), bool)
    if which == "first":
        mask[np.unique(pairs, return_index=True)[1]] = True
    else:
        mask[len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]] = True
    return mask


def _thresholds(rows: _Rows, params: PrepareParams) -> tuple[_Rows, int]:
    """The rows that stay, and how many rounds of counting it took."""
    rounds = 0
    while True:
        rounds += 1
        enough_user = np.bincount(rows.users) >= params.min_user
        enough_item = np.bincount(rows.items) >= params.min_item
        left = rows.keep(enough_user[rows.users] & enough_item[rows.items])
        if params.filter == "once" or len(left.users) == len(rows.users) or not len(left.users):
            return left, rounds
        rows = left


def _below(codes: Array, least: int) -> int:
    counts = np.bincount(codes)
    return int(((counts > 0) & (counts < least)).sum())


def _difference(before: _Rows, after: _Rows) -> dict[str, int]:
    return {name: a - b for name, a, b in zip(("rows", "users", "items"), before.distinct(), after.distinct(), strict=True)}


def _refuse_nothing(before: _Rows, left: _Rows, params: PrepareParams) -> None:
    n, users, items = before.distinct()
    most_user, most_item = int(np.bincount(before.users).max()), int(np.bincount(before.items).max())
    seen = (
        f"the file has {n} interactions of {users} users with {items} items; the most active user has {most_user}, the "
        f"most frequent item {most_item}"
    )
    advice = "lower prepare.min_user and prepare.min_item, or give more data"
    if not len(left.users):
        raise UserError(
            f"nothing is left after prepare.min_user = {params.min_user} and prepare.min_item = {params.min_item} "
            f"({params.filter}): {seen}; {advice}"
        )
    if params.split == "leave_one_out" and np.bincount(left.users).max() < EVALUABLE:
        raise UserError(f"no user has the {EVALUABLE} interactions that evaluation needs after filtering: {seen}; {advice}")
    if _distinct(left.items) < 2:
        raise UserError(f"only one item is left after filtering: {seen}; {advice}")


def _renumber(rows: _Rows, stats: dict[str, Any]) -> Interactions:
    """Codes of the table are in order of first appearance and the rows are sorted by them, so leaving out those that no
    row has keeps the order."""
    user_codes = np.flatnonzero(np.bincount(rows.users))
    item_codes = np.flatnonzero(np.bincount(rows.items))
    new = np.zeros(int(item_codes[-1]) + 1, np.int32)
    new[item_codes] = np.arange(1, len(item_codes) + 1, dtype=np.int32)
    lengths = np.bincount(rows.users)[user_codes]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tied = np.append(False, _tied(rows))
    ties = int((tied | np.append(tied[1:], False)).sum())
    summary = {
        "users": len(user_codes),
        "items": len(item_codes),
        "interactions": len(rows.users),
        "length": _quantiles(lengths),
        "duplicates": stats["raw"]["duplicates"],
        "exact_duplicates": stats["raw"]["exact_duplicates"],
        "ties": stats["raw"]["ties"],
        "ties_kept": ties,
        "last_two_tie": int((tied[offsets[1:] - 1] & (lengths >= EVALUABLE)).sum()),
    }
    return Interactions(new[rows.items], offsets, rows.timestamps, rows.ratings, user_codes, item_codes, summary | stats)


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
