"""Latency of a model on this machine: encoding histories, and scoring all items with the ten best."""

import csv
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sasrec.config import BenchmarkParams


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `work` in milliseconds over `repeats` calls, after two that do not count."""
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        work()
        if i >= 2:
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


@torch.no_grad()
def latency(model: Any, params: BenchmarkParams) -> str:
    """CSV: batch, encode_ms, score_ms (all items, ten best), sequences_per_second (both), medians. Full histories of random
    items, because the cost depends on the length alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["batch", "encode_ms", "score_ms", "sequences_per_second"])
    generator = torch.Generator().manual_seed(0)
    table = model.scoring_table.all()
    for size in params.batch_sizes:
        histories = torch.randint(1, model.items + 1, (size, model.params.max_len), generator=generator)
        states = model.encode(histories, last=True)[:, 0]
        encode = median_ms(lambda h=histories: model.encode(h, last=True), params.repeats)  # type: ignore[misc]
        score = median_ms(lambda s=states: (s @ table.T).topk(min(10, len(table))), params.repeats)  # type: ignore[misc]
        writer.writerow([size, f"{encode:.3f}", f"{score:.3f}", f"{size / (encode + score) * 1000:.0f}"])
    return text.getvalue()
