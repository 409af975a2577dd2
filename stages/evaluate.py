"""Measure every seed of an exported variant on the test items: python -m stages.evaluate VARIANT"""

import dataclasses
from pathlib import Path

import numpy as np

from sasrec import protocol
from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.deploy.artefact import load, sizes
from sasrec.evaluation import model_scorer, rank
from sasrec.files import write_json
from sasrec.process import set_up
from stages.common import run

SECTIONS = ("seeds", "threads", "device", "evaluate")


def main(study: Study, variant: str) -> None:
    device = set_up(study.threads, study.device)
    store = Sequences.load(Path("data/prepared"))
    params = study.evaluate
    ranks, validation = [], []
    for seed in study.seeds:
        folder = Path("data/exported", variant, str(seed))
        model, manifest = load(folder)
        model.to(device)
        validation.append(manifest["valid_ndcg@10"])
        ranks.append(
            rank(
                model_scorer(model),
                store,
                "test",
                model.params.max_len,
                exclude_seen=params.exclude_seen,
                batch_size=params.batch_size,
                device=device,
            )
        )
    card = protocol.card(store.stats, params)
    size = dataclasses.asdict(sizes(folder))
    result = protocol.flat_metrics(ranks, params, card, size, float(np.mean(validation)))
    protocol.write_ranks(Path("data/evaluated", variant), ranks, study.seeds, card)
    write_json(Path("metrics", f"{variant}.json"), result)
    print(f"{variant}: NDCG@10 {result['ndcg@10']:.4f} full, {result['sampled_ndcg@10']:.4f} sampled")


if __name__ == "__main__":
    run(main, SECTIONS)
