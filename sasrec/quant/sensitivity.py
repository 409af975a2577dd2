"""What rounding each tensor alone does to the validation loss, and mixed widths chosen from it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sasrec.config import QuantParams
from sasrec.data.batches import Ints
from sasrec.errors import UserError
from sasrec.evaluation import blocks
from sasrec.guardian import stop_if_orphaned
from sasrec.losses import CHUNK_ELEMENTS
from sasrec.models.events import Histories, asked_by
from sasrec.models.taps import Place, Tap, taps
from sasrec.quant import attach
from sasrec.quant.frozen import tensors
from sasrec.quant.quantizer import FixedScale, Quantizer

# Users whose validation items are scored, evenly taken from all: a loss is a mean over them, and differences between two
# models on the same users are far sharper than either.
USERS = 2000
# Widths that an assignment may choose from.
WIDTHS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Cost:
    """A tensor at a width: bytes it takes with its scales (0 for an activation), and by how much the validation loss rises
    (cross-entropy over all items, in nats) when it alone is rounded to the nearest, after training."""

    tensor: str
    kind: str
    bits: int
    bytes: int
    rise: float


class Nearest:
    """Plain rounding at the scales of least squared error, as `ptq` does by default; here so that an edit of that file does
    not re-run every method."""

    @staticmethod
    def build(place: Place, bits: int, per_row: bool, options: None) -> Quantizer:
        return FixedScale(place, bits, per_row)


class Validation:
    """The validation items of some users, to take the loss of one model after another on."""

    def __init__(self, store: Any, max_len: int, device: torch.device, users: int = USERS, asked: Sequence[str] = ()) -> None:
        """asked: what the model wants to know of each event (`models.events.asked_by`)."""
        held = store.held("validation")
        chosen = np.unique(np.linspace(0, len(held.users) - 1, min(users, len(held.users))).round().astype(np.int64))
        part = replace(held, users=held.users[chosen], positions=held.positions[chosen])
        targets = np.asarray(store.items)[part.positions].astype(np.int64)
        self.batches: list[tuple[Histories, Tensor]] = [
            (histories.to(device), self._tensor(targets[rows], device))
            for rows, histories in blocks(store, part, max_len, 512, asked)
        ]

    @staticmethod
    def _tensor(values: Ints, device: torch.device) -> Tensor:
        return torch.from_numpy(values).to(device)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Mean cross-entropy of the held-out items over all items, in nats, in evaluation mode."""
        mode = model.training
        model.eval()
        table = model.scoring_table.all()[1:]
        total, count = 0.0, 0
        for histories, targets in self.batches:
            states = model.encode(histories, last=True)[:, 0]
            for part, target in zip(
                states.split(rows := max(1, CHUNK_ELEMENTS // len(table))), targets.split(rows), strict=True
            ):
                total += float(torch.nn.functional.cross_entropy(part @ table.T, target - 1, reduction="sum"))
                count += len(part)
        model.train(mode)
        return total / count


def measure(
    model: Any,
    validation: Validation,
    quant: QuantParams,
    histories: Sequence[Histories],
    widths: Sequence[int],
    kinds: Sequence[str] = ("table", "weight", "activation"),
    given: Mapping[str, int] | None = None,
    shifted: Collection[str] = (),
) -> tuple[float, list[Cost]]:
    """The full-precision model's validation loss, and the cost of every tensor of those kinds at each width: each alone is
    rounded to the nearest, the rest stays in full precision. histories: what activations are calibrated on. given: widths of
    tensors that have no others (32: full precision). shifted: as `size_of`. The model must not have quantizers, and has none
    after."""
    full = validation.loss(model)
    weights = tensors(model)
    found = []
    mode = model.training
    model.eval()  # what activations are calibrated on has no dropout
    with torch.no_grad(), attach.recording(model) as recorders:
        for batch in histories:
            model.encode(batch)
    model.train(mode)
    fixed, own = given or {}, of_own_file(model)
    for name, tap in taps(model).items():
        if tap.kind not in kinds:
            continue
        for bits in [fixed[name]] if name in fixed else widths:
            if tap.kind == "activation" and bits < 2:
                continue
            stop_if_orphaned()
            size = size_of(tap, bits, quant, tap in own, shifted)
            if bits == attach.FULL_PRECISION:
                found.append(Cost(name, tap.kind, bits, size, 0.0))
                continue
            alone = replace(quant, overrides=dict.fromkeys(taps(model), attach.FULL_PRECISION) | {name: bits}, preset="all")
            (quantizer,) = attach.build(model, alone, Nearest, None).values()
            quantizer.initialize(weights[name].detach() if name in weights else recorders[name].sample())
            tap.quantizer = quantizer
            rise = validation.loss(model) - full
            tap.quantizer = None
            found.append(Cost(name, tap.kind, bits, size, rise))
    return full, found


def stored_bytes(rows: int, features: int, bits: int, per_row: bool, large: bool = False, shifted: bool = False) -> int:
    """Packed codes and scales of a weight or table, as an exported model has them; 0 for an activation, which has no rows.
    large: whether it is a table with a file of its own, where a scale by row takes 16 bits, elsewhere 32. shifted: whether a
    shift stands beside each scale."""
    scales = (2 if large else 4) * rows if per_row else 4 * (rows > 0)
    return (rows * features * bits + 7) // 8 + scales * (2 if shifted else 1)


def of_own_file(model: Any) -> set[Tap]:
    """The tables that an exported model has in files of their own."""
    return {table.weight_tap for table in (*model.item_tables, *(part.table for part in model.scoring_parts))}


def size_of(tap: Tap, bits: int, quant: QuantParams, large: bool, shifted: Collection[str] = ()) -> int:
    """Bytes of the weight or table at `tap` (an activation has none), at so many bits, or in full precision at 32. large: as
    `stored_bytes`. shifted: kinds of tensors that have shifts, `SHIFTED` of the method."""
    if bits == attach.FULL_PRECISION:
        return 4 * tap.rows * tap.features
    scales = quant.table if tap.kind == "table" else quant.weights
    return stored_bytes(tap.rows, tap.features, bits, scales == "per_row", large, tap.kind in shifted)


def check(model: Any, quant: QuantParams, shifted: Collection[str] = ()) -> None:
    """Raise UserError where no widths bring the weights and tables of `model` within `quant.budget_kb`. shifted: as
    `size_of`."""
    if quant.budget_kb is None:
        return
    own = of_own_file(model)
    narrowest = {name: quant.overrides.get(name, WIDTHS[0]) for name in taps(model)}
    least = sum(size_of(tap, narrowest[name], quant, tap in own, shifted) for name, tap in taps(model).items())
    if least > 1000 * quant.budget_kb:
        raise UserError(
            f"params.yaml: quant.budget_kb: {quant.budget_kb:g} kB do not hold the weights and tables of this model; "
            f"the least is {least / 1000:.1f} kB"
        )


def front(costs: Sequence[Cost]) -> list[tuple[int, float, dict[str, int]]]:
    """Assignments of a width to every tensor that no other beats in both bytes and predicted rise, smallest first: (bytes,
    sum of the rises, {tensor: bits}). The rises of single tensors are taken to add up."""
    best: list[tuple[int, float, dict[str, int]]] = [(0, 0.0, {})]
    for name in dict.fromkeys(cost.tensor for cost in costs):
        own = [cost for cost in costs if cost.tensor == name]
        grown = [
            (size + cost.bytes, rise + max(cost.rise, 0.0), chosen | {name: cost.bits})
            for size, rise, chosen in best
            for cost in own
        ]
        grown.sort(key=lambda each: each[:2])
        best = []
        for each in grown:
            if not best or each[1] < best[-1][1]:
                best.append(each)
    return best


def mixed(
    model: Any,
    store: Any,
    quant: QuantParams,
    histories: Sequence[Histories],
    log: Callable[[str], None] = print,
    shifted: Collection[str] = (),
) -> QuantParams:
    """`quant` with the widths of weights and tables that `quant.budget_kb` or `quant.max_drop` asks for, as overrides; as it
    is where neither is set. Widths that `quant.overrides` gives stay. shifted: as `size_of`.

    Raises UserError where no assignment fits; the error says what the least is.
    """
    if quant.budget_kb is None and quant.max_drop is None:
        return quant
    check(model, quant, shifted)
    device = next(model.parameters()).device
    validation = Validation(store, model.params.max_len, device, asked=asked_by(model))
    full, costs = measure(model, validation, quant, histories, WIDTHS, ("table", "weight"), quant.overrides, shifted)
    found = front(costs)
    if quant.budget_kb is not None:
        chosen = [each for each in found if each[0] <= 1000 * quant.budget_kb][-1]
        rise = joint_rise(model, quant, histories, chosen[2], validation) - full
    else:
        limit = float(quant.max_drop or 0)
        chosen, rise = smallest_within(model, quant, histories, found, validation, full, limit)
        if rise > limit:
            raise UserError(
                f"params.yaml: quant.max_drop: no assignment stays within {limit:g}; with all weights and tables at "
                f"{WIDTHS[-1]} bits and activations at theirs the validation loss rises by {rise:.4f}"
            )
    widths = ", ".join(f"{name} {bits}" for name, bits in chosen[2].items())
    log(f"mixed widths, {chosen[0] / 1000:.1f} kB, validation loss {rise:+.4f} after rounding: {widths}")
    return replace(quant, overrides={**chosen[2], **quant.overrides})


def joint_rise(
    model: nn.Module, quant: QuantParams, histories: Sequence[Histories], chosen: dict[str, int], validation: Validation
) -> float:
    """Validation loss with all weights and tables at the chosen widths, and activations at theirs, rounded to the nearest."""
    attach.attach(model, replace(quant, overrides={**chosen, **quant.overrides}), Nearest, None)
    attach.calibrate(model, histories)
    loss = validation.loss(model)
    attach.place(model, {})
    return loss


def smallest_within(
    model: nn.Module,
    quant: QuantParams,
    histories: Sequence[Histories],
    found: list[tuple[int, float, dict[str, int]]],
    validation: Validation,
    full: float,
    limit: float,
) -> tuple[tuple[int, float, dict[str, int]], float]:
    """By bisection over the front, measuring the whole model: the smallest whose rise is within `limit`, and its rise; the
    largest where none is."""
    low, high = 0, len(found) - 1
    rise = joint_rise(model, quant, histories, found[high][2], validation) - full
    if rise > limit:
        return found[high], rise
    while low < high:
        middle = (low + high) // 2
        own = joint_rise(model, quant, histories, found[middle][2], validation) - full
        if own <= limit:
            high, rise = middle, own
        else:
            low = middle + 1
    return found[high], rise
