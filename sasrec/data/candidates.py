"""The candidate negatives of the sampled protocol."""

import numpy as np

from sasrec.data.table import Array

CHUNK = 1 << 22  # cells handled at a time


class Unseen:
    """The items each user never interacted with, by their place in ascending order, without a list of them.

    items: (interactions,) ids 1..n_items, offsets: (users + 1,).
    """

    def __init__(self, items: Array, offsets: Array, n_items: int) -> None:
        self.stride = n_items + 1
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        seen = np.sort(owner * self.stride + items)
        seen = seen[np.append(True, seen[1:] != seen[:-1])]
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
