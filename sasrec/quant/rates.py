"""Learning rates where params.yaml leaves them empty: the narrower a grid, the larger the steps that training needs.

No torch here: the report reads it.
"""

from collections.abc import Mapping
from typing import Any

from sasrec.config import QuantParams
from sasrec.quant.conventions import EDGE_BITS

# Of all weights (`quant.lr`) by the narrowest width in the model, each from that width up to the next.
OF_WEIGHTS = {1: 4e-3, 3: 2e-3, 4: 5e-4, 6: 2e-4}


def of_width(rates: Mapping[int, float], bits: int) -> float:
    """The rate of the widest width in `rates` that is not above `bits`."""
    return rates[max(width for width in rates if width <= bits)]


def narrowest(quant: QuantParams) -> int:
    """The fewest bits that the section asks for. What `budget_kb` and `max_drop` choose is not known from it."""
    tables = quant.embedding_bits or (EDGE_BITS if quant.preset == "paper" else quant.bits)
    kinds = (quant.weight_bits or quant.bits, quant.activation_bits or quant.bits, tables)
    return min(*kinds, *quant.overrides.values())


def of_weights(quant: QuantParams) -> float:
    """`quant.lr`, or what suits the narrowest width. The control has it, too, because all else has to be equal."""
    return quant.lr if quant.lr is not None else of_width(OF_WEIGHTS, narrowest(quant))


def of_quantizer(method: Any, options: Any, bits: int) -> float:
    """Of the parameters that a quantizer of `bits` learns: the method's option `lr`, or what its RATES say of that width. 0
    for a method that has no such option, because its quantizers learn nothing."""
    given: float | None = getattr(options, "lr", 0.0)
    return of_width(method.RATES, bits) if given is None else given
