"""APoT: additive powers-of-two quantization (Li, Dong and Wang, ICLR 2020, arXiv 1909.13144)."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant.grid import Grid, is_uniform, nearest, nearest_table
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer, by_row, inner, inside, least_squares, row_sum

TRAINS = True
SHIFTED = ("weight",)
# Of `methods.apot.lr`, where it is empty, by the width of each tensor.
RATES = {1: 0.03, 3: 0.001, 6: 0.0001}


@dataclass(frozen=True)
class Options:
    lr: float | None = None  # of the logarithm of alpha; null: RATES

    def __post_init__(self) -> None:
        within("lr", self.lr, 0)


def magnitudes(bits: int) -> list[int]:
    """The 2^bits levels from 0 up, in units of the smallest power of two among them; alpha is the largest.

    Section 2.2 with k = 2: sums of n = bits / 2 terms p_i in {0, 2^-i, 2^-(i+n), 2^-(i+2n)}. An odd width has a term of
    one bit besides, {0, 2^-2n}, and the last exponents of the others move up by one. So every power of two belongs to
    one term only, and no two sums are equal. 3 bits: {0, 1, 2, 3, 4, 6, 8, 10} / 10.
    """
    n, odd = divmod(bits, 2)
    last = 3 * n - 1 + odd  # the largest exponent; 2^-last is the unit
    terms = [[0, *(2 ** (last - e) for e in (i, i + n, i + 2 * n + odd))] for i in range(n)]
    if odd:
        terms.append([0, 2 ** (last - 2 * n)])
    return sorted(sum(choice) for choice in itertools.product(*terms))


def levels(bits: int, signed: bool, spare: bool = False) -> list[int]:
    """Signed: b - 1 bits of magnitude and a sign, 2^b - 1 levels. (8 bits, and so 7 of magnitude, is our extension.)

    spare: the code that is left over stands for -2 alpha, the next power of two. So for signed activations of 2 bits, which
    the paper does not know: -alpha, 0 and alpha alone lose half of the quality, whatever is learned. From 3 bits on training
    does better without: what lies between -1.5 alpha and -alpha says to alpha "narrower" with it, and the same above "wider".
    """
    if not signed:
        return magnitudes(bits)
    positive = magnitudes(bits - 1)[1:]
    return [-2 * positive[-1]] * spare + [-level for level in reversed(positive)] + [0, *positive]


def project(v: Tensor, table: Tensor | None, low: int, high: int) -> Tensor:
    """The level nearest to each v. table: the level of each half unit (`grid.nearest`), None for consecutive integers."""
    return v.round().clamp_(low, high) if table is None else nearest(v, table, low)


def project_by_chance(v: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """The level above or below each v, with the probabilities that make v the mean; v between the ends, or one of them.
    levels: (n,) ascending. noise: uniform in 0..1, of v's shape."""
    above = torch.bucketize(v, levels, right=True).clamp_(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return torch.where(v - low > noise * (high - low), high, low)


class ReparameterizedClip(torch.autograd.Function):
    """x -> alpha P(clip(x / alpha, -1, 1)) on normalised x, section 2.3; P is the nearest level.

    scale: alpha sigma / high, what one unit of the levels is worth in x; shift: mu, or None for 0. by_chance: (levels,
    noise) where the projection is stochastic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        shift: Tensor | None,
        table: Tensor | None,
        low: int,
        high: int,
        by_chance: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        scale = alpha / high * sigma
        scaled = x / scale if shift is None else (x - shift) / scale
        projected = project(scaled, table, low, high) if by_chance is None else project_by_chance(scaled, *by_chance)
        quantized = projected.mul_(scale)
        ctx.save_for_backward(scaled, quantized, alpha, sigma, shift)
        ctx.low, ctx.high = low, high
        return quantized if shift is None else quantized.add_(shift)  # the same tensor, saved above

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        scaled, quantized, alpha, sigma, shift = ctx.saved_tensors
        centred = quantized if shift is None else quantized - shift
        # Straight through the projection; the clip lets nothing through beyond its ends. (They themselves are inside, and
        # a quotient of two floats may pass them by its rounding.)
        to_x = inside(gradient, scaled, ctx.low * (1 + 1e-6), ctx.high * (1 + 1e-6))
        # d/dalpha: sign(x) beyond the clip, where q is that end; q - x / alpha inside.
        to_alpha = inner(gradient, centred, alpha) / alpha - inner(to_x, scaled, alpha) / ctx.high * sigma
        return to_x, to_alpha, None, None, None, None, None, None


class APoT(Quantizer):
    """Q((W - mu) / sigma; alpha) sigma + mu.

    Weights are normalised (section 2.4) and de-normalised again, because no batch norm follows here; tables only by their
    root mean square, so that 0 stays 0; activations not at all. mu, sigma: of the row or of the tensor, constants for the
    gradient. The logarithm of alpha is trained, so that the rate is relative to it.
    """

    sigma: Tensor | None
    levels: Tensor
    table: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool, options: Options) -> None:
        super().__init__(place, bits, per_row)
        own = levels(bits, place.signed, spare=place.kind == "activation" and bits == 2)
        self.low, self.high = own[0], own[-1]
        self.register_buffer("levels", torch.tensor(own, dtype=torch.float32), persistent=False)
        table = None if is_uniform(self.levels) else self.levels[nearest_table(self.levels)]
        self.register_buffer("table", table, persistent=False)
        self.log_alpha = nn.Parameter(torch.zeros(self.scale_shape))
        # One sigma for a whole table cannot be taken from looked-up rows; activations have none.
        self.register_buffer("sigma", torch.ones(()) if place.kind != "weight" and not self.per_row else None)

    def _moments(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """mu (None for 0) and sigma of each row of x or of the tensor: (..., 1) or ()."""
        if self.sigma is not None:
            return None, self.sigma
        x = x.detach().float()
        if not self.per_row:
            return x.mean(), x.std(correction=0).clamp_min(SMALLEST_SCALE)
        mean = None
        if self.place.kind == "weight":
            mean = row_sum(x) / x.shape[-1]
            x = x - mean
        return mean, (row_sum(x * x) / x.shape[-1]).sqrt().clamp_min(SMALLEST_SCALE)

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        self.refresh(values)
        mean, sigma = self._moments(values)
        x = by_row((values.float() if mean is None else values.float() - mean) / sigma, self.per_row)
        widest = (x.abs() if self.low else x).amax(1, keepdim=True).clamp_min(SMALLEST_SCALE) / self.high
        scale = least_squares(x, widest, lambda v: project(v, self.table, self.low, self.high))
        self.log_alpha.copy_((scale * self.high).log().reshape(self.scale_shape))

    def refresh(self, values: Tensor) -> None:
        if self.sigma is not None and self.place.kind == "table":
            self.sigma.copy_(values.detach().float().square().mean().sqrt().clamp_min(SMALLEST_SCALE))

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        mean, sigma = self._moments(x)
        alpha = self.of_rows(self.log_alpha.exp(), rows)
        noise = self.noise(x)
        by_chance = None if noise is None else (self.levels, noise)
        quantized = ReparameterizedClip.apply(x.float(), alpha, sigma, mean, self.table, self.low, self.high, by_chance)
        return quantized.to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        mean, sigma = self._moments(torch.zeros(()) if values is None else values)
        scale = self.log_alpha.detach().exp() / self.high * sigma
        return Grid(self.bits, self.levels, scale, torch.zeros_like(sigma) if mean is None else mean)


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return APoT(place, bits, per_row, options)
