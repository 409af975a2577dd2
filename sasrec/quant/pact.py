"""PACT: parameterized clipping activation (Choi et al. 2018, arXiv 1805.06085). Weights as in DoReFa, as the paper has
them, or by SAWB (Choi et al., SysML 2019), which the same authors joined to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sasrec.config import QuantParams
from sasrec.errors import UserError
from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer, RoundThrough, by_row, inner, inside, mse_scale, rounded, row_sum
from sasrec.quant.rates import of_width
from sasrec.quant.tanh_weight import Tanh, TanhWeight

TRAINS = True
# Of `methods.pact.lr`, where it is empty, by the width of each tensor. At 8 bits hardly a value is clipped, and Adam makes
# whole steps of the L2 term alone: at 0.001 alphas shrink by a third in five epochs of MovieLens-1M, and the loss rises.
RATES = {1: 0.01, 3: 0.003, 4: 0.001, 6: 0.0001}

# SAWB: clip = c1 sqrt(mean w^2) - c2 mean|w|. Fitted by the authors to the best clips of six distributions for symmetric
# grids with zero; published for these widths alone (3, 15 and 255 levels).
SAWB = {2: (2.6, 1.71), 4: (12.035, 12.03), 8: (31.76, 35.04)}

# Of `methods.pact.decay`, where it is empty, likewise. At 2 bits with 0.0001 alphas of the stream between blocks grow by 20 to
# 45 % in three epochs, and validation falls below the start; at 4 bits with 0.01 all shrink to half (built-in data, lr 0.01).
DECAYS = {1: 1e-2, 3: 6e-4, 4: 1e-4}


@dataclass(frozen=True)
class Options:
    lr: float | None = None  # of the logarithm of alpha; null: RATES
    # Of the L2 term on alpha, section 3.2. alpha's gradient comes from clipped values alone and knows nothing of the rounding,
    # so that it says "wider", and only this term says otherwise. What wider costs grows with the step; the paper, too, finds
    # that fewer bits want more decay. null: DECAYS.
    decay: float | None = None
    weights: Literal["dorefa", "sawb"] = "dorefa"
    tanh: Tanh = "scaled"  # of weights by dorefa, as its option

    def __post_init__(self) -> None:
        within("lr", self.lr, 0)
        within("decay", self.decay, 0)


class LearnedClip(torch.autograd.Function):
    """x -> round(clip(x, alpha low / high, alpha) high / alpha) alpha / high, equations 1 and 2; low is 0 in the paper. unit:
    (features,), where alpha is in units of its own for each feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int, high: int, unit: Tensor | None = None) -> Tensor:
        scale = alpha / high if unit is None else alpha / high * unit
        quantized, kept, size = rounded(x, scale, low, high)
        ctx.save_for_backward(kept, quantized, alpha)
        # Its ends are outside of the clip. (Of two floats a quotient, or a product, may miss them by its rounding.)
        ctx.low, ctx.high = low * size * (1 - 1e-6), high * size * (1 - 1e-6)
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        kept, quantized, alpha = ctx.saved_tensors
        # Straight through the rounding. d/dx: 1 inside the clip, 0 at its ends and beyond.
        to_x = inside(gradient, kept, ctx.low, ctx.high)
        # Equation 3. d/dalpha: 0 inside, without LSQ's residual of the rounding; 1 at alpha and beyond, low / high at the
        # other end and beyond (0 for the fixed end 0): which is quantized / alpha at each of them.
        to_alpha = inner(gradient - to_x, quantized, alpha) / alpha
        return to_x, to_alpha, None, None, None


class PACT(Quantizer):
    """The clip alpha of one activation: [0, alpha] after ReLU or softmax. For a signed tensor, which the paper does not
    know, it is two-sided, and like an unsigned one it has 2^b levels: one more under 0 than over it, so that the lower end
    is -alpha 2^(b-1) / (2^(b-1) - 1), nearly -alpha but at few bits. (At 2 bits the symmetric three levels lose half of the
    quality, whatever is learned.) The logarithm of alpha is trained, so that the rate is relative to it; it starts at the
    clip with the least squared error on the calibration batches."""

    def __init__(self, place: Place, bits: int, options: Options) -> None:
        super().__init__(place, bits, per_row=False)
        self.decay = of_width(DECAYS, bits) if options.decay is None else options.decay
        self.log_alpha = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        self.log_alpha.copy_((mse_scale(values, self.low, self.high, per_row=False) * self.high).log())

    @staticmethod
    def joint_penalty(of: Sequence["PACT"]) -> Tensor:
        by_decay: dict[float, list[Tensor]] = {}
        for quantizer in of:
            by_decay.setdefault(quantizer.decay, []).append(quantizer.log_alpha)
        return torch.stack([(decay * torch.stack(own).exp().square()).sum() for decay, own in by_decay.items()]).sum()

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return LearnedClip.apply(x.float(), self.log_alpha.exp(), self.low, self.high).to(x.dtype)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        return LearnedClip.apply(x.float(), self.log_alpha.exp(), self.low, self.high, unit).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        return Grid.uniform(self.bits, self.low, self.high, self.log_alpha.detach().exp() / self.high)


class SawbWeight(Quantizer):
    """Statistics-aware weight binning: clip = (c1 - c2 mean|w| / rms) rms, straight-through inside it.

    The bracket, the shape of the distribution, is taken over all rows: it is the small difference of two large numbers,
    and over the 64 weights of one row mostly noise. rms is that of the row, or of the tensor.
    """

    shape: Tensor
    rms: Tensor | None
    largest: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool) -> None:
        super().__init__(place, bits, per_row, symmetric=True)
        self.register_buffer("shape", torch.ones(()))
        for name in ("rms", "largest"):
            self.register_buffer(name, None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        self.refresh(values)

    def refresh(self, values: Tensor) -> None:
        x = by_row(values, self.per_row)
        rms = x.square().mean(1, keepdim=True).sqrt()
        c1, c2 = SAWB[self.bits]
        # Of the rows that are not all 0; not picked, which a GPU would have to be waited for.
        some = rms > 0
        share = torch.where(some, x.abs().mean(1, keepdim=True) / rms, 0).sum() / some.sum().clamp_min(1)
        self.shape.copy_(torch.where(some.any(), c1 - c2 * share, 1.0))
        if self.rms is not None and self.largest is not None:
            self.rms.copy_(rms.squeeze())
            self.largest.copy_(x.abs().max())

    def _scale(self, x: Tensor) -> Tensor:
        if self.rms is not None and self.largest is not None:
            rms, largest = self.rms, self.largest
        else:
            x = x.detach().float()
            rms, largest = (row_sum(x * x) / x.shape[-1]).sqrt(), x.abs().amax(-1, keepdim=True)
        # The fit does not hold for two-valued tensors and the like, where the clip would fall below the spread.
        clip = torch.where(self.shape >= 1, self.shape * rms, largest)
        return clip.clamp_min(SMALLEST_SCALE) / self.high

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale = self._scale(x)
        return RoundThrough.apply(self.dithered(x.float(), scale), scale, self.low, self.high).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        assert values is not None
        return Grid.uniform(self.bits, self.low, self.high, self._scale(values))


def check(model: nn.Module, quant: QuantParams, options: Options) -> None:
    """Raise UserError where widths are chosen from more than those that SAWB is published for."""
    given = next((name for name in ("budget_kb", "max_drop") if getattr(quant, name) is not None), None)
    if given is not None and options.weights == "sawb":
        raise UserError(
            f"params.yaml: methods.pact.weights: sawb is published for 2, 4 and 8 bits, and quant.{given} chooses from others, "
            f"too; use weights: dorefa, or leave quant.{given} empty"
        )


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    if place.kind == "activation":
        return PACT(place, bits, options)
    if options.weights == "dorefa":
        return TanhWeight(place, bits, per_row, tanh=options.tanh)
    if bits not in SAWB:
        raise UserError(
            f"params.yaml: methods.pact.weights: sawb is published for 2, 4 and 8 bits, and {place.name} has {bits}; "
            "use weights: dorefa, or another width"
        )
    return SawbWeight(place, bits, per_row)
