"""Train one full-precision model with one seed: python -m stages.train MODEL SEED"""

from pathlib import Path

import torch

from sasrec.checkpoint import contents, fingerprint, save_model
from sasrec.config import Study
from sasrec.curves import write_curves
from sasrec.data.sequences import Sequences, read_catalogue
from sasrec.files import atomic_folder
from sasrec.models import registry
from sasrec.models.facts import Facts
from sasrec.process import run_once, set_up
from sasrec.training import Trainer
from stages import methods
from stages.common import run, whole

SECTIONS = ("threads", "device", "model", "train", "per_model.<model>")
PREPARED = Path("data/prepared")


def main(study: Study, name: str, seed: str) -> None:
    device = set_up(study.threads, study.device)
    model_params, train_params = study.of_model(name)
    store = Sequences.load(PREPARED)
    categories = [own for _, _, own in read_catalogue(PREPARED)]
    facts = Facts.of_data(model_params, store, categories)
    torch.manual_seed(int(seed))
    model = registry.of_data(model_params, store.items_count, categories, facts).to(device)
    trainer = Trainer(model, store, train_params, int(seed), device=device)
    # Before the methods' code is loaded, on which this training does not depend.
    key = fingerprint(model_params, train_params, seed, study.threads, str(device), contents(PREPARED))
    methods.check(whole(study), store, categories)
    with run_once(f"train-{name}-{seed}") as job:
        progress = trainer.run(job.resume, key, job.log)
        card = {
            "trained": {"name": name, "seed": int(seed), "best_epoch": progress.best_epoch, "epochs": progress.epoch},
            "valid_ndcg@10": round(progress.best_ndcg, 5),
            "data": store.stats["sha256"],
        }
        write_curves(Path(f"plots/curves/{name}-{seed}.csv"), progress.rows)
        with atomic_folder(Path("data/models", name, seed)) as folder:
            save_model(folder, model, model.state_dict(), card)


if __name__ == "__main__":
    run(main, SECTIONS)
