"""What an exported model costs on this machine: time, memory and bytes, beside the same network run by others."""

import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.config import BenchmarkParams, ModelParams, from_mapping
from sasrec.deploy.artefact import Item, export, sizes
from sasrec.deploy.recommender import CHUNK, Recommender
from sasrec.models import registry
from sasrec.models.facts import Facts, item_categories
from sasrec.models.registry import Model

K = 10
# What decides how fast integers are multiplied.
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
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


def times_ms(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and 99th percentile of the wall time of `work` in milliseconds, after two calls that do not count."""
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        work()
        if i >= 2:
            times.append((time.perf_counter() - began) * 1000)
    return float(np.median(times)), float(np.percentile(times, 99))


def processor_flags(path: Path = Path("/proc/cpuinfo")) -> str:
    """Which of FLAGS this processor has, separated by blanks; empty where the system does not say."""
    if not path.exists():
        return ""
    lines = (line.partition(":")[2].split() for line in path.read_text().splitlines() if line.startswith("flags"))
    found = set(next(lines, []))
    return " ".join(flag for flag in FLAGS if flag in found)


def loading(folder: Path) -> dict[str, float]:
    """Of a new process that serves the model: load_ms, from the files to the first answer's start, and resident_mb."""
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=folder, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def chunks(histories: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for at in range(0, len(histories), CHUNK):
        yield histories[at : at + CHUNK]


def of_runtime(model: Recommender, histories: NDArray[np.int64], repeats: int) -> dict[str, float]:
    """encode_ms, score_ms (the ten best of all items) and their 99th percentiles, for the whole batch."""
    states = [model.encode(part) for part in chunks(histories)]
    nothing = np.zeros(0, np.int64)

    def score() -> None:
        for state in states:
            model.top_k(state, K, [nothing] * len(state))

    encode = times_ms(lambda: [model.encode(part) for part in chunks(histories)], repeats)
    best = times_ms(score, repeats)
    return {"encode_ms": encode[0], "score_ms": best[0], "encode_p99_ms": encode[1], "score_p99_ms": best[1]}


def of_torch(model: Model, histories: NDArray[np.int64], repeats: int, compiled: bool) -> float:
    """Median milliseconds from histories to the ten best, in one call."""
    ids = torch.from_numpy(histories)
    table = model.scoring_table.all().detach()

    def work(batch: torch.Tensor) -> Any:
        return (model.encode(batch, last=True)[:, 0] @ table.T).topk(min(K, len(table)))

    run = torch.compile(work, dynamic=False) if compiled else work
    with torch.no_grad():
        return times_ms(lambda: run(ids), repeats)[0]


def benchmark(folder: Path, params: BenchmarkParams) -> str:
    """CSV of the exported model in `folder`, a row per batch size: batch, encode_ms, score_ms, sequences_per_second, p99s;
    milliseconds of the same network in full precision, from histories to the ten best, by torch and by onnxruntime (empty
    where not asked for); bytes, resident_mb, load_ms, threads and the processor's flags.

    Full histories of random items, because the cost depends on the length alone; so do the others' random weights.
    """
    model = Recommender.load(folder, params.threads)
    facts = loading(folder)
    shape = from_mapping(ModelParams, model.manifest["model"], "model")
    categories = model.categories[1:]
    known = Facts(torch.tensor(model.manifest["rating_edges"]), item_categories(categories))
    plain = registry.of_data(shape, model.items_count, categories, known).eval()
    rng = np.random.default_rng(0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["batch", "encode_ms", "score_ms", "sequences_per_second", "encode_p99_ms", "score_p99_ms"]
        + ["torch_ms", "torch_compile_ms", "onnxruntime_fp32_ms", "bytes", "resident_mb", "load_ms", "threads", "flags"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        full = None
        if params.peers:
            export(Path(temporary), plain, {}, [Item("")] * model.items_count, {})
            full = Recommender.load(temporary, params.threads)
        for size in params.batch_sizes:
            histories = rng.integers(1, model.items_count + 1, (size, model.max_len))
            repeats = max(params.repeats, params.repeats * 32 // size)  # a percentile of few is none
            own = of_runtime(model, histories, repeats)
            total = own["encode_ms"] + own["score_ms"]
            peers: list[float | None] = [None, None, None]
            if full is not None:
                other = of_runtime(full, histories, repeats)
                peers = [of_torch(plain, histories, repeats, False), None, other["encode_ms"] + other["score_ms"]]
            if params.compile:
                peers[1] = of_torch(plain, histories, repeats, True)
            row = [f"{own['encode_ms']:.3f}", f"{own['score_ms']:.3f}", f"{size / total * 1000:.0f}"]
            row += [f"{own['encode_p99_ms']:.3f}", f"{own['score_p99_ms']:.3f}"]
            row += ["" if peer is None else f"{peer:.3f}" for peer in peers]
            row += [str(sizes(folder).bytes), f"{facts['resident_mb']:.0f}", f"{facts['load_ms']:.0f}", str(params.threads)]
            writer.writerow([size, *row, processor_flags()])
    return text.getvalue()
