"""The form that every method ends in: which values a tensor may take, and the integer codes of those values."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def nearest_table(levels: Tensor) -> Tensor:
    """What `nearest` looks up: for each half unit from the lowest level to the highest, the index of its level.

    levels: (n,) ascending integers. Returns (2 (highest - lowest) + 1,) int64. The borders between neighbouring levels
    are multiples of a half, so that no interval [i/2, (i+1)/2) holds one inside.
    """
    low, high = int(levels[0]), int(levels[-1])
    halves = torch.arange(2 * low, 2 * high + 1, device=levels.device, dtype=torch.float32) / 2
    return torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True)


def nearest(v: Tensor, table: Tensor, low: int) -> Tensor:
    """What `table` holds for the level nearest to each v (the upper one half-way), of v's shape.

    A look-up by floor(2 (v - low)), thirty times faster than a binary search (`torch.bucketize`). table: `nearest_table`,
    or anything indexed by it. low: the lowest level.
    """
    halves = torch.add(v.new_full((), -2.0 * low), v, alpha=2).clamp_(0, len(table) - 1)
    # What is not a number is some integer, which the clip brings back into the table, so that the loss can tell of it.
    return table.index_select(0, halves.int().clamp_(0, len(table) - 1).flatten()).view(v.shape)


def is_uniform(levels: Tensor) -> bool:
    """Whether the levels are consecutive integers, for which rounding does."""
    return bool((levels.diff() == 1).all())


def half_parts(parameter: Tensor) -> tuple[Tensor, float]:
    """A scale per row as float16 numbers and the power of two they are multiplied with: (rows, 1) float16, and a unit.

    The unit brings the largest into 1..2, so that 14 octaves below it keep all 11 bits of a float16.
    """
    largest = float(parameter.abs().max())
    unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
    return (parameter / unit).half(), unit


@dataclass(frozen=True)
class Grid:
    """Values scale * levels[code] + shift.

    bits: width of a code. levels: (n,) float32, strictly ascending integers, at most 2^bits; consecutive ones for a
    uniform grid. scale, shift: float32 of shape () or (rows, 1), per row of the tensor; the scale of
    a stream's activation also (features,). A power-of-two grid has integer
    levels too, in units of its smallest term; so any product of levels is exact in integers.
    """

    bits: int
    levels: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def uniform(bits: int, low: int, high: int, scale: Tensor, shift: Tensor | None = None) -> "Grid":
        """The grid scale * {low, ..., high} + shift (no shift: 0)."""
        levels = torch.arange(low, high + 1, dtype=torch.float32, device=scale.device)
        zero = torch.zeros((), device=scale.device)
        return Grid(bits, levels, scale.detach().float(), zero if shift is None else shift.detach().float())

    def with_half_scales(self) -> "Grid":
        """The grid with scales and shifts per row that a float16 times a power of two holds exactly: as they ship."""

        def rounded(parameter: Tensor) -> Tensor:
            if parameter.dim() == 0:
                return parameter
            half, unit = half_parts(parameter)
            return half.float() * unit

        return Grid(self.bits, self.levels, rounded(self.scale), rounded(self.shift))

    @cached_property
    def is_uniform(self) -> bool:
        return is_uniform(self.levels)

    @cached_property
    def has_zero(self) -> bool:
        """Whether 0 is a value of the grid, and is kept by it."""
        return bool((self.levels == 0).any()) and not bool(self.shift.any())

    @cached_property
    def nearest_codes(self) -> Tensor:
        """What `nearest` looks up to find codes."""
        return nearest_table(self.levels)

    def _scaled(self, x: Tensor, rows: Tensor | None) -> Tensor:
        return (x.float() - self._of(self.shift, rows)) / self._of(self.scale, rows)

    def encode(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Codes of the nearest values, uint8 of x's shape. rows: ids of x's rows when x is a look-up of the tensor.

        Half-way, a uniform grid takes the even level and any other the upper one.
        """
        v = self._scaled(x, rows)
        if not self.is_uniform:
            return nearest(v, self.nearest_codes, int(self.levels[0])).to(torch.uint8)
        low, high = float(self.levels[0]), float(self.levels[-1])
        return v.round_().clamp_(low, high).sub_(low).to(torch.uint8)

    def decode(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """Values of codes, float32 of their shape."""
        return self._values(self.levels[codes.long()], rows)

    def quantize(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The nearest values of x, of its shape and type: decode(encode(x)), without the detour where there is none."""
        if not self.is_uniform:
            return self.decode(self.encode(x, rows), rows).to(x.dtype)
        levels = self._scaled(x, rows).round_().clamp_(float(self.levels[0]), float(self.levels[-1]))
        return self._values(levels, rows).to(x.dtype)

    def _values(self, levels: Tensor, rows: Tensor | None) -> Tensor:
        return levels * self._of(self.scale, rows) + self._of(self.shift, rows)

    @staticmethod
    def _of(parameter: Tensor, rows: Tensor | None) -> Tensor:
        return parameter if rows is None or parameter.dim() == 0 else parameter[rows]
