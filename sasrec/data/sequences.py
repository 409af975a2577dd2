"""The prepared data as flat arrays on disk: the reader that training uses, and the only description of the layout.

items.npy int32 (interactions,): ids 1..n, users one after the other, each in time order; offsets.npy int64
(users + 1,); timestamps.npy int64 and ratings.npy float32 (interactions,), where the data has them; train_ends.npy int64
(users,): user u trains on items[offsets[u] : train_ends[u]]; test.npy and validation.npy int64 (targets, 2): (user, place of
the target in items), users ascending; negatives.npy, popular_negatives.npy (of test) and validation_negatives.npy int32
(targets, candidates), row by row their candidates, 0 where a user has too few; catalogue.csv (id, original, title,
categories joined with |; row order by id), users.csv (id, original; user u of the arrays has id u + 1), stats.json.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sasrec.errors import UserError
from sasrec.files import read_json

Array = np.ndarray[Any, Any]
Ints = NDArray[np.int64]

Part = Literal["validation", "test"]

# Interactions held at once where all of them are gone through.
ROWS = 1 << 20


@dataclass(frozen=True)
class Held:
    """What is held out for one part. users: int64 (n,), ascending, one target each; positions: int64 (n,), where the target is
    in items; its history is everything of the user before it. negatives: int32 (n, candidates), 0 = none;
    popular_negatives: the same, drawn by popularity, for test only."""

    users: Ints
    positions: Ints
    negatives: NDArray[np.int32]
    popular_negatives: NDArray[np.int32] | None


@dataclass
class Sequences:
    """Sequences of users 0..users-1 of items 1..items_count, and what of them is for training, validation and test."""

    items: NDArray[np.int32]
    offsets: Ints
    timestamps: Ints | None
    ratings: NDArray[np.float32] | None
    train_ends: Ints
    test: Ints
    validation: Ints
    negatives: NDArray[np.int32]
    validation_negatives: NDArray[np.int32]
    popular_negatives: NDArray[np.int32]
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
                _array(path, "train_ends", np.int64, 1),
                _array(path, "test", np.int64, 2),
                _array(path, "validation", np.int64, 2),
                _array(path, "negatives", np.int32, 2),
                _array(path, "validation_negatives", np.int32, 2),
                _array(path, "popular_negatives", np.int32, 2),
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
        begins, ends = self.offsets[:-1], self.offsets[1:]
        if len(self.train_ends) != self.users or ((self.train_ends < begins) | (self.train_ends > ends)).any():
            return "train_ends.npy does not fit offsets.npy"
        for name in ("test", "validation"):
            if (problem := self._target_problem(getattr(self, name))) is not None:
                return f"{name}.npy {problem}"
        for name in ("negatives", "validation_negatives", "popular_negatives"):
            array, targets = getattr(self, name), self.validation if name == "validation_negatives" else self.test
            if len(array) != len(targets):
                return f"{name}.npy has {len(array)} rows for {len(targets)} targets"
            if array.size and (int(array.min()) < 0 or int(array.max()) > self.items_count):
                return f"{name}.npy holds ids that are not in the catalogue"
        return None

    def _target_problem(self, targets: Ints) -> str | None:
        """What is wrong with (user, place) rows, or None."""
        if targets.shape[1] != 2:
            return f"has {targets.shape[1]} columns for user and place"
        users, places = targets.T
        if (np.diff(users) < 1).any() or (users < 0).any() or (users >= self.users).any():
            return "names users that do not exist, or not in ascending order"
        if ((places <= self.offsets[users]) | (places >= self.offsets[users + 1])).any():
            return "holds a target without a history, or outside its user's sequence"
        if (places < self.train_ends[users]).any():
            return "holds a target that is trained on"
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

    def held(self, part: Part) -> Held:
        if part == "test":
            users, positions = np.ascontiguousarray(self.test.T)
            return Held(users, positions, self.negatives, self.popular_negatives)
        users, positions = np.ascontiguousarray(self.validation.T)
        return Held(users, positions, self.validation_negatives, None)

    def known(self, part: Part) -> NDArray[np.bool_]:
        """bool (interactions,): what is known when the targets of `part` are asked for. Of validation: the training part. Of
        test: everything but the test targets, and with a cut in time everything before it."""
        if part == "validation":
            return training_part(self.offsets, self.train_ends)
        if self.stats["split"]["split"] == "temporal":
            assert self.timestamps is not None
            return np.asarray(self.timestamps < self.stats["split"]["test_cut"])
        known = np.ones(len(self.items), bool)
        known[self.test[:, 1]] = False
        return known


def user_ranges(offsets: Array, rows: int) -> Iterator[tuple[int, int]]:
    """Users (begin, end) one range after the other, each of at most `rows` rows, or of a single user with more.
    offsets: int64 (users + 1,)."""
    begin = 0
    while begin < len(offsets) - 1:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + rows, side="right")) - 1)
        yield begin, end
        begin = end


def training_part(offsets: Ints, train_ends: Ints) -> NDArray[np.bool_]:
    """bool (interactions,): which are trained on."""
    # One where a training part begins, minus one where it ends, added up: two bytes a row and no list of places.
    steps = np.zeros(int(offsets[-1]) + 1, np.int8)
    np.add.at(steps, offsets[:-1], 1)
    np.subtract.at(steps, train_ends, 1)
    return np.cumsum(steps[:-1], dtype=np.int8, out=steps[:-1]).view(np.bool_)


class Readable(Protocol):
    """An array of items, or a column of them in a file (`spool.Column`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Array: ...


def training_items(items: Readable, offsets: Array, train_ends: Array, rows: int) -> Iterator[tuple[int, Array, Array]]:
    """What is trained on, some users at a time: the first of these users, whose each item is, counted from that user, and
    the items. rows: how many interactions there are at a time, if no user has more."""
    for first, last in user_ranges(offsets, rows):
        begin = int(offsets[first])
        trained = training_part(offsets[first : last + 1] - begin, train_ends[first:last] - begin)
        owner = np.repeat(np.arange(last - first), train_ends[first:last] - offsets[first:last])
        yield first, owner, items[begin : int(offsets[last])][trained]


def training_counts(items: Readable, offsets: Array, train_ends: Array, n_items: int) -> Array:
    """int64 (n_items + 1,): how often each item occurs in the training part; place 0 is padding."""
    counts = np.zeros(n_items + 1, np.int64)
    for _, _, own in training_items(items, offsets, train_ends, ROWS):
        counts += np.bincount(own, minlength=n_items + 1)
    return counts


def read_catalogue(path: Path | str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(original id, title, categories) of the items 1..n of the store at `path`, in that order."""
    with open(Path(path) / "catalogue.csv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        return [(original, title, parted(categories)) for _, original, title, categories in rows]


def joined(categories: tuple[str, ...]) -> str:
    """Categories as catalogue.csv holds them: with `|` between; one in a name is written `\\|`, and a backslash twice."""
    return "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in categories)


def parted(categories: str) -> tuple[str, ...]:
    """The inverse of `joined`."""
    if "\\" not in categories:
        return tuple(categories.split("|")) if categories else ()
    names = re.findall(r"(?:[^\\|]|\\.)+", categories, re.DOTALL)
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


def _array(path: Path, name: str, dtype: type, dimensions: int) -> Array:
    array: Array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{name}.npy is {array.dtype} with {array.ndim} dimensions")
    return array
