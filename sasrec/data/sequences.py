"""The prepared data as flat arrays on disk: the reader that training uses, and the only description of the layout.

items.npy int32 (interactions,): ids 1..n, users one after the other, each in time order; offsets.npy int64
(users + 1,); timestamps.npy int64 and ratings.npy float32 (interactions,), where the data has them; negatives.npy and
validation_negatives.npy int32 (evaluated users, candidates), 0 where a user has too few unseen items; catalogue.csv
(id, original, title, categories joined with |; row order by id), users.csv (id, original; user u of the arrays has id
u + 1), stats.json.
"""

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sasrec.errors import UserError
from sasrec.files import read_json

Array = np.ndarray[Any, Any]
Ints = NDArray[np.int64]

EVALUABLE = 3  # interactions: one to test on, one to validate on, one to start from


@dataclass
class Sequences:
    """Sequences of users 0..users-1 of items 1..items_count. Leave-one-out: the last item of a user is the test target,
    the last but one the validation target, the rest is for training; users with fewer than 3 train on everything."""

    items: NDArray[np.int32]
    offsets: Ints
    timestamps: Ints | None
    ratings: NDArray[np.float32] | None
    negatives: NDArray[np.int32]
    validation_negatives: NDArray[np.int32]
    stats: dict[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> "Sequences":
        """Map the store at `path` into memory. Raises UserError where files are missing or do not fit together."""
        path = Path(path)
        try:
            stats = read_json(path / "stats.json")
            store = cls(
                _array(path, "items", np.int32, 1),
                _array(path, "offsets", np.int64, 1),
                _array(path, "timestamps", np.int64, 1) if (path / "timestamps.npy").exists() else None,
                _array(path, "ratings", np.float32, 1) if (path / "ratings.npy").exists() else None,
                _array(path, "negatives", np.int32, 2),
                _array(path, "validation_negatives", np.int32, 2),
                stats,
            )
            problem = store._problem()
        except FileNotFoundError as error:
            problem = f"{Path(str(error.filename)).name} is missing"
        except (ValueError, KeyError, TypeError, EOFError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise UserError(f"the prepared data in {path} cannot be used: {problem}; run the prepare stage again")
        return store

    def _problem(self) -> str | None:
        """What does not fit together, or None."""
        if self.stats["users"] != self.users or self.stats["interactions"] != len(self.items):
            return "stats.json and the arrays have different counts"
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.items) or (np.diff(self.offsets) < 1).any():
            return "offsets.npy does not fit items.npy"
        if int(self.items.min()) < 1 or int(self.items.max()) > self.items_count:
            return "items.npy holds ids that are not in the catalogue"
        for name in ("timestamps", "ratings"):
            array = getattr(self, name)
            if array is not None and len(array) != len(self.items):
                return f"{name}.npy does not fit items.npy"
        for name in ("negatives", "validation_negatives"):
            array = getattr(self, name)
            if len(array) != len(self.evaluated):
                return f"{name}.npy has {len(array)} rows for {len(self.evaluated)} evaluated users"
            if array.size and (int(array.min()) < 0 or int(array.max()) > self.items_count):
                return f"{name}.npy holds ids that are not in the catalogue"
        return None

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def items_count(self) -> int:
        """n: items have the ids 1..n."""
        return int(self.stats["items"])

    @cached_property
    def lengths(self) -> Ints:
        """int64 (users,)"""
        return np.diff(self.offsets)

    @cached_property
    def evaluated(self) -> Ints:
        """int64 (evaluated users,): users with at least 3 interactions, ascending; rows of the negatives."""
        return np.flatnonzero(self.lengths >= EVALUABLE)

    @cached_property
    def train_ends(self) -> Ints:
        """int64 (users,): user u trains on items[offsets[u] : train_ends[u]]."""
        return np.where(self.lengths >= EVALUABLE, self.offsets[1:] - 2, self.offsets[1:])

    def validation_positions(self) -> Ints:
        """int64 (evaluated users,): where the validation target is in items; the history is all of the user before."""
        positions: Ints = self.offsets[self.evaluated + 1] - 2
        return positions

    def test_positions(self) -> Ints:
        """int64 (evaluated users,): where the test target is in items; the history includes the validation target."""
        positions: Ints = self.offsets[self.evaluated + 1] - 1
        return positions

    def train_counts(self) -> Ints:
        """int64 (items_count + 1,): how often each item occurs in the training parts; place 0 is padding."""
        training = np.ones(len(self.items), bool)
        training[self.validation_positions()] = False
        training[self.test_positions()] = False
        return np.bincount(self.items[training], minlength=self.items_count + 1)


def read_catalogue(path: Path | str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(original id, title, categories) of the items 1..n of the store at `path`, in that order."""
    with open(Path(path) / "catalogue.csv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        return [
            (original, title, tuple(categories.split("|")) if categories else ()) for _, original, title, categories in rows
        ]


def _array(path: Path, name: str, dtype: type, dimensions: int) -> Array:
    array: Array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{name}.npy is {array.dtype} with {array.ndim} dimensions")
    return array
