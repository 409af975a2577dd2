"""A reference merged of several parts: methods by width, line and seed, behind the figure of quality against bytes.

A part is a kept reference (`sasrec.reference`) of one width, line and seed, or of full-precision models. metrics/reference/
NAME.json then has, besides what every reference has: `protocols`, those whose ranks are kept; `parts`, each one's command,
environment, and parameters where they are not those of the file; `runs`, for each variant what it is (method, bits, line) and
by seed what ranks do not tell (validation, coverage, sizes); `frontier`, every quantized variant against full-precision models
of its size; `choices`, the method to choose at each width and line (both by `sasrec.compared`). In NAME/: `ranks/` as ever,
`curves.csv` of all runs, and `locks/PART.lock.gz`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sasrec.config import QuantParams, Study
from sasrec.errors import UserError
from sasrec.mapping import flat, from_mapping
from sasrec.metrics import Floats
from sasrec.quant import pq
from sasrec.quant.attach import load_method
from sasrec.quant.rates import of_weights
from sasrec.reference import kind_of
from sasrec.report.results import Kind, from_control, reference

# Ranks among popular candidates are left out: the grid has hundreds of runs, and no figure of it is made of them.
KEPT_PROTOCOLS = ("full", "sampled")
# What the ranks do not tell of a run.
VALUES = ("valid_ndcg@10", "coverage@10", "bits", "bytes", "embedding_bytes", "weight_bytes")
# Of the quantized models of a grid: what other tensors than those of a line have.
WIDEST = 8
# Of section quant: what the control depends on, too; of each such recipe there is one control.
OF_CONTROL = ("model", "epochs", "lr", "dropout", "distill")


@dataclass(frozen=True)
class Facts:
    """What a variant is. method, bits, line: of a quantized one, the method as `of_options` names it. reference: what it is
    compared with. model: what a quantized one was made from, where that is not the model that a study quantizes unless told
    otherwise."""

    kind: Kind
    method: str | None = None
    bits: int | None = None
    line: str | None = None
    reference: str | None = None
    model: str | None = None

    @property
    def plain_method(self) -> str:
        """The method without the options in its name."""
        return (self.method or "").partition("-")[0]


@dataclass(frozen=True)
class Run:
    """A variant with one seed. values: VALUES. ranks: (users,) by protocol. curve: rows of its CSV without the heading."""

    part: str
    values: Mapping[str, Any]
    ranks: Mapping[str, Floats]
    curve: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Where runs come from. params: all of params.yaml; lock: its part of dvc.lock, gzipped."""

    command: str
    params: Mapping[str, Any]
    environment: Mapping[str, Any]
    lock: bytes
    configurations: Sequence[Any] = ()
    test_reads: int = 1


@dataclass
class Grid:
    """facts: by variant. runs: by variant and seed. controls: the recipe of each control. heading: of the curves."""

    data: Mapping[str, Any]
    card: Mapping[str, Any]
    parts: dict[str, Part] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)
    heading: str = ""

    def add(self, variant: str, facts: Facts, seed: int, run: Run) -> None:
        """Raises UserError where the same run is there already and ranks differently, or was made with other parameters."""
        known = self.runs.setdefault(variant, {})
        for other in known.values():
            if other.part != run.part:
                self._same_recipe(variant, facts, other.part, run.part)
        if seed in known:
            other = known[seed]
            for protocol in KEPT_PROTOCOLS:
                if not np.array_equal(other.ranks[protocol], run.ranks[protocol]):
                    what = "is not the same model" if facts.kind != "method" else "comes twice, with different ranks"
                    raise UserError(
                        f"{variant}, seed {seed}, of {run.part} and of {other.part} {what} ({protocol}: "
                        f"{int((other.ranks[protocol] != run.ranks[protocol]).sum())} users differ); make both with the same "
                        "parameters on the same machine, or merge one of them only"
                    )
            if other.part == run.part:  # kept anew: what ranks do not tell may be another
                known[seed] = run
            return
        if facts != self.facts.setdefault(variant, facts):
            raise UserError(f"{variant} is {facts} in {run.part}, but {self.facts[variant]} in what is merged already")
        known[seed] = run

    def _same_recipe(self, variant: str, facts: Facts, *parts: str) -> None:
        first, second = (_recipe(variant, facts, from_mapping(Study, self.parts[part].params, "")) for part in parts)
        for key in first.keys() | second.keys():
            if first.get(key) != second.get(key):
                raise UserError(
                    f"{variant} was made with {key}: {first.get(key)} in {parts[0]}, and with {second.get(key)} in {parts[1]}; "
                    "runs of one variant differ by their seed alone"
                )

    def control_of(self, params: Mapping[str, Any]) -> str:
        """The name of the control of a part: control, or where that was trained otherwise, what is different about this one,
        such as control-lr0.001, or control-h128 of another model."""
        own = control_recipe(params)
        if own not in self.controls.values():
            first = next(iter(self.controls.values()), own)
            words = [value if key == "model" else f"{key}{value}" for key, value in own.items() if value != first[key]]
            self.controls["-".join(["control", *words])] = own
        return next(name for name, recipe in self.controls.items() if recipe == own)

    def checked(self) -> None:
        """Raises UserError where a variant has no reference of its seeds."""
        for name, facts in self.facts.items():
            if facts.reference is None or facts.kind == "baseline":
                continue
            missing = sorted(set(self.runs[name]) - set(self.runs.get(facts.reference, {})))
            if missing:
                raise UserError(
                    f"{name} has seed {missing[0]}, but its reference {facts.reference} has not; merge a part with both"
                )


def control_recipe(params: Mapping[str, Any]) -> dict[str, Any]:
    """What of a part's parameters its control depends on, beyond the trained model."""
    quant = from_mapping(QuantParams, params["quant"], "quant")
    return of_control(quant) | {"init": "scratch" if quant.from_scratch else "checkpoint"}


def of_control(quant: QuantParams) -> dict[str, Any]:
    """What of the section the control depends on, with the rate that an empty `lr` stands for."""
    return {key: getattr(quant, key) for key in OF_CONTROL} | {"lr": of_weights(quant)}


def _recipe(variant: str, facts: Facts, study: Study) -> dict[str, Any]:
    """The parameters that make a variant, with dotted names."""
    if facts.kind == "baseline":
        return flat(asdict(study.evaluate))
    if facts.kind == "model":
        name = variant if variant in study.models else study.quant.model
        model, train = study.of_model(name)
        return flat({"model": asdict(model), "train": asdict(train)})
    if facts.kind == "control":  # its name says what is special about it
        return {}
    method = facts.plain_method
    return flat({"quant": asdict(study.quant), "methods": {method: study.methods.get(method, {})}})


def changes(base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What of `params` is not as in `base`: {"set": {dotted name: value}, "without": [dotted names]}."""
    before, after = flat(base), flat(params)
    different = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return {"set": different, "without": sorted(set(before) - set(after))}


def changed(base: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: `base` with `changes` applied."""
    kept = {key: value for key, value in flat(base).items() if key not in difference["without"]} | difference["set"]
    nested: dict[str, Any] = {}
    for key, value in kept.items():
        *path, last = key.split(".")
        inner = nested
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested


def widths_apart(quant: QuantParams) -> dict[str, int]:
    """Of the kinds of tensors whose width is not `quant.bits`."""
    own = {"weights": quant.weight_bits, "activations": quant.activation_bits, "tables": quant.embedding_bits}
    return {kind: bits for kind, bits in own.items() if bits is not None and bits != quant.bits}


def cell_of(quant: QuantParams, where: str) -> tuple[int, str]:
    """Width and line of a part. The line is its preset, `tables` where these alone are narrower than 8 bits, whose width then
    counts, or else the kinds of tensors whose width is not quant.bits. Raises UserError for mixed widths, which no line
    holds."""
    if quant.overrides or quant.budget_kb is not None or quant.max_drop is not None:
        raise UserError(f"{where}: the parts of a grid have one width a kind of tensor, not quant.overrides or mixed widths")
    apart = widths_apart(quant)
    if quant.preset == "all" and quant.bits == WIDEST and list(apart) == ["tables"]:
        return apart["tables"], "tables"
    words = [f"{kind}{bits}" for kind, bits in apart.items()]
    return quant.bits, "-".join(([] if words and quant.preset == "all" else [quant.preset]) + words)


def of_product(options: Mapping[str, Any], hidden: int) -> int:
    """Bits a number of a table by product quantization, rounded up: its codes', for the vectors weigh little."""
    own = from_mapping(pq.Options, options, "methods.pq")
    return math.ceil(own.splits * math.log2(own.centroids) / hidden)


def of_options(method: str, options: Any) -> str:
    """A method with what is not as usual of its options: pact-sawb, lsq-offset. Numbers, such as rates, are left out: they make
    no other method of it."""
    module, own = load_method(method, options)
    usual = asdict(module.Options())
    words = [method]
    for key, value in asdict(own).items():
        if value != usual[key] and isinstance(value, bool):
            words.append(key if value else f"no_{key}")
        elif value != usual[key] and isinstance(value, str):
            words.append(value)
    return "-".join(words)


def facts_of(grid: Grid, variant: str, params: Mapping[str, Any], where: str) -> tuple[str, Facts]:
    """The name of a part's variant in the grid, such as lsq-4-paper, or lsq-4-paper-h128 of another model, and what it is."""
    kind = kind_of(variant, params)
    quant = from_mapping(QuantParams, params["quant"], "quant")
    later = from_control(params["quant"], params.get("methods", {}).get(variant))
    wanted = reference(variant, kind, (quant.model, "control"), quant.model, later)
    if wanted == "control":
        wanted = grid.control_of(params)
    if kind == "control":
        return grid.control_of(params), Facts(kind, reference=wanted)
    if kind != "method":
        return variant, Facts(kind, reference=wanted)
    bits, line = cell_of(quant, where)
    if variant == "pq" and (bits, line) == (WIDEST, "all"):
        hidden = from_mapping(Study, params, "").of_model(quant.model)[0].hidden
        bits, line = of_product(params["methods"]["pq"], hidden), "tables"
    model = None if quant.model == QuantParams().model else quant.model
    method = of_options(variant, params.get("methods", {}).get(variant))
    name = "-".join([method, str(bits), line, *filter(None, [model])])
    return name, Facts(kind, method, bits, line, wanted, model)
