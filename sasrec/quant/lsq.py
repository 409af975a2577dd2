"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153), and LSQ+ (Bhalgat et al., CVPR
Workshops 2020, arXiv 2004.09576), which learns an offset besides."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import (
    SMALLEST_SCALE,
    BinaryQuantizer,
    Quantizer,
    by_row,
    inner,
    inside,
    least_squares,
    mse_scale,
    rounded,
)

TRAINS = True
# Of `methods.lsq.lr`, where it is empty, by the width of each tensor.
RATES = {1: 0.01, 3: 0.003, 6: 0.001}
# Values that a zero point is searched on.
SEARCHED = 20_000


@dataclass(frozen=True)
class Options:
    lr: float | None = None  # of the logarithm of the step; null: RATES
    # paper: 2 mean|v| / sqrt(Qp), section 2.1. mse: least squared error. On a bell-shaped tensor the paper's step is 1.6
    # times the best at 2 to 4 bits and spans 18 standard deviations at 8; for attention weights, whose mean is one over
    # the length, it clips nearly everything. The paper trains for 90 epochs, which mends that; a few epochs do not.
    start: Literal["mse", "paper"] = "mse"
    # LSQ+: signed activations learn an offset; weights start by its own rule where start is `paper`.
    offset: bool = False

    def __post_init__(self) -> None:
        within("lr", self.lr, 0)


class LearnedStep(torch.autograd.Function):
    """v -> round(clip(v / s, -Qn, Qp)) s, equations 1 and 2, with the gradients of equations 3 and 5. unit: (features,), where
    s is in units of its own for each feature."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, low: int, high: int, gradient_scale: float, unit: Tensor | None = None
    ) -> Tensor:
        scale = step if unit is None else step * unit
        quantized, kept, size = rounded(v, scale, low, high)
        ctx.save_for_backward(v, kept, quantized, step)
        ctx.low, ctx.high, ctx.gradient_scale = low * size, high * size, gradient_scale
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (gradient,) = gradients
        v, kept, quantized, step = ctx.saved_tensors
        # Equation 5. d/dv: 1 inside, 0 at the ends of the grid and beyond.
        to_v = inside(gradient, kept, ctx.low, ctx.high)
        # Equation 3. d/ds: round(v/s) - v/s inside; -Qn or Qp at the ends and beyond, where quantized / s is that end.
        to_step = (inner(gradient, quantized, step) - inner(to_v, v, step)) / step
        return to_v, to_step * ctx.gradient_scale, None, None, None, None


class LearnedOffset(torch.autograd.Function):
    """v -> round(clip((v - beta) / s, -Qn, Qp)) s + beta, with the gradients of LSQ+, section 3.1.

    beta is a whole number `zero` of steps, so that 0 stays a level and the model ships as integers with a zero point; its
    gradient is passed straight through that rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, beta: Tensor, zero: int | Tensor, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        scaled = v / step
        ends: Any = low + zero, high + zero
        quantized = scaled.round().clamp_(*ends).mul_(step)
        ctx.save_for_backward(scaled, quantized, step)
        (ctx.low, ctx.high), ctx.zero, ctx.gradient_scale = ends, zero, gradient_scale
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        scaled, quantized, step = ctx.saved_tensors
        if isinstance(ctx.zero, Tensor):
            to_v = torch.where((scaled > ctx.low) & (scaled < ctx.high), gradient, 0)
        else:
            to_v = inside(gradient, scaled, ctx.low, ctx.high)
        # d/dbeta: 0 inside, 1 at the ends of the grid and beyond.
        to_beta = (gradient - to_v).sum()
        # d/ds: round((v - beta)/s) - (v - beta)/s inside, where beta drops out; -Qn or Qp at the ends and beyond, which
        # is quantized / s less the zero point.
        to_step = inner(gradient, quantized, step) / step - inner(to_v, scaled, step) - ctx.zero * to_beta
        return to_v, to_step * ctx.gradient_scale, to_beta * ctx.gradient_scale, None, None, None, None


def offset_start(values: Tensor, low: int, high: int, candidates: int = 16) -> tuple[Tensor, Tensor]:
    """Step and zero point with the least squared error among those tried, () each (as LSQ+, section 3.2).

    Every pair of shrunken lower and upper ends of the values' range gives a zero point; for the best of them, and for the
    plain grid, the step is then searched alone.
    """
    x = values.detach().float().flatten()
    some = x
    if len(x) > SEARCHED:
        # Drawn, not every n-th: that might be the same features of every token.
        some = x[torch.randint(len(x), (SEARCHED,), generator=torch.Generator().manual_seed(0)).to(x.device)]
    shares = torch.linspace(0.1, 1, candidates).tolist()
    ends = [(float(x.min()) * a, float(x.max()) * b) for a in shares for b in shares]

    def zero_of(bottom: float, top: float) -> int:
        step = max((top - bottom) / (high - low), SMALLEST_SCALE)
        return max(-high, min(-low, round(bottom / step) - low))

    def error(bottom: float, top: float) -> float:
        step, zero = max((top - bottom) / (high - low), SMALLEST_SCALE), zero_of(bottom, top)
        return float(((some / step).round_().clamp_(low + zero, high + zero).mul_(step) - some).square_().sum())

    found = []
    for zero in {0, zero_of(*min(ends, key=lambda pair: error(*pair)))}:
        bottom, top = low + zero, high + zero
        widest = max(float(x.max()) / top if top else 0.0, float(x.min()) / bottom if bottom else 0.0, SMALLEST_SCALE)
        step = least_squares(x[None], x.new_full((1, 1), widest), partial(round_within, low=bottom, high=top)).reshape(())
        loss = float(((x / step).round().clamp_(bottom, top) * step - x).square_().sum())
        found.append((loss, abs(zero), step, x.new_tensor(float(zero))))
    return min(found, key=lambda each: each[:2])[2:]


def round_within(v: Tensor, low: int, high: int) -> Tensor:
    """v rounded to a whole number within low..high, in place."""
    return v.round_().clamp_(low, high)


class LSQ(Quantizer):
    """The logarithm of the step is trained, so that the learning rate is relative to the step: steps differ by orders of
    magnitude between tensors and widths, and a rate that suits one destroys another."""

    unit: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool, options: Options) -> None:
        super().__init__(place, bits, per_row)
        self.options = options
        self.log_step = nn.Parameter(torch.zeros(self.scale_shape))
        # beta in units of the step it started with, so that the rate of both is relative to that step.
        offset = options.offset and place.kind == "activation" and place.signed
        self.offset = nn.Parameter(torch.zeros(())) if offset else None
        self.register_buffer("unit", torch.ones(()) if offset else None)
        # Section 2.2: g = 1 / sqrt(N Qp). For activations N is the features of one token, not of the batch, so that the
        # gradient does not depend on the batch size. (Adam divides any constant factor out again; the rate is `lr` alone.)
        shared = place.features if self.per_row or place.kind == "activation" else place.features * place.rows
        self.gradient_scale = (shared * self.high) ** -0.5

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        if self.offset is not None and self.unit is not None:
            step, zero = offset_start(values, self.low, self.high)
            self.unit.copy_(step)
            self.offset.copy_(zero)
        elif self.options.start == "paper" and self.options.offset and self.place.kind != "activation":
            # LSQ+, section 3.2: so wide that 3 standard deviations are not clipped.
            deviation, mean = torch.std_mean(by_row(values, self.per_row), 1, correction=0)
            step = (mean.abs() + 3 * deviation) / -self.low
        elif self.options.start == "paper":
            step = 2 * by_row(values, self.per_row).abs().mean(1) / self.high**0.5
        else:
            step = mse_scale(values, self.low, self.high, self.per_row)
        self.log_step.copy_(step.clamp_min(SMALLEST_SCALE).log().reshape(self.scale_shape))

    def _zero_point(self) -> int:
        """The offset in whole steps, within the grid, so that 0 is one of its levels."""
        if self.offset is None or self.unit is None:
            return 0
        return int(self._zero_tensor(self.offset, self.unit))

    def _zero_tensor(self, offset: Tensor, unit: Tensor) -> Tensor:
        """`_zero_point`, (), where it is not worth waiting for a GPU to know it."""
        return (offset.detach() * unit / self.log_step.detach().exp()).round().clamp(-self.high, -self.low)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        step = self.of_rows(self.log_step.exp(), rows)
        if self.offset is None or self.unit is None:
            # The noise is not what the step is learned from: through it would come noise, and no gradient scale.
            values = self.dithered(x.float(), step.detach())
            quantized = LearnedStep.apply(values, step, self.low, self.high, self.gradient_scale)
        else:
            beta = self.offset * self.unit
            zero = self._zero_point() if x.device.type == "cpu" else self._zero_tensor(self.offset, self.unit)
            quantized = LearnedOffset.apply(x.float(), step, beta, zero, self.low, self.high, self.gradient_scale)
        return quantized.to(x.dtype)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        if self.offset is not None:
            return super().by_feature(x, unit, mask)
        step, ends = self.log_step.exp(), (self.low, self.high)
        return LearnedStep.apply(x.float(), step, *ends, self.gradient_scale, unit).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        zero = self._zero_point()
        return Grid.uniform(self.bits, self.low + zero, self.high + zero, self.log_step.detach().exp())


class LearnedSign(torch.autograd.Function):
    """v -> sign(v) s, or sign(chosen) s; the sign of 0 is +. d/ds = sign, d/dv as in `quantizer.Sign`: 1 where |v| <= 1."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, chosen: Tensor | None, gradient_scale: float) -> Tensor:
        quantized = torch.where((v if chosen is None else chosen) >= 0, step, -step)
        ctx.save_for_backward(v, quantized, step)
        ctx.gradient_scale = gradient_scale
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        v, quantized, step = ctx.saved_tensors
        to_step = inner(gradient, quantized, step) / step
        return gradient * (v.abs() <= 1), to_step * ctx.gradient_scale, None, None


class BinaryLSQ(BinaryQuantizer):
    """1 bit: sign(w) s. The step starts at mean|w|, the best for those signs, and is learned as at more bits (Qp = 1)."""

    def __init__(self, place: Place, bits: int, per_row: bool) -> None:
        super().__init__(place, bits, per_row)
        self.shared_scale = None  # learned, not taken from the weights
        self.log_step = nn.Parameter(torch.zeros(self.scale_shape))
        self.gradient_scale = (place.features if self.per_row else place.features * place.rows) ** -0.5

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        mean = by_row(values, self.per_row).abs().mean(1).clamp_min(SMALLEST_SCALE)
        self.log_step.copy_(mean.log().reshape(self.scale_shape))

    def refresh(self, values: Tensor) -> None:
        """Nothing: no statistic is kept."""

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        step = self.of_rows(self.log_step.exp(), rows)
        return LearnedSign.apply(x.float(), step, self.chosen(x, step), self.gradient_scale).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        return self.signs(self.log_step.detach().exp())


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return LSQ(place, bits, per_row, options)


def binary(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return BinaryLSQ(place, bits, per_row)
