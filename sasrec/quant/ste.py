"""STE: uniform fake quantization with running ranges and straight-through rounding (Jacob et al., CVPR 2018, arXiv
1712.05877, section 3; the straight-through estimator is Bengio et al. 2013, arXiv 1308.3432).

The zero point is 0 for activations, too, where that paper gives them a lower and an upper end of their own: products are then
of integers alone. Nothing is learned but the weights. The textbook range is the largest magnitude: the current one for
weights, an exponential moving average of the batches' for activations. Below 8 bits that wastes levels on the tails, so the
range is a share of the largest magnitude, the share with the least squared error where training starts (`range: minmax` is
the textbook's share of 1). So training starts exactly where `ptq` ends; from the first batch on the ranges of activations
move from the largest of all calibration batches to the average of what is the largest of each.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import SMALLEST_SCALE, Quantizer, RoundThrough, max_scale, mse_scale

TRAINS = True


@dataclass(frozen=True)
class Options:
    range: Literal["minmax", "mse"] = "mse"
    momentum: float = 0.99  # of the moving average, per batch
    # Share of the epochs after which the activations' ranges stand still, so that the weights settle on fixed grids.
    freeze_after: float = 0.5

    def __post_init__(self) -> None:
        within("momentum", self.momentum, 0, 1)
        within("freeze_after", self.freeze_after, 0, 1)


class STE(Quantizer):
    """scale = share * widest, where widest is the min-max scale: of a row now, or kept in a buffer.

    share: set at the start. widest: for an activation the moving average, for a tensor with one scale the last refresh.
    """

    share: Tensor
    widest: Tensor | None

    def __init__(self, place: Place, bits: int, per_row: bool, options: Options) -> None:
        super().__init__(place, bits, per_row)
        self.options = options
        self.observing = True
        self.register_buffer("share", torch.ones(self.scale_shape))
        self.register_buffer("widest", None if self.per_row else torch.ones(()))

    def initialize(self, values: Tensor) -> None:
        widest = max_scale(values, self.low, self.high, self.per_row)
        if self.widest is not None:
            self.widest.copy_(widest)
        if self.options.range == "mse":
            self.share.copy_(mse_scale(values, self.low, self.high, self.per_row) / widest)

    def start_epoch(self, epoch: int, epochs: int, seed: int, before: int = 0) -> None:
        super().start_epoch(epoch, epochs, seed, before)
        self.observing = epoch < self.options.freeze_after * epochs

    def refresh(self, values: Tensor) -> None:
        if self.widest is not None and self.place.kind != "activation":
            self.widest.copy_(max_scale(values, self.low, self.high, per_row=False))

    def _widest(self, x: Tensor) -> Tensor:
        """Min-max scale of each row of x: (..., features) -> (..., 1)."""
        widest = x.amax(-1, keepdim=True) / self.high
        return widest.maximum(x.amin(-1, keepdim=True) / self.low) if self.low else widest

    def _scale(self, x: Tensor, rows: Tensor | None) -> Tensor:
        widest = self._widest(x) if self.widest is None else self.widest
        return (self.of_rows(self.share, rows) * widest).clamp_min(SMALLEST_SCALE)

    @torch.no_grad()
    def _observe(self, x: Tensor, mask: Tensor | None) -> None:
        assert self.widest is not None
        # Padding as 0, which no range leaves out. All elements at once: reducing every short row takes ten times as long.
        real = x if mask is None else x * (mask != 0).unsqueeze(-1)
        self.widest.lerp_(self._widest(real.flatten())[0], 1 - self.options.momentum)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        values = x.float()
        if self.training and self.observing and self.place.kind == "activation":
            self._observe(values.detach(), mask)
        scale = self._scale(values.detach(), rows)
        return RoundThrough.apply(self.dithered(values, scale), scale, self.low, self.high).to(x.dtype)

    def by_feature(self, x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        values = x.float()
        if self.training and self.observing:
            self._observe(values.detach() / unit, mask)
        return RoundThrough.apply(values, self._scale(values, None) * unit, self.low, self.high).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        scale = self._scale(torch.zeros(()) if values is None else values.detach().float(), None)
        return Grid.uniform(self.bits, self.low, self.high, scale)


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return STE(place, bits, per_row, options)
