"""From the host to the device that a model is on, without waiting.

A GPU works through what it is given while Python goes on. Whatever asks it for a number (`.item()`, `bool()`, a boolean index,
whose result has as many rows as it finds) stops until it has done all of it, and then it has nothing to do until Python is
ready again. So what decides shapes is worked out on the host, where batches are made, and only sent.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, itself where it is there already. Nothing waits for the copy, which is from page-locked
    memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """The array as a tensor on `device`; on the CPU they share their memory."""
    return moved(torch.from_numpy(array), device)


def real_tokens(items: Tensor) -> Tensor | None:
    """items: (batch, length) ids, 0 = padding. True at real tokens; None, for less work, where all are. A GPU is not asked
    whether all are: the mask is right in any case."""
    real = items != 0
    return None if items.device.type == "cpu" and bool(real.all()) else real
