"""Scorers without learning, which anything learned has to beat: popularity, overall and recent, the first-order Markov
chain, and item-based nearest neighbours."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sasrec.data.batches import Ints

# Of ItemKNN. Users with thousands of items say little about which two belong together, and cost the square of that.
LONGEST = 500
# Co-occurrences held at once; bounds the memory whatever the catalogue.
BLOCK_ELEMENTS = 2_000_000
# Far below the differences of similarities, far above the rounding of a double.
NEXT_TO_NOTHING = 1e-9


@dataclass(frozen=True)
class Popularity:
    """The score of an item is how often it occurs in the known part of all histories."""

    counts: NDArray[np.int64]  # (items + 1,)

    @staticmethod
    def fit(items: NDArray[np.int32], known: NDArray[np.bool_], items_count: int) -> "Popularity":
        """items: all interactions; known: which of them may be used."""
        return Popularity(np.bincount(items[known], minlength=items_count + 1))

    def __call__(self, histories: Tensor, users: Ints) -> Tensor:
        return torch.from_numpy(self.counts).double().repeat(len(histories), 1)

    @property
    def nbytes(self) -> int:
        return self.counts.astype(np.int32).nbytes


@dataclass(frozen=True)
class Markov:
    """The score of an item is how often it followed the last item of the history; popularity, scaled below one count,
    orders the items that never did."""

    starts: NDArray[np.int64]  # (items + 2,) where the followers of each item begin
    followers: NDArray[np.int32]
    counts: NDArray[np.int32]
    popularity: Popularity

    @staticmethod
    def fit(items: NDArray[np.int32], known: NDArray[np.bool_], items_count: int, offsets: Ints) -> "Markov":
        first = np.zeros(len(items), bool)
        first[offsets[:-1][offsets[:-1] < len(items)]] = True
        at = np.flatnonzero(known & ~first)
        pairs = items[at - 1].astype(np.int64) * (items_count + 1) + items[at]
        unique, counts = np.unique(pairs, return_counts=True)
        starts = np.searchsorted(unique // (items_count + 1), np.arange(items_count + 2))
        followers = (unique % (items_count + 1)).astype(np.int32)
        return Markov(starts, followers, counts.astype(np.int32), Popularity.fit(items, known, items_count))

    def __call__(self, histories: Tensor, users: Ints) -> Tensor:
        scores = self.popularity(histories, users) / (1.0 + self.popularity.counts.max())
        last = histories[:, -1].numpy()
        lengths = self.starts[last + 1] - self.starts[last]
        rows = np.repeat(np.arange(len(last)), lengths)
        at = np.repeat(self.starts[last], lengths) + np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        scores[torch.from_numpy(rows), torch.from_numpy(self.followers[at].astype(np.int64))] += torch.from_numpy(
            self.counts[at].astype(np.float64)
        )
        return scores

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.followers.nbytes + self.counts.nbytes + self.popularity.nbytes


@dataclass(frozen=True)
class RecentPopularity:
    """The score of an item is how often it occurs in the known interactions of all users in [t - window, t), where t is
    the time of the request; how often it does at any time before t, scaled below one count, orders the rest.

    Needs times that can be compared between users.
    """

    times: NDArray[np.int64]  # (known interactions,) ascending
    items: NDArray[np.int32]  # (known interactions,) in that order
    now: NDArray[np.int64]  # (users,) when each user's request is made
    window: int  # in the unit of the times
    items_count: int

    @staticmethod
    def fit(
        items: NDArray[np.int32], times: Ints, known: NDArray[np.bool_], items_count: int, now: Ints, window: int
    ) -> "RecentPopularity":
        """items, times: of all interactions; known: which of them may be used; now: (users,) times of the requests."""
        at = np.flatnonzero(known)
        at = at[np.argsort(times[at], kind="stable")]
        return RecentPopularity(times[at], items[at], now, window, items_count)

    def counts_before(self, moments: Ints) -> Ints:
        """(len(moments), items + 1): how often each item occurs before each moment, what is exactly at it not counted."""
        counts = np.empty((len(moments), self.items_count + 1), np.int64)
        running = np.zeros(self.items_count + 1, np.int64)
        begin = 0
        order = np.argsort(moments, kind="stable")
        for row, end in zip(order, np.searchsorted(self.times, moments[order], side="left"), strict=True):
            running += np.bincount(self.items[begin:end], minlength=len(running))
            counts[row] = running
            begin = end
        return counts

    def __call__(self, histories: Tensor, users: Ints) -> Tensor:
        past = self.counts_before(self.now[users])
        recent = past - self.counts_before(self.now[users] - self.window)
        return torch.from_numpy(recent + past / (1.0 + past.max(1, keepdims=True)))

    @property
    def nbytes(self) -> int:
        """Of the two counts an item that serve at one moment."""
        return 2 * 4 * (self.items_count + 1)


@dataclass(frozen=True)
class ItemKNN:
    """Item-based nearest neighbours on the end of the history (Sarwar et al. 2001; on sessions, Ludewig & Jannach 2018).

    Two items are as similar as the sets of users who have them: the cosine of their binary columns. The score of an item
    is the sum over the last items of the history of its similarity to each, where it is among that one's nearest, times
    1 / d^2, d = 1 for the last item, 2 for the one before. Popularity, scaled to next to nothing, orders the items of
    equal score.
    """

    nearest: sparse.csr_array  # (items + 1, items + 1) float32, in each row the similarities of that item's nearest
    last: int
    popularity: Popularity

    @staticmethod
    def fit(
        items: NDArray[np.int32],
        known: NDArray[np.bool_],
        items_count: int,
        offsets: Ints,
        neighbours: int,
        last: int,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> "ItemKNN":
        """items: all interactions, user u has offsets[u] to offsets[u + 1]; known: which of them may be used.

        neighbours: how many nearest each item keeps, of equals the lower ids; last: how many items of the history count.
        A user counts with the last LONGEST known items. block_elements: co-occurrences held at once, at the least a row.
        """
        sets = user_sets(items, known, items_count, offsets)
        counts = sets.sum(0)
        columns = sets.T.tocsr()
        # A row of the product has at most as many elements as its users have items together, and never more than there are.
        bound = np.cumsum(np.minimum(columns @ sets.sum(1), items_count + 1))
        edges = np.searchsorted(bound // block_elements, np.arange(bound[-1] // block_elements + 2))
        blocks = [
            nearest(columns[begin:end] @ sets, begin, counts, neighbours) for begin, end in pairwise(edges) if begin < end
        ]
        return ItemKNN(sparse.vstack(blocks, format="csr"), last, Popularity.fit(items, known, items_count))

    def __call__(self, histories: Tensor, users: Ints) -> Tensor:
        ends = histories[:, -self.last :].numpy()
        # Of 1, 1/d, 1/sqrt(d), 1/d^2, linear, 0.5^d and 0.8^d, this has the best validation NDCG@10 on MovieLens-1M
        # (0.106; 1/d: 0.100) and misses the best on Amazon Games by half a percent of it (0.0340).
        weights = 1.0 / np.arange(ends.shape[1], 0, -1) ** 2
        rows = np.repeat(np.arange(len(ends)), ends.shape[1])
        shape = (len(ends), len(self.popularity.counts))
        # Padding is row 0 of `nearest`, which is empty.
        weighted = sparse.csr_array((np.tile(weights, len(ends)), (rows, ends.ravel())), shape=shape)
        scores = torch.from_numpy((weighted @ self.nearest).toarray())
        counts = self.popularity.counts
        return scores.add_(torch.from_numpy(counts * (NEXT_TO_NOTHING / (1.0 + counts.max()))))

    @property
    def nbytes(self) -> int:
        arrays = (self.nearest.data, self.nearest.indices, self.nearest.indptr)
        return sum(array.nbytes for array in arrays) + self.popularity.nbytes


def user_sets(items: NDArray[np.int32], known: NDArray[np.bool_], items_count: int, offsets: Ints) -> sparse.csr_array:
    """(users, items + 1) int32, 1 where the item is among the last LONGEST known ones of the user."""
    before = np.concatenate([[0], np.cumsum(known)])  # how many are known before each position
    at = np.flatnonzero(known)
    user = np.searchsorted(offsets, at, side="right") - 1
    late = before[offsets[user + 1]] - before[at] <= LONGEST
    at, user = at[late], user[late]
    sets = sparse.csr_array((np.ones(len(at), np.int32), (user, items[at])), shape=(len(offsets) - 1, items_count + 1))
    sets.sum_duplicates()
    sets.data[:] = 1
    return sets


def nearest(together: sparse.csr_array, begin: int, counts: Ints, neighbours: int) -> sparse.csr_array:
    """The `neighbours` largest cosines of each row, float32 and of `together`'s shape; of equals those of lower columns.

    together: (rows, items + 1) users that the items begin, begin + 1, ... share with every item; counts: users of each.
    """
    together.sort_indices()
    row = np.repeat(np.arange(together.shape[0]), np.diff(together.indptr))
    other = row + begin != together.indices
    row, column, shared = row[other], together.indices[other], together.data[other]
    cosines = shared / np.sqrt(counts[row + begin] * counts[column].astype(np.float64))
    order = np.lexsort((-cosines, row))
    place = np.arange(len(row)) - np.searchsorted(row, row)  # order keeps the rows where they are
    kept = order[place < neighbours]
    return sparse.csr_array((cosines[kept].astype(np.float32), (row[kept], column[kept])), shape=together.shape)
