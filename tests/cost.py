"""What a training step costs with everything quantized, against full precision in the same run.

Steps of all methods are taken in turn, on one thread and with the memory allocator of a training run; medians of the process's
own CPU time are compared, so that what else the machine does counts little. Nothing in the project uses it.

    python -m tests.cost [ROUNDS]    # prints a line a method: an ML-1M-like step, and one with a table of 83,000 x 128
"""

import statistics
import sys
import time

import numpy as np
import torch

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.data.batches import Batch
from sasrec.models.sasrec import SASRec
from sasrec.process import set_up
from sasrec.quant.attach import attach, calibrate, load_method, own_training
from sasrec.training import Trainer
from tests.conftest import SmallStore

METHODS = ("control", "ste", "lsq", "pact", "dorefa", "apot")


def compare(items: int, hidden: int, loss: str, batch: int = 128, length: int = 50, rounds: int = 15) -> dict[str, float]:
    """Median CPU milliseconds of a step by method, at 8 bits. loss: of `train.loss`; BCE with one negative looks up rows
    alone."""
    rng = np.random.default_rng(0)
    store = SmallStore([[1, 2, 3, 4]], items)
    ids = rng.integers(1, items + 1, (batch, length + 1))
    drawn = Batch(ids[:, :-1], ids[:, 1:], np.zeros((batch, length), np.int64))
    trainers = {}
    for method in METHODS:
        torch.manual_seed(0)
        model = SASRec(ModelParams(max_len=length, hidden=hidden, dropout=0.2), items)
        module, options = load_method(method, None)
        attach(model, QuantParams(), module, options)
        calibrate(model, [torch.from_numpy(drawn.histories)])
        params = TrainParams(loss=loss, negatives=1, batch_size=batch, negatives_from="all")  # type: ignore[arg-type]
        trainers[method] = Trainer(model, store, params, 0, device=torch.device("cpu"), extras=own_training(model, options, 0))
        model.train()
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 2):
        for method, trainer in trainers.items():
            began = time.process_time()
            result, _ = trainer._loss(drawn, np.random.default_rng(number))
            penalty = trainer.extras.penalty()
            trainer.optimizer.zero_grad()
            (result.loss if penalty is None else result.loss + penalty).backward()
            trainer.optimizer.step()
            if number > 1:
                times[method].append(1000 * (time.process_time() - began))
    return {method: statistics.median(values) for method, values in times.items()}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    set_up(1, "cpu")
    for name, found in {
        "3,416 items, hidden 64, bce": compare(3416, 64, "bce", rounds=rounds),
        "3,416 items, hidden 64, cross_entropy": compare(3416, 64, "cross_entropy", rounds=rounds),
        "83,000 items, hidden 128, bce": compare(83_000, 128, "bce", rounds=rounds),
    }.items():
        full = found["control"]
        print(
            f"{name}: full precision {full:.0f} ms; "
            + ", ".join(f"{m} {t / full:.2f}x" for m, t in found.items() if m != "control")
        )


if __name__ == "__main__":
    main()
