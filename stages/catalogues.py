"""Measure how training and ranking grow with the catalogue: python -m stages.catalogues [ITEMS ...]

For each number of items: a training step with dense and with sparse tables (`train.table_optimizer`), taken in turn, on random
histories; then the validation of users, full ranking among all items. Sampled softmax with 256 shared negatives, batch 128,
length 50, two blocks, one thread; medians of the processor's own time, and the peak resident memory of a process that does
only the one thing. The rows of what was measured are replaced in metrics/reference/catalogues.csv.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasrec.bench.alone import peak_mb
from sasrec.config import ModelParams, TrainParams
from sasrec.data.batches import Batch
from sasrec.data.sequences import Held, Part
from sasrec.errors import UserError
from sasrec.machine import processor
from sasrec.measurements import replace_rows
from sasrec.models.sasrec import SASRec
from sasrec.process import set_up
from sasrec.training import Trainer

TABLE = Path("metrics/reference/catalogues.csv")
COLUMNS = (
    "items", "hidden", "dense_step_ms", "sparse_step_ms", "dense_peak_mb", "sparse_peak_mb", "validation_users",
    "validation_s", "validation_peak_mb", "cpu",
)  # fmt: skip
LENGTH, BATCH, WARM = 50, 128, 2


@dataclass
class RandomStore:
    """Users with as many uniform items as fill a window, the last two of them held out."""

    users: int
    items_count: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.items = rng.integers(1, self.items_count + 1, self.users * (LENGTH + 2)).astype(np.int32)
        self.offsets = np.arange(self.users + 1) * (LENGTH + 2)
        self.train_ends = self.offsets[1:] - 2
        self.negatives = rng.integers(1, self.items_count + 1, (self.users, 100)).astype(np.int32)
        self.stats: dict[str, Any] = {}

    def held(self, part: Part) -> Held:
        return Held(np.arange(self.users), self.train_ends, self.negatives, None)


def trainer(items: int, hidden: int, table_optimizer: str, users: int) -> Trainer:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=LENGTH, hidden=hidden, dropout=0.2), items)
    params = TrainParams(loss="sampled_softmax", table_optimizer=table_optimizer)  # type: ignore[arg-type]
    return Trainer(model, RandomStore(users, items), params, 0, device=torch.device("cpu"))


def steps(made: list[Trainer], rounds: int) -> list[float]:
    """Median milliseconds of a step of each, taken in turn."""
    times: list[list[float]] = [[] for _ in made]
    for number in range(WARM + rounds):
        rng = np.random.default_rng(number)
        ids = rng.integers(1, made[0].model.items + 1, (BATCH, LENGTH + 1))
        batch = Batch(ids[:, :-1], ids[:, 1:], np.zeros((BATCH, LENGTH), np.int64))
        for own, each in zip(times, made, strict=True):
            each.model.train()
            began = time.process_time()
            each._step(partial(each._loss, batch, rng), BATCH * LENGTH)
            if number >= WARM:
                own.append(1000 * (time.process_time() - began))
    return [statistics.median(own) for own in times]


def measure(task: str, items: int, hidden: int, users: int, rounds: int) -> dict[str, float]:
    """One task of those in `row_of`, in this process."""
    set_up(1, "cpu")
    if task == "steps":
        dense, sparse = steps([trainer(items, hidden, way, 2) for way in ("dense", "sparse")], rounds)
        return {"dense_step_ms": dense, "sparse_step_ms": sparse}
    found: dict[str, float] = {}
    if task == "validation":
        validated = trainer(items, hidden, "sparse", users)
        began = time.process_time()
        validated.validate()
        found["validation_s"] = time.process_time() - began
    else:
        steps([trainer(items, hidden, task, 2)], 3)
    return found | {f"{task}_peak_mb": peak_mb()}


def row_of(items: int, hidden: int, users: int, rounds: int) -> dict[str, str]:
    """All tasks, each in a process of its own, so that its peak of memory is its own."""
    found: dict[str, float] = {}
    for task in ("steps", "dense", "sparse", "validation"):
        arguments = [str(value) for value in (items, hidden, users, rounds)]
        command = [sys.executable, "-m", "stages.catalogues", "--task", task, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"{task} of {items} items, in a process of its own: {said[-1].removeprefix('error: ')}")
        found |= json.loads(done.stdout)
    values = {name: f"{value:.0f}" if name.endswith("_mb") else f"{value:.1f}" for name, value in found.items()}
    return {"items": str(items), "hidden": str(hidden), "validation_users": str(users), "cpu": processor()} | values


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.catalogues", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", type=int, metavar="ITEMS", help="default: 3416 83000 1000000")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--users", type=int, default=2000, help="users of the validation")
    parser.add_argument("--rounds", type=int, default=11, help="steps behind each median")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.task:
            print(json.dumps(measure(options.task, *options.items)))
            return
        if min(options.items + [options.hidden, options.users]) < 1 or options.rounds < 3:
            raise UserError("ITEMS, --hidden and --users start at 1, and --rounds at 3")
        for items in options.items or [3416, 83_000, 1_000_000]:
            row = row_of(items, options.hidden, options.users, options.rounds)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            replace_rows(TABLE, [row], ["items", "hidden"], COLUMNS, order=lambda row: (int(row["items"]), int(row["hidden"])))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
