"""When a training run is quantized, and to what width: from the start, after some epochs, or narrower step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from torch import nn

from sasrec.config import QuantParams, TrainParams
from sasrec.errors import UserError
from sasrec.models.events import Histories
from sasrec.models.taps import taps
from sasrec.quant import attach
from sasrec.quant.quantizer import Quantizer
from sasrec.training import Extras

# Epochs of the study that `quant.preset: source` repeats.
SOURCE_EPOCHS = 20
# Share of the epochs of a training from scratch in which scales are set anew at the start of each.
SETTLING = 0.25


@dataclass(frozen=True)
class Phase:
    """Epochs from `start` (from 0) on, with no tensor narrower than `least` bits; 32: in full precision."""

    start: int
    least: int


def epochs_of(quant: QuantParams, train: TrainParams) -> int:
    """How long a training with quantizers is. train: of the model."""
    if quant.preset == "source":
        return SOURCE_EPOCHS
    return train.epochs if quant.from_scratch else quant.epochs


def phases(quant: QuantParams, epochs: int) -> list[Phase]:
    """The phases of a run: `quant.delay_epochs` in full precision, then equal shares of the rest for each width of
    `quant.progressive` and for the study's own. Raises UserError where an epoch for each is not there."""
    delay, widths = quant.delay_epochs, (*(quant.progressive or ()), 1)
    rest = epochs - delay
    if rest < len(widths):
        raise UserError(
            f"params.yaml: {epochs} epochs are too few for quant.delay_epochs: {delay} and {len(widths)} width(s) after it; "
            + (
                f"quant.preset: source has {SOURCE_EPOCHS}, so delay less, or name fewer widths in quant.progressive"
                if quant.preset == "source"
                else f"raise {'train' if quant.from_scratch else 'quant'}.epochs"
            )
        )
    planned = [Phase(delay + rest * i // len(widths), least) for i, least in enumerate(widths)]
    return [Phase(0, attach.FULL_PRECISION), *planned] if delay else planned


def built(
    model: nn.Module, quant: QuantParams, method: Any, options: Any, epochs: int
) -> tuple[list[Phase], list[dict[str, Quantizer]]]:
    """The phases of a run of `method`, and for each the quantizers, by the tap's name, which are not in place yet. epochs: of
    the whole run; 0 for a method that does not train. Raises UserError where the model or the epochs do not suit."""
    plan = phases(quant, epochs) if attach.quantizes(method) and method.TRAINS and epochs else [Phase(0, 1)]
    return plan, [
        {}
        if phase.least == attach.FULL_PRECISION
        else attach.build(model, narrowed(model, quant, phase.least), method, options)
        for phase in plan
    ]


class Schedule:
    """The quantizers of every phase, all of which exist from the start, so that the optimizer knows their parameters; those
    of the phase that runs are on the model's taps.

    The quantizers of a phase are initialized when it begins, from the weights as they are then. Where these are those of an
    untrained network, what they grow to is up to 40 times as much (the stream of MovieLens-1M's model), and neither a fixed
    clip nor a learned one follows: so in the first quarter of a training from scratch scales are set anew at the start of each
    epoch.
    """

    def __init__(
        self, model: nn.Module, quant: QuantParams, method: Any, options: Any, histories: Sequence[Histories], epochs: int
    ) -> None:
        """histories: (batch, length) each, to calibrate activations on. epochs: of the whole run; 0 for a method that does
        not train."""
        self.model, self.histories = model, histories
        self.settling = ceil(SETTLING * epochs) if quant.from_scratch else 0
        self.phases, self.built = built(model, quant, method, options, epochs)
        self.begin(0)

    def at(self, epoch: int) -> int:
        """The number of the phase that an epoch (from 0) belongs to."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= epoch)

    def place(self, number: int) -> None:
        """Put the quantizers of that phase on the taps, as they are."""
        for name, tap in taps(self.model).items():
            tap.quantizer = self.built[number].get(name)

    def begin(self, number: int) -> None:
        """Initialize the quantizers of that phase and put them on the taps."""
        attach.place(self.model, self.built[number])
        attach.calibrate(self.model, self.histories)

    def extras(self, seed: int) -> Extras:
        """What the quantizers add to a training run."""
        every = [quantizer for built in self.built for quantizer in built.values()]
        own, weights = attach.parameters(every)
        ends = [phase.start for phase in self.phases[1:]]

        def on_epoch(epoch: int, epochs: int) -> None:
            number = self.at(epoch)
            start = self.phases[number].start
            if epoch == start and number:
                self.begin(number)
            elif 0 < epoch <= self.settling and self.built[number]:
                attach.renew(self.model, self.histories)
            length = (ends[number] if number < len(ends) else epochs) - start
            for quantizer in self.built[number].values():
                quantizer.start_epoch(epoch - start, length, seed, before=start)

        return replace(
            attach.own_training(self.model, seed),
            parameters=own,
            weights=weights,
            draws=attach.draw(every),
            on_epoch=on_epoch,
            on_resume=lambda done: self.place(self.at(max(done - 1, 0))),
            # The model of an earlier phase is not what was asked for, however good.
            candidates_from=self.phases[-1].start + 1 if len(self.phases) > 1 else 0,
        )


def narrowed(model: nn.Module, quant: QuantParams, least: int) -> QuantParams:
    """The parameters under which every tensor has the width that `quant` gives it, but at least `least` bits."""
    if least <= 1:
        return quant
    wanted = {name: attach.width(tap.place(name), quant) for name, tap in taps(model).items()}
    return replace(quant, overrides={**quant.overrides, **{name: max(bits, least) for name, bits in wanted.items()}})
