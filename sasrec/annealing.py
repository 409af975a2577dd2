"""What changes over a training: the learning rate, and the rate of dropout."""

import math

from sasrec.config import TrainParams


def learning_rate(params: TrainParams, progress: float) -> float:
    """The rate at `progress` (0..1) of the run: a linear warm-up over the share `warmup`, then constant or half a cosine to
    0; one_cycle (Smith and Topin, arXiv 1708.07120): up from 1/25 over `warmup` (0.3 where that is 0), down to 1e-4."""
    if params.schedule == "one_cycle":
        warmup, low = params.warmup or 0.3, (1 / 25, 1e-4)
        if progress < warmup:
            return params.lr * (low[0] + (1 - low[0]) * (1 - math.cos(math.pi * progress / warmup)) / 2)
        rest = (progress - warmup) / max(1 - warmup, 1e-9)
        return params.lr * (low[1] + (1 - low[1]) * (1 + math.cos(math.pi * rest)) / 2)
    if progress < params.warmup:
        return params.lr * progress / params.warmup
    if params.schedule == "cosine":
        rest = (progress - params.warmup) / max(1 - params.warmup, 1e-9)
        return params.lr * (1 + math.cos(math.pi * rest)) / 2
    return params.lr


def dropout_rate(params: TrainParams, first: float, epoch: int) -> float:
    """The rate of dropout in `epoch` (from 1): from `first` in equal steps to `final_dropout` in the last."""
    if params.final_dropout is None:
        return first
    return first + (params.final_dropout - first) * (epoch - 1) / max(params.epochs - 1, 1)
