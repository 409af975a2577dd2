"""Quantize the trained model of quant.model with one method and seed: python -m stages.quantize METHOD SEED"""

import dataclasses
from pathlib import Path

import torch

from sasrec.checkpoint import fingerprint, load_model, save_model, save_tensors
from sasrec.config import Study
from sasrec.data.batches import epoch_batches
from sasrec.data.sequences import Sequences
from sasrec.files import atomic_folder, sha256
from sasrec.models.sasrec import SASRec
from sasrec.process import run_once, set_up
from sasrec.quant.attach import attach, calibrate, freeze, load_method, own_training
from sasrec.quant.frozen import to_tensors
from sasrec.training import Trainer, write_curves
from stages.common import run

SECTIONS = ("threads", "device", "train", "model", "per_model.<quant.model>", "quant", "methods.<method>")


def main(study: Study, method: str, seed: str) -> None:
    device = set_up(study.threads, study.device)
    module, options = load_method(method, study.methods.get(method))
    quant = study.quant
    # The levels of a grid are not numbers of bfloat16, so that quantized products are exact only in float32.
    train = dataclasses.replace(study.of_model(quant.model)[1], precision="float32")
    store = Sequences.load(Path("data/prepared"))
    source = Path("data/models", quant.model, seed)
    model, card = load_model(source)
    with run_once(f"quantize-{method}-{seed}") as job:
        # A method that does not train has nothing to start from but the trained model.
        if quant.init == "scratch" and module.TRAINS:
            torch.manual_seed(int(seed))
            model = SASRec(model.params, model.items)
        else:
            # Fine-tuning: its own rate and length, half a cosine down to nothing, no early stop.
            train = dataclasses.replace(
                train, epochs=quant.epochs, lr=quant.lr, schedule="cosine", warmup=0.0, patience=quant.epochs + 1
            )
        model.to(device)
        batches = epoch_batches(store, model.params.max_len, train.batch_size, False, int(seed), 0, "shuffled").batches
        histories = [
            torch.from_numpy(batch.histories).to(device)
            for batch, _ in zip(batches, range(quant.calibration_batches), strict=False)
        ]
        attach(model, quant, module, options)
        calibrate(model, histories)
        if not module.TRAINS:
            train = dataclasses.replace(train, epochs=0)
        trainer = Trainer(
            model,
            store,
            train,
            int(seed),
            device=device,
            extras=own_training(model, options, int(seed)),
            validate_start=True,
        )
        checkpoint = sha256(source / "model.safetensors")
        key = fingerprint(method, options, quant, train, seed, study.threads, str(device), store.stats, checkpoint)
        progress = trainer.run(job.resume, key, job.log)
        best = progress.best_ndcg
        if hasattr(module, "reconstruct"):
            module.reconstruct(model, histories, options, int(seed))
            best = trainer.validate()[2]
            job.log(f"reconstructed: validation NDCG@10 {best:.4f}")
        card |= {
            "trained": {**card["trained"], "method": method, "tuned_epochs": progress.best_epoch},
            "valid_ndcg@10": round(best, 5),
        }
        frozen, bits = to_tensors(freeze(model))
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".quantizer." not in name}
        write_curves(Path(f"plots/curves/{method}-{seed}.csv"), progress.rows)
        with atomic_folder(Path("data/models", method, seed)) as folder:
            save_model(folder, model, weights, card)
            if frozen:
                save_tensors(folder / "quantized.safetensors", frozen, bits)


if __name__ == "__main__":
    run(main, SECTIONS)
