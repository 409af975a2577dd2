"""The figure of quality against bytes: a line a method and width, beside full-precision models of the same sizes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sasrec.report.figures import size_ticks
from sasrec.report.layout import spread
from sasrec.report.tables import size_text
from sasrec.report.widths import LINES, Point, Widths

WIDTH, HEIGHT = 7.2, 4.3  # inches: half a page; as much again for a third and a fourth line
INK = "#222222"
# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each: nothing is told by colour alone.
LOOKS = {
    "ptq": ("#5A5A5A", "X"), "ste": ("#E69F00", "^"), "lsq": ("#D55E00", "o"), "pact": ("#009E73", "D"),
    "dorefa": ("#0072B2", "v"), "apot": ("#CC79A7", "P"), "adaround": ("#3A9BD5", "s"),
}  # fmt: skip
OTHER = ("#8B6D3F", "h")
OF_ANOTHER_MODEL = (0, (1, 1.5))
DASHES = {"all": "-", "activations8": (0, (6, 1.5)), "paper": (0, (4, 2)), "tables": (0, (2, 1.5))}
TITLES = {
    "all": "All tensors at b bits", "activations8": "Weights and tables at b bits, activations 8",
    "paper": "Encoder at b bits, tables 8", "tables": "Tables at b bits, the rest 8",
}  # fmt: skip


def quality_against_bytes(widths: Widths) -> Figure:
    """A panel for each line that was measured: NDCG@10 on test against the bytes of the exported model."""
    lines = [line for line in LINES if widths.line(line)]
    places = rows_of(lines)
    figure = Figure(figsize=(WIDTH, HEIGHT * len(places)), layout="constrained")
    if not lines:
        figure.text(0.5, 0.5, "No quantized model was measured.", ha="center")
        return figure
    ratios = [1.75, 1][: len(places[-1])]
    # Of a panel: the columns that it takes of its row.
    shares = {line: sum(ratios[i] for i, own in enumerate(row) if own == line) for row in places for line in row}
    found = figure.subplot_mosaic(places, sharey=True, width_ratios=ratios)  # type: ignore[arg-type]
    panels = [found[line] for line in lines]
    _limits(panels[0], widths, lines)
    for axes, line in zip(panels, lines, strict=True):
        width = 0.88 * WIDTH * shares[line] / sum(ratios)
        with_models = axes is panels[0]
        _extent(axes, widths, line, with_models, width)
        if widths.controls:
            _band(axes, widths, named=with_models)
        _models(axes, widths)
        _methods(axes, widths, line)
        axes.set_title(TITLES[line], pad=18, fontsize=10.5)
    for row in places:
        found[row[0]].set_ylabel("NDCG@10 on test, all items ranked")
    figure.supxlabel("size of the exported model, logarithmic", fontsize=10.5)
    figure.draw_without_rendering()  # settles the layout, which places in pixels depend on
    for axes, line in zip(panels, lines, strict=True):
        _widths_on_top(figure, axes, widths.line(line))
        _names(figure, axes, widths.line(line))
    return figure


def rows_of(lines: list[str]) -> list[list[str]]:
    """Lines by row of the figure. Of two in a row the first has the wider panel; four are two and two, those with the larger
    range of sizes on the left."""
    if len(lines) < 3:
        return [lines]
    return [[lines[0]] * 2, lines[1:]] if len(lines) == 3 else [lines[::2], lines[1::2]]


def _limits(axes: Axes, widths: Widths, lines: list[str]) -> None:
    """From the lowest point or model to the control's band."""
    points = [point for line in lines for point in widths.line(line)]
    tops = [point.high for point in points] + [whole.high for whole in widths.controls[:1]]
    tops += [whole.quality for whole in widths.models]
    lows = [point.low for point in points] + [model.quality for model in widths.models]
    low, high = min(lows), max(tops)
    axes.set_ylim(max(0.0, low - 0.06 * (high - low)), high + 0.04 * (high - low))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _extent(axes: Axes, widths: Widths, line: str, with_models: bool, inches: float) -> None:
    """Room for the methods' names on the left. inches: the width of the panel."""
    sizes = [point.size for point in widths.line(line)]
    if with_models:
        sizes += [model.size for model in widths.models]
    low, high = np.log10(min(sizes)), np.log10(max(sizes))
    longest = max(len(_name(point)) for point in widths.line(line))
    left, right = max(1.0, 0.35 + 0.08 * longest) / inches, 0.08  # shares of the panel; a letter is 0.08 inches wide
    unit = max(high - low, 0.05) / (1 - left - right)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - left * unit), 10 ** (high + right * unit))
    ends = axes.get_xlim()
    # Over a narrow range round numbers are evenly spaced, over a wide one 1, 2 and 5.
    narrow = [tick for tick in MaxNLocator(3).tick_values(*ends) if ends[0] <= tick <= ends[1]]
    axes.xaxis.set_major_locator(FixedLocator(narrow) if ends[1] < 2 * ends[0] else size_ticks(*ends))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value).replace(".00 ", " ").replace(".0 ", " ")))
    axes.tick_params(axis="x", labelsize=9)


def _band(axes: Axes, widths: Widths, named: bool) -> None:
    """The interval of the control, the full-precision model trained on for as long."""
    control = widths.controls[0]
    axes.axhspan(control.low, control.high, color="#DCE9F2", linewidth=0, zorder=0)
    axes.axhline(control.quality, color="#7FA8C4", linewidth=0.9, zorder=1)
    if named:
        # Where large models stand, which are never as bad as the smallest.
        band = Patch(color="#DCE9F2", label="control: full precision, trained on; 95 %")
        axes.legend(handles=[band], loc="lower right", fontsize=8, labelcolor="#3D6E8F", frameon=False)


def _models(axes: Axes, widths: Widths) -> None:
    """The line that quantized models are measured against, and the full-precision models on and under it, as far as they are
    within the panel."""
    front = widths.front
    if not front:
        return
    low, high = axes.get_xlim()
    # What is larger than the best of them is measured against that one.
    x = [model.size for model in front] + [max(model.size for model in widths.models)]
    y = [model.quality for model in front] + [front[-1].quality]
    axes.plot(x, y, color=INK, linewidth=1.2, zorder=2)
    for model in (model for model in widths.models if low < model.size < high):
        axes.plot([model.size], [model.quality], "s", color=INK, markersize=4.5, zorder=3)
        name = f"hidden {model.name[1:]}" if model.name[0] == "h" and model.name[1:].isdigit() else model.name
        # The last one has no room on its right, and the line that comes up to it on its left below.
        last = model.size == max(other.size for other in widths.models)
        axes.annotate(
            name, (model.size, model.quality), (-6, 0) if last else (5, -5), textcoords="offset points", fontsize=8.5,
            color=INK, va="bottom" if last else "top", ha="right" if last else "left",
        )  # fmt: skip


def _methods(axes: Axes, widths: Widths, line: str) -> None:
    by_method: dict[tuple[str, str | None], list[Point]] = {}
    for point in widths.line(line):
        by_method.setdefault((point.method, point.model), []).append(point)
    for (method, model), points in by_method.items():
        colour, marker = LOOKS.get(method, OTHER)
        x, y = [point.size for point in points], [point.quality for point in points]
        reach = [[p.quality - p.low for p in points], [p.high - p.quality for p in points]]
        axes.plot(x, y, color=colour, linestyle=OF_ANOTHER_MODEL if model else DASHES[line], linewidth=1.3, zorder=4)
        axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=0.9, capsize=1.8, zorder=4)
        for point in points:
            face = colour if point.worth != "not worth it" else "white"
            axes.plot(
                [point.size], [point.quality], marker, color=colour, markerfacecolor=face, markersize=4.8,
                markeredgewidth=0.9, zorder=5,
            )  # fmt: skip


def _widths_on_top(figure: Figure, axes: Axes, points: list[Point]) -> None:
    """The widths in bits above the panel, where their models stand: of the usual model, where it was measured. Widths whose
    models are of about the same size stand together."""
    sizes: dict[int, list[int]] = {}
    for point in [point for point in points if point.model is None] or points:
        sizes.setdefault(point.bits, []).append(point.size)
    middles = {bits: float(np.median(own)) for bits, own in sorted(sizes.items())}
    together: list[list[int]] = []
    for bits, at in middles.items():
        x = float(axes.transData.transform((at, 0))[0])
        if together and x - float(axes.transData.transform((middles[together[-1][-1]], 0))[0]) < 9 * figure.dpi / 72:
            together[-1].append(bits)
        else:
            together.append([bits])
        axes.axvline(at, color="#E6E6E6", linewidth=0.7, zorder=0)
    for group in together:
        last = group is together[-1]  # its number, not its middle, stands over the line, or it would cover one close by
        axes.annotate(
            ", ".join(map(str, group)) + " bits" * last, (middles[group[0]], 1), xycoords=("data", "axes fraction"),
            xytext=(-3 * last, 4), textcoords="offset points", ha="left" if last else "center", fontsize=9, color="#444444",
        )  # fmt: skip
    axes.grid(axis="x", visible=False)


def _name(point: Point) -> str:
    return ", ".join(filter(None, [point.method, point.model]))


def _names(figure: Figure, axes: Axes, points: list[Point]) -> None:
    """Each method's name, and the model where that is not the usual one, to the left of its narrowest point, kept apart, with
    a line to it."""
    figure.draw_without_rendering()  # settles the layout, which places in pixels depend on
    last: dict[str, Point] = {}
    for point in points:
        name = _name(point)
        if name not in last or point.bits < last[name].bits:
            last[name] = point
    ends = list(last.values())
    pixels = axes.transData.transform([(point.size, point.quality) for point in ends])
    unit = figure.dpi / 72
    box = axes.get_window_extent()
    heights = spread(pixels[:, 1], 10.5 * unit, float(box.y0) + 6 * unit, float(box.y1) - 6 * unit)
    left = float(pixels[:, 0].min()) - 16 * unit
    for name, point, (x, y), height in zip(last, ends, pixels, heights, strict=True):
        colour, _ = LOOKS.get(point.method, OTHER)
        axes.annotate(
            name, (point.size, point.quality), ((left - x) / unit, (height - y) / unit), textcoords="offset points",
            ha="right", va="center", fontsize=9, color=colour, fontweight="bold", zorder=6,
            # A name may stand on the line of the full-precision models, which would cross it out.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (1, 0.5)},
        )  # fmt: skip
