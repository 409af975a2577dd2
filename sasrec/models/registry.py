"""The kinds of models that `model.kind` names: from data, from a checkpoint, or another of the same shape."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sasrec.config import ModelParams, TrainParams
from sasrec.models.cafe import CAFE
from sasrec.models.facts import Facts, require
from sasrec.models.intents import item_intents
from sasrec.models.sasrec import SASRec

Model = SASRec | CAFE


def of_data(params: ModelParams, items: int, categories: Sequence[Sequence[str]], facts: Facts | None = None) -> Model:
    """A new model for data of so many items. categories: of the items 1, 2, ...; facts: what `model.side` has to know of the
    data. Raises UserError where the data lacks what the model needs."""
    if params.kind == "cafe":
        return CAFE(params, item_intents(categories))
    return SASRec(params, items, facts)


def check(params: ModelParams, train: TrainParams, store: Any, categories: Sequence[Sequence[str]]) -> None:
    """Raise UserError where the prepared data lacks what such a model or its training needs. categories: of the items 1, 2,
    ..."""
    if params.kind == "cafe":
        CAFE.require(params, categories)
    else:
        Facts.of_data(params, store, categories)
    if train.rating_weight:
        require(store, "rating", "train.rating_weight is above 0")


def of_state(params: ModelParams, items: int, tensors: dict[str, Tensor]) -> Model:
    """The model whose state is `tensors`."""
    model = CAFE(params, tensors["intents"]) if params.kind == "cafe" else SASRec(params, items, Facts.of_state(tensors))
    model.load_state_dict(tensors)
    return model


def untrained(model: Model, **changes: Any) -> Model:
    """A new model of the shape of `model`, on its device. changes: of its parameters, such as tied=False."""
    params = replace(model.params, **changes)
    fresh = CAFE(params, model.intents) if isinstance(model, CAFE) else SASRec(params, model.items, model.facts)
    return fresh.to(next(model.parameters()).device)


def with_dropout(model: Model, rate: float) -> Model:
    """A copy of `model` that is trained with another rate of dropout."""
    fresh = untrained(model, dropout=rate)
    fresh.load_state_dict(model.state_dict())
    return fresh


def facts_of(model: Model) -> Facts:
    """What the model knows of the data for `model.side`."""
    return Facts() if isinstance(model, CAFE) else model.facts


def encoders(model: Model) -> dict[str, SASRec]:
    """The sequence encoders of a model, each a SASRec, by what the names of their tensors begin with."""
    return {f"{name}." if name else "": part for name, part in model.named_modules() if isinstance(part, SASRec)}
