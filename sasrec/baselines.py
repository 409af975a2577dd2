"""Scorers without learning, which anything learned has to beat: popularity, and the first-order Markov chain."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.batches import Ints


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
