"""Which values a tensor may take at each width: one table, which the tests hold the methods to and the report prints.

b bits; in units of the scale (for APoT, of the smallest term):

| method                  | signed levels                 | unsigned levels           | zero among them           |
|-------------------------|-------------------------------|---------------------------|---------------------------|
| ptq ste lsq adaround    | -2^(b-1) .. 2^(b-1) - 1       | 0 .. 2^b - 1              | yes                       |
| lsq with offset         | activations: 2^b from an      | 0 .. 2^b - 1              | yes                       |
|                         | integer zero point on         |                           |                           |
| pact dorefa             | activations: as ptq           | 0 .. 2^b - 1              | yes                       |
|                         | weights: +- 2^(b-1) - 1       |                           | yes                       |
| dorefa grid: paper      | weights: 2^b from -m to m     |                           | no                        |
| apot                    | 0, +- 2^(b-1) - 1 sums of     | 2^b sums of powers of two | yes, but for weights (mu) |
|                         | powers of two                 |                           |                           |
| any, 1 bit              | -1, 1                         |                           | no                        |

No torch here: the report reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["weight", "table", "activation"]

# Whose grids leave out -2^(b-1), so that they are symmetric: of weights and tables, and of activations.
SYMMETRIC_WEIGHTS = frozenset({"pact", "dorefa", "apot"})
SYMMETRIC_ACTIVATIONS = frozenset({"apot"})


@dataclass(frozen=True)
class Convention:
    """levels: how many. zero: whether 0 is one of them. symmetric: whether -v is one wherever v is."""

    levels: int
    zero: bool
    symmetric: bool


def convention(method: str, bits: int, kind: Kind, signed: bool = True, options: Mapping[str, Any] | None = None) -> Convention:
    """What the grid of a tensor is like. signed: whether the tensor can be negative; weights and tables can.
    options: those of the method that differ from its defaults."""
    given = options or {}
    if bits == 1:
        return Convention(2, zero=False, symmetric=True)
    if kind == "activation" and not signed:
        return Convention(2**bits, zero=True, symmetric=False)
    if method == "dorefa" and kind != "activation" and given.get("grid") == "paper":
        return Convention(2**bits, zero=False, symmetric=True)
    symmetric = method in (SYMMETRIC_ACTIVATIONS if kind == "activation" else SYMMETRIC_WEIGHTS)
    # APoT moves the grid of a weight by the mean of its row.
    return Convention(2**bits - symmetric, zero=(method, kind) != ("apot", "weight"), symmetric=symmetric)
