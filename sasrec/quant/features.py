"""A scale per feature for activations that enter no matrix product."""

import torch
from torch import Tensor

from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import Quantizer

# No unit is smaller than this share of the largest: a feature that calibration saw nothing of may still turn up.
SMALLEST_SHARE = 2.0**-10


class PerFeature(Quantizer):
    """x -> u q(x / u): the quantizer q of any method, on features that were brought to one range by their root mean squares u.

    What a product sums over must have one scale. What blocks pass on to each other enters none: norms and sums read it, and the
    features that are widest there, with a small gain behind, would set the step of all others (Lin et al., IJCAI 2022, arXiv
    2111.13824, who take powers of two for u, with which less is gained). u comes from calibration and stays.
    """

    unit: Tensor

    def __init__(self, inner: Quantizer) -> None:
        super().__init__(inner.place, inner.bits, inner.per_row)
        self.inner, self.low, self.high = inner, inner.low, inner.high
        self.register_buffer("unit", torch.ones(inner.place.features))

    @property
    def method(self) -> Quantizer:
        return self.inner.method

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        """values: (n, features)."""
        size = values.float().square().mean(0).sqrt()
        largest = size.max()
        self.unit.copy_(size.clamp_min(largest * SMALLEST_SHARE) if largest > 0 else torch.ones_like(size))
        self.inner.initialize(values / self.unit)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            # As it ships: x / (u s), which may round a value half-way between two levels otherwise than (x / u) / s.
            return self.grid().quantize(x)
        return self.inner.by_feature(x, self.unit, mask).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        own = self.inner.grid()
        return Grid(own.bits, own.levels, own.scale * self.unit, own.shift * self.unit)

    def start_epoch(self, epoch: int, epochs: int, seed: int, before: int = 0) -> None:
        self.inner.start_epoch(epoch, epochs, seed, before)
