"""Measure what each choice of the quantization recipe is worth: python -m stages.ablation [KEY=VALUE ...]

The recipe is that of params.yaml, `quant` and `methods.<method>`; each KEY=VALUE, such as quant.table=per_tensor or
'quant.progressive=[8,6]', is one change to it alone; without any, those in CHOICES that apply. Each is one training from the
model in data/models/<quant.model>/<seed>, which `dvc repro train@<quant.model>-<seed>` makes, measured on the test items by
the simulation in torch, and compared with the recipe as it stands and with the control of its own (which has the same epochs,
rates, dropout and distillation, and no quantizers), user by user. Rows of metrics/reference/ablation.csv that are measured
anew are replaced. What was measured is kept in data/ablation, so that a killed run goes on where it was.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from sasrec import metrics
from sasrec.config import NO_FILE, QuantParams, Study
from sasrec.errors import UserError
from sasrec.evaluation import model_scorer, rank
from sasrec.files import atomic_folder, read_json, write_json
from sasrec.mapping import from_mapping
from sasrec.measurements import replace_rows
from sasrec.merged import changes, of_control, widths_apart
from sasrec.metrics import Floats
from sasrec.models.events import asked_by
from sasrec.process import run_once
from sasrec.quant import fits
from sasrec.quant.attach import load_method
from sasrec.quant.rates import narrowest, of_weights
from sasrec.quant.schedule import epochs_of
from stages.common import read_study
from stages.quantize import Plan, plan

TABLE = Path("metrics/reference/ablation.csv")
KEPT = Path("data/ablation")
# What a row is a measurement of. epochs, lr: of the recipe; recipe: what else of it is not as it is by default.
KEYS = ("data", "bits", "preset", "method", "epochs", "lr", "recipe", "seed", "choice")
# Settings of section quant that another column tells.
TOLD = {
    f"quant.{name}" for name in ("bits", "weight_bits", "activation_bits", "embedding_bits", "preset", "model", "epochs", "lr")
}
COLUMNS = (
    *KEYS, "validation_loss", "validation_ndcg@10", "ndcg@10", "of_recipe_%", "of_recipe_low_%", "of_recipe_high_%",
    "of_control_%", "of_control_low_%", "of_control_high_%",
)  # fmt: skip
RECIPE = "the recipe"
CHOICES = (
    "quant.stream=per_tensor", "quant.centre=false", "quant.table=per_tensor", "quant.weights=per_tensor",
    "quant.preset=paper", "quant.dropout=0.2", "quant.distill=0.3", "quant.delay_epochs=1", "quant.progressive=[8]",
    "quant.table_rounding=stochastic", "quant.init=control", "methods.lsq.lr=0.0003", "methods.lsq.lr=0.03",
    "methods.lsq.start=paper", "methods.lsq.offset=true",
)  # fmt: skip


def choices(study: Study, method: str) -> list[str]:
    """Those of CHOICES that say something of `method` and of the widths of `study`."""
    known = [choice for choice in CHOICES if method == "lsq" or choice.startswith("quant.")]
    # Widths on the way down lead nowhere where no tensor has fewer bits.
    return [choice for choice in known if choice != "quant.progressive=[8]" or narrowest(study.quant) < 8]


def changed(study: Study, choice: str, method: str) -> Study:
    """The study with one KEY=VALUE. Raises UserError where that is not one, or of another section."""
    key, equals, text = choice.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"'{choice}': {' '.join(str(error).split())}") from None
    match key.split("."):
        case ["quant", name] if equals:
            return dataclasses.replace(study, quant=from_mapping(QuantParams, {name: value}, "quant", study.quant))
        case ["methods", of, name] if equals and of == method:
            own = {**(study.methods.get(method) or {}), name: value}
            return dataclasses.replace(study, methods={**study.methods, method: own})
    raise UserError(f"'{choice}' is not a change of the recipe; write quant.KEY=VALUE or methods.{method}.KEY=VALUE")


@dataclasses.dataclass(frozen=True)
class Measured:
    """gains: NDCG@10 of each user on the test items, (users,)."""

    loss: float
    validation: float
    gains: Floats


def planned_of(study: Study, method: str, seed: int) -> Plan:
    """Raises UserError where the recipe of `study` cannot be run."""
    source = Path("data/models", study.quant.model, str(seed))
    if not (source / "model.safetensors").exists():
        raise UserError(f"{source} does not exist; make it first: dvc repro train@{study.quant.model}-{seed}")
    planned = plan(study, method, seed)
    fits.check(planned.model, planned.quant, planned.train, method, planned.options)
    return planned


def measure(study: Study, method: str, seed: int) -> Measured:
    """One training by the recipe of `study`, or what an earlier run kept of the same."""
    planned = planned_of(study, method, seed)
    kept = KEPT / (planned.key if study.evaluate.exclude_seen else f"{planned.key}-seen")
    if not (kept / "values.json").exists():
        with run_once(f"ablation-{planned.key}") as job:
            outcome = planned.run(job)
        model = outcome.model
        ranks = rank(
            model_scorer(model), planned.store, "test", model.params.max_len,
            exclude_seen=study.evaluate.exclude_seen, device=planned.device, only="full", asked=asked_by(model),
        )  # fmt: skip
        with atomic_folder(kept) as folder:
            np.save(folder / "ranks.npy", ranks.full)
            write_json(folder / "values.json", {"loss": round(outcome.loss, 5), "validation": round(outcome.ndcg, 5)})
    gains = metrics.ndcg(np.load(kept / "ranks.npy").astype(np.float64), 10)
    values = read_json(kept / "values.json")
    return Measured(values["loss"], values["validation"], gains)


def data_of(study: Study) -> str:
    """The data set, by which rows of several tell themselves apart: its name, and the file's where one is given."""
    own = study.dataset
    return own.name if own.path == NO_FILE else f"{own.name} {Path(own.path).name}"


def bits_of(quant: QuantParams) -> str:
    """The width, and those of the kinds of tensors that have another."""
    return ", ".join([str(quant.bits), *(f"{kind} {bits}" for kind, bits in widths_apart(quant).items())])


def method_of(quant: QuantParams, method: str) -> str:
    """The method, and the model where that is not the usual one."""
    return method if quant.model == QuantParams().model else f"{method} of {quant.model}"


def training_of(study: Study) -> tuple[str, str]:
    """Epochs and learning rate of the recipe."""
    train = study.of_model(study.quant.model)[1]
    rate = train.lr if study.quant.from_scratch else of_weights(study.quant)
    return str(epochs_of(study.quant, train)), f"{rate:g}"


def recipe_of(study: Study, method: str) -> str:
    """What else of the recipe differs from the defaults, as the KEY=VALUE that would change it, or nothing."""
    _, options = load_method(method, study.methods.get(method))
    usual, own = (
        {"quant": dataclasses.asdict(quant), "methods": {method: dataclasses.asdict(chosen)}}
        for quant, chosen in ((QuantParams(), type(options)()), (study.quant, options))
    )
    values = {name: value for name, value in changes(usual, own)["set"].items() if name not in TOLD}
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def percents(own: Floats, other: Floats, study: Study) -> list[str]:
    """By how many percent of the other's mean the own is higher, with its 95 % interval."""
    interval = metrics.bootstrap_interval((own - other)[None], study.evaluate.bootstrap, study.evaluate.seed)
    values = [100 * value / other.mean() for value in (float((own - other).mean()), *interval)]
    return [f"{value:+.2f}" for value in values]


def measure_all(method: str, seed: int, choices: Sequence[str]) -> None:
    study = read_study()
    # All of them first: a typing error in the last would otherwise show after hours.
    studies = {RECIPE: study} | {choice: changed(study, choice, method) for choice in choices}
    for each in studies.values():
        load_method(method, each.methods.get(method))
    for each in studies.values():
        planned_of(each, method, seed)
    recipe: Measured | None = None
    for choice, each in studies.items():
        own = measure(each, method, seed)
        recipe = recipe or own
        plain = of_control(each.quant)
        if each.quant.from_scratch or study.quant.from_scratch:
            plain |= {"init": each.quant.init, "preset": each.quant.preset}
        # Of nothing else does the control depend, so that choices which leave these alone share one.
        control = measure(dataclasses.replace(each, quant=dataclasses.replace(study.quant, **plain)), "control", seed)
        of_recipe = ["", "", ""] if choice == RECIPE else percents(own.gains, recipe.gains, study)
        values = (
            data_of(study), bits_of(study.quant), study.quant.preset, method_of(study.quant, method), *training_of(study),
            recipe_of(study, method), str(seed), choice, f"{own.loss:.4f}", f"{own.validation:.4f}", f"{own.gains.mean():.4f}",
            *of_recipe, *percents(own.gains, control.gains, study),
        )  # fmt: skip
        row = dict(zip(COLUMNS, values, strict=True))
        print(", ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)
        replace_rows(TABLE, [row], KEYS, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--method", default="lsq")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        measure_all(options.method, options.seed, options.choices or choices(read_study(), options.method))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run again to go on")


if __name__ == "__main__":
    main()
