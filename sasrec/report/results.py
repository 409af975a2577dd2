"""The results of a study read back from files, and the paired comparisons between its variants.

All variants of a study rank the held-out item of the same users in the same order, so two of them are compared user by
user and seed by seed: what is hard for every model, or due to one training run, cancels out, and differences far below
the interval of either number become visible.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sasrec import metrics
from sasrec.config import BASELINES, EvaluateParams, Study
from sasrec.errors import UserError
from sasrec.files import read_json
from sasrec.metrics import Floats

Kind = Literal["model", "control", "method", "baseline"]

BASELINE_SEED = 0  # they learn nothing, so that one seed is all
# Methods that leave the trained weights as they are; the others are trained on, and so is what they are compared with.
UNTRAINED = frozenset({"ptq", "adaround", "fp16"})
# Methods that store the model in shorter floating-point numbers, and count as full precision.
FLOATS = frozenset({"fp16"})
# What the tables and figures cannot do without.
REQUIRED = (
    "hr@10", "ndcg@10", "ndcg@10_low", "ndcg@10_high", "mrr", "coverage@10", "sampled_hr@10", "sampled_ndcg@10",
    "ndcg@10_std", "valid_ndcg@10", "seeds", "users", "bits", "bytes", "embedding_bytes", "weight_bytes", "card",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """metrics: the content of metrics/<name>.json. gains: (seeds, users) NDCG@10 of each user, log2_ranks: of the same
    shape; one seed for what learns nothing. card: the protocol. reference: the variant it is compared with, if any."""

    name: str
    kind: Kind
    metrics: dict[str, Any]
    gains: Floats
    log2_ranks: Floats
    card: dict[str, Any]
    reference: str | None


@dataclass(frozen=True)
class Comparison:
    """A variant against another, by user and seed. difference: of NDCG@10, with the 95 % interval low..high; base: NDCG@10 of
    the other. log2_rank: mean difference of log2(rank), +1 where the held-out items stand twice as far down."""

    reference: str
    base: float
    difference: float
    low: float
    high: float
    log2_rank: float
    log2_rank_low: float
    log2_rank_high: float

    def percent(self, difference: float) -> float | None:
        """A difference of NDCG@10 in percent of the other's; None where that is 0."""
        return 100 * difference / self.base if self.base else None

    @property
    def relative(self) -> float | None:
        return self.percent(self.difference)

    @property
    def verdict(self) -> Literal["within noise", "better", "worse"]:
        """Whether the interval of the difference leaves 0 out, and on which side."""
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Results:
    """variants: baselines first, then in the order of params.yaml. comparisons: by (variant, other). notes: a sentence for
    each baseline that this data does not allow. agreement: how the exported models agree with the simulation, in a sentence
    or two; empty where no quantized variant was measured."""

    variants: tuple[Variant, ...]
    comparisons: dict[tuple[str, str], Comparison]
    notes: tuple[str, ...] = ()
    agreement: str = ""

    def get(self, name: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == name), None)

    def of_kind(self, *kinds: Kind) -> list[Variant]:
        return [variant for variant in self.variants if variant.kind in kinds]

    def own(self, variant: Variant) -> Comparison | None:
        """The comparison of a variant with its reference."""
        return self.comparisons.get((variant.name, variant.reference or ""))


def load_results(study: Study) -> Results:
    """Everything that evaluate and baselines wrote for the study, from the working directory.

    Raises UserError where a file is missing or damaged, or was measured under another protocol than the rest.
    """
    variants, notes = [], []
    for name in BASELINES:
        path = Path("metrics", f"{name}.json")
        if path.exists() and _read(path).get("ndcg@10", 0) is None:
            notes.append(str(_read(Path("data/evaluated", name, "left_out.json"))["note"]))
        elif path.exists():
            variants.append(_load(name, "baseline", (BASELINE_SEED,), study))
    for name in study.variants:
        if name not in (*study.models, *study.quantized):
            raise UserError(f"params.yaml: variants names {name}, but neither models nor quantized does; add it there")
        whole = name in study.models or name in FLOATS
        kind: Kind = "model" if whole else "control" if name == "control" else "method"
        variants.append(_load(name, kind, study.seeds, study))
    first = variants[-1]
    for variant in variants:
        if variant.metrics["card"] != first.metrics["card"] or variant.gains.shape[1] != first.gains.shape[1]:
            raise UserError(
                f"metrics/{variant.name}.json and metrics/{first.name}.json were measured under different protocols "
                f"and cannot be compared; run `dvc repro`"
            )
    exported = [variant.name for variant in variants if variant.kind == "method"]
    compared = {(a.name, b.name): (a, b) for a, b in [*pairs(variants), *rivals(variants)]}
    return Results(tuple(variants), compare(list(compared.values()), study.evaluate), tuple(notes), agreement(exported))


def agreement(names: Sequence[str]) -> str:
    """The least agreement between an exported model and the simulation of its checkpoint that evaluate found."""
    found = {name: _read_list(Path("data/evaluated", name, "agreement.json")) for name in names}
    if not found:
        return ""

    def worst(key: str, of: Callable[[Iterable[float]], float]) -> tuple[float, str]:
        value = of(of(abs(seed[key]) for seed in seeds) for seeds in found.values())
        return value, next(name for name, seeds in found.items() if any(abs(seed[key]) == value for seed in seeds))

    steps, of_steps = worst("steps", max)
    same, of_same = worst("same_top10", min)
    gain, of_gain = worst("ndcg@10_difference", max)
    text = "step" if steps == 1 else "steps"
    # Of a bound the last digit is on the safe side; of what has fewer digits it is what it is.
    least, most = math.floor(round(1e4 * same, 6)) / 100, math.ceil(round(1e5 * gain, 6)) / 1e5
    return (
        "What is measured is the exported model, run by its own runtime. Against the simulation of the same checkpoint in "
        f"torch, final states differ by at most {steps:g} integer {text}{f' ({of_steps})' if steps else ''}, at least "
        f"{least:.2f} % of users get the same ten items in the same order{f' ({of_same})' if same < 1 else ''}, "
        f"and NDCG@10 differs by at most {most:.5f}{f' ({of_gain})' if gain else ''}."
    )


def _read_list(path: Path) -> list[dict[str, float]]:
    """The agreement of each seed."""
    try:
        content = read_json(path)
        return [{key: float(seed[key]) for key in ("steps", "same_top10", "ndcg@10_difference")} for seed in content]
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what evaluate writes; delete it and run `dvc repro`") from None


def from_control(quant: Mapping[str, Any], options: Mapping[str, Any] | None) -> bool:
    """Whether even a method that does not train starts from the control, or from as much training. quant: the section quant;
    options: those of the method."""
    return quant.get("init") == "control" or quant.get("preset") == "source" or bool((options or {}).get("after"))


def reference(name: str, kind: Kind, variants: Sequence[str], source: str, from_control: bool = False) -> str | None:
    """What a variant is compared with: methods that train, or that start `from_control`, with the control, which trained for
    as long in full precision; everything else with `source`, the trained model that is quantized. None where that is not in
    `variants`."""
    trained = kind == "method" and (name not in UNTRAINED or from_control)
    wanted = "control" if trained and "control" in variants else source
    return wanted if wanted != name and wanted in variants else None


def _load(name: str, kind: Kind, seeds: Sequence[int], study: Study) -> Variant:
    values = _read(Path("metrics", f"{name}.json"))
    missing = [key for key in REQUIRED if key not in values]
    if missing:
        raise UserError(f"metrics/{name}.json lacks {missing[0]}; run `dvc repro`")
    folder = Path("data/evaluated", name)
    ranks = np.stack([_read_ranks(folder / str(seed) / "full.npy") for seed in seeds])  # (seeds, users)
    card = _read(folder / "card.json")
    later = from_control(asdict(study.quant), study.methods.get(name))
    wanted = reference(name, kind, study.variants, study.quant.model, later)
    return Variant(name, kind, values, metrics.ndcg(ranks, 10), np.log2(ranks), card, wanted)


def _missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist; run `dvc repro` to make it")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise _missing(path) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; delete it and run `dvc repro`")
    return content


def _read_ranks(path: Path) -> Floats:
    try:
        ranks = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, EOFError):
        raise UserError(f"{path} is not a whole array; delete it and run `dvc repro`") from None
    return np.asarray(ranks, np.float64)


def load_stats(path: Path = Path("data/prepared/stats.json")) -> dict[str, Any]:
    """Facts of the prepared data. Raises UserError where one that the report tells is missing."""
    stats = _read(path)
    for key in ("dataset", "users", "items", "interactions"):
        if key not in stats:
            raise UserError(f"{path} lacks '{key}'; run `dvc repro`")
    return stats


def pairs(variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """The comparisons the report makes: each variant with its reference, each method with ptq, each model with each
    baseline."""
    named = {variant.name: variant for variant in variants}
    found: dict[tuple[str, str], tuple[Variant, Variant]] = {}
    for variant in variants:
        others = [variant.reference or ""]
        if variant.kind == "method" and variant.name != "ptq":
            others.append("ptq")
        if variant.kind == "model":
            others += BASELINES
        for other in others:
            if other in named:
                found[variant.name, other] = (variant, named[other])
    return list(found.values())


def best_method(variants: Sequence[Variant]) -> Variant | None:
    """The quantized variant with the highest NDCG@10 on validation, the first of equals; tests choose nothing."""
    return max(
        (variant for variant in variants if variant.kind == "method" and variant.metrics["valid_ndcg@10"] is not None),
        key=lambda variant: variant.metrics["valid_ndcg@10"],
        default=None,
    )


def rivals(variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """The method to choose against each other one, which tells what it is tied with."""
    best = best_method(variants)
    return [(best, other) for other in variants if best and other.kind == "method" and other.name != best.name]


def compare(compared: Sequence[tuple[Variant, Variant]], params: EvaluateParams) -> dict[tuple[str, str], Comparison]:
    """Each first variant against its second, by name; the intervals resample users, and seeds where there are several."""
    if not compared:
        return {}
    # (pairs, seeds, users); what learns nothing has one seed, which meets every seed of the other.
    gains = np.stack([a.gains - b.gains for a, b in compared])
    log2_ranks = np.stack([a.log2_ranks - b.log2_ranks for a, b in compared])
    intervals = metrics.bootstrap_intervals(np.concatenate([gains, log2_ranks]), params.bootstrap, params.seed)
    return {
        (a.name, b.name): Comparison(
            b.name, float(b.gains.mean()), float(gain.mean()), *of_gain, float(log2_rank.mean()), *of_rank
        )
        for (a, b), gain, log2_rank, of_gain, of_rank in zip(
            compared, gains, log2_ranks, intervals[: len(compared)], intervals[len(compared) :], strict=True
        )
    }
