"""What every quantizer shares: its place, its integer range, rounding with its gradient, and scales from data.

Which levels each method has at each width is one table, in `conventions.py`.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasrec.models.taps import Place
from sasrec.quant.frozen import Product
from sasrec.quant.grid import Grid

# A scale is never zero: an all-zero tensor has no range, and any grid holds it exactly.
SMALLEST_SCALE = 1e-12

Rule = Literal["minmax", "percentile", "mse"]


def integer_range(bits: int, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """Lowest and highest level: -2^(b-1)..2^(b-1)-1 signed, 0..2^b-1 unsigned; symmetric leaves out -2^(b-1)."""
    high = 2 ** (bits - 1) - 1
    return (-high - (not symmetric), high) if signed else (0, 2**bits - 1)


class Quantizer(nn.Module):
    """Brings the tensor of one place onto a grid.

    Life: built from its place; `initialize` once with data; `forward` in training and evaluation; `grid` and `codes` at
    the end. In evaluation, to the bit: `forward(x) == grid().quantize(x)` for an activation, and
    `forward(values) == grid(values).decode(codes(values))` for a weight or table. Nothing may depend on the rest of the
    batch: what is not a parameter or a buffer may be computed from x only where x holds all that shares it, which is so
    for a whole weight, and for each row of a table that has a scale per row (sums by `row_sum`). A table with one scale
    for all its rows keeps statistics in a buffer that `refresh` renews.
    Trainable parameters of a quantizer are in a group of their own in the optimizer, of the rate `rate`
    (`methods.<name>.lr`), but for its `weights`.
    """

    def __init__(self, place: Place, bits: int, per_row: bool, symmetric: bool = False) -> None:
        """per_row: one scale per output channel or table row; else one for the tensor (always so for activations)."""
        super().__init__()
        self.place, self.bits, self.rate = place, bits, 0.0
        self.per_row = per_row and place.kind != "activation"
        self.low, self.high = integer_range(bits, place.signed, symmetric)
        # Rounds up or down by chance while it trains (`quant.table_rounding`), from a generator of its own, so that a
        # control run without it sees the same negatives and dropout.
        self.stochastic = False
        self.generator: torch.Generator | None = None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (self.place.rows, 1) if self.per_row else ()

    @property
    def method(self) -> "Quantizer":
        """The quantizer of the method, where this one only prepares its input."""
        return self

    def initialize(self, values: Tensor) -> None:
        """Set scales from data: the whole tensor (rows, features) for a weight or table (after training from scratch has
        begun it may be called again), or a sample of real tokens' values for an activation, (n,), or (n, features) of the
        stream."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Quantized x, of its shape and type, differentiable. rows: ids of looked-up table rows, of x's shape without the
        last axis. mask: of the tokens, as `Tap.forward` has it (for what is gathered from a batch in training)."""
        raise NotImplementedError(type(self).__name__)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        """unit * forward(x / unit) for an activation (..., features) and a unit for each feature, (features,); methods may get
        there in fewer passes."""
        return self(x / unit, None, mask) * unit

    def grid(self, values: Tensor | None = None) -> Grid:
        """The frozen form. values: the whole weight or table (rows, features); None for an activation."""
        raise NotImplementedError(type(self).__name__)

    def codes(self, values: Tensor) -> Tensor:
        """Integer codes of the whole weight or table, uint8. Not those of the nearest values where the method transforms
        the weights before it rounds (DoReFa) or learns the rounding itself (AdaRound)."""
        return self.grid(values).encode(values)

    def product(self) -> Product | None:
        """What those codes are put together from, where that is what is stored."""
        return None

    def weights(self) -> list[nn.Parameter]:
        """Parameters that stand in the place of the tensor, and are trained as it would be."""
        return []

    def renew(self, values: Tensor) -> None:
        """Set the scale anew, from the weight or table as it is now."""
        self.initialize(values)

    def refresh(self, values: Tensor) -> None:
        """Renew buffered statistics of the whole weight or table. Called every few steps of training and at its end."""

    @staticmethod
    def joint_penalty(of: Sequence[Any]) -> Tensor | None:
        """A term of the training loss on the own parameters of several quantizers of one class, or None: together, because
        each of a model's alone is half a dozen operators on single numbers, which cost more than what they compute."""
        return None

    def start_epoch(self, epoch: int, epochs: int, seed: int, before: int = 0) -> None:
        """Called before each epoch (from 0) of those that the quantizer is in place for, which `before` others of the run
        precede: freeze statistics, seed the generator anew, so that a run can resume and no two epochs of it share noise."""
        if self.draws:
            self.seed_generator(seed, before + epoch)

    def seed_generator(self, seed: int, epoch: int) -> torch.Generator:
        own = zlib.crc32(f"{seed} {epoch} {self.place.name}".encode())
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        self.generator = torch.Generator(device).manual_seed(own)
        return self.generator

    @property
    def draws(self) -> bool:
        """Whether a training step draws from `generator`."""
        return self.stochastic

    def noise(self, x: Tensor) -> Tensor | None:
        """Uniform numbers in 0..1 of x's shape where rounding is stochastic now, else None."""
        if not self.stochastic or not self.training:
            return None
        generator = self.generator or self.seed_generator(0, 0)
        return torch.rand(x.shape, generator=generator, device=x.device)

    def dithered(self, x: Tensor, step: Tensor) -> Tensor:
        """x, or where rounding is stochastic x + (u - 1/2) step: what is nearest to that is the level above x with a
        probability of x's distance from the level below, in steps, so that the mean of many roundings is x."""
        noise = self.noise(x)
        return x if noise is None else x + (noise - 0.5) * step

    @staticmethod
    def of_rows(parameter: Tensor, rows: Tensor | None) -> Tensor:
        """The parameters of looked-up rows, (*rows.shape, 1), or the parameter itself."""
        return parameter if rows is None or parameter.dim() == 0 else F.embedding(rows, parameter)


def rounded(x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, float]:
    """clip(round(x / scale), low, high) scale, of x's shape; and what tells which of x were clipped: a tensor to compare with
    low and high times the number that comes with it.

    On the CPU, with one scale, that is x itself and the scale, and the quotients become the result where they stand, because
    going through memory is most of what this costs. Elsewhere it is x / scale and 1: a GPU's scale would have to be waited
    for, and that of rows is not one number.
    """
    scaled = x / scale
    if scale.dim() == 0 and x.device.type == "cpu":
        return scaled.round_().clamp_(low, high).mul_(scale), x, float(scale)
    return scaled.round().clamp_(low, high).mul_(scale), scaled, 1.0


class RoundThrough(torch.autograd.Function):
    """x -> clip(round(x / scale), low, high) scale. The gradient is that of the identity (straight through, Bengio et al.
    2013, arXiv 1308.3432) where x / scale rounds to a level of the grid, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        quantized, kept, unit = rounded(x, scale, low, high)
        ctx.save_for_backward(kept)
        # Half a step beyond the ends still rounds to an end. With the ends themselves as borders, the largest weight of
        # a row, which lies exactly at the end of a min-max grid, would never move again.
        ctx.low, ctx.high = (low - 0.5) * unit, (high + 0.5) * unit
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return inside(gradients[0], kept, ctx.low, ctx.high), None, None, None


def inside(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """gradient where low < x < high, 0 elsewhere: one pass, ten times faster than a product with a mask of booleans."""
    return torch.ops.aten.hardtanh_backward(gradient, x, low, high)


def inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a * b over all elements that share one element of `like`: shape (), or (..., 1) for one per row."""
    if like.dim() == 0:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).sum(-1, keepdim=True)


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, (..., 1), by halving. `sum` may add in another order for another number of rows, and then
    a looked-up row and the same row of the whole table differ in the last bit."""
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = folded if n == 2 * half else torch.cat([folded, x[..., -1:]], -1)
    return x


def by_row(values: Tensor, per_row: bool) -> Tensor:
    """values as (rows, n) float32: its own rows, or one row that holds everything."""
    values = values.detach().float()
    return values if per_row else values.reshape(1, -1)


def max_scale(values: Tensor, low: int, high: int, per_row: bool) -> Tensor:
    """The smallest scale at which nothing is clipped (min-max): shape (rows, 1) or ()."""
    x = by_row(values, per_row)
    bound = (x.amax(1, keepdim=True) / high).maximum(x.amin(1, keepdim=True) / low if low else x.new_zeros(()))
    return bound.clamp_min(SMALLEST_SCALE).reshape((-1, 1) if per_row else ())


def percentile_scale(values: Tensor, low: int, high: int, per_row: bool, percentile: float) -> Tensor:
    """The scale at which that share of the magnitudes, in percent, is not clipped: shape (rows, 1) or ()."""
    x = by_row(values, per_row)
    magnitude = x.abs() if low else x.clamp_min(0)
    rank = max(1, math.ceil(percentile * x.shape[1] / 100))  # 0.55 * 100 is more than 55 in floats
    bound = magnitude.sort(dim=1).values[:, rank - 1 : rank] / high
    return bound.clamp_min(SMALLEST_SCALE).reshape((-1, 1) if per_row else ())


def mse_scale(values: Tensor, low: int, high: int, per_row: bool) -> Tensor:
    """The scale with the least squared error that `least_squares` finds: (rows, 1) or ()."""
    widest = max_scale(values, low, high, per_row).reshape(-1, 1)
    scale = least_squares(by_row(values, per_row), widest, lambda v: v.round_().clamp_(low, high))
    return scale.reshape((-1, 1) if per_row else ())


def least_squares(x: Tensor, widest: Tensor, nearest: Callable[[Tensor], Tensor], candidates: int = 50) -> Tensor:
    """Scales s of rows with the least sum (s nearest(x / s) - x)^2. x: (rows, n); widest, result: (rows, 1).

    Tries s = widest 0.9^i (down to 1/200: outliers), then steps of 2 % about the best, then improves it by turns: s = sum
    x q / sum q^2 is the best for the levels q = nearest(x / s), and those are the best for s. Never worse than `widest`.
    """
    rows_at_once = max(1, 2**18 // x.shape[1])  # what is tried 50 times stays in the cache
    if len(x) > rows_at_once:
        parts = zip(x.split(rows_at_once), widest.split(rows_at_once), strict=True)
        return torch.cat([least_squares(part, bound, nearest, candidates) for part, bound in parts])

    def levels_and_error(scale: Tensor) -> tuple[Tensor, Tensor]:
        levels = nearest(x / scale)
        return levels, (levels * scale - x).square_().sum(1, keepdim=True)

    best = widest.clone()
    best_levels, best_error = levels_and_error(best)

    def keep_better(scale: Tensor) -> None:
        nonlocal best, best_levels, best_error
        levels, error = levels_and_error(scale)
        better = error < best_error
        best, best_error = scale.where(better, best), error.where(better, best_error)
        best_levels = levels.where(better, best_levels)

    for i in range(1, candidates):
        keep_better(widest * 0.9**i)
    coarse = best
    for percent in (92, 94, 96, 98, 102, 104, 106, 108):
        keep_better(coarse * (percent / 100))
    for _ in range(2):
        scale = (x * best_levels).sum(1, keepdim=True) / best_levels.square().sum(1, keepdim=True).clamp_min(1)
        keep_better(scale.where(scale > 0, best))
    return best.clamp_min(SMALLEST_SCALE)


class FixedScale(Quantizer):
    """Uniform rounding at a scale that was set once from data."""

    scale: Tensor

    def __init__(
        self,
        place: Place,
        bits: int,
        per_row: bool,
        rule: Rule = "mse",
        percentile: float = 99.99,
    ) -> None:
        super().__init__(place, bits, per_row)
        self.rule, self.percentile = rule, percentile
        self.register_buffer("scale", torch.ones(self.scale_shape))

    def initialize(self, values: Tensor) -> None:
        if self.rule == "percentile":
            scale = percentile_scale(values, self.low, self.high, self.per_row, self.percentile)
        else:
            scale = (max_scale if self.rule == "minmax" else mse_scale)(values, self.low, self.high, self.per_row)
        self.scale.copy_(scale)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale = self.of_rows(self.scale, rows)
        return RoundThrough.apply(self.dithered(x.float(), scale), scale, self.low, self.high).to(x.dtype)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        return RoundThrough.apply(x.float(), self.scale * unit, self.low, self.high).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        return Grid.uniform(self.bits, self.low, self.high, self.scale)


class Sign(torch.autograd.Function):
    """w -> sign(w) scale, or sign(chosen) scale; the gradient passes where |w| <= 1."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, chosen: Tensor | None) -> Tensor:
        ctx.save_for_backward(w)
        return torch.where((w if chosen is None else chosen) >= 0, scale, -scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return gradients[0] * (w.abs() <= 1), None, None


class BinaryQuantizer(Quantizer):
    """1 bit, the same for every method but LSQ, which learns the scale: sign(w) mean|w| (Rastegari et al. 2016, arXiv
    1603.05279), with the gradient passed straight through to w where |w| <= 1 (section 3.1; its factor of the scale, and the
    part of 1/n that reaches w through the scale, are left out). The sign of 0 is +."""

    shared_scale: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool) -> None:
        super().__init__(place, bits, per_row)
        self.register_buffer("shared_scale", None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        self.refresh(values)

    def refresh(self, values: Tensor) -> None:
        if self.shared_scale is not None:
            self.shared_scale.copy_(values.detach().abs().mean().clamp_min(SMALLEST_SCALE))

    def _scale(self, x: Tensor) -> Tensor:
        if self.shared_scale is not None:
            return self.shared_scale
        return (row_sum(x.detach().float().abs()) / x.shape[-1]).clamp_min(SMALLEST_SCALE)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale = self._scale(x)
        return Sign.apply(x.float(), scale, self.chosen(x, scale)).to(x.dtype)

    def chosen(self, x: Tensor, scale: Tensor) -> Tensor | None:
        """What the signs are taken from where rounding is stochastic: + with probability (1 + w / scale) / 2, because the two
        levels are 2 scale apart. None where it is not."""
        noise = self.noise(x)
        return None if noise is None else x + (2 * noise - 1) * scale

    def grid(self, values: Tensor | None = None) -> Grid:
        assert values is not None
        return self.signs(self._scale(values))

    @staticmethod
    def signs(scale: Tensor) -> Grid:
        """-scale and scale."""
        return Grid(1, torch.tensor([-1.0, 1.0], device=scale.device), scale, torch.zeros((), device=scale.device))

    def codes(self, values: Tensor) -> Tensor:
        return (values >= 0).to(torch.uint8)
