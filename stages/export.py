"""Export every seed of a variant as packed integers with a manifest: python -m stages.export VARIANT"""

import shutil
from pathlib import Path

from sasrec.checkpoint import load_model, load_tensors
from sasrec.config import Study
from sasrec.deploy.artefact import export
from sasrec.files import atomic_folder
from sasrec.quant.frozen import from_tensors
from stages.common import run

SECTIONS = ("seeds",)


def main(study: Study, variant: str) -> None:
    # Seeds of earlier runs would stay in the folder that this stage depends on, and change its hash.
    for old in Path("data/models", variant).iterdir():
        if old.name not in map(str, study.seeds):
            shutil.rmtree(old)
    for seed in study.seeds:
        folder = Path("data/models", variant, str(seed))
        model, card = load_model(folder)
        frozen = {}
        if (folder / "quantized.safetensors").exists():
            frozen = from_tensors(*load_tensors(folder / "quantized.safetensors"))
        del card["model"], card["items"]
        with atomic_folder(Path("data/exported", variant, str(seed))) as exported:
            sizes = export(exported, model, frozen, card)
        print(f"{variant}, seed {seed}: {sizes.bytes:,} bytes, {sizes.bits:g} bits per stored weight")


if __name__ == "__main__":
    run(main, SECTIONS)
