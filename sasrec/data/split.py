"""What is trained on and what is held out: leave-one-out, or a global cut in time."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sasrec.config import PrepareParams
from sasrec.data.interactions import EVALUABLE, Interactions
from sasrec.data.sequences import user_ranges
from sasrec.data.spool import CHUNK, Array
from sasrec.data.table import Numbers
from sasrec.errors import UserError


@dataclass(frozen=True)
class Split:
    """`train_ends`: int64 (users,), user u trains on items[offsets[u] : train_ends[u]]. `validation`, `test`: int64 (n, 2),
    (user, place of the target in items), users ascending; the history of a target is everything of its user before it.
    `facts`: what stats.json says of the split."""

    train_ends: Array
    validation: Array
    test: Array
    facts: dict[str, Any]


def split(interactions: Interactions, params: PrepareParams, times: str) -> Split:
    """The split that `prepare.split` names. times: whether those of different users can be compared ('comparable' or
    'order'). Raises UserError where the data has no such split."""
    if params.split == "leave_one_out":
        return leave_one_out(interactions.offsets)
    if interactions.timestamps is None:
        raise UserError(
            "params.yaml: prepare.split is 'temporal', but the data has no timestamps; name the column in "
            "dataset.columns.timestamp, or set prepare.split to leave_one_out"
        )
    if times == "order":
        raise UserError(
            "params.yaml: prepare.split is 'temporal', but the times of this data only order each user's own "
            "interactions; set prepare.split to leave_one_out, or dataset.times to comparable where they are real times"
        )
    return temporal(interactions.offsets, interactions.timestamps, params)


def repeated(items: Numbers, offsets: Array, targets: Array) -> int:
    """How many targets, (n, 2) as in `Split`, are items that their user has before that place."""
    places = np.full(len(offsets) - 1, -1, np.int64)
    places[targets[:, 0]] = targets[:, 1]
    count = 0
    for begin, end in user_ranges(offsets, CHUNK):
        first, lengths = int(offsets[begin]), np.diff(offsets[begin : end + 1])
        own = np.asarray(items[first : int(offsets[end])])
        asked = places[begin:end] - first
        target = np.where(asked >= 0, own[np.maximum(asked, 0)], 0)  # 0 is no item
        owner = np.repeat(np.arange(end - begin), lengths)
        before = (own == target[owner]) & (np.arange(len(own)) < asked[owner])
        count += len(np.unique(owner[before]))
    return count


def leave_one_out(offsets: Array) -> Split:
    """The last item of a user is the test target, the last but one the validation target, the rest is for training;
    users with fewer than 3 interactions train on everything. Raises UserError where nothing is left to train on."""
    ends = offsets[1:]
    users = np.flatnonzero(np.diff(offsets) >= EVALUABLE)
    train_ends = ends.copy()
    train_ends[users] -= 2
    if (train_ends - offsets[:-1]).max() < 2:
        raise UserError(
            "nothing is left to train on: no user has two interactions besides the last two, which are held out for validation "
            "and test; give more data, or set prepare.split to temporal"
        )
    validation, test = (np.stack([users, ends[users] - before], 1) for before in (2, 1))
    return Split(train_ends, validation, test, {"split": "leave_one_out"})


def temporal(offsets: Array, timestamps: Numbers, params: PrepareParams) -> Split:
    """The global temporal split (Gusak et al., 'Time to Split', arXiv 2507.16289): one cut in time for all users begins the
    test period, an earlier one the validation period; training is everything before both.

    The cuts are times of interactions, placed so that the last `test_share` of all interactions, and `validation_share`
    before it, are in the periods; what happens at a cut is after it, so that ties stay together. A user's `target` in a
    period is its last or its first interaction there, and counts where anything of the user comes before it.
    Raises UserError where a period has no target, or nothing is left to train on.
    """
    shares = (params.test_share + params.validation_share, params.test_share)
    cuts = _cuts(timestamps, [max(1, round(share * len(timestamps))) for share in shares])
    begins, ends = offsets[:-1], offsets[1:]
    # Where each user enters the validation and the test period.
    entries = [begins.copy(), begins.copy()]
    for first, last in user_ranges(offsets, CHUNK):
        times, starts = timestamps[int(begins[first]) : int(ends[last - 1])], begins[first:last] - begins[first]
        for entry, cut in zip(entries, cuts, strict=True):
            entry[first:last] += np.add.reduceat((times < cut).astype(np.int64), starts)
    validation = _targets(begins, entries[0], entries[1], params.target)
    test = _targets(begins, entries[1], ends, params.target)
    for name, rows, cut in (("validation", validation, cuts[0]), ("test", test, cuts[1])):
        if not len(rows):
            raise UserError(
                f"no user has a target with a history in the {name} period, which begins at time {cut}; raise "
                f"prepare.{name}_share, or set prepare.target to last or prepare.split to leave_one_out"
            )
    if (entries[0] - begins).max() < 2:
        raise UserError(
            f"nothing is left to train on: no user has two interactions before the time {cuts[0]}, where the validation "
            "period begins; lower prepare.validation_share and prepare.test_share, or set prepare.split to leave_one_out"
        )
    facts = {
        "split": "temporal",
        "validation_share": params.validation_share,
        "test_share": params.test_share,
        "target": params.target,
        "validation_cut": cuts[0],
        "test_cut": cuts[1],
    }
    return Split(entries[0], validation, test, facts)


def _cuts(timestamps: Numbers, counts: list[int]) -> list[int]:
    """The times that so many interactions are at or after. The only step that holds a whole column: 8 bytes an interaction."""
    times = np.array(timestamps[:])
    places = [len(times) - count for count in counts]
    times.partition(places)
    return [int(times[place]) for place in places]


def _targets(begins: Array, entries: Array, exits: Array, target: str) -> Array:
    """int64 (n, 2): (user, place) of the first or the last of the user's interactions [entry, exit) in a period."""
    places = entries if target == "first" else exits - 1
    users = np.flatnonzero((entries < exits) & (places > begins))
    return np.stack([users, places[users]], 1)
