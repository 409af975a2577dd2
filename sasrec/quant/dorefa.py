"""DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160): weights through tanh (`tanh_weight.py`), activations clipped to a fixed
range, and, if asked for, gradients quantized with stochastic noise. Nothing is learned but the weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant.quantizer import FixedScale, Quantizer, inside
from sasrec.quant.tanh_weight import Tanh, TanhWeight, WeightGrid

TRAINS = True


@dataclass(frozen=True)
class Options:
    # Of the weights: the paper's 2^b levels without 0, or 2^b - 1 with 0 among them; auto: the paper's at 2 and 3 bits.
    grid: WeightGrid = "auto"
    tanh: Tanh = "scaled"  # of weights in units in which the largest is 1/4 at most; or as they are, as in the paper
    gradient_bits: int | None = None  # of the gradients of activations; null: not quantized

    def __post_init__(self) -> None:
        within("gradient_bits", self.gradient_bits, 2, 8)


def largest(gradient: Tensor, samples: Tensor) -> Tensor:
    """max|dr| of each sample, at each of its tokens. gradient: (batch, n, features); samples: (batch, n), the number of a
    token's sample within its row, at most n; returns (batch, n, 1)."""
    of_tokens = gradient.abs().amax(2)
    numbered = of_tokens.new_zeros(len(of_tokens), of_tokens.shape[1] + 1)
    return numbered.scatter_reduce(1, samples, of_tokens, "amax").gather(1, samples).unsqueeze(2)


def quantize_gradient(gradient: Tensor, bits: int, generator: torch.Generator | None, samples: Tensor | None = None) -> Tensor:
    """Section 2.5: 2 m [q_k(dr / (2 m) + 1/2 + N(k)) - 1/2], m = max|dr| of each sample, N uniform in +-1/2 / (2^k - 1).

    gradient: (batch, ...). generator: None leaves the noise out. samples: as `largest` takes them; None where each row is one.
    """
    steps = 2**bits - 1
    if samples is None:
        m = gradient.abs().flatten(1).amax(1).reshape(-1, *[1] * (gradient.dim() - 1))
    else:
        m = largest(gradient, samples)
    position = gradient / (2 * m).clamp_min(torch.finfo(gradient.dtype).tiny) + 0.5  # in 0..1
    if generator is not None:
        noise = torch.rand(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype) - 0.5
        position = position + noise / steps
    quantized: Tensor = 2 * m * ((position.clamp(0, 1) * steps).round() / steps - 0.5)
    return quantized


class QuantizedGradient(torch.autograd.Function):
    """The identity, whose gradient is quantized at real tokens; at padding it is as it was (0 brings no noise). It stands
    before the clip: the gradient goes back through the activation function first (algorithm 1), so that what is clipped does
    not count in m.

    mask: as taps take it; a sample is a history, whatever else its row holds (of attention weights, that of one head). Where
    what cannot be negative is 0, the ReLU or softmax behind it lets nothing through, and that does not count either: keys that
    a query does not see are other histories', too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, signed: bool, bits: int, generator: torch.Generator) -> Tensor:
        ctx.save_for_backward(None if signed else x, mask)
        ctx.bits, ctx.generator = bits, generator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        behind, mask = ctx.saved_tensors
        if behind is not None:
            gradient = inside(gradient, behind, 0, math.inf)
        quantized = quantize_gradient(gradient, ctx.bits, ctx.generator, None if mask is None else mask.long())
        if mask is not None:
            quantized = torch.where((mask != 0).unsqueeze(-1), quantized, gradient)
        return quantized, None, None, None, None


class BoundedActivation(FixedScale):
    """Rounding within a clip that calibration fixed (the paper clips to 0..1; these activations are not in that range).

    Signed tensors are clipped on both sides and have 2^b levels as unsigned ones do, -2^(b-1) the lowest: with the three
    that are symmetric at 2 bits, training recovers nothing. The noise of the gradients comes from a generator of its own,
    so that a control run without it sees the same negatives and dropout; it is seeded anew each epoch, so that a run can
    resume.
    """

    def __init__(self, place: Place, bits: int, gradient_bits: int | None) -> None:
        super().__init__(place, bits, per_row=False)
        self.gradient_bits = gradient_bits

    @property
    def draws(self) -> bool:
        return self.gradient_bits is not None

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return super().forward(self._with_quantized_gradient(x, mask), rows, mask)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        return super().by_feature(self._with_quantized_gradient(x, mask), unit, mask)

    def _with_quantized_gradient(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.gradient_bits is None or not self.training or not torch.is_grad_enabled():
            return x
        generator = self.generator or self.seed_generator(0, 0)
        return QuantizedGradient.apply(x, mask, self.place.signed, self.gradient_bits, generator)


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    if place.kind == "activation":
        return BoundedActivation(place, bits, options.gradient_bits)
    return TanhWeight(place, bits, per_row, options.grid, options.tanh)
