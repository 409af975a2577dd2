"""How a trained model becomes a quantized one: where it starts, what it is trained on, and what comes after."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sasrec.config import QuantParams, TrainParams
from sasrec.curves import Row
from sasrec.distillation import Distillation
from sasrec.models.events import Histories
from sasrec.models.registry import Model, untrained, with_dropout
from sasrec.next_item import NextItem
from sasrec.quant import fits, rates
from sasrec.quant.attach import load_method, quantizes, shifted
from sasrec.quant.calibration import calibration
from sasrec.quant.centring import centre
from sasrec.quant.schedule import Schedule, epochs_of
from sasrec.quant.sensitivity import mixed
from sasrec.training import Trainer
from sasrec.validation import Validation


@dataclass(frozen=True)
class Run:
    """What stays the same through the parts of a run. key: what a resume file must have been written under. resume: the
    file of the last part; those of the parts before it lie beside it and are removed with it."""

    store: Any
    quant: QuantParams
    train: TrainParams
    seed: int
    device: torch.device
    resume: Path
    key: str
    log: Callable[[str], None]

    def resume_of(self, part: str) -> Path:
        return self.resume.with_name(f"{self.resume.stem}-{part}{self.resume.suffix}")


@dataclass(frozen=True)
class Outcome:
    """best_epoch: of the training that ended in the model, 0 where the start was best. loss: of the kind that is trained with,
    and ndcg: NDCG@10, both on validation."""

    model: Model
    best_epoch: int
    loss: float
    ndcg: float
    rows: list[Row]


def quantize(run: Run, model: Model, method: str, options: Any) -> Outcome:
    """`model`, the trained one, quantized by `method` with the section `methods.<method>`, its quantizers in place.

    `quant.init: control` starts from the full-precision model trained on for as long, which is trained here first, by the
    code and with the draws of the control. What a method without training starts from under `quant.preset: source`, where
    everything is trained from scratch, is the control, too. Raises UserError for options that do not fit.
    """
    module, chosen = load_method(method, options)
    model = model.to(run.device)
    fits.check(model, run.quant, run.train, method, options)
    teacher = model if run.quant.distill else None
    if run.quant.preset == "source":
        run, model = replace(run, quant=replace(run.quant, init="scratch")), untrained(model, tied=False)
    after = getattr(chosen, "after", None)
    trains = module.TRAINS or after is not None
    control_first = method != "control" and (run.quant.init == "control" or (run.quant.preset == "source" and not trains))
    if control_first:
        run.log("first the control, from which the method starts")
        model = trained(run, model, "control", None, teacher, run.resume_of("control")).model
        run = replace(run, quant=replace(run.quant, init="checkpoint"))
    if after is None:
        outcome = trained(run, model, method, options, teacher, run.resume)
    else:
        run.log(f"first {after}, whose steps the rounding is learned on")
        outcome = trained(run, model, after, chosen.after_options, teacher, run.resume)
        module.take_over(outcome.model)
    if hasattr(module, "reconstruct") and getattr(module, "reconstructs", lambda _: True)(chosen):
        module.reconstruct(outcome.model, _histories(run, outcome.model), chosen, run.seed)
        task = NextItem(outcome.model, run.train, run.store, run.device)
        loss, _, ndcg = Validation(outcome.model, run.store, run.train, run.seed, task)()
        run.log(f"reconstructed: validation loss {loss:.4f}, NDCG@10 {ndcg:.4f}")
        outcome = replace(outcome, loss=loss, ndcg=ndcg)
    if control_first:
        run.resume_of("control").unlink(missing_ok=True)
    return outcome


def trained(run: Run, model: Model, method: str, options: Any, teacher: Model | None, resume: Path) -> Outcome:
    """`model`, or one of its shape from scratch, with the quantizers of `method` in place and trained, if it trains."""
    module, chosen = load_method(method, options)
    if hasattr(module, "prepare"):
        chosen = module.prepare(chosen, run.store, run.seed)
    quant, train = run.quant, run.train
    scratch = quant.init == "scratch" and module.TRAINS
    if scratch:
        torch.manual_seed(run.seed)
        if quant.dropout is not None:
            train = replace(train, final_dropout=None)
        model = untrained(model, **({} if quant.dropout is None else {"dropout": quant.dropout}))
        train = replace(train, epochs=epochs_of(quant, train))
    else:
        # Where dropout fell in training, the rate that it ended with.
        rate = train.final_dropout if quant.dropout is None else quant.dropout
        rate = rate if module.TRAINS else None
        model = copy.deepcopy(model) if rate is None else with_dropout(model, rate)
        # Fine-tuning: its own rate and length, half a cosine down to nothing, no early stop; and no second task, whose head
        # is gone and would have to be learned anew in these few steps.
        train = replace(
            train,
            epochs=quant.epochs,
            lr=rates.of_weights(quant),
            schedule="cosine",
            warmup=0.0,
            patience=quant.epochs + 1,
            rating_weight=0.0,
            final_dropout=None,
        )
    histories = _histories(run, model)
    if quantizes(module):
        if quant.centre and not scratch and quant.preset != "source":
            centre(model, histories)
        quant = mixed(model, run.store, quant, histories, run.log, shifted(module))
    if not module.TRAINS:
        train = replace(train, epochs=0)
    schedule = Schedule(model, quant, module, chosen, histories, train.epochs)
    extras = schedule.extras(run.seed)
    if teacher is not None and module.TRAINS:
        sampled = None if train.loss == "cross_entropy" else train.negatives
        distillation = Distillation(teacher, model, quant.distill, sampled, run.seed)
        extras = replace(extras, distill=distillation, on_epoch=both(extras.on_epoch, distillation.start_epoch))
    if module.TRAINS:
        own = ", ".join(f"{rate:g}" for rate in sorted(extras.parameters))
        run.log(f"learning rate {train.lr:g}" + (f", of what {method} learns besides {own}" if own else ""))
    trainer = Trainer(model, run.store, train, run.seed, device=run.device, extras=extras, validate_start=True)
    progress = trainer.run(resume, f"{method} {run.key}", run.log)
    (best,) = (row for row in progress.rows if row.epoch == progress.best_epoch)
    return Outcome(model, best.epoch, best.validation_loss, best.validation_ndcg, progress.rows)


def _histories(run: Run, model: Model) -> list[Histories]:
    return calibration(run.store, model, run.train.batch_size, run.quant.calibration_batches, run.seed, run.device)


def both(first: Callable[[int, int], None], second: Callable[[int], None]) -> Callable[[int, int], None]:
    """What calls one and then the other with the epoch."""

    def on_epoch(epoch: int, epochs: int) -> None:
        first(epoch, epochs)
        second(epoch)

    return on_epoch
