"""One training loop for every model and every quantization method: epochs, validation, early stopping, resuming.

A run can be killed at any moment. After each epoch everything that the rest depends on is written to a resume file, and
every random draw of an epoch comes from a generator seeded with (seed, epoch), so that a resumed run ends with the same
bits as one that was never interrupted.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sasrec import losses
from sasrec.adam import Adam
from sasrec.annealing import dropout_rate, learning_rate
from sasrec.captured import ANY_ITEM, CapturedSteps, Static, filled
from sasrec.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from sasrec.config import TrainParams
from sasrec.curves import Row
from sasrec.data.batches import Batch, Ints, epoch_batches
from sasrec.errors import UserError
from sasrec.guardian import stop_if_orphaned
from sasrec.lazy_adam import LazyAdam, clip_norm
from sasrec.models.dropout import set_dropout
from sasrec.models.events import Histories, asked_by, gather, on
from sasrec.models.transfer import send
from sasrec.next_item import NextItem
from sasrec.objective import Positions
from sasrec.second_task import RatingTask
from sasrec.validation import Validation

# Of Adam; as the SASRec authors have them.
BETAS = (0.9, 0.98)

# Steps between renewals of a table's buffered statistics.
REFRESH_EVERY = 50


@dataclass
class Progress:
    """What a run has reached: everything the resume file holds besides tensors."""

    epoch: int = 0
    best_epoch: int = 0
    best_ndcg: float = -1.0
    since_best: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Extras:
    """What a quantization method adds to plain training. parameters: its own by their rate, without weight
    decay and outside norm clipping. weights: those that stand in the place of the model's, trained as those are. penalty:
    added to the loss. step: what the loss of a step is worked out within. on_epoch: called before each. refresh:
    called every few steps, and before a validation, to renew what is buffered of whole tables. draws: whether steps draw from
    generators of their own, which steps that are captured once cannot. on_resume: called with
    the epochs done, before the state of a killed run is loaded. candidates_from: the first epoch that may be the best
    checkpoint. distill: (loss, states, histories, windows, places of real positions, targets) of a batch -> what becomes of the
    loss."""

    parameters: dict[float, list[nn.Parameter]] = field(default_factory=dict)
    penalty: Callable[[], Tensor | None] = lambda: None
    step: Callable[[], AbstractContextManager[None]] = nullcontext
    on_epoch: Callable[[int, int], None] = lambda epoch, epochs: None
    refresh: Callable[[], None] = lambda: None
    on_resume: Callable[[int], None] = lambda epoch: None
    candidates_from: int = 0
    distill: Callable[[losses.Result, Tensor, Histories, Tensor | None, Tensor, Ints], losses.Result] | None = None
    weights: list[nn.Parameter] = field(default_factory=list)
    draws: bool = False


NOTHING = Extras()


@contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """The precision of the factors of matrix products inside; sums are float32 either way. Where a processor has no
    products of bfloat16 they stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer:
    """Trains `model` in place; `run` returns the curves and leaves the best checkpoint in the model."""

    def __init__(
        self,
        model: Any,
        store: Any,
        params: TrainParams,
        seed: int,
        *,
        device: torch.device,
        extras: Extras | None = None,
        validate_start: bool = False,
    ) -> None:
        """validate_start: whether the state before training is a candidate for the best checkpoint."""
        self.model, self.store, self.params, self.seed, self.device = model, store, params, seed, device
        self.extras = extras or NOTHING
        self.validate_start = validate_start
        own = {id(parameter) for parameters in self.extras.parameters.values() for parameter in parameters}
        self.weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        # Those of quantizers that are put in place later.
        known = {id(parameter) for parameter in self.weights}
        self.weights += [p for p in self.extras.weights if id(p) not in known]
        self.second = RatingTask(store, model.scoring_parts[-1].columns.stop).to(device) if params.rating_weight else None
        if self.second is not None:
            self.weights += self.second.parameters()
        sparse = params.table_optimizer == "sparse"
        for table in model.item_tables:
            table.sparse = sparse
        tables = [table.weight for table in model.item_tables] if sparse else []
        rest = [p for p in self.weights if not any(p is table for table in tables)]
        groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": params.weight_decay}]
        groups += [{"params": parameters, "weight_decay": 0.0} for parameters in self.extras.parameters.values()]
        decay, decoupled = params.weight_decay, params.optimizer == "adamw"
        self.task = NextItem(model, params, store, device)
        self.validate = Validation(model, store, params, seed, self.task)
        self.asked = asked_by(model)
        self.captured = CapturedSteps(self._work, device) if device.type == "cuda" and self._can_be_captured() else None
        if self.captured is not None:
            groups = [{**group, "lr": torch.tensor(params.lr, device=device)} for group in groups]
            self.average = torch.zeros((), device=device)  # real positions of a batch, in the mean of the epoch
            self.total = torch.zeros(2, device=device)  # of loss and accuracy over the positions of the epoch so far
        self.optimizer = Adam(groups, params.lr, BETAS, decoupled, capturable=self.captured is not None)
        self.steps = 0  # of the last epoch
        self.table_optimizer = LazyAdam(tables, params.lr, BETAS, decay, decoupled) if tables else None

    def run(self, resume: Path | None = None, key: str = "", log: Callable[[str], None] = print) -> Progress:
        """Train to the end or to early stopping. resume: the file that a killed run of the same `key` left behind."""
        progress, best = self._restore(resume, key) if resume else (Progress(), None)
        if progress.epoch:
            log(f"resuming after epoch {progress.epoch}")
        elif self.validate_start or not self.params.epochs:  # the start is then all there is
            self.extras.refresh()
            loss, accuracy, ndcg = self.validate()
            best = self._note(progress, Row(0, 0.0, None, loss, None, accuracy, ndcg), best)
            log(f"start: validation loss {loss:.4f}, accuracy {accuracy:.4f}, NDCG@10 {ndcg:.4f}")
        while progress.epoch < self.params.epochs and progress.since_best < self.params.patience:
            epoch, began = progress.epoch + 1, time.monotonic()
            rate, train_loss, train_accuracy = self.epoch(epoch)
            trained = time.monotonic() - began
            progress.epoch = epoch
            if epoch % self.params.evaluate_every == 0 or epoch == self.params.epochs:
                self.extras.refresh()
                loss, accuracy, ndcg = self.validate()
                row = Row(epoch, rate, train_loss, loss, train_accuracy, accuracy, ndcg)
                best = self._note(progress, row, best)
                log(
                    f"epoch {epoch}: loss {train_loss:.4f}, validation loss {loss:.4f}, accuracy {accuracy:.4f}, "
                    f"NDCG@10 {ndcg:.4f}{' *' if progress.best_epoch == epoch else ''} "
                    f"({trained:.1f} s + {time.monotonic() - began - trained:.1f} s)"
                )
            if resume:
                self._save(resume, key, progress, best)
        if self.captured is not None:
            self.captured.forget()
        if best is not None:
            self.model.load_state_dict(best)
        self.model.eval()
        return progress

    def _note(self, progress: Progress, row: Row, best: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Record a validation; returns the best weights so far."""
        progress.rows.append(row)
        if row.epoch < self.extras.candidates_from:
            # What may not win does not use up the patience either.
            return best
        if row.validation_ndcg > progress.best_ndcg:
            progress.best_epoch, progress.best_ndcg, progress.since_best = row.epoch, row.validation_ndcg, 0
            return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        progress.since_best += 1
        return best

    def epoch(self, epoch: int) -> tuple[float, float, float]:
        """Train one epoch (from 1). Returns the last learning rate, and the means of loss and accuracy over positions."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1)[0]))
        rng = np.random.default_rng([self.seed, epoch, 2])
        self.model.train()
        dropout = dropout_rate(self.params, self.model.params.dropout, epoch)
        set_dropout(self.model, dropout)
        self.extras.on_epoch(epoch - 1, self.params.epochs)
        max_len, every = self.model.params.max_len, self.params.windows == "all"
        size, way, least = self.params.batch_size, self.params.batching, self.params.min_batches
        drawn = epoch_batches(self.store, max_len, size, every, self.seed, epoch, way, least)
        count, average = drawn.count, drawn.positions / max(drawn.count, 1)
        total = torch.zeros(2, device=self.device)
        tokens = 0
        rate = self.params.lr
        # Batches are made between the steps, not by a thread beside them: on MovieLens-1M one takes 0.6 ms and its negatives
        # 0.2, of a step of 29 ms (length 50, one core) to 113 (length 200), so that no more than 3 % could be had.
        bar = tqdm(drawn.batches, f"epoch {epoch}/{self.params.epochs}", count, leave=False, disable=not sys.stderr.isatty())
        with self._graphs(epoch, average, dropout):
            for i, batch in enumerate(bar):
                stop_if_orphaned()
                if i % REFRESH_EVERY == 0:
                    self.extras.refresh()
                rate = learning_rate(self.params, (epoch - 1 + i / count) / self.params.epochs)
                self._set_rates(rate)
                if self.captured is None:
                    total += self._step(partial(self._loss, batch, rng), average)
                else:
                    negatives = self.task.negatives_of(batch, rng)
                    self.captured(filled(batch, negatives, self.task.kind, max_len), self.task.log_expected(negatives))
                tokens += int(np.count_nonzero(batch.targets))
        if self.captured is not None:
            total = self.total
        self.steps = count
        loss, accuracy = (total / max(tokens, 1)).tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"training diverged: the loss of epoch {epoch} is {loss}; lower train.lr (or quant.lr and "
                "methods.<name>.lr), or set train.clip_norm"
            )
        return rate, loss, accuracy

    def _step(self, forward: Callable[[], tuple[losses.Result, int | Tensor]], average: float | Tensor) -> Tensor:
        """Train on what `forward` gives: loss and accuracy of a batch, and how many positions they are of. average: how many a
        batch of this epoch has. Returns the sums of both over the positions, (2,)."""
        with product_precision(self.params.precision):
            with ExitStack() as once:
                once.enter_context(self.extras.step())
                for table in self.model.item_tables:
                    once.enter_context(table.quantized_once())
                result, n = forward()
            loss = result.loss
            if result.second is not None:
                loss = loss + self.params.rating_weight * result.second
            # Batches of short windows have few positions; weighing as much as others, each of those would count for more.
            loss = loss if self.params.weighting == "batch" else loss * (n / average)
            penalty = self.extras.penalty()
            self.descend(loss if penalty is None else loss + penalty)
        return torch.stack([result.loss.detach(), result.accuracy]) * n

    def _can_be_captured(self) -> bool:
        """Whether a step is work of the device alone, on tensors that have a shape for each shape of a batch: no draws beside
        those of negatives and of torch's own generator, and no sparse gradients."""
        plain = self.task.of_items_alone and self.second is None and self.extras.distill is None
        return plain and not self.asked and not self.extras.draws and self.params.table_optimizer == "dense"

    def _work(self, static: Static) -> None:
        """A training step on a batch that is on the device already."""
        self.total += self._step(partial(self._loss_of, static), self.average)

    def _loss_of(self, static: Static) -> tuple[losses.Result, Tensor]:
        """As `_loss`."""
        targets = static.targets.flatten()
        encoded = self.model.encode(static.histories, windows=static.windows)
        real = (targets > 0).to(encoded.dtype)
        states = encoded if self.task.kind == "sequence" else encoded.flatten(0, 1)
        asked = Positions(states, targets.clamp(min=ANY_ITEM), static.negatives, None, static.log_expected, real)
        return self.task.loss_of_items(asked), real.sum()

    @contextmanager
    def _graphs(self, epoch: int, average: float, dropout: float) -> Iterator[None]:
        """What is around the steps of an epoch where they are captured."""
        if self.captured is None:
            yield
            return
        # Rates of dropout are part of a graph, and what quantizers do changes with the epochs.
        self.captured.keep_while((dropout, 0 if self.extras is NOTHING else epoch))
        self.average.fill_(average)
        self.total.zero_()
        with self.captured.running():
            yield

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizers down the gradient of `loss`."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        if self.params.clip_norm:
            clip_norm(self.weights, self.params.clip_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the names that resume files know them by."""
        return {"optimizer": self.optimizer} | ({"tables": self.table_optimizer} if self.table_optimizer else {})

    def _set_rates(self, rate: float) -> None:
        own = [own * rate / self.params.lr for own in self.extras.parameters]
        for group, value in zip(self.optimizer.param_groups, [rate, *own], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)  # where graphs read it
            else:
                group["lr"] = value
        for group in self.table_optimizer.param_groups if self.table_optimizer else ():
            group["lr"] = rate

    def _loss(self, batch: Batch, rng: np.random.Generator) -> tuple[losses.Result, int]:
        """Loss and accuracy over the real positions of a batch, and how many there are. All that decides a shape is worked out
        here on the host, so that a GPU is never waited for (`models.transfer`)."""
        real = batch.targets > 0
        places = self._tensor(np.flatnonzero(real))
        histories = on(gather(self.store, batch.histories, batch.places, self.asked), self.device)
        windows = None if batch.windows is None else self._tensor(batch.windows)
        encoded = states = self.model.encode(histories, windows=windows)
        targets = batch.targets[real]
        users, negatives = batch.users[real], self.task.negatives_of(batch, rng)
        if self.task.kind == "sequence":
            result = self.task.loss(states, targets, users, negatives, rng, places)
        else:
            states = states.flatten(0, 1)
            states = states if len(targets) == real.size else states[places]
            result = self.task.loss(states, targets, users, negatives, rng)
        if self.extras.distill:
            result = self.extras.distill(result, encoded, histories, windows, places, targets)
        if self.second is not None:
            assert batch.places is not None
            rows = self.model.scoring_table.lookup(self._tensor(targets))
            own = self.second.loss(encoded.flatten(0, 1)[places], rows, batch.places[real] + 1)
            result = replace(result, second=own)
        return result, len(targets)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return send(array, self.device)

    def _save(self, path: Path, key: str, progress: Progress, best: dict[str, Tensor] | None) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in (best or {}).items()}
        if self.second is not None:
            tensors |= {f"second/{name}": tensor for name, tensor in self.second.state_dict().items()}
        for part, optimizer in self.optimizers.items():
            tensors |= {f"{part}/{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        save_tensors(path, tensors, {"key": key, "progress": asdict(progress)})

    def _restore(self, path: Path, key: str) -> tuple[Progress, dict[str, Tensor] | None]:
        """The progress of a killed run with the same key, loaded into the model and the optimizer; else a fresh start."""
        if not path.exists():
            return Progress(), None
        tensors, meta = load_tensors(path)
        if meta["key"] != key:
            return Progress(), None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", "best", "second", *self.optimizers)}
        for name, tensor in tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor.to(self.device)
        self.extras.on_resume(meta["progress"]["epoch"])
        self.model.load_state_dict(parts["model"])
        if self.second is not None:
            self.second.load_state_dict(parts["second"])
        for part, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, parts[part])
        saved = meta["progress"]
        return Progress(**{**saved, "rows": [Row(**row) for row in saved["rows"]]}), parts["best"] or None
