"""The works that take turns: steps, epochs and evaluations of the plain code, of full precision, and of each method."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sasrec.bench import BFLOAT16, FULL, PLAIN, settings
from sasrec.bench.plain import PlainSASRec, PlainTraining, full_ranks, sampled_ranks
from sasrec.bench.plain_data import Data
from sasrec.bench.settings import Setting
from sasrec.config import QuantParams
from sasrec.data.sequences import Sequences
from sasrec.evaluation import model_scorer, rank
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, load_method, own_training, quantizes
from sasrec.quant.calibration import calibration
from sasrec.training import Extras, Trainer

Works = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Methods:
    """names: quantization methods; options: their sections `methods.<name>`."""

    names: Sequence[str]
    quant: QuantParams
    options: Mapping[str, Any]

    def of(self, trains: bool) -> list[str]:
        """Those that train with the quantizers in place, or those that start from a trained model and do not. `control` and
        `fp16` add nothing to full precision."""
        modules = {name: load_method(name, self.options.get(name))[0] for name in self.names}
        return [name for name, module in modules.items() if quantizes(module) and module.TRAINS is trains]


def plain_data(store: Sequences) -> Data:
    bounds = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    return Data([store.items[begin:end].tolist() for begin, end in bounds], store.items_count)


def plain_training(store: Sequences, setting: Setting, size: int) -> PlainTraining:
    torch.manual_seed(0)
    return PlainTraining(PlainSASRec(setting.model, store.items_count), plain_data(store), setting.train, size)


def trainer(
    store: Sequences,
    setting: Setting,
    size: int,
    precision: Literal["float32", "bfloat16"],
    extras: Extras | None = None,
    model: Any = None,
) -> Trainer:
    """Of `model`, or of a new one, in batches of `size` windows."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    model = model or SASRec(setting.model, store.items_count).to(device)
    params = replace(setting.train, batch_size=size, min_batches=1, precision=precision)
    return Trainer(model, store, params, 0, device=device, extras=extras)


def quantized(store: Sequences, setting: Setting, size: int, methods: Methods, name: str) -> Trainer:
    """Of a model with the quantizers of a method in place, calibrated."""
    module, options = load_method(name, methods.options.get(name))
    torch.manual_seed(0)
    device = torch.device(setting.device)
    model = SASRec(setting.model, store.items_count).to(device)
    attach(model, methods.quant, module, options)
    calibrate(model, calibration(store, model, size, 1, 0, device))
    return trainer(store, setting, size, "float32", own_training(model, 0), model)


class Epochs:
    """Epochs of a Trainer one after the other, each with draws of its own; with the quantizers' own work around them."""

    def __init__(self, of: Trainer) -> None:
        self.trainer, self.number = of, 0

    def __call__(self) -> int:
        """The number of steps."""
        self.number += 1
        self.trainer.epoch(self.number)
        return self.trainer.steps


def training(store: Sequences, setting: Setting, size: int, methods: Methods) -> Works:
    """An epoch of each over all of `store`; each returns the number of its steps. The methods and their measure, full
    precision, in float32; beside it, in bfloat16 products where the setting trains so."""
    works: Works = {}
    if setting.device == "cpu":
        plain = plain_training(store, setting, size)
        works[PLAIN] = lambda: plain.epoch()[1]
    works[FULL] = Epochs(trainer(store, setting, size, "float32"))
    if setting.train.precision == "bfloat16":
        works[BFLOAT16] = Epochs(trainer(store, setting, size, "bfloat16"))
    for name in methods.of(trains=True):
        works[name] = Epochs(quantized(store, setting, size, methods, name))
    return works


def steps(store: Sequences, setting: Setting, methods: Methods) -> Works:
    """STEPS training steps of each, with the making of their batches and the drawing of negatives: an epoch over so many
    users that it has about as many batches. Each returns the number of its steps: these differ where users have several
    windows, which the plain code cuts from the end and the other from a place that is drawn."""
    size = settings.batch_size(store, setting)
    some = settings.some_users(store, size * settings.STEPS)
    if setting.train.windows == "all":
        # A user may have several windows.
        share = settings.window_count(some, setting) / some.users
        some = settings.some_users(store, max(1, round(size * settings.STEPS / share)))
    return training(some, setting, size, methods)


def evaluations(store: Sequences, setting: Setting) -> dict[str, Works]:
    """Ranking all test users: `full`, among all items; `sampled`, among a hundred; `both`. The plain code ranks under one
    protocol at a time; here the scores of all items are there anyway, so that there is no `sampled` alone."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    model = SASRec(setting.model, store.items_count).to(device)

    def own(only: Any) -> Callable[[], object]:
        return lambda: rank(model_scorer(model), store, "test", setting.model.max_len, only=only, device=device)

    if setting.device != "cpu":
        return {"evaluate both": {FULL: own(None)}, "evaluate full": {FULL: own("full")}}
    plain, data = PlainSASRec(setting.model, store.items_count), plain_data(store)
    return {
        "evaluate both": {PLAIN: lambda: (full_ranks(plain, data), sampled_ranks(plain, data)), FULL: own(None)},
        "evaluate full": {PLAIN: lambda: full_ranks(plain, data), FULL: own("full")},
    }


def post_training(store: Sequences, setting: Setting, size: int, methods: Methods) -> Works:
    """From a trained model to a quantized one, of the methods that do not train: scales, and what they reconstruct."""
    device = torch.device(setting.device)
    torch.manual_seed(0)
    trained = SASRec(setting.model, store.items_count).to(device)
    histories = calibration(store, trained, size, methods.quant.calibration_batches, 0, device)

    def work(name: str) -> None:
        module, options = load_method(name, methods.options.get(name))
        model = copy.deepcopy(trained)
        attach(model, methods.quant, module, options)
        calibrate(model, histories)
        if hasattr(module, "reconstruct") and getattr(module, "reconstructs", lambda _: True)(options):
            module.reconstruct(model, histories, options, 0)

    return {name: lambda name=name: work(name) for name in methods.of(trains=False)}  # type: ignore[misc]
