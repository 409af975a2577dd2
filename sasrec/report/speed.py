"""What `python -m stages.bench` measured, as tables for the README and as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sasrec.bench import BFLOAT16, FULL, PLAIN
from sasrec.measurements import shown_rows
from sasrec.report.figures import BLUE, ORANGE, WIDTH, size_ticks

COLUMNS = (
    "data", "setting", "threads", "what", "variant", "measure", "unit", "median", "q1", "q3", "rounds",
    "of_plain", "of_plain_q1", "of_plain_q3", "of_full", "of_full_q1", "of_full_q3",
    "users", "items", "interactions", "shape", "bits", "cpu", "flags", "versions",
)  # fmt: skip
# What a row is a measurement of; another one of the same replaces it.
KEY = ("data", "setting", "threads", "what", "variant", "measure")
Row = Mapping[str, str]
Group = tuple[str, str, str]  # data, setting, threads

# Things measured beside the plain code, and their words.
THINGS = {
    ("prepare", "time"): "prepare the data",
    ("prepare", "peak"): "peak memory of preparing",
    ("step", "time"): "training step",
    ("epoch", "time"): "training epoch",
    ("evaluate both", "time"): "evaluate all users, both protocols",
    ("evaluate full", "time"): "evaluate all users, full ranking",
    ("train process", "peak"): "peak memory of training",
    ("evaluate process", "peak"): "peak memory of evaluation",
}


def read(path: Path) -> list[dict[str, str]]:
    return shown_rows(path, "stages.bench", COLUMNS)


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows that compare: of one data set, setting and number of threads, in the order they came in."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row["data"], row["setting"], row["threads"]), []).append(row)
    return found


def pick(rows: Sequence[Row], what: str, kind: str, variant: str) -> Row | None:
    """The row of `what`; kind: peak, or time, which is that of the processor for one thread, and of the wall for more."""
    measure = kind if kind == "peak" else "cpu" if rows[0]["threads"] == "1" else "wall"
    return next((row for row in rows if (row["what"], row["variant"], row["measure"]) == (what, variant, measure)), None)


def figure_text(row: Row | None) -> str:
    """Median and quartiles with their unit."""
    if row is None:
        return ""
    values = [float(row[name]) for name in ("median", "q1", "q3")]
    factor, unit = (1000, "ms") if row["unit"] == "s" and values[0] < 1 else (1, row["unit"])
    median, q1, q3 = (_three(value * factor) for value in values)
    return f"{median} {unit} ({q1} to {q3})"


def ratio_text(row: Row | None, base: str) -> str:
    if row is None or not row[base]:
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[f"{base}{part}"]) for part in ("", "_q1", "_q3")))


def _three(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _titles(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"`{first['data']}`, {first['setting']}"


def methods(rows: Sequence[Row]) -> list[str]:
    """Quantization methods that were timed in training, or in what they do instead."""
    names = [row["variant"] for row in rows if row["what"] in ("step", "epoch", "quantize")]
    return [name for name in dict.fromkeys(names) if name not in (PLAIN, FULL, BFLOAT16)]


def speed(path: Path) -> str:
    """Markdown: everything beside the plain code, methods beside full precision, and what the rows were measured on."""
    rows = read(path)
    lines = ["| data, setting | what | plain | here | here / plain |", "|---|---|---:|---:|---:|"]
    for own in groups(rows).values():
        for (what, kind), words in THINGS.items():
            plain = pick(own, what, kind, PLAIN)
            for variant in (FULL, BFLOAT16):
                row = pick(own, what, kind, variant)
                if row is not None:
                    name = f"{words}, bfloat16 products" if variant == BFLOAT16 else words
                    cells = (figure_text(plain), figure_text(row), ratio_text(row, "of_plain"))
                    lines.append(f"| {_titles(own)} | {name} | {' | '.join(cells)} |")
    lines += ["", "| data, setting | method | step | step / full precision | epoch / full precision | without training |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for own in groups(rows).values():
        for name in methods(own):
            step, epoch = pick(own, "step", "time", name), pick(own, "epoch", "time", name)
            cells = (figure_text(step), ratio_text(step, "of_full"), ratio_text(epoch, "of_full"))
            lines.append(
                f"| {_titles(own)} | {name} | {' | '.join(cells)} | {figure_text(pick(own, 'quantize', 'time', name))} |"
            )
    return "\n".join(lines) + "\n\n" + facts(rows) + "\n"


def facts(rows: Sequence[Row]) -> str:
    """Data, shapes, machines and versions of the rows."""
    described = []
    for own in groups(rows).values():
        first = own[0]
        counts = f"{int(first['users']):,} users, {int(first['items']):,} items, {int(first['interactions']):,} interactions"
        described.append(f"{_titles(own)}: {counts}; {first['shape']}; methods at {first['bits']} bits.")
    machines = dict.fromkeys(
        f"{row['threads']} thread{'' if row['threads'] == '1' else 's'} of {row['cpu']} ({row['flags']}); {row['versions']}."
        for row in rows
    )
    return " ".join([*described, *machines])


def draw(rows: Sequence[Row]) -> Figure:
    """A row of panels for each group: this project against the plain code, and methods against full precision."""
    found = groups(rows)
    shown = [[thing for thing in THINGS if _ratio(own, thing, FULL, "of_plain")] for own in found.values()]
    heights = [max(len(things), len(methods(own)), 1) for things, own in zip(shown, found.values(), strict=True)]
    figure = Figure(figsize=(1.5 * WIDTH, 0.6 + sum(1.1 + 0.3 * height for height in heights)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, height_ratios=[h + 2.5 for h in heights], width_ratios=(3, 2))
    for (left, right), things, own in zip(panels, shown, found.values(), strict=True):
        data, setting, length = own[0]["data"], own[0]["setting"], own[0]["shape"].split(",")[0]
        _dots(left, {THINGS[thing]: _ratio(own, thing, FULL, "of_plain") for thing in things}, BLUE)
        left.set_title(f"{data}, {setting} ({length}): here / plain")
        _dots(right, {name: _ratio(own, ("step", "time"), name, "of_full") for name in methods(own)}, ORANGE)
        right.set_title("step / full precision")
    return figure


def _ratio(rows: Sequence[Row], thing: tuple[str, str], variant: str, base: str) -> tuple[float, float, float] | None:
    row = pick(rows, *thing, variant)
    return None if row is None or not row[base] else (float(row[base]), float(row[f"{base}_q1"]), float(row[f"{base}_q3"]))


def _dots(axes: Axes, ratios: Mapping[str, tuple[float, float, float] | None], colour: str) -> None:
    """Medians with quartiles and the number beside them, on a logarithmic axis, with a line to 1 from each."""
    values = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    for i, (median, q1, q3) in enumerate(values.values()):
        axes.plot([1, median], [i, i], color=colour, linewidth=1, alpha=0.5)
        axes.plot([q1, q3], [i, i], color="#333333", linewidth=1.6)
        axes.plot([median], [i], "o", color=colour, markersize=6.5, zorder=3)
        axes.annotate(f"{median:.2f}", (median, i), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(max(len(values), 1) - 0.4, -0.8)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="#333333", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    edges = [edge for ratio in values.values() for edge in ratio[1:]] + [1.0]
    room = max(1.15, (max(edges) / min(edges)) ** 0.07)  # for the numbers of the outermost
    low, high = min(edges) / room, max(edges) * room
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(size_ticks(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
