"""Measure the scorers that learn nothing: popularity, overall and recent, first-order Markov, and item-kNN.

Run: python -m stages.baselines
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasrec import metrics, protocol
from sasrec.baselines import ItemKNN, Markov, Popularity, RecentPopularity
from sasrec.config import BASELINES, EvaluateParams, Study
from sasrec.data.sequences import Part, Sequences
from sasrec.evaluation import Ranks, Scorer, rank
from sasrec.files import write_json
from sasrec.models.events import A_SECOND
from stages.common import run

SECTIONS = ("threads", "evaluate")


def fit(name: str, store: Sequences, part: Part, params: EvaluateParams) -> Popularity | RecentPopularity | Markov | ItemKNN:
    """The baseline on all that is known when the items of `part` are asked for."""
    known = store.known(part)
    if name == "popularity":
        return Popularity.fit(store.items, known, store.items_count)
    if name == "markov":
        return Markov.fit(store.items, known, store.items_count, store.offsets)
    if name == "item_knn":
        return ItemKNN.fit(
            store.items, known, store.items_count, store.offsets, neighbours=params.knn_neighbours, last=params.knn_last
        )
    assert name == "recent_popularity" and store.timestamps is not None
    held = store.held(part)
    now = np.zeros(store.users, np.int64)
    now[held.users] = store.timestamps[held.positions]
    if store.stats["split"]["split"] == "temporal":
        # What happens after the cut is known to no model, so the last days before it are the recent ones.
        now = np.minimum(now, store.stats["split"][f"{part}_cut"])
    window = round(params.recent_days * 86_400 * A_SECOND[store.stats["time_unit"]])
    return RecentPopularity.fit(store.items, store.timestamps, known, store.items_count, now, window)


def left_out(name: str, stats: dict[str, Any]) -> str | None:
    """Why this data does not allow a baseline, in a sentence, or None. stats: `data/prepared/stats.json`."""
    if name == "recent_popularity" and stats["times"] != "comparable":
        return "Recent popularity is left out: the times of different users cannot be compared in this data."
    return None


def main(study: Study) -> None:
    torch.set_num_threads(study.threads)
    store = Sequences.load(Path("data/prepared"))
    params = study.evaluate
    card = protocol.card(store.stats, params)

    def measure(scorer: Scorer, part: Part) -> Ranks:
        return rank(scorer, store, part, params.knn_last, exclude_seen=params.exclude_seen, batch_size=params.batch_size)

    result: dict[str, Any] = {}
    for name in BASELINES:
        folder = Path("data/evaluated", name)
        shutil.rmtree(folder, ignore_errors=True)
        note = left_out(name, store.stats)
        if note:
            # DVC wants every output of a stage. The keys of those before, all null, are a row of dashes in
            # `dvc metrics show`; a sentence there would be one more column.
            write_json(folder / "left_out.json", {"note": note})
            write_json(Path("metrics", f"{name}.json"), dict.fromkeys(result))
            print(f"note: {note}")
            continue
        validation = measure(fit(name, store, "validation", params), "validation").full.astype(np.float64)
        scorer = fit(name, store, "test", params)
        ranks = [measure(scorer, "test")]
        size = {"bits": 32, "bytes": scorer.nbytes, "embedding_bytes": 0, "weight_bytes": 0}
        result = protocol.flat_metrics(ranks, params, card, [size], float(metrics.ndcg(validation, 10).mean()))
        protocol.write_ranks(folder, ranks, [0], card)
        write_json(Path("metrics", f"{name}.json"), result)
        print(f"{name}: NDCG@10 {result['ndcg@10']:.4f} full, {result['sampled_ndcg@10']:.4f} sampled")


if __name__ == "__main__":
    run(main, SECTIONS)
