"""Whether the methods of a study suit the model that they are to quantize: asked before a training, not after it."""

import importlib
from collections.abc import Sequence
from typing import Any

from sasrec.config import Study
from sasrec.errors import UserError
from sasrec.models import registry
from sasrec.models.facts import Facts


def check(study: Study, store: Any, categories: Sequence[Sequence[str]]) -> None:
    """Raise UserError where a method does not suit the model of `quant.model`, the recipe or the epochs, or where a section
    of `methods` has what the method does not know. store, categories: the prepared data, and of its items 1, 2, ..."""
    # By name: an import would have to be named in dvc.yaml, and an edit of any method would train the model anew.
    fits, attach = (importlib.import_module(f"sasrec.quant.{name}") for name in ("fits", "attach"))
    params, train = study.of_model(study.quant.model)
    model = registry.of_data(params, store.items_count, categories, Facts.of_data(params, store, categories))
    refused = []
    for method in dict.fromkeys((*study.quantized, *study.methods)):
        try:
            if method in study.quantized:
                fits.check(model, study.quant, train, method, study.methods.get(method))
            else:
                attach.load_method(method, study.methods[method])
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(dict.fromkeys(refused)))
