"""Stage preflight: refuse, before any model is trained, a study that names a model which the data lacks something for, or
whose quantization does not suit the model: an option that a method does not have, a tensor in quant.overrides that is not
there, a width that a method does not take."""

import importlib
from pathlib import Path

from sasrec.config import Study, TrainParams
from sasrec.data.sequences import Sequences, read_catalogue
from sasrec.errors import UserError
from sasrec.files import write_text
from sasrec.models import registry
from sasrec.models.facts import Facts
from sasrec.models.registry import Model, untrained
from sasrec.quant import overrides
from stages.common import run, whole

SECTIONS = ("models", "variants", "model", "train", "per_model", "quant.model", "quant.overrides", "quant.preset")
PREPARED = Path("data/prepared")
# Always the same, so that nothing is trained anew where another list or parameter passes, too.
PASSED = "The data has what every model of the study needs, and every method suits the model.\n"


def main(study: Study) -> None:
    store = Sequences.load(PREPARED)
    categories = [own for _, _, own in read_catalogue(PREPARED)]
    refused: dict[str, str] = {}
    for name in study.models:
        try:
            registry.check(*study.of_model(name), store, categories)
        except UserError as error:
            refused[name] = str(error)
    if refused:
        raise UserError("; ".join(dict.fromkeys(refused.values())) + without(list(refused), study))
    params, train = study.of_model(study.quant.model)
    model = registry.of_data(params, store.items_count, categories, Facts.of_data(params, store, categories))
    # Which scores with a table of its own where the preset is source.
    overrides.check(untrained(model, tied=False) if study.quant.preset == "source" else model, study.quant.overrides)
    check_methods(whole(study), model, train)
    write_text("data/preflight.txt", PASSED)
    print(PASSED, end="")


def check_methods(study: Study, model: Model, train: TrainParams) -> None:
    """Raise UserError where a method of the study does not suit the model, or a section of `methods` has what the method does
    not know."""
    # By name: an import would have to be named in dvc.yaml, and an edit of any method would run this stage, too.
    fits = importlib.import_module("sasrec.quant.fits")
    refused = []
    for method in dict.fromkeys((*study.quantized, *study.methods)):
        try:
            if method in study.quantized:
                fits.check(model, study.quant, train, method, study.methods.get(method))
            else:
                fits.check_options(method, study.methods[method])
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(dict.fromkeys(refused)))


def without(names: list[str], study: Study) -> str:
    """What to type for the study without the models `names`; nothing where no other is left."""
    models = [name for name in study.models if name not in names]
    if not models:
        return ""
    options = {"models": models, "variants": [name for name in study.variants if name not in names] or models}
    typed = [f"-S '{key}=[{','.join(values)}]'" for key, values in options.items()]
    if study.quant.model in names:
        typed.append(f"-S quant.model={models[0]}")
    return f". The study without {' and '.join(names)}: dvc exp run {' '.join(typed)}, beside your other options"


if __name__ == "__main__":
    run(main, SECTIONS)
