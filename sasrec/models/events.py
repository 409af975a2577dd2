"""Histories as they enter a model: item ids alone, or with what is known of each event where the model asks for it.

A model says what it asks for in `event_inputs`, names of NAMES; one that has no such attribute takes ids alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.models.transfer import moved

NAMES = ("ratings", "times")

# By stats["time_unit"] of the prepared data.
A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Events:
    """items: (batch, length) ids, 0 = padding on the left. ratings: float32, times: float64, whole seconds since 1970, of
    the same shape, nan where unknown and at padding; None: all of them unknown. Sliced and split along the batch."""

    items: Tensor
    ratings: Tensor | None = None
    times: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Events":
        return Events(*(None if part is None else change(part) for part in (self.items, self.ratings, self.times)))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "Events":
        return self.each(lambda part: moved(part, device))

    def __getitem__(self, rows: Any) -> "Events":
        return self.each(lambda part: part[rows])

    def __len__(self) -> int:
        return len(self.items)

    def split(self, size: int) -> "list[Events]":
        return [self[at : at + size] for at in range(0, len(self), size)]


Histories = Tensor | Events


def on(histories: Histories, device: torch.device | str) -> Histories:
    """The histories on `device`."""
    return histories.to(device) if isinstance(histories, Events) else moved(histories, device)


def ids(histories: Histories) -> Tensor:
    """(batch, length) item ids."""
    return histories.items if isinstance(histories, Events) else histories


def asked_by(model: Any) -> tuple[str, ...]:
    """What a model wants to know of each event beside the item."""
    return getattr(model, "event_inputs", ())


def gather(store: Any, items: NDArray[np.int64], places: NDArray[np.int64] | None, asked: Sequence[str]) -> Histories:
    """items (batch, length), with what is `asked` for of the events at `places` of the store, of the same shape, -1 at
    padding. The ids alone where nothing is asked for."""
    histories = torch.from_numpy(items)
    if not asked:
        return histories
    assert places is not None
    parts = {name: torch.from_numpy(known(store, places, name)) for name in asked}
    return Events(histories, **parts)


def known(store: Any, places: NDArray[np.int64], name: str) -> NDArray[Any]:
    """The ratings (float32), or the times (float64) in whole seconds, of the events at `places`; nan where places are -1."""
    real = places >= 0
    if name == "ratings":
        return np.where(real, store.ratings[np.where(real, places, 0)], np.float32(np.nan))
    seconds = store.timestamps[np.where(real, places, 0)] // A_SECOND[store.stats["time_unit"]]
    return np.where(real, seconds.astype(np.float64), np.nan)
