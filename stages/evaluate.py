"""Measure every seed of an exported variant on the test items, as it runs where it is served: python -m stages.evaluate VARIANT

Beside the ranks, how the exported model agrees with the simulation of its checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sasrec import metrics, protocol
from sasrec.checkpoint import load_model, load_tensors
from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.deploy.artefact import sizes
from sasrec.deploy.recommender import ArtefactError, Recommender
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.errors import UserError
from sasrec.evaluation import rank
from sasrec.files import write_json
from sasrec.process import set_up
from sasrec.quant.frozen import from_tensors
from stages.common import run

SECTIONS = ("seeds", "threads", "evaluate")


def simulation(folder: Path) -> Simulation:
    """The checkpoint in `folder`, quantized or not."""
    model, _ = load_model(folder)
    quantized = folder / "quantized.safetensors"
    return Simulation(model, from_tensors(*load_tensors(quantized)) if quantized.exists() else {})


def main(study: Study, variant: str) -> None:
    # One thread of torch: the simulation works on small tensors, for which two wait for each other more than they compute, on a
    # busy machine twenty times longer. What is counted comes from onnxruntime, with the threads of the study.
    set_up(1, "cpu")
    store = Sequences.load(Path("data/prepared"))
    params = study.evaluate
    options: dict[str, Any] = {"exclude_seen": params.exclude_seen, "batch_size": params.batch_size}
    ranks, manifests, taken, agreements = [], [], [], []
    for seed in study.seeds:
        folder = Path("data/exported", variant, str(seed))
        try:
            model = Recommender.load(folder, study.threads)
        except ArtefactError as error:
            raise UserError(str(error)) from None
        manifests.append(model.manifest)
        taken.append(dataclasses.asdict(sizes(folder)))
        options["asked"] = model.inputs
        agreement = Agreement(simulation(Path("data/models", variant, str(seed))), model)
        ranks.append(rank(agreement.exported, store, "test", model.max_len, **options))
        expected = rank(agreement.simulated, store, "test", model.max_len, only="full", **options)
        gains = [metrics.ndcg(one.full.astype(np.float64), 10).mean() for one in (ranks[-1], expected)]
        agreements.append(agreement.summary() | {"ndcg@10_difference": float(gains[0] - gains[1])})
    card = protocol.card(store.stats, params)
    validation = float(np.mean([manifest["valid_ndcg@10"] for manifest in manifests]))
    result = protocol.flat_metrics(ranks, params, card, taken, validation)
    protocol.write_ranks(Path("data/evaluated", variant), ranks, study.seeds, card)
    write_json(Path("data/evaluated", variant, "agreement.json"), agreements)
    # For the report: how each tensor is stored and computed, with the first seed; with others the same, but for widths that
    # quant.budget_kb or quant.max_drop chose.
    described = {key: manifests[0][key] for key in ("tensors", "activations", "products", "float_operators")}
    write_json(Path("data/evaluated", variant, "tensors.json"), described)
    write_json(Path("metrics", f"{variant}.json"), result)
    print(f"{variant}: NDCG@10 {result['ndcg@10']:.4f} full, {result['sampled_ndcg@10']:.4f} sampled")
    for seed, found in zip(study.seeds, agreements, strict=True):
        print(f"seed {seed} against the simulation: " + ", ".join(f"{key} {value:g}" for key, value in found.items()))


if __name__ == "__main__":
    run(main, SECTIONS)
