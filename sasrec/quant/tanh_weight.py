"""Weights through tanh: the transform of DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160, section 2.3), which PACT uses too."""

from typing import Any, Literal

import torch
from torch import Tensor

from sasrec.models.taps import Place
from sasrec.quant.conventions import PAPER_BELOW
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer

WeightGrid = Literal["auto", "paper", "zero"]
Tanh = Literal["scaled", "paper"]


class TanhRound(torch.autograd.Function):
    """W -> the nearest of scale * {low, ..., high} to tanh W, or, with half, of scale * {low + 1/2, ..., high + 1/2}; W and
    the result in units of `unit`. The gradient is that of tanh alone: the rounding is passed straight through, and the
    largest |tanh W| in scale is a constant."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, noise: Tensor | None, unit: Tensor, scale: Tensor, half: bool, low: int, high: int
    ) -> Tensor:
        bounded = (weight / unit).tanh_()
        ctx.save_for_backward(bounded)
        rounded = level_numbers(bounded, noise, scale, half, low, high)
        # Twice the level and half the scale, as the grid has it, are whole numbers: the same bits.
        return rounded.mul_(2).add_(1).mul_(scale * unit / 2) if half else rounded.mul_(scale * unit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (bounded,) = ctx.saved_tensors
        # g (1 - tanh^2 W): the unit before tanh and that after it cancel.
        return torch.ops.aten.tanh_backward(gradients[0], bounded), None, None, None, None, None, None


def level_numbers(bounded: Tensor, noise: Tensor | None, scale: Tensor, half: bool, low: int, high: int) -> Tensor:
    """low..high of bounded's shape: which level each is rounded to; with noise, uniform in 0..1, up or down by chance."""
    scaled = bounded / scale
    if half:
        scaled.sub_(0.5)
    if noise is not None:
        scaled.add_(noise).sub_(0.5)
    return scaled.round_().clamp_(low, high)


class TanhWeight(Quantizer):
    """m (2 q(tanh W / (2 m) + 1/2) - 1) with m = max|tanh W|, of the row or of the tensor; W and the result in units of
    `unit`, 1 in the paper.

    The paper leaves the factor m out, because batch norm follows there; here nothing does, and a trained checkpoint would
    be destroyed. Its networks are trained from scratch with tanh in place, and weights stay where it hardly bends. Those of a
    trained checkpoint reach 3, where tanh is flat, and the model is not the same before anything is rounded. So `tanh: scaled`
    takes as unit the power of two that brings the largest weight of the tensor to 1/8 to 1/4 at the start, or 1 where it is
    below that already, as in a network from scratch; `paper` always takes 1.

    `paper`, of the grid: q rounds to 2^b levels, none of which is 0. `zero`: to 2^b - 1 levels with 0 in the middle, that is
    m round(n tanh W / m) / n with n = 2^(b-1) - 1. `auto`: the paper's below 4 bits, where a level less costs most: of three
    levels from -m to m, the middle one takes nearly every weight of a bell-shaped row.
    """

    unit: Tensor
    largest: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool, grid: WeightGrid = "auto", tanh: Tanh = "scaled") -> None:
        super().__init__(place, bits, per_row, symmetric=True)
        self.tanh = tanh
        self.centred = grid == "paper" or (grid == "auto" and bits < PAPER_BELOW)
        if self.centred:
            self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("largest", None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        if self.tanh == "scaled":
            self.unit.copy_((4 * values.detach().float().abs().max()).log2().ceil().exp2().clamp_min(1))
        self.refresh(values)

    def refresh(self, values: Tensor) -> None:
        if self.largest is not None:
            self.largest.copy_((values.detach().float().abs().max() / self.unit).tanh())

    def _scale(self, weight: Tensor) -> Tensor:
        """What a level is worth, in units. weight: (..., features), or anything where the largest is kept in the buffer.
        tanh rises, so that the largest |tanh W| is the tanh of the largest |W|."""
        largest = self.largest
        if largest is None:
            largest = (weight.detach().float().abs().amax(-1, keepdim=True) / self.unit).tanh()
        return largest.clamp_min(SMALLEST_SCALE) / (self.high + 0.5 * self.centred)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        values = TanhRound.apply(x.float(), self.noise(x), self.unit, self._scale(x), self.centred, self.low, self.high)
        return values.to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        assert values is not None
        scale = self._scale(values) * self.unit
        if not self.centred:
            return Grid.uniform(self.bits, self.low, self.high, scale)
        # Odd numbers of half the scale: whole numbers without an offset, as an integer product wants them.
        levels = torch.arange(2 * self.low + 1, 2 * self.high + 2, 2, dtype=torch.float32, device=scale.device)
        return Grid(self.bits, levels, (scale / 2).float(), torch.zeros((), device=scale.device))

    def codes(self, values: Tensor) -> Tensor:
        bounded = (values.detach().float() / self.unit).tanh_()
        numbers = level_numbers(bounded, None, self._scale(values), self.centred, self.low, self.high)
        return numbers.sub_(self.low).to(torch.uint8)
