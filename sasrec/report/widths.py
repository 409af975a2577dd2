"""Quality against bytes in figures and words: what a merged reference (`sasrec.merged`) says of methods, widths and lines.

Here are the numbers behind the figure, the tables and the sentences, from the JSON file alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sasrec.report.tables import MINUS, listed, percent_text, size_text

LINES = {
    "all": "every tensor", "activations8": "activations at 8 bits", "paper": "tables at 8 bits",
    "tables": "tables alone, the rest at 8 bits",
}  # fmt: skip
# What to set for b bits of a line, of parameters in `quant`.
OPTIONS = {
    "all": ("bits={}",), "activations8": ("bits={}", "activation_bits=8"), "paper": ("bits={}", "preset=paper"),
    "tables": ("bits=8", "embedding_bits={}"),
}  # fmt: skip
# Sizes that differ by less are one: the methods store other scales and shifts beside the same codes.
SAME_SIZE = 1.01
METHODS = ("ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround", "pq")


@dataclass(frozen=True)
class Point:
    """A quantized variant. quality: NDCG@10 on test; low, high: where the 95 % interval of its paired difference from the
    reference puts it; change, change_low, change_high: that difference in percent; worth: the verdict against full-precision
    models of its size, None where there are none so small; validation: NDCG@10, the mean and by seed; model: what it was made
    from, where that is not the usual one."""

    name: str
    method: str
    bits: int
    line: str
    seeds: int
    size: int
    quality: float
    low: float
    high: float
    reference: str
    change: float
    change_low: float
    change_high: float
    verdict: str
    worth: str | None
    validation: float | None
    by_seed: Mapping[int, float]
    model: str | None

    @property
    def where(self) -> str:
        """Its line in words, with the model."""
        return in_words(self.line) + (f", of {self.model}" if self.model else "")


@dataclass(frozen=True)
class Whole:
    """A full-precision model, or the control; validation and by_seed as of `Point`."""

    name: str
    seeds: int
    size: int
    quality: float
    low: float
    high: float
    validation: float | None
    by_seed: Mapping[int, float]


@dataclass(frozen=True)
class Widths:
    """points: by line, then from the widest width down. front: names of the full-precision models that quantized ones are
    measured against, smallest first. controls: one a recipe of fine-tuning. choices: as stored."""

    points: tuple[Point, ...]
    models: tuple[Whole, ...]
    controls: tuple[Whole, ...]
    choices: tuple[Mapping[str, Any], ...]

    def line(self, line: str) -> list[Point]:
        """Of all models."""
        return [point for point in self.points if point.line == line]

    def get(self, name: str) -> Point:
        return next(point for point in self.points if point.name == name)

    @property
    def lines(self) -> list[tuple[str, str | None]]:
        """Lines and the models that each was measured of."""
        return list(dict.fromkeys((point.line, point.model) for point in self.points))

    @property
    def front(self) -> list[Whole]:
        """The full-precision models that no other of at most their bytes equals, smallest first."""
        by_name = {model.name: model for model in self.models}
        return [by_name[name] for name, *_ in undominated([(own.name, own.size, own.quality) for own in self.models])]

    @property
    def smallest(self) -> list[Point | Whole]:
        """Of all models, quantized or not, those whose NDCG@10 on validation no other of about their bytes or fewer equals,
        smallest first: what to ship at each size. Two are compared over the seeds that both have, for a seed says more than
        the difference between most; where three so compared beat each other in a circle, what beats the best by its own
        mean stays. Tests choose nothing."""
        every: list[Point | Whole] = [*self.points, *self.models, *self.controls]
        known = sorted((own for own in every if own.validation is not None), key=lambda own: -(own.validation or 0.0))

        def beaten(own: Point | Whole, by: Sequence[Point | Whole]) -> bool:
            return any(other.size <= SAME_SIZE * own.size and _ahead(other, own) for other in by)

        kept: list[Point | Whole] = []
        for own in known:
            if not beaten(own, kept):
                kept.append(own)
        return sorted((own for own in kept if not beaten(own, kept)), key=lambda own: own.size)


def _ahead(one: Point | Whole, other: Point | Whole) -> bool:
    """Whether one is better on validation than the other; of two that are level the smaller is, and of the same size one."""
    seeds = sorted(one.by_seed.keys() & other.by_seed.keys())
    own, its = ([each.by_seed[seed] for seed in seeds] or [each.validation or 0.0] for each in (one, other))
    return (sum(own), -one.size, other.name) > (sum(its), -other.size, one.name)


def undominated(models: Sequence[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """Of (name, bytes, quality) those that no other of at most their bytes equals, smallest first."""
    found: list[tuple[str, int, float]] = []
    for model in sorted(models, key=lambda model: (-model[2], model[1])):
        if not found or model[1] < found[-1][1]:
            found.append(model)
    return found[::-1]


def load(content: Mapping[str, Any]) -> Widths:
    """content: a merged reference file."""
    compared = {(row["variant"], row["reference"]): row for row in content["comparisons"]}
    worth = {row["variant"]: row["verdict"] for row in content["frontier"]}
    points: list[Point] = []
    models: list[Whole] = []
    controls: list[Whole] = []
    for name, run in content["runs"].items():
        values = content["variants"][name]
        if run["kind"] == "method":
            points.append(_point(name, run, values, compared[name, run["reference"]], worth.get(name)))
        elif run["kind"] != "baseline":
            whole = Whole(
                name=name, seeds=len(run["seeds"]), size=values["bytes"], quality=values["ndcg@10"],
                low=values["ndcg@10_low"], high=values["ndcg@10_high"], validation=values["valid_ndcg@10"],
                by_seed=_by_seed(run),
            )  # fmt: skip
            (models if run["kind"] == "model" else controls).append(whole)
    return Widths(tuple(points), tuple(models), tuple(controls), tuple(content["choices"]))


def _point(name: str, run: Mapping[str, Any], values: Mapping[str, Any], row: Mapping[str, Any], worth: str | None) -> Point:
    change, change_low, change_high = (
        100 * row[key] / row["base"] if row["base"] else 0.0 for key in ("difference", "low", "high")
    )
    quality = values["ndcg@10"]
    return Point(
        name=name, method=run["method"], bits=run["bits"], line=run["line"], seeds=len(run["seeds"]), size=values["bytes"],
        quality=quality, low=quality + row["low"] - row["difference"], high=quality + row["high"] - row["difference"],
        reference=run["reference"], change=change, change_low=change_low, change_high=change_high,
        verdict={"within noise": "tied"}.get(row["verdict"], row["verdict"]), worth=worth,
        validation=values["valid_ndcg@10"], by_seed=_by_seed(run), model=run.get("model"),
    )  # fmt: skip


def _by_seed(run: Mapping[str, Any]) -> dict[int, float]:
    pairs = zip(run["seeds"], run["valid_ndcg@10"], strict=True)
    return {seed: value for seed, value in pairs if value is not None}


def in_words(line: str) -> str:
    return LINES.get(line, line)


def bits_text(*bits: int) -> str:
    """'1 bit', or '4, 3 and 2 bits'."""
    return f"{listed([str(each) for each in bits])} {'bit' if bits == (1,) else 'bits'}"


def change_text(point: Point) -> str:
    """−1.2 % (−2.0 to −0.4)"""
    change, low, high = (percent_text(value, MINUS) for value in (point.change, point.change_low, point.change_high))
    return f"{change} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def choice_sentence(widths: Widths, choice: Mapping[str, Any]) -> str:
    """Which method to choose at a width and line, with those that cannot be told from it."""
    best = widths.get(choice["best"])
    groups = {key: [widths.get(name).method for name in choice[key]] for key in ("tied", "ahead")}
    others = len(choice["tied"]) + len(choice["behind"]) + len(choice["ahead"])
    sentence = f"{bits_text(best.bits)}, {best.where}: **{best.method}**, {change_text(best)} against {best.reference}"
    if not others:
        return sentence + "; no other method was measured."
    plain = ", of which ptq needs no training" if "ptq" in groups["tied"] else ""
    if len(groups["tied"]) == others:
        return sentence + f"; tied with all others{plain}."
    if groups["tied"]:
        sentence += f"; tied with {listed(groups['tied'])}{plain}"
    if groups["ahead"]:
        sentence += f"; on the test items {listed(groups['ahead'])} did better"
    return sentence + ("." if groups["tied"] or groups["ahead"] else "; the others are behind.")


def options_sentence(widths: Widths) -> str:
    """What to set for the lines that were measured."""
    each = []
    for point in {point.line: point for point in reversed(widths.points)}.values():
        if point.line in OPTIONS:
            options = " ".join(f"-S quant.{option.format(point.bits)}" for option in OPTIONS[point.line])
            each.append(f"{in_words(point.line)}, {bits_text(point.bits)}: `{options}`")
    return f"To have them: {'; '.join(reversed(each))}." if each else ""


def untrained_sentence(widths: Widths) -> str:
    """Where rounding alone is enough."""
    cells: dict[str, list[int]] = {}
    for choice in widths.choices:
        best = widths.get(choice["best"])
        if "ptq" in (widths.get(name).method for name in (choice["best"], *choice["tied"])):
            cells.setdefault(best.where, []).append(best.bits)
    each = [f"{bits_text(*bits)} ({where})" for where, bits in cells.items()]
    return f"`ptq`, which needs no training, is the choice or tied with it at {listed(each)}." if each else ""


def worth_sentence(widths: Widths, line: str, model: str | None = None) -> str:
    """From which width on quantized models of a line are not worth it against full-precision ones of their size. model: what
    they were made from, as in `Point`."""
    points = [point for point in widths.line(line) if point.model == model]
    chosen = [widths.get(choice["best"]) for choice in widths.choices]
    cells = {best.bits: best for best in chosen if best in points}
    judged = [point for point in points if point.worth is not None]
    bad = [point for point in judged if point.worth == "not worth it"]
    tiny = sorted({point.bits for point in points if point.worth is None}, reverse=True)
    start = f"{points[0].where[0].upper()}{points[0].where[1:]}: "
    if not judged:
        return start + "smaller than every full-precision model that was measured." if tiny else ""
    wide = [bits for bits, best in cells.items() if best.worth == "worth it"]
    parts = []
    if not bad:
        which = "that has full-precision models of its size to be compared with is above their line" if tiny else ""
        parts.append(f"every quantized model {which or 'is above the line of full-precision models of its size'}")
    else:
        if wide:
            parts.append(f"the chosen method is worth its bytes at {bits_text(*sorted(wide, reverse=True))}")
        lost = [best for best in cells.values() if best.worth == "not worth it"]
        if lost:
            parts.append(
                f"at {bits_text(*(point.bits for point in lost))} it is not above the line of full-precision models of "
                "its size beyond noise, and not worth it"
            )
        names = [point for point in bad if point.name not in {best.name for best in cells.values()}]
        if names:
            by_bits: dict[int, list[str]] = {}
            for point in names:
                by_bits.setdefault(point.bits, []).append(point.method)
            each = [f"{listed(methods)} at {bits_text(bits)}" for bits, methods in by_bits.items()]
            parts.append(f"not worth it either: {'; '.join(each)}" if lost else f"not worth it: {'; '.join(each)}")
    if tiny:
        parts.append(f"at {bits_text(*tiny)} some are smaller than every full-precision model that was measured")
    return start + "; ".join(parts) + "."


def words(widths: Widths) -> str:
    """The choice at every width and line, and what is not worth it, as a Markdown list."""
    lines = [f"- {choice_sentence(widths, choice)}" for choice in widths.choices]
    lines += [f"- {sentence}" for line in widths.lines if (sentence := worth_sentence(widths, *line))]
    return "\n".join(lines) + "\n"


def table(widths: Widths) -> str:
    """Width x line x method in Markdown: what each loses against its reference, and what that is worth."""
    rows = [
        "| bits | line | method | seeds | size | NDCG@10 | change against its reference (95 % interval) | verdict | against "
        "full precision of its size |",
        "|---:|---|---|---:|---:|---:|---|---|---|",
    ]
    best = {choice["best"] for choice in widths.choices}
    for point in widths.points:
        name = f"**{point.method}**" if point.name in best else point.method
        line = " of ".join(filter(None, [point.line, point.model]))
        rows.append(
            f"| {point.bits} | {line} | {name} | {point.seeds} | {size_text(point.size)} | {point.quality:.4f} "
            f"| {change_text(point)} of {point.reference} | {point.verdict} | {point.worth or 'smaller than any'} |"
        )
    for model in sorted(widths.models, key=lambda model: -model.size):
        rows.append(
            f"|  |  | {model.name} | {model.seeds} | {size_text(model.size)} | {model.quality:.4f} |  |  | full precision |"
        )
    rows += [
        f"|  |  | {own.name} | {own.seeds} | {size_text(own.size)} | {own.quality:.4f} |  |  | full precision, trained on |"
        for own in widths.controls
    ]
    return "\n".join(rows) + "\n"


def smallest_table(widths: Widths) -> str:
    """`Widths.smallest` in Markdown."""
    rows = [
        "| size | model | NDCG@10 on validation | NDCG@10 | change against its reference (95 % interval) |",
        "|---:|---|---:|---:|---|",
    ]
    for own in widths.smallest:
        what, change = f"{own.name}, full precision", ""
        if isinstance(own, Point):
            what, change = f"{own.method}, {bits_text(own.bits)}, {own.where}", f"{change_text(own)} of {own.reference}"
        rows.append(f"| {size_text(own.size)} | {what} | {own.validation:.4f} | {own.quality:.4f} | {change} |")
    return "\n".join(rows) + "\n"


def short_table(widths: Widths) -> str:
    """The choice at each width and line in Markdown."""
    rows = ["| bits | line | choose | change (95 % interval) | size | tied with |", "|---:|---|---|---|---:|---|"]
    for choice in widths.choices:
        point = widths.get(choice["best"])
        tied = listed([widths.get(name).method for name in choice["tied"]]) or "none"
        rows.append(
            f"| {point.bits} | {point.where} | {point.method} | {change_text(point)} | {size_text(point.size)} | {tied} |"
        )
    return "\n".join(rows) + "\n"
