"""Weights through tanh: the transform of DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160, section 2.3), which PACT uses too."""

from typing import Any, Literal

import torch
from torch import Tensor

from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer, row_sum

Factor = Literal["least_squares", "largest"]


class TanhRound(torch.autograd.Function):
    """W -> factor * level, where position = tanh W / step + offset is rounded to a level of {low, ..., high}, and its
    middle taken off. The gradient is that of (factor / step) tanh W: the rounding is passed straight through, and factor
    and step, which are statistics of W, are constants.

    rounded: (same shape) the levels, their middle taken off. bounded: tanh W. step, factor: (..., 1) or ().
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bounded: Tensor, rounded: Tensor, step: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(bounded, factor / step)
        return rounded * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        bounded, slope = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradients[0] * slope, bounded), None, None, None, None  # g (1 - tanh^2 W)


class TanhWeight(Quantizer):
    """c (2 q(tanh W / (2 m) + 1/2) - 1) with m = max|tanh W|, of the row or of the tensor, and a factor c.

    `paper`: q rounds to 2^b levels, none of which is 0. `zero`: to 2^b - 1 levels with 0 in the middle, so that the bracket
    is round(n tanh W / m) / n with n = 2^(b-1) - 1.
    The paper has no factor, because batch norm follows there; here nothing does, and without one a trained checkpoint would
    be destroyed. `largest`: c = m, the smallest change. At 2 bits that puts every weight above m / 2 to the largest of its
    row, twice what they are on average; `least_squares` is the c with the least squared error for the levels that q chose,
    which at 1 bit is the mean |W| that the paper itself has there. At 8 bits the two agree within a percent.
    """

    largest: Tensor | None
    best: Tensor | None

    def __init__(
        self,
        place: Place,
        bits: int,
        per_row: bool,
        grid: Literal["zero", "paper"] = "zero",
        factor: Factor = "least_squares",
    ) -> None:
        super().__init__(place, bits, per_row, symmetric=True)
        self.has_zero, self.factor = grid == "zero", factor
        if not self.has_zero:
            self.low, self.high = 0, 2**bits - 1
        # A table with one scale for all its rows keeps its statistics; looked-up rows have none of their own.
        for name in ("largest", "best"):
            self.register_buffer(name, None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        self.refresh(values)

    @torch.no_grad()
    def refresh(self, values: Tensor) -> None:
        if self.largest is None or self.best is None:
            return
        values = values.float()
        self.largest.copy_(values.abs().max().tanh().clamp_min(SMALLEST_SCALE))
        rounded = self._rounded(values.tanh(), self._step(values))
        self.best.copy_(self._best((values * rounded).sum(), rounded.square().sum(), self._step(values)))

    def _step(self, weight: Tensor) -> Tensor:
        """Distance of the levels before the factor: (..., 1) or (). tanh rises, so that the largest |tanh W| is the tanh of
        the largest |W|."""
        largest = weight.abs().amax(-1, keepdim=True).tanh().clamp_min(SMALLEST_SCALE) if self.largest is None else self.largest
        return largest / self.high if self.has_zero else 2 * largest / self.high

    def _rounded(self, bounded: Tensor, step: Tensor) -> Tensor:
        """Levels around 0 in units of the step: whole numbers, or for the paper's grid halves of odd ones."""
        middle = 0.0 if self.has_zero else self.high / 2
        return (bounded / step).add_(middle).round_().clamp_(self.low, self.high).sub_(middle)

    @staticmethod
    def _best(product: Tensor, square: Tensor, step: Tensor) -> Tensor:
        """sum W level / sum level^2; the step itself where every level is 0."""
        return torch.where(square > 0, product / square.clamp_min(0.25), step).clamp_min(SMALLEST_SCALE)

    def _scale(self, weight: Tensor, rounded: Tensor, step: Tensor) -> Tensor:
        """What one unit of the levels is worth: (..., 1) or ()."""
        if self.factor == "largest":
            return step
        if self.best is not None:
            return self.best
        return self._best(row_sum(weight * rounded), row_sum(rounded * rounded), step)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        values = x.float()
        with torch.no_grad():
            bounded, step = values.tanh(), self._step(values)
            rounded = self._rounded(self.dithered(bounded, step), step)
            scale = self._scale(values, rounded, step)
        return TanhRound.apply(values, bounded, rounded, step, scale).to(x.dtype)

    @torch.no_grad()
    def grid(self, values: Tensor | None = None) -> Grid:
        assert values is not None
        values = values.float()
        step = self._step(values)
        scale = self._scale(values, self._rounded(values.tanh(), step), step)
        # The paper's grid, too, is stored as codes from 0 up.
        return Grid.uniform(self.bits, self.low, self.high, scale, None if self.has_zero else -scale * (self.high / 2))

    @torch.no_grad()
    def codes(self, values: Tensor) -> Tensor:
        step = self._step(values.float())
        middle = self.low if self.has_zero else -self.high / 2
        return (self._rounded(values.float().tanh(), step) - middle).to(torch.uint8)
