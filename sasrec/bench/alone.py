"""One work in a process of its own, for its peak memory: python -m sasrec.bench.alone, which is told what on its input.

The peak is that of this process alone (VmHWM), from its start: Python and the libraries that the work imports count.
Each work imports what it needs itself, so that the plain code is not charged for this project's modules.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec.config import DatasetParams, ModelParams, PrepareParams, TrainParams
from sasrec.errors import UserError
from sasrec.mapping import from_mapping

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Alone:
    """Of a process from start to end: seconds on the wall and of the processor, peak resident memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(work: str, threads: int, **told: Any) -> Alone:
    """The work of that name in a new process. Raises UserError with what it says where it fails."""
    began = time.perf_counter()
    content = json.dumps({"work": work, "threads": threads, **told})
    done = subprocess.run(
        [sys.executable, "-m", "sasrec.bench.alone"], input=content, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - began
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{work} in a process of its own: {said[-1].removeprefix('error: ')}")
    return Alone(wall=wall, **json.loads(done.stdout.splitlines()[-1]))


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MiB. Not getrusage: its figure includes that of the parent."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise UserError(f"{STATUS} does not exist: memory is measured on Linux only; leave it out with --what") from None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def prepare(told: Mapping[str, Any]) -> None:
    from sasrec.data import store

    dataset, params = (
        from_mapping(DatasetParams, told["dataset"], "dataset"),
        from_mapping(PrepareParams, told["prepare"], "prepare"),
    )
    with tempfile.TemporaryDirectory() as folder:
        store.prepare(Path(told["raw"]), dataset, params, Path(folder, "prepared"))


def prepare_plain(told: Mapping[str, Any]) -> None:
    from sasrec.bench import plain_data

    params = from_mapping(PrepareParams, told["prepare"], "prepare")
    with tempfile.TemporaryDirectory() as folder:
        plain_data.prepare(Path(told["lines"]), params.min_user, params.min_item, Path(folder, "prepared.txt"))


def params_of(told: Mapping[str, Any]) -> tuple[ModelParams, TrainParams]:
    return from_mapping(ModelParams, told["model"], "model"), from_mapping(TrainParams, told["train"], "train")


def train(told: Mapping[str, Any]) -> None:
    """One epoch and its validation among all items."""
    import torch

    from sasrec.data.sequences import Sequences
    from sasrec.models.sasrec import SASRec
    from sasrec.process import set_up
    from sasrec.training import Trainer

    device = set_up(told["threads"], "cpu")
    model, params = params_of(told)
    store = Sequences.load(told["prepared"])
    torch.manual_seed(0)
    trainer = Trainer(SASRec(model, store.items_count), store, params, 0, device=device)
    trainer.epoch(1)
    trainer.validate()


def train_plain(told: Mapping[str, Any]) -> None:
    import torch

    from sasrec.bench.plain import PlainSASRec, PlainTraining, full_ranks
    from sasrec.bench.plain_data import read

    torch.set_num_threads(told["threads"])
    model, params = params_of(told)
    data = read(Path(told["lines"]))
    training = PlainTraining(PlainSASRec(model, data.items), data, params, params.batch_size)
    training.epoch()
    full_ranks(training.model, data, held=2)


def evaluate(told: Mapping[str, Any]) -> None:
    """Both protocols on the test items."""
    from sasrec.data.sequences import Sequences
    from sasrec.evaluation import model_scorer, rank
    from sasrec.models.sasrec import SASRec
    from sasrec.process import set_up

    set_up(told["threads"], "cpu")
    model, _ = params_of(told)
    store = Sequences.load(told["prepared"])
    rank(model_scorer(SASRec(model, store.items_count)), store, "test", model.max_len)


def evaluate_plain(told: Mapping[str, Any]) -> None:
    import torch

    from sasrec.bench.plain import PlainSASRec, full_ranks, sampled_ranks
    from sasrec.bench.plain_data import read

    torch.set_num_threads(told["threads"])
    model, _ = params_of(told)
    data = read(Path(told["lines"]))
    plain = PlainSASRec(model, data.items)
    full_ranks(plain, data)
    sampled_ranks(plain, data)


WORKS = {work.__name__: work for work in (prepare, prepare_plain, train, train_plain, evaluate, evaluate_plain)}


def main() -> None:
    told = json.load(sys.stdin)
    try:
        WORKS[told["work"]](told)
        print(json.dumps({"cpu": time.process_time(), "peak": peak_mb()}))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
