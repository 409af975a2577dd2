"""Quantize the trained model of quant.model with one method and seed: python -m stages.quantize METHOD SEED"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sasrec.checkpoint import contents, fingerprint, load_model, save_model, save_tensors
from sasrec.config import QuantParams, Study, TrainParams
from sasrec.curves import write_curves
from sasrec.data.sequences import Sequences
from sasrec.files import atomic_folder, sha256
from sasrec.models.registry import Model
from sasrec.process import Job, run_once, set_up
from sasrec.quant.attach import freeze, load_method
from sasrec.quant.frozen import to_tensors
from sasrec.quant.recipe import Outcome, Run, quantize
from stages.common import run

SECTIONS = ("threads", "device", "train", "model", "per_model.<quant.model>", "quant", "methods.<method>")
PREPARED = Path("data/prepared")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training with quantizers, ready to run. card: of the trained model. key: a short name of all that it depends on."""

    store: Sequences
    model: Model
    card: dict[str, Any]
    quant: QuantParams
    train: TrainParams
    seed: int
    device: torch.device
    method: str
    options: Any
    key: str

    def run(self, job: Job) -> Outcome:
        run = Run(self.store, self.quant, self.train, self.seed, self.device, job.resume, self.key, job.log)
        return quantize(run, self.model, self.method, self.options)


def plan(study: Study, method: str, seed: int) -> Plan:
    """From the prepared data and the trained model of quant.model."""
    device = set_up(study.threads, study.device)
    options, quant = study.methods.get(method), study.quant
    load_method(method, options)  # now, so that the fingerprint has its code
    # The levels of a grid are not numbers of bfloat16, so that quantized products are exact only in float32.
    train = dataclasses.replace(study.of_model(quant.model)[1], precision="float32")
    store = Sequences.load(PREPARED)
    source = Path("data/models", quant.model, str(seed))
    model, card = load_model(source)
    checkpoint = sha256(source / "model.safetensors")
    key = fingerprint(method, options, quant, train, str(seed), study.threads, str(device), contents(PREPARED), checkpoint)
    return Plan(store, model, card, quant, train, seed, device, method, options, key)


def main(study: Study, method: str, seed: str) -> None:
    planned = plan(study, method, int(seed))
    with run_once(f"quantize-{method}-{seed}") as job:
        outcome = planned.run(job)
        model = outcome.model
        card = planned.card | {
            "trained": {**planned.card["trained"], "method": method, "tuned_epochs": outcome.best_epoch},
            "valid_ndcg@10": round(outcome.ndcg, 5),
        }
        frozen, bits = to_tensors(freeze(model))
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".quantizer." not in name}
        write_curves(Path(f"plots/curves/{method}-{seed}.csv"), outcome.rows)
        with atomic_folder(Path("data/models", method, seed)) as folder:
            save_model(folder, model, weights, card)
            if frozen:
                save_tensors(folder / "quantized.safetensors", frozen, bits)


if __name__ == "__main__":
    run(main, SECTIONS)
