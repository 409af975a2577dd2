"""What `quant.overrides` may say of a model: which tensors there are, and which widths they take."""

from collections.abc import Mapping

from torch import nn

from sasrec.errors import UserError
from sasrec.mapping import unknown
from sasrec.models.taps import taps


def check(model: nn.Module, overrides: Mapping[str, int]) -> None:
    """Raise UserError for a tensor that the model does not have, or an activation below 2 bits."""
    known = taps(model)
    for name, bits in overrides.items():
        if name not in known:
            raise unknown("tensor in quant.overrides", name, known)
        if known[name].kind == "activation" and bits < 2:
            raise UserError(f"params.yaml: quant.overrides.{name}: an activation takes 2 to 8 bits, not {bits}")
