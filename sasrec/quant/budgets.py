"""Mixed widths beside uniform ones: what each assignment of widths to weights and tables costs, after rounding alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sasrec.config import QuantParams
from sasrec.models.events import Histories
from sasrec.quant.sensitivity import WIDTHS, Cost, Validation, front, joint_rise, smallest_within


@dataclass(frozen=True)
class Assignment:
    """name: what it is. bits: the uniform width that it is, or that it is held against. bytes: of weights and tables with their
    scales. rise: of the validation loss, measured with all of them rounded, in nats. widths: by tensor."""

    name: str
    bits: int
    bytes: int
    rise: float
    widths: dict[str, int]


def assignments(
    model: nn.Module,
    validation: Validation,
    quant: QuantParams,
    histories: Sequence[Histories],
    full: float,
    costs: Sequence[Cost],
    match: Sequence[int] = (4,),
) -> list[Assignment]:
    """For each width from the widest down: all tensors at it (`uniform`), and between the extremes the best mixed widths for no
    more bytes (`budget`, as `quant.budget_kb` chooses), if they are others. For the widths in `match` also the smallest mixed
    model that loses no more (`same loss`, as `quant.max_drop`). Activations are at `quant`'s width everywhere.

    costs: of the weights and tables alone, at all WIDTHS; full: the full-precision validation loss, as from `measure`.
    """
    stored = [cost for cost in costs if cost.kind != "activation"]
    found = front(stored)
    rows = []
    for bits in sorted(WIDTHS, reverse=True):
        uniform = {cost.tensor: bits for cost in stored}
        size = sum(cost.bytes for cost in stored if cost.bits == bits)
        rise = joint_rise(model, quant, histories, uniform, validation) - full
        rows.append(Assignment("uniform", bits, size, rise, uniform))
        best = [each for each in found if each[0] <= size][-1]
        if best[2] != uniform:
            own = joint_rise(model, quant, histories, best[2], validation) - full
            rows.append(Assignment("budget", bits, best[0], own, best[2]))
        if bits in match and rise > 0:
            chosen, own = smallest_within(model, quant, histories, found, validation, full, rise)
            if own <= rise:
                rows.append(Assignment("same loss", bits, chosen[0], own, chosen[2]))
    return rows
