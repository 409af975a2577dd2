"""Which values a tensor may take at each width: one table, which the tests hold the methods to and the report prints.

b bits; in units of the scale (for APoT, of the smallest term):

| method                  | signed levels                 | unsigned levels           | zero among them           |
|-------------------------|-------------------------------|---------------------------|---------------------------|
| ptq ste lsq adaround    | -2^(b-1) .. 2^(b-1) - 1       | 0 .. 2^b - 1              | yes                       |
| lsq with offset         | activations: 2^b from an      | 0 .. 2^b - 1              | yes                       |
|                         | integer zero point on         |                           |                           |
| pact dorefa             | activations: as ptq           | 0 .. 2^b - 1              | yes                       |
|                         | weights: 2^b from -m to m,    |                           | no                        |
|                         | from 4 bits 2^b - 1           |                           | yes                       |
| apot                    | weights: 0, +- 2^(b-1) - 1    | 2^b sums of powers of two | yes, but for weights (mu) |
|                         | sums of powers of two;        |                           |                           |
|                         | activations of 2 bits: -2     |                           |                           |
|                         | alpha, too                    |                           |                           |
| pq                      | those of `rest`; of the item  | as ptq                    | yes                       |
|                         | table, the centroids: as ptq  |                           |                           |
| any, 1 bit              | -1, 1                         |                           | no                        |

No torch here: the report reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["weight", "table", "activation"]

# Bits of the first and the last layer, and of the stream between layers, under `quant.preset: paper`.
EDGE_BITS = 8
# Below so many bits the weights of DoReFa, and of PACT, which takes them from it, have the paper's grid.
PAPER_BELOW = 4


@dataclass(frozen=True)
class Convention:
    """levels: how many. zero: whether 0 is one of them. symmetric: whether -v is one wherever v is."""

    levels: int
    zero: bool
    symmetric: bool


def is_quantized(method: str, kind: Kind, options: Mapping[str, Any] | None = None) -> bool:
    """Whether the method quantizes tensors of that kind: `pq` leaves all but the item table where `rest` is none."""
    return method != "pq" or kind == "table" or (options or {}).get("rest") != "none"


def convention(method: str, bits: int, kind: Kind, options: Mapping[str, Any] | None = None, signed: bool = True) -> Convention:
    """What the grid of a tensor is like. options: those of the method that differ from its defaults. signed: whether it can
    be negative, which moves the levels of an activation, and changes their number with APoT alone."""
    given = options or {}
    if bits == 1:
        return Convention(2, zero=False, symmetric=True)
    if method == "apot" and kind == "activation" and signed and bits > 2:
        return Convention(2**bits - 1, zero=True, symmetric=True)
    if kind == "activation":
        return Convention(2**bits, zero=True, symmetric=False)
    if method == "dorefa" or (method == "pact" and given.get("weights", "dorefa") == "dorefa"):
        paper = {"paper": True, "zero": False}.get(given.get("grid", "auto"), bits < PAPER_BELOW)
        return Convention(2**bits - (not paper), zero=not paper, symmetric=True)
    symmetric = method in ("pact", "apot")
    # APoT moves the grid of a weight by the mean of its row.
    return Convention(2**bits - symmetric, zero=(method, kind) != ("apot", "weight"), symmetric=symmetric)
