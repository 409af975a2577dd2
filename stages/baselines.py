"""Measure the scorers that learn nothing, popularity and first-order Markov: python -m stages.baselines"""

from pathlib import Path

import numpy as np
import torch

from sasrec import metrics, protocol
from sasrec.baselines import Markov, Popularity
from sasrec.config import Study
from sasrec.data.sequences import Part, Sequences
from sasrec.evaluation import Ranks, Scorer, rank
from sasrec.files import write_json
from stages.common import run

SECTIONS = ("threads", "evaluate")
NAMES = ("popularity", "markov")


def fit(name: str, store: Sequences, part: Part) -> Popularity | Markov:
    """The baseline on all that is known when the items of `part` are asked for."""
    known = store.known(part)
    if name == "popularity":
        return Popularity.fit(store.items, known, store.items_count)
    return Markov.fit(store.items, known, store.items_count, store.offsets)


def main(study: Study) -> None:
    torch.set_num_threads(study.threads)
    store = Sequences.load(Path("data/prepared"))
    params = study.evaluate
    card = protocol.card(store.stats, params)

    def measure(scorer: Scorer, part: Part) -> Ranks:
        return rank(scorer, store, part, 1, exclude_seen=params.exclude_seen, batch_size=params.batch_size)

    for name in NAMES:
        validation = measure(fit(name, store, "validation"), "validation").full.astype(np.float64)
        scorer = fit(name, store, "test")
        ranks = [measure(scorer, "test")]
        size = {"bits": 32, "bytes": scorer.nbytes, "embedding_bytes": 0, "weight_bytes": 0}
        result = protocol.flat_metrics(ranks, params, card, size, float(metrics.ndcg(validation, 10).mean()))
        protocol.write_ranks(Path("data/evaluated", name), ranks, [0], card)
        write_json(Path("metrics", f"{name}.json"), result)
        print(f"{name}: NDCG@10 {result['ndcg@10']:.4f} full, {result['sampled_ndcg@10']:.4f} sampled")


if __name__ == "__main__":
    run(main, SECTIONS)
