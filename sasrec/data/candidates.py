"""The candidate negatives of the sampled protocols."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sasrec.data.sequences import user_ranges
from sasrec.data.spool import Array, Column
from sasrec.data.table import Numbers

CHUNK = 1 << 22  # cells handled at a time; another number draws other candidates
ROWS = 1 << 21  # of what was seen, held at a time
ROUNDS = 5  # of drawing by popularity with repetition, before the rest is drawn from a list of all items


@dataclass(frozen=True)
class _Seen:
    """What users first, first + 1, ... have seen, as keys `user * stride + item` in ascending order, users counted from the
    first; `starts`: where each begins in `keys`."""

    first: int
    stride: int
    keys: Array
    starts: Array

    def has(self, users: Array, items: Array) -> Array:
        """bool, of the shape that users and items have together."""
        keys = (users - self.first) * self.stride + items
        found: Array = self.keys[np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)] == keys
        return found

    def items_at(self, users: Array, places: Array) -> Array:
        """The unseen item at each place, which is the place + 1 and one more for every seen item before it.

        The j-th seen item s has s - 1 - j unseen ones below it. The user stays in the high part, so that one search
        serves all users."""
        owner = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        below = self.keys - 1 - np.arange(len(self.keys)) + self.starts[owner]
        who = users - self.first
        before = np.searchsorted(below, (who * self.stride + places).ravel(), side="right").reshape(places.shape)
        found: Array = places + 1 + before - self.starts[who]
        return found


class Unseen:
    """The items each user never interacted with, by their place in ascending order, without a list of them.

    items: (interactions,) ids 1..n_items, offsets: (users + 1,). folder: where what was seen goes, in a temporary file.
    """

    def __init__(self, items: Numbers, offsets: Array, n_items: int, folder: Path | None = None) -> None:
        self.stride = n_items + 1
        self.items = Column(np.int32, folder)  # of each user those seen, once each, ascending
        counts = np.zeros(len(offsets) - 1, np.int64)
        for first, last in user_ranges(offsets, ROWS):
            owner = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
            keys = owner * self.stride + items[int(offsets[first]) : int(offsets[last])]
            keys.sort()
            keys = keys[np.append(True, keys[1:] != keys[:-1])]
            owner, seen = np.divmod(keys, self.stride)
            self.items.append(seen)
            counts[first:last] = np.bincount(owner, minlength=last - first)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.counts = n_items - counts  # (users,) unseen items

    def _near(self, users: Array) -> Iterator[tuple[slice, _Seen]]:
        """Parts of `users`, ascending, with what the users of each have seen."""
        if not len(users):
            return
        first, last = int(users[0]), int(users[-1]) + 1
        for begin, end in user_ranges(self.starts[first : last + 1], ROWS):
            part = slice(*np.searchsorted(users, [first + begin, first + end]).tolist())
            if part.start == part.stop:
                continue
            starts = self.starts[first + begin : first + end + 1]
            owner = np.repeat(np.arange(end - begin), np.diff(starts))
            keys = owner * self.stride + self.items[int(starts[0]) : int(starts[-1])]
            yield part, _Seen(first + begin, self.stride, keys, starts - starts[0])

    def draw(self, users: Array, count: int, seed: list[int]) -> Iterator[Array]:
        """int32 (len(users), count), some rows at a time: for each of `users`, ascending, uniform unseen items without
        repetition, ascending. A user with fewer unseen items gets all of them, then zeros. The same seed gives the same
        items."""
        random = np.random.default_rng(seed)
        rows = max(1, CHUNK // count)
        for begin in range(0, len(users), rows):  # chunks of users, to bound memory
            who = users[begin : begin + rows]
            places = _places(self.counts[who], count, random)
            drawn = np.zeros(places.shape, np.int32)
            for part, seen in self._near(who):
                own, at = who[part, None], places[part]
                drawn[part] = np.where(at < self.counts[own], seen.items_at(own, at), 0)
            yield drawn

    def draw_popular(self, users: Array, count: int, weights: Array, seed: list[int]) -> Iterator[Array]:
        """int32 (len(users), count), some rows at a time: for each of `users`, ascending, unseen items drawn one after the
        other without repetition, each in proportion to its weight among those left (the candidates of BERT4Rec, Sun et al.,
        arXiv 1904.06690), in the order of the draws. weights: int64 (n_items + 1,), how often each occurs; items of weight 0
        are never drawn. A user with fewer unseen items of some weight gets all of them, then zeros. The same seed gives the
        same items.

        Draws with repetition, of which those that repeat or were seen are passed over, have this distribution. What they
        have not found after a few rounds goes on as a race of exponential clocks over all items, which has it too (Efraimidis
        and Spirakis 2006), and takes a time that does not depend on how little is left.
        """
        random = np.random.default_rng(seed)
        ends = np.cumsum(weights)
        rows = max(1, CHUNK // (3 * count))
        for begin in range(0, len(users), rows):
            who = users[begin : begin + rows]
            drawn = np.zeros((len(who), count), np.int32)
            pending = np.arange(len(who))
            for _ in range(ROUNDS):
                new = np.searchsorted(ends, random.integers(0, ends[-1], (len(pending), 2 * count)), side="right")
                new[self._is_seen(who[pending], new)] = 0
                drawn[pending] = _first_distinct(np.concatenate([drawn[pending], new], 1), count)
                pending = pending[drawn[pending, -1] == 0]
            self._race(who, weights, drawn, pending, random)
            yield drawn

    def _is_seen(self, users: Array, items: Array) -> Array:
        """bool (len(users), n): which of `items`, (len(users), n) or (n,), each of `users` has seen."""
        items = np.broadcast_to(items, (len(users), items.shape[-1]))
        found = np.zeros(items.shape, bool)
        for part, seen in self._near(users):
            found[part] = seen.has(users[part, None], items[part])
        return found

    def _race(self, users: Array, weights: Array, drawn: Array, pending: Array, random: np.random.Generator) -> None:
        """Fill the zeros of the rows `pending` of `drawn`: the clock of each item rings after an exponential time of rate
        `weights`, and the first to ring are next."""
        count, items = drawn.shape[1], np.arange(self.stride)
        rows = max(1, CHUNK // self.stride)
        for begin in range(0, len(pending), rows):
            part = pending[begin : begin + rows]
            times = random.exponential(size=(len(part), self.stride)) / np.maximum(weights, 1)
            times[self._is_seen(users[part], items) | (weights == 0)] = np.inf
            np.put_along_axis(times, drawn[part].astype(np.int64), np.inf, 1)
            order = np.argsort(times, axis=1)[:, :count]
            order[np.isinf(np.take_along_axis(times, order, 1))] = 0
            drawn[part] = _first_distinct(np.concatenate([drawn[part], order], 1), count)


def _first_distinct(values: Array, count: int) -> Array:
    """(rows, count): the first `count` different numbers above 0 of each row, in their order, then zeros."""
    order = np.argsort(values, axis=1, kind="stable")
    in_order = np.take_along_axis(values, order, 1)
    repeated = np.zeros(values.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], 1)
    left_out = repeated | (values == 0)
    chosen = np.argsort(left_out, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(left_out, chosen, 1), 0, np.take_along_axis(values, chosen, 1))


def _places(unseen: Array, count: int, random: np.random.Generator) -> Array:
    """int64 (rows, count): distinct numbers below `unseen`, ascending. Where there are fewer than `count`: all of them,
    then numbers not below `unseen`."""
    places = np.empty((len(unseen), count), np.int64)
    scarce = unseen < 2 * count
    if scarce.any():
        # Rejection would wait long for the last free places: shuffle them all instead.
        order = random.random((int(scarce.sum()), 2 * count))
        order[np.arange(2 * count) >= unseen[scarce, None]] = 2.0
        places[scarce] = np.sort(np.argsort(order, axis=1, kind="stable")[:, :count], axis=1)
    todo = np.flatnonzero(~scarce)
    current = random.integers(0, unseen[todo, None], (len(todo), count))
    while len(todo):
        current.sort(axis=1)
        repeated = np.zeros(current.shape, bool)
        repeated[:, 1:] = current[:, 1:] == current[:, :-1]
        again = repeated.any(axis=1)
        places[todo[~again]] = current[~again]
        todo, current, repeated = todo[again], current[again], repeated[again]
        row = np.nonzero(repeated)[0]
        current[repeated] = random.integers(0, unseen[todo[row]])
    return places
