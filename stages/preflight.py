"""Stage preflight: refuse, before any model is trained, a study that names a model which the data lacks something for, or a
tensor in quant.overrides that the model does not have."""

import dataclasses
from pathlib import Path

from sasrec.config import Study
from sasrec.data.sequences import Sequences, read_catalogue
from sasrec.errors import UserError
from sasrec.files import write_text
from sasrec.models import registry
from sasrec.models.facts import Facts
from sasrec.quant import overrides
from stages.common import run

SECTIONS = ("models", "variants", "model", "train", "per_model", "quant.model", "quant.overrides", "quant.preset")
PREPARED = Path("data/prepared")
# Always the same, so that nothing is trained anew where another list or parameter passes, too.
PASSED = "The data has what every model of the study needs.\n"


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
    if study.quant.overrides:
        params = study.of_model(study.quant.model)[0]
        if study.quant.preset == "source":  # which scores with a table of its own
            params = dataclasses.replace(params, tied=False)
        facts = Facts.of_data(params, store, categories)
        overrides.check(registry.of_data(params, store.items_count, categories, facts), study.quant.overrides)
    write_text("data/preflight.txt", PASSED)
    print(PASSED, end="")


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
