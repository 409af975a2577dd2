"""A reference merged of several parts: methods by width, line and seed, behind the figure of quality against bytes.

A part is a kept reference (`sasrec.reference`) of one width, line and seed, or of full-precision models. metrics/reference/
NAME.json then has, besides what every reference has: `protocols`, those whose ranks are kept; `parts`, each one's command,
environment, and parameters where they are not those of the file; `runs`, for each variant what it is (method, bits, line) and
by seed what ranks do not tell (validation, coverage, sizes); `frontier`, every quantized variant against full-precision models
of its size; `choices`, the method to choose at each width and line. In NAME/: `ranks/` as ever, `curves.csv` of all runs, and
`locks/PART.lock.gz`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sasrec import metrics
from sasrec.config import BASELINES, EvaluateParams, QuantParams, Study
from sasrec.errors import UserError
from sasrec.mapping import flat, from_mapping
from sasrec.metrics import Floats
from sasrec.protocol import DIGITS, quality, short_hash
from sasrec.quant import pq
from sasrec.quant.rates import of_weights
from sasrec.reference import kind_of
from sasrec.report.results import BASELINE_SEED, Comparison, Kind, Variant, compare, from_control, reference
from sasrec.report.widths import LINES, METHODS, undominated

# Ranks among popular candidates are left out: the grid has hundreds of runs, and no figure of it is made of them.
PROTOCOLS = ("full", "sampled")
# What the ranks do not tell of a run.
VALUES = ("valid_ndcg@10", "coverage@10", "bits", "bytes", "embedding_bytes", "weight_bytes")
# Of the quantized models of a grid: what other tensors than those of a line have.
WIDEST = 8
# Of section quant: what the control depends on, too; of each such recipe there is one control.
OF_CONTROL = ("model", "epochs", "lr", "dropout", "distill")

# Width, line, and model where that is not the usual one: the variants of a cell differ by their method alone.
Cell = tuple[int, str, str | None]


@dataclass(frozen=True)
class Facts:
    """What a variant is. method, bits, line: of a quantized one. reference: what it is compared with. model: what a quantized
    one was made from, where that is not the model that a study quantizes unless told otherwise."""

    kind: Kind
    method: str | None = None
    bits: int | None = None
    line: str | None = None
    reference: str | None = None
    model: str | None = None


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
            for protocol in PROTOCOLS:
                if not np.array_equal(other.ranks[protocol], run.ranks[protocol]):
                    what = "is not the same model" if facts.kind != "method" else "comes twice, with different ranks"
                    raise UserError(
                        f"{variant}, seed {seed}, of {run.part} and of {other.part} {what} ({protocol}: "
                        f"{int((other.ranks[protocol] != run.ranks[protocol]).sum())} users differ); make both with the same "
                        "parameters on the same machine, or merge one of them only"
                    )
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
    return flat({"quant": asdict(study.quant), "methods": {facts.method: study.methods.get(facts.method or "", {})}})


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


def cell_of(quant: QuantParams, where: str) -> tuple[int, str]:
    """Width and line of a part. The line is its preset, `tables` where these alone are narrower than 8 bits, whose width then
    counts, or else the kinds of tensors whose width is not quant.bits. Raises UserError for mixed widths, which no line
    holds."""
    if quant.overrides or quant.budget_kb is not None or quant.max_drop is not None:
        raise UserError(f"{where}: the parts of a grid have one width a kind of tensor, not quant.overrides or mixed widths")
    own = {"weights": quant.weight_bits, "activations": quant.activation_bits, "tables": quant.embedding_bits}
    apart = {kind: bits for kind, bits in own.items() if bits is not None and bits != quant.bits}
    if quant.preset == "all" and quant.bits == WIDEST and list(apart) == ["tables"]:
        return apart["tables"], "tables"
    words = [f"{kind}{bits}" for kind, bits in apart.items()]
    return quant.bits, "-".join(([] if words and quant.preset == "all" else [quant.preset]) + words)


def of_product(options: Mapping[str, Any], hidden: int) -> int:
    """Bits a number of a table by product quantization, rounded up: its codes', for the vectors weigh little."""
    own = from_mapping(pq.Options, options, "methods.pq")
    return math.ceil(own.splits * math.log2(own.centroids) / hidden)


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
    name = "-".join([variant, str(bits), line, *filter(None, [model])])
    return name, Facts(kind, variant, bits, line, wanted, model)


def in_order(facts: Mapping[str, Facts]) -> list[str]:
    """Baselines, full-precision models, the controls, and the methods: by line and model, from the widest width down."""

    lines = list(LINES)

    def place(name: str) -> tuple[Any, ...]:
        own = facts[name]
        if own.kind == "baseline":
            return (0, BASELINES.index(name))
        if own.kind != "method":
            return (1 + (own.kind == "control"), own.reference is not None, name)
        line = lines.index(own.line) if own.line in lines else len(lines)
        method = METHODS.index(own.method) if own.method in METHODS else len(METHODS)
        return (3, line, own.line, own.model or "", -(own.bits or 0), method, own.method)

    return sorted(facts, key=place)


def flat_values(runs: Mapping[int, Run], params: EvaluateParams, card: Mapping[str, Any]) -> dict[str, Any]:
    """The flat metrics of a variant over all its seeds."""
    ordered = [runs[seed] for seed in sorted(runs)]
    found = quality({name: np.stack([run.ranks[name] for run in ordered]) for name in PROTOCOLS}, params)
    for key in VALUES:
        values = [run.values[key] for run in ordered]
        mean = None if None in values else float(np.mean(values))
        whole = key.endswith("bytes")
        found[key] = mean if mean is None else round(mean) if whole else round(mean, DIGITS)
    return found | {"card": short_hash(dict(card))}


def compared(pairs: Iterable[tuple[Variant, Variant, Sequence[int]]], params: EvaluateParams) -> list[dict[str, Any]]:
    """Rows of paired comparisons, each over the seeds that both have (given with the pair)."""
    listed = list(pairs)
    found: dict[tuple[str, str], tuple[Comparison, int]] = {}
    for count in sorted({len(seeds) for *_, seeds in listed}):
        own = [(a, b) for a, b, seeds in listed if len(seeds) == count]
        found |= {key: (comparison, count) for key, comparison in compare(own, params).items()}
    rows = []
    for a, b, _ in listed:
        comparison, count = found[a.name, b.name]
        numbers = {key: round(value, DIGITS) + 0.0 for key, value in asdict(comparison).items() if isinstance(value, float)}
        rows.append({"variant": a.name, "reference": b.name, "seeds": count, **numbers, "verdict": comparison.verdict})
    return rows


class Compared:
    """All that the ranks of a grid say: values by variant, comparisons, frontier, choices."""

    def __init__(self, grid: Grid, params: EvaluateParams) -> None:
        self.grid, self.params = grid, params
        self.names = in_order(grid.facts)
        self.values = {name: flat_values(grid.runs[name], params, grid.card) for name in self.names}
        best = self._best()
        self.comparisons = compared(self._pairs(best), params)
        self.frontier = self._frontier()
        self.choices = self._choices(best)

    def _variant(self, name: str, seeds: Sequence[int]) -> Variant:
        """The variant with some of its seeds."""
        ranks = np.stack([self.grid.runs[name][seed].ranks["full"] for seed in seeds])
        facts = self.grid.facts[name]
        return Variant(name, facts.kind, {}, metrics.ndcg(ranks, 10), np.log2(ranks), {}, facts.reference)

    def _shared(self, first: str, second: str) -> list[int]:
        """Seeds that both have; a baseline has one for all."""
        own, other = self.grid.runs[first], self.grid.runs[second]
        if self.grid.facts[first].kind == "baseline":
            return sorted(other)
        return sorted(own if self.grid.facts[second].kind == "baseline" else set(own) & set(other))

    def _pair(self, first: str, second: str) -> tuple[Variant, Variant, list[int]] | None:
        shared = self._shared(first, second)
        if not shared:
            return None
        one = [BASELINE_SEED]
        a, b = (self._variant(name, one if self.grid.facts[name].kind == "baseline" else shared) for name in (first, second))
        return a, b, shared

    def cells(self) -> dict[Cell, list[str]]:
        """The quantized variants of each width and line."""
        found: dict[Cell, list[str]] = {}
        for name in self.names:
            facts = self.grid.facts[name]
            if facts.kind == "method" and facts.bits is not None and facts.line is not None:
                found.setdefault((facts.bits, facts.line, facts.model), []).append(name)
        return found

    def _best(self) -> dict[Cell, str]:
        """Of each width and line, the variant with the highest mean NDCG@10 on validation, over the seeds that all have
        (where there are such); tests choose nothing."""
        found = {}
        for cell, names in self.cells().items():
            shared = set.intersection(*(set(self.grid.runs[name]) for name in names))

            def mean(name: str, seeds: set[int] = shared) -> float:
                runs = self.grid.runs[name]
                return float(np.mean([runs[seed].values["valid_ndcg@10"] for seed in sorted(seeds or set(runs))]))

            found[cell] = max(names, key=mean)
        return found

    def _pairs(self, best: Mapping[Cell, str]) -> list[tuple[Variant, Variant, list[int]]]:
        """Each variant with its reference, each method with ptq of its width and line, and the best of those with the rest."""
        wanted = [(name, self.grid.facts[name].reference) for name in self.names]
        for cell, names in self.cells().items():
            plain = next((name for name in names if self.grid.facts[name].method == "ptq"), None)
            wanted += [(name, plain) for name in names if name != plain]
            wanted += [(best[cell], name) for name in names if name != best[cell]]
        pairs = [self._pair(a, b) for a, b in dict.fromkeys(wanted) if b is not None and b in self.grid.runs]
        return [pair for pair in pairs if pair is not None]

    def _choices(self, best: Mapping[Cell, str]) -> list[dict[str, Any]]:
        rows = {(row["variant"], row["reference"]): row for row in self.comparisons}
        words = {"within noise": "tied", "better": "behind", "worse": "ahead"}
        found = []
        for cell, names in self.cells().items():
            groups: dict[str, list[str]] = {"tied": [], "behind": [], "ahead": []}
            for name in names:
                row = rows.get((best[cell], name))
                if row is not None:
                    groups[words[row["verdict"]]].append(name)
            of_model = {} if cell[2] is None else {"model": cell[2]}
            found.append({"bits": cell[0], "line": cell[1], **of_model, "best": best[cell], **groups})
        return found

    def _frontier(self) -> list[dict[str, Any]]:
        """Every quantized variant against full precision of its size: between the two full-precision models around it, of
        those that no smaller one equals, on the line through them over the logarithm of bytes. A variant that is smaller
        than all of them has nothing to be compared with; one is worth it where the interval is above 0."""
        models = [name for name in self.names if self.grid.facts[name].kind == "model"]
        front = undominated([(name, self.values[name]["bytes"], self.values[name]["ndcg@10"]) for name in models])
        rows: list[dict[str, Any]] = []
        pairs, places = [], []
        for name in self.names:
            if self.grid.facts[name].kind != "method" or not front:
                continue
            place = between(self.values[name]["bytes"], front)
            if place is None:
                continue
            seeds = sorted(set.intersection(*(set(self.grid.runs[each]) for each in (name, *place[:2]))))
            if not seeds:
                continue
            low, high = (self._variant(each, seeds) for each in place[:2])
            share = place[2]
            mixed = replace(
                low, name="frontier", gains=(1 - share) * low.gains + share * high.gains,
                log2_ranks=(1 - share) * low.log2_ranks + share * high.log2_ranks,
            )  # fmt: skip
            pairs.append((self._variant(name, seeds), mixed, seeds))
            places.append(place)
        for row, (low_name, high_name, share) in zip(compared(pairs, self.params), places, strict=True):
            del row["reference"]
            verdict = "worth it" if row.pop("verdict") == "better" else "not worth it"
            rows.append({**row, "between": [low_name, high_name], "share": round(share, DIGITS), "verdict": verdict})
        return rows


def between(size: float, front: Sequence[tuple[str, int, float]]) -> tuple[str, str, float] | None:
    """The two models of `undominated` around a size in bytes, and how far it is from the first to the second in the
    logarithm of bytes, 0..1; the largest twice from its size on, None below the smallest."""
    if size < front[0][1]:
        return None
    for (name, low, _), (other, high, _) in zip(front, front[1:], strict=False):
        if size < high:
            return name, other, math.log(size / low) / math.log(high / low)
    return front[-1][0], front[-1][0], 0.0
