"""Stage preflight: refuse, before any model is trained, a study that names a model which the data lacks something for, or
whose quantization does not suit the model: an option that a method does not have, a tensor in quant.overrides that is not
there, a width that a method does not take."""

from collections.abc import Sequence
from pathlib import Path

from sasrec.config import Study
from sasrec.data.sequences import Sequences, read_catalogue
from sasrec.errors import UserError
from sasrec.files import write_text
from sasrec.models import registry
from sasrec.models.facts import Facts
from sasrec.models.registry import untrained
from sasrec.quant import fits, overrides
from sasrec.quant.attach import load_method
from stages.common import run

SECTIONS = ("models", "quantized", "variants", "model", "train", "per_model", "quant", "methods")
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
    check_methods(study, store, categories)
    write_text("data/preflight.txt", PASSED)
    print(PASSED, end="")


def check_methods(study: Study, store: Sequences, categories: Sequence[Sequence[str]]) -> None:
    """Raise UserError where a method of the study, or a section of `methods`, does not suit the model that is quantized."""
    params, train = study.of_model(study.quant.model)
    model = registry.of_data(params, store.items_count, categories, Facts.of_data(params, store, categories))
    scored = untrained(model, tied=False) if study.quant.preset == "source" else model
    overrides.check(scored, study.quant.overrides)
    refused = []
    for method in dict.fromkeys((*study.quantized, *study.methods)):
        try:
            if method in study.quantized:
                fits.check(model, study.quant, train, method, study.methods.get(method))
            else:
                load_method(method, study.methods[method])
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
