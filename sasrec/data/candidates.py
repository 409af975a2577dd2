"""The candidate negatives of the sampled protocols."""

import numpy as np

from sasrec.data.table import Array

CHUNK = 1 << 22  # cells handled at a time
ROUNDS = 5  # of drawing by popularity with repetition, before the rest is drawn from a list of all items


class Unseen:
    """The items each user never interacted with, by their place in ascending order, without a list of them.

    items: (interactions,) ids 1..n_items, offsets: (users + 1,).
    """

    def __init__(self, items: Array, offsets: Array, n_items: int) -> None:
        self.stride = n_items + 1
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        seen = np.sort(owner * self.stride + items)
        seen = seen[np.append(True, seen[1:] != seen[:-1])]
        self.seen = seen
        self.starts = np.searchsorted(seen, np.arange(len(offsets)) * self.stride)
        self.counts = n_items - np.diff(self.starts)  # (users,) unseen items
        # How many unseen items lie below each seen one: the j-th seen item s has s - 1 - j. The owner stays in the high
        # part, so that one search serves all users.
        owner = np.repeat(np.arange(len(self.counts)), np.diff(self.starts))
        self.below = seen - 1 - np.arange(len(seen)) + self.starts[owner]

    def draw(self, users: Array, count: int, seed: list[int]) -> Array:
        """int32 (len(users), count): for each of `users`, uniform unseen items without repetition, ascending. A user
        with fewer unseen items gets all of them, then zeros. The same seed gives the same items."""
        random = np.random.default_rng(seed)
        drawn = np.zeros((len(users), count), np.int32)
        rows = max(1, CHUNK // count)
        for begin in range(0, len(users), rows):  # chunks of users, to bound memory
            part = slice(begin, begin + rows)
            who = users[part, None]
            places = _places(self.counts[users[part]], count, random)
            # The item at place p is p + 1 and one more for every seen item before it.
            before = np.searchsorted(self.below, (who * self.stride + places).ravel(), side="right")
            before = before.reshape(places.shape) - self.starts[who]
            drawn[part] = np.where(places < self.counts[who], places + 1 + before, 0)
        return drawn

    def draw_popular(self, users: Array, count: int, weights: Array, seed: list[int]) -> Array:
        """int32 (len(users), count): for each of `users`, unseen items drawn one after the other without repetition, each in
        proportion to its weight among those left (the candidates of BERT4Rec, Sun et al., arXiv 1904.06690), in the order of
        the draws. weights: int64 (n_items + 1,), how often each occurs; items of weight 0 are never drawn. A user with fewer
        unseen items of some weight gets all of them, then zeros. The same seed gives the same items.

        Draws with repetition, of which those that repeat or were seen are passed over, have this distribution. What they
        have not found after a few rounds goes on as a race of exponential clocks over all items, which has it too (Efraimidis
        and Spirakis 2006), and takes a time that does not depend on how little is left.
        """
        random = np.random.default_rng(seed)
        drawn = np.zeros((len(users), count), np.int32)
        ends = np.cumsum(weights)
        rows = max(1, CHUNK // (3 * count))
        for begin in range(0, len(users), rows):
            pending = np.arange(begin, min(begin + rows, len(users)))
            for _ in range(ROUNDS):
                new = np.searchsorted(ends, random.integers(0, ends[-1], (len(pending), 2 * count)), side="right")
                new[self._is_seen(users[pending, None], new)] = 0
                drawn[pending] = _first_distinct(np.concatenate([drawn[pending], new], 1), count)
                pending = pending[drawn[pending, -1] == 0]
            self._race(users, weights, drawn, pending, random)
        return drawn

    def _is_seen(self, users: Array, items: Array) -> Array:
        keys = users * self.stride + items
        found: Array = self.seen[np.minimum(np.searchsorted(self.seen, keys), len(self.seen) - 1)] == keys
        return found

    def _race(self, users: Array, weights: Array, drawn: Array, pending: Array, random: np.random.Generator) -> None:
        """Fill the zeros of the rows `pending` of `drawn`: the clock of each item rings after an exponential time of rate
        `weights`, and the first to ring are next."""
        count, items = drawn.shape[1], np.arange(self.stride)
        rows = max(1, CHUNK // self.stride)
        for begin in range(0, len(pending), rows):
            part = pending[begin : begin + rows]
            times = random.exponential(size=(len(part), self.stride)) / np.maximum(weights, 1)
            times[self._is_seen(users[part, None], items) | (weights == 0)] = np.inf
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
