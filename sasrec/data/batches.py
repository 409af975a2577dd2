"""From stored sequences to training batches: windows, batches of like length, negatives. No loop over users anywhere.

Everything random is drawn from a generator seeded with (seed, epoch), so that an epoch can be repeated on its own: a run
that is killed and resumed sees exactly the batches of one that was not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sasrec.data.sequences import training_counts, training_items

Ints = NDArray[np.int64]

# packed: windows drawn whatever their lengths, several in a row; shuffled: the same windows, each padded to the longest;
# bucketed: windows of like length, each in a row of its own.
Batching = Literal["packed", "shuffled", "bucketed"]

# Batches that are sorted by length together; long enough to leave almost no padding, short enough to stay random.
BATCHES_SORTED_TOGETHER = 50

# Draws of a negative that hits the history of one of several users, before any item is taken.
ROUNDS = 100


class Store(Protocol):
    """What training needs of `sasrec.data.sequences.Sequences`."""

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def train_ends(self) -> NDArray[np.int64]: ...
    @property
    def items_count(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """histories: (rows, length) item ids, 0 = padding on the left. targets: (rows, length), the item that follows each
    position, 0 where there is padding. users: (rows, length), the index of the user whose position it is. windows: (rows,
    length), which window of its row a position is in, counted from 1, 0 where there is padding; None where each row holds
    one window. places: (rows, length), where the event of each position is in the store, -1 where there is padding; its
    target is at the place after it."""

    histories: Ints
    targets: Ints
    users: Ints
    windows: Ints | None = None
    places: Ints | None = None


@dataclass(frozen=True)
class Epoch:
    """count: how many batches; positions: real positions in all of them together."""

    count: int
    positions: int
    batches: Iterator[Batch]


def windows(offsets: Ints, ends: Ints, max_len: int, every: bool, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Cut the training part [offsets[u], ends[u]) of each user into windows of up to `max_len` (input, target) pairs.

    Returns (users, starts, stops): the inputs of a window are items[start:stop], its targets items[start + 1:stop + 1].
    Without `every` there is one window a user, its last pairs. With it every pair is in exactly one window, and the place
    of the cuts is drawn anew for each epoch, so that no item is forever at the start of a window with no history.
    """
    pairs = np.maximum(ends - offsets[:-1] - 1, 0)
    users = np.flatnonzero(pairs > 0)
    pairs, last = pairs[users], ends[users] - 1
    if not every:
        return users, last - np.minimum(pairs, max_len), last
    # The first window from the right is `shift` pairs long where the history needs more than one window.
    shift = np.where(pairs > max_len, rng.integers(1, max_len + 1, len(users)), np.minimum(pairs, max_len))
    count = 1 + -(-(pairs - shift) // max_len)
    owner = np.repeat(np.arange(len(users)), count)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)  # 0 is the rightmost window
    stops = last[owner] - np.where(number == 0, 0, shift[owner] + (number - 1) * max_len)
    lengths = np.where(number == 0, shift[owner], max_len)
    starts = np.maximum(stops - lengths, (last - pairs)[owner])
    return users[owner], starts, stops


def left_placed(starts: Ints, stops: Ints, length: int) -> Ints:
    """start..stop-1 of each row, (rows, length), padded with -1 on the left."""
    index = stops[:, None] - length + np.arange(length)
    return np.where(index >= starts[:, None], index, -1)


def items_at(items: NDArray[np.int32], places: Ints) -> Ints:
    """The items at `places`, 0 where those are -1."""
    real = places >= 0
    return np.where(real, items[np.where(real, places, 0)], 0).astype(np.int64)


def left_padded(items: NDArray[np.int32], starts: Ints, stops: Ints, length: int) -> Ints:
    """items[start:stop] of each row, (rows, length), padded with 0 on the left."""
    return items_at(items, left_placed(starts, stops, length))


def packed_rows(lengths: Ints) -> tuple[Ints, Ints]:
    """Lay windows of `lengths` side by side in rows as long as the longest: decreasing first fit.

    Returns (row of each window, how many positions of the row are to the right of it).
    """
    rows, taken = np.zeros_like(lengths), np.zeros_like(lengths)
    capacity = int(lengths.max())
    filled: list[int] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        row = next((row for row, used in enumerate(filled) if used + length <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        rows[i], taken[i] = row, filled[row]
        filled[row] += length
    return rows, taken


def packed_batch(items: NDArray[np.int32], users: Ints, starts: Ints, stops: Ints) -> Batch:
    """Windows of `windows`, several in a row, filled from the right end."""
    lengths = stops - starts
    rows, taken = packed_rows(lengths)
    length = int(lengths.max())
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # Windows of a row are numbered from the right; what matters is that neighbours differ.
    number = np.zeros_like(rows)
    by_row = np.lexsort((taken, rows))
    number[by_row] = 1 + np.arange(len(rows)) - np.searchsorted(rows[by_row], rows[by_row])
    row, column = rows[owner], (length - taken - lengths)[owner] + inside
    histories, targets, owners, numbers = np.zeros((4, int(rows.max()) + 1, length), np.int64)
    place = starts[owner] + inside
    places = np.full_like(histories, -1)
    places[row, column] = place
    histories[row, column] = items[place]
    targets[row, column] = items[place + 1]
    owners[row, column] = users[owner]
    numbers[row, column] = number[owner]
    return Batch(histories, targets, owners, numbers, places)


def padded_batch(items: NDArray[np.int32], users: Ints, starts: Ints, stops: Ints) -> Batch:
    """Windows of `windows`, a row each."""
    length = int((stops - starts).max())
    places = left_placed(starts, stops, length)
    targets = left_padded(items, starts + 1, stops + 1, length)
    return Batch(items_at(items, places), targets, np.repeat(users[:, None], length, 1), None, places)


def epoch_batches(
    store: Store,
    max_len: int,
    batch_size: int,
    every: bool,
    seed: int,
    epoch: int,
    batching: Batching = "packed",
    min_batches: int = 1,
) -> Epoch:
    """The batches of one epoch, in random order: of `batch_size` windows, or fewer where that would make fewer than
    `min_batches` of them. Every window is in one batch."""
    rng = np.random.default_rng([seed, epoch, 0])
    users, starts, stops = windows(np.asarray(store.offsets), store.train_ends, max_len, every, rng)
    batch_size = max(1, min(batch_size, len(users) // min_batches))
    order = rng.permutation(len(users))
    if batching == "bucketed":
        lengths = (stops - starts)[order]
        pool = np.arange(len(order)) // (batch_size * BATCHES_SORTED_TOGETHER)
        order = order[np.lexsort((lengths, pool))]
    batches = rng.permutation(-(-len(order) // batch_size))

    def generate() -> Iterator[Batch]:
        for number in batches:
            own = order[number * batch_size : (number + 1) * batch_size]
            layout = packed_batch if batching == "packed" else padded_batch
            yield layout(store.items, users[own], starts[own], stops[own])

    return Epoch(len(batches), int((stops - starts).sum()), generate())


# Largest bit table of (user, item) pairs, in bytes; beyond it pairs are looked up in sorted lists, 15 times slower.
BIT_TABLE = 2**28

# Interactions gone through at once to make the table or the lists: little beside what a step of training takes.
ROWS = 1 << 17


class Seen:
    """Which (user, item) pairs are in the training part. counts: (users,) how many items of each.

    A bit a pair where that is little; else the items of each user in ascending order, items[begins[user] : begins[user + 1]],
    once each, which is no more than the training part itself.
    """

    def __init__(self, store: Store) -> None:
        self.stride = store.items_count + 1
        offsets, ends = np.asarray(store.offsets), store.train_ends
        users = len(ends)
        self.counts = np.zeros(users, np.int64)
        size = users * self.stride // 8 + 1
        self.bits = np.zeros(size, np.uint8) if size <= BIT_TABLE else None
        self.items = np.empty(0 if self.bits is not None else int((ends - offsets[:-1]).sum()), np.int32)
        taken = 0
        for first, owner, items in training_items(store.items, offsets, ends, ROWS):
            keys = owner * self.stride + items
            keys.sort()
            keys = keys[np.diff(keys, prepend=-1) != 0]
            if not len(keys):
                continue
            owner = keys // self.stride
            self.counts[first : first + owner[-1] + 1] = np.bincount(owner)
            if self.bits is None:
                self.items[taken : taken + len(keys)] = keys - owner * self.stride
                taken += len(keys)
            else:
                keys += first * self.stride
                byte = keys >> 3
                begins = np.flatnonzero(np.diff(byte, prepend=-1))
                # A byte may hold the last pairs of the users before, too.
                self.bits[byte[begins]] |= np.bitwise_or.reduceat((1 << (keys & 7)).astype(np.uint8), begins)
        self.items = self.items[:taken]
        self.begins = np.concatenate([[0], np.cumsum(self.counts)])
        self.halvings = int(self.counts.max(initial=0)).bit_length()

    def __call__(self, users: Ints, items: Ints) -> NDArray[np.bool_]:
        if self.bits is not None:
            keys = users * self.stride + items
            return (self.bits[keys >> 3] >> (keys & 7).astype(np.uint8) & 1).astype(bool)
        if not len(self.items):
            return np.zeros(len(users), bool)
        # The first item that is not below, by halving the user's own list.
        low, end = self.begins[users], self.begins[users + 1]
        high = end.copy()
        for _ in range(self.halvings):
            middle = (low + high) >> 1
            below = self.items[np.minimum(middle, len(self.items) - 1)] < items
            below &= middle < high
            low = np.where(below, middle + 1, low)
            high = np.where(below, high, middle)
        return (low < end) & (self.items[np.minimum(low, len(self.items) - 1)] == items)


class NegativeSampler:
    """Uniform items, or uniform items that are not in the user's training history; for a whole batch also by popularity."""

    def __init__(self, store: Store, unseen: bool, by_popularity: bool = False) -> None:
        self.items = store.items_count
        self.seen = Seen(store) if unseen else None
        self.counts: Ints | None = None  # (items + 1,) in the training parts
        if by_popularity:
            self.counts = training_counts(store.items, np.asarray(store.offsets), store.train_ends, self.items)
            self.cumulative = self.counts.cumsum()

    def draw(self, users: Ints, shape: tuple[int, ...], rng: np.random.Generator) -> Ints:
        """Item ids of `shape`, whose first axis is that of `users`. One vectorised draw, and one more for each round of
        those that hit the history. A user who has seen everything gets any item."""
        drawn = rng.integers(1, self.items + 1, shape)
        if self.seen is None:
            return drawn
        flat = drawn.reshape(-1)
        owner = np.repeat(users, int(np.prod(shape[1:])))
        pending = np.flatnonzero(self.seen(owner, flat))
        pending = pending[self.seen.counts[owner[pending]] < self.items]
        while len(pending):
            flat[pending] = rng.integers(1, self.items + 1, len(pending))
            pending = pending[self.seen(owner[pending], flat[pending])]
        return flat.reshape(shape)

    def draw_by_row(self, users: Ints, real: NDArray[np.bool_], count: int, rng: np.random.Generator) -> Ints:
        """(rows, count) item ids that each row shares: where histories count, not in that of any user of the row. users,
        real: (rows, length), whose position it is, and whether it is one. Where the users of a row have seen nearly
        everything, any item."""
        drawn = rng.integers(1, self.items + 1, (len(users), count))
        if self.seen is None:
            return drawn
        row, column = (real & (np.diff(np.where(real, users, -1), axis=1, prepend=-1) != 0)).nonzero()
        begins = np.searchsorted(row, np.arange(len(users)))
        owner = users[row, column]
        pending = np.ones(drawn.shape, bool)
        for _ in range(ROUNDS):
            hit = self.seen(np.repeat(owner, count), drawn[row].ravel()).reshape(-1, count)
            pending = np.logical_or.reduceat(hit, begins, axis=0)
            if not pending.any():
                break
            drawn[pending] = rng.integers(1, self.items + 1, int(pending.sum()))
        return drawn

    def draw_shared(self, count: int, rng: np.random.Generator) -> Ints:
        """`count` item ids, with repetition, for a whole batch: uniform, or by popularity, where an item without training
        interactions is never drawn."""
        if self.counts is None:
            return rng.integers(1, self.items + 1, count)
        drawn = rng.integers(0, self.cumulative[-1], count)
        return np.searchsorted(self.cumulative, drawn, side="right")

    def log_expected(self, drawn: Ints) -> NDArray[np.float32] | None:
        """How often each item of a shared draw was expected in it, (n,): log(n Q(item)), Q its share of the training
        interactions. None where the draw is uniform, as all are then expected alike."""
        if self.counts is None:
            return None
        return np.log(len(drawn) * self.counts[drawn] / self.cumulative[-1]).astype(np.float32)
