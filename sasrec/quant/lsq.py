"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sasrec.config import within
from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer, by_row, inner, inside, mse_scale

TRAINS = True


@dataclass(frozen=True)
class Options:
    lr: float = 1e-3  # of the logarithm of the step
    # paper: 2 mean|v| / sqrt(Qp), section 2.1. mse: least squared error. On a bell-shaped tensor the paper's step is 1.6
    # times the best at 2 to 4 bits and spans 18 standard deviations at 8; for attention weights, whose mean is one over
    # the length, it clips nearly everything. The paper trains for 90 epochs, which mends that; a few epochs do not.
    start: Literal["mse", "paper"] = "mse"

    def __post_init__(self) -> None:
        within("lr", self.lr, 0)


class LearnedStep(torch.autograd.Function):
    """v -> round(clip(v / s, -Qn, Qp)) s, equations 1 and 2, with the gradients of equations 3 and 5."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        scaled = v / step
        quantized = scaled.round().clamp_(low, high).mul_(step)
        ctx.save_for_backward(scaled, quantized, step)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        scaled, quantized, step = ctx.saved_tensors
        # Equation 5. d/dv: 1 inside, 0 at the ends of the grid and beyond.
        to_v = inside(gradient, scaled, ctx.low, ctx.high)
        # Equation 3. d/ds: round(v/s) - v/s inside; -Qn or Qp at the ends and beyond, where quantized / s is that end.
        to_step = inner(gradient, quantized, step) / step - inner(to_v, scaled, step)
        return to_v, to_step * ctx.gradient_scale, None, None, None


class LSQ(Quantizer):
    """The logarithm of the step is trained, so that the learning rate is relative to the step: steps differ by orders of
    magnitude between tensors and widths, and a rate that suits one destroys another."""

    def __init__(self, place: Place, bits: int, per_row: bool, options: Options) -> None:
        super().__init__(place, bits, per_row)
        self.start = options.start
        self.log_step = nn.Parameter(torch.zeros(self.scale_shape))
        # Section 2.2: g = 1 / sqrt(N Qp). For activations N is the features of one token, not of the batch, so that the
        # gradient does not depend on the batch size.
        shared = place.features if self.per_row or place.kind == "activation" else place.features * place.rows
        self.gradient_scale = (shared * self.high) ** -0.5

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        if self.start == "paper":
            step = 2 * by_row(values, self.per_row).abs().mean(1) / self.high**0.5
        else:
            step = mse_scale(values, self.low, self.high, self.per_row)
        self.log_step.copy_(step.clamp_min(SMALLEST_SCALE).log().reshape(self.scale_shape))

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        step = self.of_rows(self.log_step.exp(), rows)
        quantized = LearnedStep.apply(x.float(), step, self.low, self.high, self.gradient_scale)
        return quantized.to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        return Grid.uniform(self.bits, self.low, self.high, self.log_step.detach().exp())


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return LSQ(place, bits, per_row, options)
