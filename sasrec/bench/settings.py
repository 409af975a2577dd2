"""What is timed: the study's own network and training, or a shape that others publish their times for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sasrec.config import ModelParams, TrainParams
from sasrec.data.batches import windows
from sasrec.data.sequences import Sequences

# Of the paper's training: one negative a position, the end of each history, batches of windows by chance, one constant rate.
PAPER = TrainParams(
    loss="bce",
    negatives=1,
    windows="last",
    precision="float32",
    min_batches=1,
    schedule="constant",
    warmup=0.0,
    weighting="batch",
)
# Steps of a turn: enough that the beginning of an epoch does not count, few enough that turns are short.
STEPS = 8


@dataclass(frozen=True)
class Setting:
    """random_items: the size of a catalogue that is made up, for steps alone; None: the prepared data. device: cpu or cuda,
    where this project's own code runs; the plain code is for the CPU alone."""

    name: str
    model: ModelParams
    train: TrainParams
    random_items: int | None = None
    device: str = "cpu"

    @property
    def shape(self) -> str:
        loss = self.train.loss + (f" {self.train.negatives}" if self.train.loss != "cross_entropy" else "")
        return (
            f"length {self.model.max_len}, hidden {self.model.hidden}, {self.model.blocks} blocks, {self.model.block}, dropout "
            f"{self.model.dropout:g}, batch {self.train.batch_size}, {loss}, windows {self.train.windows}"
        )


NAMED: Mapping[str, Setting] = {
    "s": Setting("s", ModelParams(max_len=50, hidden=50, blocks=2, dropout=0.5, block="original"), PAPER),
    "p": Setting("p", ModelParams(max_len=200, hidden=50, blocks=2, dropout=0.2, block="original"), PAPER),
    "large": Setting("large", ModelParams(max_len=50, hidden=128, blocks=2, dropout=0.2, block="original"), PAPER, 83_000),
}
NAMES = ("default", *NAMED)


def random_store(items: int, max_len: int, users: int) -> Sequences:
    """Histories of random items, each `max_len` pairs and two held-out items long."""
    rng = np.random.default_rng(0)
    length = max_len + 3
    offsets = np.arange(users + 1) * length
    held = np.stack([np.arange(users), offsets[1:] - 1], 1)
    none = np.zeros((users, 1), np.int32)
    stats: dict[str, Any] = {"users": users, "items": items, "interactions": users * length, "dataset": "random"}
    stats |= {"times": "order", "time_unit": None, "split": {"split": "leave_one_out"}}
    return Sequences(
        rng.integers(1, items + 1, users * length).astype(np.int32), offsets, None, None, offsets[1:] - 2, held,
        held - [0, 1], none, none, none, stats,
    )  # fmt: skip


def batch_size(store: Sequences, setting: Setting) -> int:
    """Windows of a batch when all of `store` is trained on: on small data `min_batches` makes it smaller."""
    return max(1, min(setting.train.batch_size, window_count(store, setting) // setting.train.min_batches))


def window_count(store: Sequences, setting: Setting) -> int:
    every = setting.train.windows == "all"
    return len(windows(store.offsets, store.train_ends, setting.model.max_len, every, np.random.default_rng(0))[0])


def some_users(store: Sequences, count: int) -> Sequences:
    """The store with `count` users, evenly over it, or all where there are fewer; the catalogue stays."""
    if count >= store.users:
        return store
    users = np.arange(count) * store.users // count
    lengths = store.lengths[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.repeat(store.offsets[users] - offsets[:-1], lengths) + np.arange(offsets[-1])
    moved = offsets[:-1] - store.offsets[users]
    rows: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for name in ("test", "validation"):
        targets = getattr(store, name)
        kept[name] = np.isin(targets[:, 0], users)
        own = targets[kept[name]]
        number = np.searchsorted(users, own[:, 0])
        rows[name] = np.stack([number, own[:, 1] + moved[number]], 1)
    return replace(
        store,
        items=store.items[place],
        offsets=offsets,
        timestamps=None if store.timestamps is None else store.timestamps[place],
        ratings=None if store.ratings is None else store.ratings[place],
        train_ends=store.train_ends[users] + moved,
        negatives=store.negatives[kept["test"]],
        popular_negatives=store.popular_negatives[kept["test"]],
        validation_negatives=store.validation_negatives[kept["validation"]],
        stats=store.stats | {"users": count, "interactions": int(offsets[-1])},
        **rows,
    )
