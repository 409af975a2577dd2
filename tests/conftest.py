"""Small stores that tests share, and the real data files where they are at hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from sasrec.data.sequences import Held, Part

ROOT = Path(__file__).parents[1]

# A slow machine makes no test fail.
settings.register_profile("timeless", deadline=None)
settings.load_profile("timeless")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class SmallStore:
    """Sequences given as lists of item ids, one a user, with what training and evaluation need of a prepared store. ratings,
    timestamps: of all events in the order of `items`, where the data has them."""

    sequences: list[list[int]]
    items_count: int
    candidates: int = 5
    stats: dict[str, Any] = field(default_factory=lambda: {"times": "comparable", "time_unit": "s"})
    ratings: NDArray[np.float32] | None = None
    timestamps: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        self.items: NDArray[np.int32] = np.array([item for s in self.sequences for item in s], np.int32)
        self.offsets: NDArray[np.int64] = np.cumsum([0] + [len(s) for s in self.sequences])
        self.evaluated = np.flatnonzero(np.diff(self.offsets) >= 3)
        self.negatives, self.validation_negatives, self.popular_negatives = (self._draw(seed) for seed in range(3))

    def held(self, part: Part) -> Held:
        """Leave-one-out."""
        ends = self.offsets[self.evaluated + 1]
        if part == "test":
            return Held(self.evaluated, ends - 1, self.negatives, self.popular_negatives)
        return Held(self.evaluated, ends - 2, self.validation_negatives, None)

    @cached_property
    def train_ends(self) -> NDArray[np.int64]:
        return np.where(np.diff(self.offsets) >= 3, self.offsets[1:] - 2, self.offsets[1:])

    def known(self, part: Part) -> NDArray[np.bool_]:
        """Of validation: the training part."""
        assert part == "validation"
        trained: NDArray[np.bool_] = np.arange(len(self.items)) < np.repeat(self.train_ends, np.diff(self.offsets))
        return trained

    def _draw(self, seed: int) -> NDArray[np.int32]:
        rng = np.random.default_rng(seed)
        rows = np.zeros((len(self.evaluated), self.candidates), np.int32)
        for row, user in enumerate(self.evaluated):
            unseen = np.setdiff1d(np.arange(1, self.items_count + 1), self.sequences[user])
            some = rng.permutation(unseen)[: self.candidates]
            rows[row, : len(some)] = some
        return rows


@pytest.fixture
def small_store() -> Callable[..., SmallStore]:
    return SmallStore


@pytest.fixture
def chains() -> SmallStore:
    """60 users who each walk through 40 items in order from a random start: learnable in seconds."""
    rng = np.random.default_rng(0)
    return SmallStore(
        [[int((start + i) % 40) + 1 for i in range(rng.integers(3, 30))] for start in rng.integers(0, 40, 60)], 40
    )
