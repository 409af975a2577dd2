"""Whether a method, its options and the recipe suit a model, which is known before the model is trained."""

from dataclasses import replace
from typing import Any

from sasrec.config import QuantParams, TrainParams
from sasrec.models.registry import Model, untrained
from sasrec.quant import sensitivity
from sasrec.quant.attach import load_method, quantizes, shifted
from sasrec.quant.schedule import built, epochs_of


def check(model: Model, quant: QuantParams, train: TrainParams, method: str, options: Any) -> None:
    """Raise UserError, which names the parameter, where `recipe.quantize` could not do what is asked for. model: of the shape
    that is quantized, trained or not. train: of the model. options: the section `methods.<method>`.

    What only trained weights or the data tell is not known here: whether `quant.max_drop` can be kept, and which widths
    `quant.budget_kb` chooses.
    """
    module, chosen = load_method(method, options)
    if hasattr(module, "check"):
        module.check(model, quant, chosen)
    if (after := getattr(chosen, "after", None)) is not None:
        check(model, quant, train, after, chosen.after_options)
    if not quantizes(module):
        return
    sensitivity.check(model, quant, shifted(module))
    if quant.preset == "source":
        model, quant = untrained(model, tied=False), replace(quant, init="scratch")
    built(model, quant, module, chosen, epochs_of(quant, train) if module.TRAINS else 0)
