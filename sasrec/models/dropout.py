"""Dropout that costs little on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout_mask(x: Tensor, rate: float) -> Tensor:
    """What inverted dropout multiplies x by: 0, or one over the share that is kept; of x's shape and type.

    On a CPU it comes from random bytes: `F.dropout` draws a Bernoulli number per element, most of its time. The rate is
    then a multiple of 1/256, and the scale belongs to the rate that is really applied.
    """
    if x.device.type != "cpu":
        return F.dropout(torch.ones_like(x), rate)
    drop = max(1, min(255, round(rate * 256)))
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    # A byte -128..127 is kept where byte >= drop - 128. In float arithmetic, because comparing bytes and converting the
    # result is 4 times slower than the three passes here: the difference to the last dropped byte, cut to 0..1.
    mask = words.view(torch.int8)[: x.numel()].to(x.dtype)
    return mask.sub_(drop - 129).clamp_(0, 1).mul_(256 / (256 - drop)).view(x.shape)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Inverted dropout (Srivastava et al., JMLR 2014)."""
    if not training or rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    return x * dropout_mask(x, rate)


def add_dropped(x: Tensor, change: Tensor, rate: float, training: bool) -> Tensor:
    """x + dropout(change), in one pass."""
    if not training or rate == 0:
        return x + change
    return torch.addcmul(x, change, dropout_mask(change, rate))


class Dropping(nn.Module):
    """A module that applies dropout at `rate` while it trains."""

    rate: float


def set_dropout(model: nn.Module, rate: float) -> None:
    """Let every part of `model` drop at that rate from now on."""
    for module in model.modules():
        if isinstance(module, Dropping):
            module.rate = rate
