"""Half precision: tables and weights rounded to float16, nothing trained. What halving the bytes costs without quantization."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sasrec.errors import UserError
from sasrec.quant.frozen import tensors

TRAINS = False
# No grids: the values are floating-point numbers, which the export stores in 16 bits where that loses nothing.
QUANTIZES = False


@dataclass(frozen=True)
class Options:
    """None."""


@torch.no_grad()
def reconstruct(model: nn.Module, histories: list[Tensor], options: Options, seed: int) -> None:
    """Round every table and weight matrix to IEEE 754 binary16 (to the nearest, ties to even); biases and norms stay as they
    are. Raises UserError for a value beyond its largest number."""
    for name, weight in tensors(model).items():
        half = weight.half()
        if not bool(torch.isfinite(half).all()):
            raise UserError(f"{name} has values above 65,504, which float16 does not hold; train the model again")
        weight.copy_(half.float())
