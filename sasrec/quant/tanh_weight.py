"""Weights through tanh: the transform of DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160, section 2.3), which PACT uses too."""

from typing import Any, Literal

import torch
from torch import Tensor

from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer


class TanhRound(torch.autograd.Function):
    """W -> the nearest of scale * {low, ..., high} + shift to tanh W. The gradient is that of tanh alone: the rounding is
    passed straight through, and the largest |tanh W| in scale and shift is a constant."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shift: Tensor | None, low: int, high: int) -> Tensor:
        bounded = weight.tanh()
        ctx.save_for_backward(bounded)
        scaled = bounded / scale if shift is None else (bounded - shift) / scale
        rounded = scaled.round_().clamp_(low, high).mul_(scale)
        return rounded if shift is None else rounded.add_(shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (bounded,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradients[0], bounded), None, None, None, None  # g (1 - tanh^2 W)


class TanhWeight(Quantizer):
    """m (2 q(tanh W / (2 m) + 1/2) - 1) with m = max|tanh W|, of the row or of the tensor.

    The paper leaves the factor m out, because batch norm follows there; here nothing does, and a trained checkpoint would
    be destroyed. `paper`: q rounds to 2^b levels, none of which is 0. `zero`: to 2^b - 1 levels with 0 in the middle,
    that is m round(n tanh W / m) / n with n = 2^(b-1) - 1.
    """

    largest: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool, grid: Literal["zero", "paper"] = "zero") -> None:
        super().__init__(place, bits, per_row, symmetric=True)
        self.has_zero = grid == "zero"
        if not self.has_zero:
            self.low, self.high = 0, 2**bits - 1
        self.register_buffer("largest", None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        self.refresh(values)

    def refresh(self, values: Tensor) -> None:
        if self.largest is not None:
            self.largest.copy_(values.detach().float().abs().max().tanh())

    def _scale_and_shift(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """weight: (..., features), or anything where the largest is kept in the buffer. tanh rises, so that the largest
        |tanh W| is the tanh of the largest |W|."""
        largest = weight.detach().float().abs().amax(-1, keepdim=True).tanh() if self.largest is None else self.largest
        largest = largest.clamp_min(SMALLEST_SCALE)
        return (largest / self.high, None) if self.has_zero else (2 * largest / self.high, -largest)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale, shift = self._scale_and_shift(x)
        return TanhRound.apply(x.float(), scale, shift, self.low, self.high).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        assert values is not None
        scale, shift = self._scale_and_shift(values)
        return Grid.uniform(self.bits, self.low, self.high, scale, shift)

    def codes(self, values: Tensor) -> Tensor:
        return self.grid(values).encode(values.float().tanh())
