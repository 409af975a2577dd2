"""Time preparing, training and evaluation beside a plain implementation: python -m stages.bench [--setting NAME ...]

    make bench                                    # the study's own network on its prepared data, some minutes on one core
    python -m stages.bench --setting s p          # shapes that others publish times for: lengths 50 and 200, hidden 50
    python -m stages.bench --setting large --what step   # 83,000 made-up items of 128 features, no data needed
    python -m stages.bench --what step --methods lsq pact # what a step of these methods costs against full precision

Everything takes turns; what is reported are medians and quartiles, and of ratios those of the ratios round by round. Times are
given twice: of the processor, which other processes on the same core do not lengthen by waiting, and on the wall. The rows of
what was measured are replaced in metrics/reference/speed.csv, and the figure beside it is drawn anew; `python -m
sasrec.report.readme` then renews the tables of the documents. The plain implementation is sasrec/bench/plain.py.

With `device: cuda` in params.yaml steps, epochs, evaluation and quantization are timed on the GPU, without the plain code,
which is for the CPU. Those times are printed; the table is of processors alone.
"""

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from sasrec.bench import FULL, PLAIN, alone, settings, works
from sasrec.bench.plain import refuse
from sasrec.bench.rounds import Spread, Timed, in_turns, ratio, seconds_text
from sasrec.bench.settings import Setting
from sasrec.bench.works import Methods
from sasrec.config import Study, TrainParams
from sasrec.data.sequences import Sequences
from sasrec.errors import UserError
from sasrec.machine import processor, processor_flags
from sasrec.mapping import unknown
from sasrec.measurements import replace_rows
from sasrec.process import set_up
from sasrec.report.figures import write_figure
from sasrec.report.speed import COLUMNS, KEY, draw, read
from stages.common import read_study

TABLE = Path("metrics/reference/speed.csv")
WHAT = ("step", "epoch", "evaluate", "quantize", "prepare", "memory")
# What a GPU has no part in.
OF_THE_PROCESSOR = ("prepare", "memory")
# Rounds of what is short, for one of the others.
SHORT = 3
Row = dict[str, str]
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One setting on one data set. store: None where it is made up."""

    study: Study
    setting: Setting
    store: Sequences
    folders: tuple[Path, Path]  # raw, prepared
    methods: Methods
    rounds: int
    threads: int
    log: Log

    @property
    def size(self) -> int:
        return settings.batch_size(self.store, self.setting)

    def rows(self, what: str) -> Iterator[Row]:
        """Measure one of WHAT."""
        if what == "step":
            yield from self.timed("step", works.steps(self.store, self.setting, self.methods), self.rounds * SHORT)
        elif what == "epoch":
            yield from self.timed(
                "epoch", works.training(self.store, self.setting, self.size, self.methods), self.rounds, warm_up=0
            )
        elif what == "evaluate":
            for name, own in works.evaluations(self.store, self.setting).items():
                yield from self.timed(name, own, self.rounds)
        elif what == "quantize":
            for name, work in works.post_training(self.store, self.setting, self.size, self.methods).items():
                # Each alone, because one takes milliseconds and another seconds.
                yield from self.timed("quantize", {name: work}, self.rounds, warm_up=0)
        elif what == "prepare":
            told = {"raw": str(self.folders[0]), "dataset": self.study.dataset, "prepare": self.study.prepare}
            yield from self.processes("prepare", "prepare", told)
        else:
            told = {"prepared": str(self.folders[1]), "model": self.setting.model, "train": self.train}
            yield from self.processes("train process", "train", told, times=False)
            yield from self.processes("evaluate process", "evaluate", told, times=False)

    @property
    def train(self) -> TrainParams:
        """With the size that batches really have."""
        return dataclasses.replace(self.setting.train, batch_size=self.size, min_batches=1)

    def timed(self, what: str, of: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Iterator[Row]:
        wait: Callable[[], object] = torch.cuda.synchronize if self.setting.device == "cuda" else lambda: None
        found = in_turns(of, rounds, warm_up=warm_up, log=lambda line: self.log(f"{what}, {line}"), wait=wait)
        for measure in ("wall", "cpu"):
            yield from self.of_measure(what, measure, "s", {name: getattr(own, measure) for name, own in found.items()})

    def processes(self, what: str, work: str, told: Mapping[str, object], times: bool = True) -> Iterator[Row]:
        """The work and its plain counterpart, each in processes of its own."""
        plain = {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in told.items()}  # type: ignore[arg-type]
        peaks: dict[str, list[float]] = {PLAIN: [], FULL: []}
        timed = {PLAIN: Timed(), FULL: Timed()}
        with lines_of(self.store) as lines:
            for number in range(self.rounds):
                for variant, name in ((PLAIN, f"{work}_plain"), (FULL, work)):
                    found = alone.run(name, self.threads, lines=str(lines), **plain)
                    peaks[variant].append(found.peak)
                    timed[variant].wall.append(found.wall)
                    timed[variant].cpu.append(found.cpu)
                said = (f"{v} {seconds_text(timed[v].wall[-1])} and {peaks[v][-1]:.0f} MiB" for v in peaks)
                self.log(f"{what}, round {number + 1} of {self.rounds}: {', '.join(said)}")
        if times:
            for measure in ("wall", "cpu"):
                yield from self.of_measure(what, measure, "s", {v: getattr(own, measure) for v, own in timed.items()})
        yield from self.of_measure(what, "peak", "MiB", peaks)

    def of_measure(self, what: str, measure: str, unit: str, values: Mapping[str, Sequence[float]]) -> Iterator[Row]:
        """A row a variant, beside the plain code and full precision where those took part."""
        for variant, own in values.items():
            row = {"setting": self.setting.name, "what": what, "variant": variant, "measure": measure, "unit": unit}
            row |= columns("", Spread.of(own)) | {"rounds": str(len(own))}
            for base, name in ((PLAIN, "of_plain"), (FULL, "of_full")):
                if base in values and base != variant:
                    row |= columns(name, ratio(own, values[base]))
            yield row | self.facts()

    def facts(self) -> Row:
        """What the numbers depend on besides the code."""
        return {
            "data": str(self.store.stats["dataset"]),
            "users": str(self.store.users),
            "items": str(self.store.items_count),
            "interactions": str(len(self.store.items)),
            "shape": dataclasses.replace(self.setting, train=self.train).shape,
            "bits": str(self.methods.quant.bits),
            "threads": str(self.threads),
            "cpu": processor(),
            "flags": processor_flags(),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        }


def columns(name: str, spread: Spread) -> Row:
    """The columns of a spread; name: what they begin with, empty for the value itself."""
    names = (name, f"{name}_q1", f"{name}_q3") if name else ("median", "q1", "q3")
    return {column: f"{value:.5g}" for column, value in zip(names, (spread.median, spread.q1, spread.q3), strict=True)}


@contextmanager
def lines_of(store: Sequences) -> Iterator[Path]:
    """A file of the store's interactions as the plain code reads them: user and item, a line each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "interactions.txt")
        users = np.repeat(np.arange(store.users), store.lengths)
        np.savetxt(path, np.stack([users, store.items], 1), fmt="%d")
        yield path


def default(study: Study) -> Setting:
    """The study's first model that is a SASRec."""
    for name in study.models:
        model, train = study.of_model(name)
        if model.kind == "sasrec":
            return Setting("default", model, train)
    raise UserError(
        f"params.yaml: none of the models ({', '.join(study.models)}) is a SASRec; use --setting {' or '.join(settings.NAMED)}"
    )


def load(study: Study, folder: Path) -> Sequences:
    """The prepared data of the study. Raises UserError where there is none, or where it is of another data set or split."""
    if not (folder / "stats.json").exists():
        raise UserError(f"{folder} has no prepared data; run `dvc repro prepare` (or give the folder with --prepared)")
    store = Sequences.load(folder)
    if store.stats["dataset"] != study.dataset.name:
        raise UserError(
            f"{folder} holds '{store.stats['dataset']}', but params.yaml names '{study.dataset.name}'; run `dvc repro prepare`"
        )
    if store.stats["split"]["split"] != "leave_one_out":
        raise UserError("the plain reference knows prepare.split: leave_one_out alone; set that, and run `dvc repro prepare`")
    return store


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setting", nargs="+", default=["default"], metavar="NAME",
        help="default: model and train of params.yaml; s: length 50, hidden 50, 2 blocks, batch 128, BCE with 1 negative, "
        "dropout 0.5; p: the same with length 200, dropout 0.2; large: length 50, hidden 128, 83,000 made-up items, steps only",
    )  # fmt: skip
    parser.add_argument(
        "--what", nargs="+", default=list(WHAT), metavar="WHAT",
        help="of step, epoch (train one batch; all of them), evaluate (rank all test users), quantize (what methods do that do "
        "not train), prepare (time and memory), memory (peaks of a training and an evaluating process); default: all",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="*", metavar="METHOD", help="quantization methods; default: all in the list quantized"
    )
    parser.add_argument("--rounds", type=int, default=5, help=f"timings behind each median; steps have {SHORT} times as many")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--prepared", type=Path, default=Path("data/prepared"), help="folder of the prepared data")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"), help="folder of the raw data, for prepare")
    return parser.parse_args()


def bench_of(study: Study, name: str, options: argparse.Namespace, log: Log) -> Bench:
    setting = default(study) if name == "default" else settings.NAMED[name]
    setting = dataclasses.replace(setting, device="cuda" if study.device == "cuda" else "cpu")
    refuse(setting.model, setting.train)
    if setting.random_items is None:
        store = load(study, options.prepared)
    else:
        store = settings.random_store(setting.random_items, setting.model.max_len, setting.train.batch_size * settings.STEPS)
    names = study.quantized if options.methods is None else options.methods
    methods = Methods(names, study.quant, study.methods)
    return Bench(study, setting, store, (options.raw, options.prepared), methods, options.rounds, options.threads, log)


def print_medians(found: Iterable[Row], device: str, log: Log) -> None:
    """Of times on the wall on a GPU."""
    for row in found:
        if row["measure"] == "wall":
            spread = " to ".join(seconds_text(float(row[name])) for name in ("q1", "q3"))
            log(f"{device}, {row['what']}, {row['variant']}: median {seconds_text(float(row['median']))}, quartiles {spread}")


def main() -> None:
    options = arguments()
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"[{int(time.monotonic() - began) // 60}:{int(time.monotonic() - began) % 60:02d}] {line}", flush=True)

    try:
        study = read_study()
        for kind, given, known in (
            ("setting", options.setting, settings.NAMES),
            ("thing to measure", options.what, WHAT),
            ("method", options.methods or [], study.methods),
        ):
            for name in given:
                if name not in known:
                    raise unknown(kind, name, known, "the command line")
        if options.rounds < 3 or options.threads < 1:
            raise UserError("--rounds starts at 3, and --threads at 1")
        on_gpu = set_up(options.threads, "cuda" if study.device == "cuda" else "cpu").type == "cuda"
        benches = [bench_of(study, name, options, log) for name in options.setting]  # before anything is measured
        for bench in benches:
            log(f"{bench.setting.name}: {bench.facts()['data']}, {bench.store.items_count:,} items; {bench.setting.shape}")
            wanted = [what for what in WHAT if what in options.what and (bench.setting.random_items is None or what == "step")]
            for what in wanted:
                if not on_gpu:
                    replace_rows(TABLE, bench.rows(what), KEY, COLUMNS)
                elif what not in OF_THE_PROCESSOR:
                    print_medians(bench.rows(what), torch.cuda.get_device_name(), log)
        if on_gpu:
            return
        write_figure(TABLE.with_suffix(".png"), draw, read(TABLE))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what was measured whole is kept")
    log(f"{TABLE} and {TABLE.with_suffix('.png')} are up to date; python -m sasrec.report.readme renews the documents")


if __name__ == "__main__":
    main()
