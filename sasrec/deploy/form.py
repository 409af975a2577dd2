"""In which numbers the products of a quantized tensor are computed: small integers where its levels are such."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.quant.grid import Grid


@dataclass(frozen=True)
class Form:
    """Values scale * integers[code] + shift, with integers in int8: what a weight or table is in an integer product.

    integers: int8 (levels,). scale, shift: float32, () or (rows, 1).
    """

    integers: NDArray[np.int8]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]

    @property
    def is_shifted(self) -> bool:
        return bool(np.any(self.shift))


def integer_form(grid: Grid) -> Form | None:
    """The grid of a weight or table in int8, or None where its levels need more bits (sums of powers of two from 7 bits of
    magnitude on). Levels 0..255 are moved by 128, which the shift takes back."""
    levels = grid.levels.cpu().numpy()
    scale, shift = grid.scale.cpu().numpy(), grid.shift.cpu().numpy()
    low, high = levels[0], levels[-1]
    if low >= -128 and high <= 127:
        return Form(levels.astype(np.int8), scale, shift)
    if low >= 0 and high <= 255:
        return Form((levels - 128).astype(np.int8), scale, (shift + 128 * scale).astype(np.float32))
    return None


def float_form(tensor: Tensor) -> NDArray[Any]:
    """A tensor in full precision as it is stored: float16 where each of its values is such a number, else float32."""
    array = tensor.detach().cpu().numpy()
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def zero_point(grid: Grid) -> int | None:
    """The uint8 that stands for 0 in activations on this grid, which may have a scale per feature, or None where the levels do
    not fit 8 bits."""
    low, high = float(grid.levels[0]), float(grid.levels[-1])
    if bool(grid.shift.any()):
        return None
    if low >= 0:
        return 0 if high <= 255 else None
    if low >= -128 and high <= 127:
        return 128
    return -int(low) if high - low <= 255 else None  # a learned offset moves all 256 levels


@dataclass(frozen=True)
class Factors:
    """A quantized weight or table as it enters a product: integers (rows, features), float32, times scale plus shift."""

    integers: Tensor
    scale: Tensor
    shift: Tensor | None


def factors(grid: Grid, codes: Tensor) -> Factors:
    """codes: (rows, features) on the grid."""
    form = integer_form(grid)
    if form is None:
        return Factors(grid.levels[codes.long()], grid.scale, grid.shift if bool(grid.shift.any()) else None)
    shift = torch.from_numpy(form.shift) if form.is_shifted else None
    return Factors(torch.from_numpy(form.integers)[codes.long()].float(), torch.from_numpy(form.scale), shift)
