"""What goes into the layers of a model, for the methods that look at layers one by one after training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sasrec.models.events import Histories, ids
from sasrec.models.taps import Table

# The name of the final states, which are the inputs of the scoring table.
STATES = "states"


def inputs_of(model: nn.Module, names: list[str], histories: Sequence[Histories]) -> dict[str, Tensor]:
    """What goes into the linear layers of those names, at real tokens: (n, features) each, in the order in which they run,
    and last, as STATES, what goes into the scoring table."""
    found: dict[str, list[Tensor]] = {}
    mask = torch.empty(0)

    def keep(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append((x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)).detach())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, arguments, name=name: keep(name, arguments[0]))
        for name in names
    ]
    try:
        for batch in histories:
            mask = ids(batch) != 0
            keep(STATES, model.encode(batch))  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def is_looked_up(model: nn.Module, table: Table, histories: Histories) -> bool:
    """Whether the encoder uses the table for its inputs."""
    uses: list[None] = []
    hook = table.weight_tap.register_forward_hook(lambda *_: uses.append(None))
    try:
        model.encode(histories)  # type: ignore[operator]
    finally:
        hook.remove()
    return bool(uses)
