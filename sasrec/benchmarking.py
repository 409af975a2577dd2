"""What an exported model costs on this machine: time, memory and bytes, beside the same network run by others."""

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.config import BenchmarkParams, ModelParams
from sasrec.deploy.artefact import sizes
from sasrec.deploy.recommender import Recommender
from sasrec.machine import processor_flags
from sasrec.mapping import from_mapping
from sasrec.models import registry
from sasrec.models.facts import Facts, item_categories
from sasrec.models.registry import Model
from sasrec.peers import Ids, K, Work, by_onnxruntime, by_runtime, by_torch, chunks

PEERS = ("torch", "torch_compile", "onnxruntime_fp32", "onnxruntime_dynamic", "onnxruntime_static")
# How often a work is done in a row while others wait: the first time finds the caches as the others left them.
IN_A_ROW = 3
# Run in a process of its own, in the exported folder, so that only the runtime is in memory.
LOAD = """
import json, time
began = time.perf_counter()
from recommender import Recommender
imported = time.perf_counter()
model = Recommender.load(".")
loaded = time.perf_counter()
model.recommend([model.ids[1]])
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({"load_ms": (loaded - imported) * 1e3, "resident_mb": int(status["VmRSS"].split()[0]) / 1024}))
"""


def times_ms(
    works: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, NDArray[np.float64]]:
    """Times of each work in milliseconds, `repeats` of each. They take turns, so that what else runs on the machine slows
    all of them alike; each runs once uncounted whenever its turn comes. clock: in seconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    while min(map(len, times.values())) < repeats:
        for name, work in works.items():
            work()
            for _ in range(min(IN_A_ROW, repeats - len(times[name]))):
                began = clock()
                work()
                times[name].append((clock() - began) * 1000)
    return {name: np.array(own) for name, own in times.items()}


def loading(folder: Path) -> dict[str, float]:
    """Of a new process that serves the model: load_ms, from the files to the first answer's start, and resident_mb."""
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=folder, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def peers(plain: Model, params: BenchmarkParams) -> dict[str, Work]:
    """Those of PEERS that were asked for."""
    found: dict[str, Work] = {}
    if params.peers:
        found |= {"torch": by_torch(plain)} | by_onnxruntime(plain, params.threads)
    if params.compile:
        found["torch_compile"] = by_torch(plain, compiled=True)
    return found


def measured(
    model: Recommender,
    others: Mapping[str, Work],
    histories: Ids,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds for the whole batch: `encode`, `score` (the ten best of all items) and both, `all`, of the runtime; and
    each of `others`, which do both."""
    states = [model.encode(part) for part in chunks(histories)]
    nothing = np.zeros(0, np.int64)
    own = by_runtime(model)
    works: dict[str, Callable[[], Any]] = {
        "encode": lambda: [model.encode(part) for part in chunks(histories)],
        "score": lambda: [model.top_k(state, K, [nothing] * len(state)) for state in states],
        "all": lambda: own(histories),
    }
    for name, other in others.items():
        works[name] = lambda other=other: other(histories)  # type: ignore[misc]
    return times_ms(works, repeats, clock)


def benchmark(folder: Path, params: BenchmarkParams) -> str:
    """CSV of the exported model in `folder`, a row per batch size: batch, encode_ms, score_ms, sequences_per_second, p99s;
    milliseconds of the same network in full precision by each of PEERS, from histories to the ten best (empty where not
    asked for); bytes, resident_mb, load_ms, threads and the processor's flags.

    Full histories of random items, because the cost depends on the length alone; so do the others' random weights.
    """
    model = Recommender.load(folder, params.threads)
    facts = loading(folder)
    shape = from_mapping(ModelParams, model.manifest["model"], "model")
    categories = model.categories[1:]
    known = Facts(torch.tensor(model.manifest["rating_edges"]), item_categories(categories))
    plain = registry.of_data(shape, model.items_count, categories, known).eval()
    others = peers(plain, params)
    rng = np.random.default_rng(0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["batch", "encode_ms", "score_ms", "sequences_per_second", "encode_p99_ms", "score_p99_ms"]
        + [f"{name}_ms" for name in PEERS]
        + ["bytes", "resident_mb", "load_ms", "threads", "flags"]
    )
    for size in params.batch_sizes:
        histories = rng.integers(1, model.items_count + 1, (size, model.max_len))
        repeats = max(params.repeats, params.repeats * 32 // size)  # a percentile of few is none
        times = measured(model, others, histories, repeats)
        row = [f"{np.median(times[name]):.3f}" for name in ("encode", "score")]
        row.append(f"{size / np.median(times['all']) * 1000:.0f}")
        row += [f"{np.percentile(times[name], 99):.3f}" for name in ("encode", "score")]
        row += [f"{np.median(times[name]):.3f}" if name in times else "" for name in PEERS]
        row += [str(sizes(folder).bytes), f"{facts['resident_mb']:.0f}", f"{facts['load_ms']:.0f}", str(params.threads)]
        writer.writerow([size, *row, processor_flags()])
    return text.getvalue()
