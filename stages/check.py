"""Check all of params.yaml before anything runs, and that DVC can start: python -m stages.check

A stage checks the file, too, but only when it runs. Names in the lists (models, quantized, variants) become files that DVC
looks for first, and its message then names the file, not the nearest name.
"""

import json
from pathlib import Path

from dvc.lock import LockError, make_lock

from sasrec.config import Study
from sasrec.data.catalogue import format_of
from sasrec.errors import UserError
from sasrec.quant.attach import load_method, quantizes
from sasrec.quant.schedule import epochs_of, phases
from stages.common import run

SECTIONS = ("dataset", "models", "quantized", "methods", "per_model", "model", "train", "quant")
# Where DVC notes which files its runs read and write. Nothing but this guards what it writes there.
USERS, GUARD = "rwlock", "rwlock.lock"


def mend(folder: Path = Path(".dvc/tmp")) -> bool:
    """Remove DVC's note of who uses which files, if a DVC that was killed while it wrote left half of it: every DVC after that
    ends with "JSON structure is corrupted". Raises UserError where another DVC holds it."""
    note = folder / USERS
    if not note.exists():
        return False
    try:
        with make_lock(str(folder / GUARD), tmp_dir=str(folder)):
            try:
                json.loads(note.read_bytes())
            except ValueError:
                note.unlink()
                return True
    except LockError:
        raise UserError(f"another DVC is at work: it holds {folder / GUARD}; wait for it to end") from None
    return False


def main(study: Study) -> None:
    if mend():
        print(f"removed .dvc/tmp/{USERS}, which a killed DVC left cut off")
    if study.dataset.format is not None:
        format_of(study.dataset, "")
    for model in study.models:
        study.of_model(model)
    for name, options in study.methods.items():
        load_method(name, options)
    methods = [load_method(method, study.methods.get(method))[0] for method in study.quantized]
    trains = any(method.TRAINS and quantizes(method) for method in methods)
    if trains and (study.quant.delay_epochs or study.quant.progressive):
        phases(study.quant, epochs_of(study.quant, study.of_model(study.quant.model)[1]))
    print("params.yaml is in order")


if __name__ == "__main__":
    run(main, SECTIONS)
