"""Export every seed of a variant as a folder that works alone, with numpy and onnxruntime: python -m stages.export VARIANT"""

import hashlib
from pathlib import Path

from sasrec.checkpoint import load_model, load_tensors
from sasrec.config import Study
from sasrec.data.sequences import Sequences, read_catalogue, training_counts
from sasrec.deploy.artefact import Item, export
from sasrec.files import atomic_folder, remove, sha256
from sasrec.quant.frozen import from_tensors
from stages.common import run

SECTIONS = ("seeds",)
PREPARED = Path("data/prepared")
# What of the prepared data the model was trained on.
TRAINED_ON = ("items.npy", "offsets.npy", "train_ends.npy", "catalogue.csv")


def main(study: Study, variant: str) -> None:
    # Seeds of earlier runs would stay in the folder that this stage depends on, and change its hash.
    for old in Path("data/models", variant).iterdir():
        if old.name not in map(str, study.seeds):
            remove(old)
    store = Sequences.load(PREPARED)
    counts = training_counts(store.items, store.offsets, store.train_ends, store.items_count)
    items = [Item(*row, int(count)) for row, count in zip(read_catalogue(PREPARED), counts[1:], strict=True)]
    prepared = hashlib.sha256("".join(sha256(PREPARED / name) for name in TRAINED_ON).encode()).hexdigest()
    for seed in study.seeds:
        folder = Path("data/models", variant, str(seed))
        model, card = load_model(folder)
        frozen = {}
        if (folder / "quantized.safetensors").exists():
            frozen = from_tensors(*load_tensors(folder / "quantized.safetensors"))
        del card["model"], card["items"]
        with atomic_folder(Path("data/exported", variant, str(seed))) as exported:
            sizes = export(exported, model, frozen, items, {**card, "prepared": prepared})
        print(f"{variant}, seed {seed}: {sizes.bytes:,} bytes, {sizes.bits:g} bits per stored weight")


if __name__ == "__main__":
    run(main, SECTIONS)
