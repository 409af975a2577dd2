"""Try a small grid through DVC's queue and judge it by validation: python -m stages.tune [-S KEY=A,B ...] [--target NAME ...]

For example: python -m stages.tune -S 'train.lr=5e-4,1e-3' -S 'model.dropout=0.2,0.4' --target sasrec --jobs 1
or, every method and the control with the same number of trials:
python -m stages.tune -S 'quant.lr=2e-4,5e-4,1e-3' --target control ste lsq pact dorefa apot

Every combination is one experiment of `evaluate@<target>`, run in a copy of the project. Choosing is for validation
alone, so test metrics are not shown. The experiments stay in `dvc exp list`; the queue is left empty.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec.config import NO_FILE, Study
from sasrec.dotted import of_key
from sasrec.errors import UserError
from sasrec.mapping import unknown
from stages.common import run

SECTIONS = ("dataset", "variants")
GRID = ("train.lr=5e-4,1e-3,2e-3", "model.dropout=0.2,0.4")
METRIC = "valid_ndcg@10"
POLL = 5  # seconds
UNFINISHED = ("Queued", "Running")
# Polls without a worker before one is started again, and how often that is tried: workers of DVC sometimes just stop.
PATIENCE, RESTARTS = 3, 3


@dataclass(frozen=True)
class Trial:
    """One experiment: the values it ran with, in the order of the grid's keys; METRIC of each target, None where there is none,
    and then why."""

    name: str
    values: tuple[Any, ...]
    scores: tuple[float | None, ...]
    failure: str = ""


def dvc(*arguments: str) -> str:
    """Standard output of the dvc beside this Python. Raises UserError with what dvc says where it fails."""
    folder = Path(sys.executable).parent
    # Experiments call `python`, which must be this one.
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    # Files, not pipes: the workers that `queue start` leaves behind would keep a pipe open to their end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run([str(folder / "dvc"), *arguments], env=environment, stdout=out, stderr=err, check=False)
        except FileNotFoundError:
            raise UserError(f"{folder / 'dvc'} does not exist; install the requirements: make") from None
        out.seek(0)
        err.seek(0)
        if done.returncode:
            said = " ".join(err.read().split()) or f"exit status {done.returncode}"
            raise UserError(f"dvc {' '.join(arguments[:2])}: {said.removeprefix('ERROR: ')}")
        return out.read()


def queued_names(output: str) -> list[str]:
    """Names of the experiments that `dvc exp run --queue` says it queued."""
    return re.findall(r"^Queued experiment '([^']+)'", output, re.MULTILINE)


def states(output: str) -> tuple[dict[str, str], int]:
    """Of `dvc queue status`: the state of each experiment in the queue, and the number of workers."""
    line = re.compile(r"^[0-9a-f]{7,}\s+(\S+)\s.*\b(Queued|Running|Success|Failed)\s*$", re.MULTILINE)
    workers = re.search(r"Worker status: (\d+) active, (\d+) idle", output)
    return dict(line.findall(output)), sum(map(int, workers.groups())) if workers else 0


def keys(grid: Sequence[str]) -> list[str]:
    """The parameters that a grid sets: train.lr of 'train.lr=5e-4,1e-3'. Raises UserError for anything else."""
    for entry in grid:
        if not re.fullmatch(r"\+?[\w.]+=.+", entry):
            raise UserError(f"-S {entry!r} is not of the form KEY=A,B")
    return [entry.split("=")[0].removeprefix("+") for entry in grid]


def trials(
    shown: Sequence[Mapping[str, Any]], names: Sequence[str], parameters: Sequence[str], targets: Sequence[str]
) -> list[Trial]:
    """The trials among `names` in the output of `dvc exp show --json`: by the first target, the
    best on validation first, and what has no result of it last."""
    found = {}
    for branch in shown:
        for experiment in branch.get("experiments") or []:
            revision = experiment["revs"][0]
            name = experiment.get("name") or revision.get("name")
            if name not in names:
                continue
            data = revision.get("data") or {}
            values = tuple(_value(data, key) for key in parameters)
            state = (experiment.get("executor") or {}).get("state")
            done = state in (None, "success")
            # What failed is shown with the metrics of the commit that it started from.
            scores = tuple(_score(data, target) if done else None for target in targets)
            failure = "" if None not in scores else "no result" if done else str(state)
            found[name] = Trial(name, values, scores, failure)
    nothing = (None,) * len(targets)
    everyone = [found.get(name, Trial(name, (None,) * len(parameters), nothing, "lost")) for name in names]
    return sorted(everyone, key=lambda trial: -math.inf if trial.scores[0] is None else trial.scores[0], reverse=True)


def _score(data: Mapping[str, Any], target: str) -> float | None:
    return (((data.get("metrics") or {}).get(f"metrics/{target}.json") or {}).get("data") or {}).get(METRIC)


def _value(data: Mapping[str, Any], key: str) -> Any:
    """The parameter `key` (dotted) of an experiment, None where it has none."""
    return of_key(((data.get("params") or {}).get("params.yaml") or {}).get("data"), key)


def best(ranked: Sequence[Trial], target: int) -> Trial | None:
    """The trial with the highest METRIC of that target, the earlier of equal ones; None where none has any."""
    scored = [(trial.scores[target], trial) for trial in ranked]
    known = [(score, trial) for score, trial in scored if score is not None]
    return max(known, key=lambda each: each[0])[1] if known else None


def table(ranked: Sequence[Trial], parameters: Sequence[str], targets: Sequence[str]) -> str:
    """Trials as an aligned table; the best of each target has a star."""
    stars = [best(ranked, target) for target in range(len(targets))]
    lines = [("experiment", *parameters, *(f"{target} {METRIC}" for target in targets))]
    for trial in ranked:
        results = [
            trial.failure if score is None else f"{score:.5f}{' *' if trial is star else ''}"
            for score, star in zip(trial.scores, stars, strict=True)
        ]
        lines.append((trial.name, *("" if value is None else str(value) for value in trial.values), *results))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def chosen(ranked: Sequence[Trial], targets: Sequence[str]) -> list[str]:
    """What to do with the best of each target, a line each. Raises UserError where nothing has a result."""
    found = [(target, best(ranked, index)) for index, target in enumerate(targets)]
    if not any(trial for _, trial in found):
        raise UserError("no experiment came to a result")
    return [
        f"best of {target} on validation: dvc exp apply {trial.name}" if trial else f"{target} came to no result"
        for target, trial in found
    ]


def reason(log: str) -> str:
    """The line of a failed experiment's log that says why: the stage's own error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no log"])[-1]


def wait(names: Sequence[str], jobs: int) -> None:
    """Run the queued experiments to their end. Raises UserError where DVC's workers do not go on."""
    dvc("queue", "start", "--jobs", str(jobs))
    idle = restarts = 0
    left = set(names)
    while True:
        state, workers = states(dvc("queue", "status"))
        before, left = left, {name for name in names if state.get(name) in UNFINISHED}
        if before != left:
            print(f"{len(names) - len(left)} of {len(names)} done", flush=True)
        if not left:
            return
        idle = 0 if workers else idle + 1
        if idle >= PATIENCE:
            if restarts >= RESTARTS:
                raise UserError("the workers of DVC's queue keep stopping; look at .dvc/tmp/exps/celery/*.out")
            dvc("queue", "start", "--jobs", str(jobs))
            idle, restarts = 0, restarts + 1
        time.sleep(POLL)


def main(study: Study, *arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.tune", description="A grid over DVC's queue, by validation.")
    parser.add_argument("-S", "--set-param", action="append", metavar="KEY=A,B", dest="grid", help=f"default: {GRID}")
    parser.add_argument("--target", nargs="+", default=[study.variants[0]], help="the variants that are judged", dest="targets")
    parser.add_argument("--jobs", type=int, default=1, help="experiments at once; each uses `threads` threads")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {options.jobs}")
    grid, targets = options.grid or list(GRID), list(dict.fromkeys(options.targets))
    parameters = keys(grid)
    for target in targets:
        if target not in study.variants:
            raise unknown("variant", target, study.variants, "--target")
    path = Path(study.dataset.path).expanduser()
    if study.dataset.path != NO_FILE and not path.is_absolute():
        raise UserError(
            f"params.yaml: dataset.path is {path}, but experiments of the queue run in another folder; "
            f"make it absolute: {path.absolute()}"
        )
    found, _ = states(dvc("queue", "status"))
    others = [name for name, state in found.items() if state in UNFINISHED]
    if others:
        raise UserError(
            f"DVC's queue holds other experiments ({', '.join(others)}); run them, or dvc queue remove {' '.join(others)}"
        )
    overrides = [part for entry in grid for part in ("-S", entry)]
    names = queued_names(dvc("exp", "run", "--queue", *overrides, *(f"evaluate@{target}" for target in targets)))
    if not names:
        raise UserError("DVC queued experiments and did not say which; see `dvc queue status`")
    failures: dict[str, str] = {}
    finished = False
    try:
        print(f"{len(names)} experiments: {', '.join(names)}", flush=True)
        wait(names, options.jobs)
        ranked = trials(json.loads(dvc("exp", "show", "--json")), names, parameters, targets)
        for trial in ranked:
            if trial.failure == "failed":
                failures[trial.name] = reason(dvc("queue", "logs", trial.name))
        finished = True
    except KeyboardInterrupt:
        raise UserError("interrupted; the experiments that were done are in `dvc exp list`") from None
    finally:
        if not finished:
            dvc("queue", "stop", "--kill")
        dvc("queue", "remove", *names)
    print(table(ranked, parameters, targets), end="")
    for name, why in failures.items():
        print(f"{name} failed: {why}")
    print("\n".join(chosen(ranked, targets)))


if __name__ == "__main__":
    run(main, SECTIONS)
