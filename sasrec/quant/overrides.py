"""What `quant.overrides` may say of a model: which tensors there are, and which widths they take."""

from collections.abc import Mapping

from torch import nn

from sasrec.errors import UserError
from sasrec.mapping import unknown
from sasrec.models.taps import taps


def check(model: nn.Module, overrides: Mapping[str, int]) -> None:
    """Raise UserError for a tensor that the model does not have, or one below 2 bits that is no table."""
    known = taps(model)
    for name, bits in overrides.items():
        if name not in known:
            raise unknown("tensor in quant.overrides", name, known)
        if known[name].kind != "table" and bits < 2:
            what = {"activation": "an activation", "weight": "a weight"}[known[name].kind]
            raise UserError(f"params.yaml: quant.overrides.{name}: {what} takes 2 to 8 bits, not {bits}")
