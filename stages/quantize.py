"""Quantize the trained model of quant.model with one method and seed: python -m stages.quantize METHOD SEED"""

import dataclasses
from pathlib import Path

from sasrec.checkpoint import fingerprint, load_model, save_model, save_tensors
from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.files import atomic_folder, sha256
from sasrec.process import run_once, set_up
from sasrec.quant.attach import freeze, load_method
from sasrec.quant.frozen import to_tensors
from sasrec.quant.recipe import Run, quantize
from sasrec.training import write_curves
from stages.common import run

SECTIONS = ("threads", "device", "train", "model", "per_model.<quant.model>", "quant", "methods.<method>")


def main(study: Study, method: str, seed: str) -> None:
    device = set_up(study.threads, study.device)
    options = study.methods.get(method)
    load_method(method, options)  # now, so that the fingerprint has its code
    quant = study.quant
    # The levels of a grid are not numbers of bfloat16, so that quantized products are exact only in float32.
    train = dataclasses.replace(study.of_model(quant.model)[1], precision="float32")
    store = Sequences.load(Path("data/prepared"))
    source = Path("data/models", quant.model, seed)
    model, card = load_model(source)
    checkpoint = sha256(source / "model.safetensors")
    with run_once(f"quantize-{method}-{seed}") as job:
        key = fingerprint(method, options, quant, train, seed, study.threads, str(device), store.stats, checkpoint)
        outcome = quantize(Run(store, quant, train, int(seed), device, job.resume, key, job.log), model, method, options)
        model = outcome.model
        card |= {
            "trained": {**card["trained"], "method": method, "tuned_epochs": outcome.best_epoch},
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
