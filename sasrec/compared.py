"""What the ranks of a merged reference (`sasrec.merged`) say: each variant's values, what it is worth beside its reference and
beside full precision of its size, and which method to choose at each width and line."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from sasrec import metrics
from sasrec.config import BASELINES, EvaluateParams
from sasrec.merged import KEPT_PROTOCOLS, VALUES, Facts, Grid, Run
from sasrec.protocol import DIGITS, quality, short_hash
from sasrec.report.results import BASELINE_SEED, Comparison, Variant, compare
from sasrec.report.widths import LINES, METHODS, undominated

# Width, line, and model where that is not the usual one: the variants of a cell differ by their method alone.
Cell = tuple[int, str, str | None]


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
        method = METHODS.index(own.plain_method) if own.plain_method in METHODS else len(METHODS)
        return (3, line, own.line, own.model or "", -(own.bits or 0), method, own.method)

    return sorted(facts, key=place)


def flat_values(runs: Mapping[int, Run], params: EvaluateParams, card: Mapping[str, Any]) -> dict[str, Any]:
    """The flat metrics of a variant over all its seeds."""
    ordered = [runs[seed] for seed in sorted(runs)]
    found = quality({name: np.stack([run.ranks[name] for run in ordered]) for name in KEPT_PROTOCOLS}, params)
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
