"""What is left of a quantized model when training is over: grids and integer codes, the same for every method."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sasrec.models.taps import taps
from sasrec.quant.grid import Grid


@dataclass(frozen=True)
class Product:
    """How a table is stored that product quantization made. book: (splits, centroids, features / splits) uint8, the codes of
    the centroids on the table's grid. numbers: (items, splits) uint8, which centroid of each split an item is made of."""

    book: Tensor
    numbers: Tensor

    def codes(self, grid: Grid) -> Tensor:
        """The codes of the table, (items + 1, features) uint8: a first row of zeros, and the items."""
        splits = torch.arange(len(self.book), device=self.book.device)
        items = self.book[splits, self.numbers.long()].flatten(1)
        return torch.cat([torch.full_like(items[:1], self.zero(grid)), items])

    @staticmethod
    def zero(grid: Grid) -> int:
        """The code of 0."""
        return int((grid.levels == 0).nonzero())


@dataclass(frozen=True)
class FrozenTensor:
    """A place after quantization: its grid and, for a weight or table, the codes (rows, features), uint8. product: what
    those codes are put together from, where that is what is stored."""

    grid: Grid
    codes: Tensor | None
    product: Product | None = None


class FrozenQuantizer(nn.Module):
    """The activation quantizer of an artefact: nearest value of a fixed grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenQuantizer":
        """Follow the model to another device."""
        grid = self.grid
        self.grid = Grid(grid.bits, fn(grid.levels), fn(grid.scale), fn(grid.shift))
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.grid.quantize(x, rows)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weight or table behind each tap of such a kind, by the tap's name."""
    return {name: model.get_parameter(name) for name, tap in taps(model).items() if tap.kind != "activation"}


@torch.no_grad()
def thaw(model: nn.Module, frozen: dict[str, FrozenTensor]) -> None:
    """Make a full-precision `model` compute as the quantized one did: values of the codes for weights and tables, fixed
    grids for activations."""
    weights = tensors(model)
    for name, tap in taps(model).items():
        if name not in frozen:
            continue
        item = frozen[name]
        if item.codes is None:
            tap.quantizer = FrozenQuantizer(item.grid)
        else:
            weights[name].copy_(item.grid.decode(item.codes))


def to_tensors(frozen: dict[str, FrozenTensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named <place>/codes, /levels, /scale, /shift, and the width of each place, for a checkpoint; /book and /numbers
    instead of /codes for a product."""
    result: dict[str, Tensor] = {}
    bits: dict[str, Any] = {}
    for name, item in frozen.items():
        bits[name] = item.grid.bits
        result |= {
            f"{name}/levels": item.grid.levels,
            f"{name}/scale": item.grid.scale,
            f"{name}/shift": item.grid.shift,
        }
        if item.product is not None:
            result |= {f"{name}/book": item.product.book, f"{name}/numbers": item.product.numbers}
        elif item.codes is not None:
            result[f"{name}/codes"] = item.codes
    return result, bits


def from_tensors(saved: dict[str, Tensor], bits: dict[str, int]) -> dict[str, FrozenTensor]:
    """The inverse of `to_tensors`."""
    frozen = {}
    for name, width in bits.items():
        grid = Grid(width, *(saved[f"{name}/{part}"] for part in ("levels", "scale", "shift")))
        if f"{name}/book" in saved:
            product = Product(saved[f"{name}/book"], saved[f"{name}/numbers"])
            frozen[name] = FrozenTensor(grid, product.codes(grid), product)
        else:
            frozen[name] = FrozenTensor(grid, saved.get(f"{name}/codes"))
    return frozen
