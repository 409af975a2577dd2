"""The figures of a study, each a function from numbers to a matplotlib Figure, and how they are written.

The same numbers always give the same bytes: no pyplot state, no user's matplotlibrc, no software tag, a fixed
resolution. Narrow and tall, so that they can be read on a phone. Colours are those of Okabe and Ito, which the
colour-blind can tell apart, and nothing is told by colour alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sasrec.files import atomic
from sasrec.report.layout import side_by_side, spread
from sasrec.report.results import Kind, Results, Variant
from sasrec.report.series import Curve, Latency
from sasrec.report.tables import size_text

WIDTH, DPI = 6.0, 150  # inches; 900 pixels
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#007A5A", "#6E6E6E"
COLOURS: dict[Kind, str] = {"model": BLUE, "control": GREEN, "method": ORANGE, "baseline": GREY}
MARKERS: dict[Kind, str] = {"model": "s", "control": "D", "method": "o", "baseline": "^"}
WORDS: dict[Kind, str] = {
    "baseline": "baseline", "model": "full precision", "control": "control", "method": "quantized",
}  # fmt: skip
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 11.5, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.7, "legend.frameon": False,
    "legend.fontsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10.5, "axes.unicode_minus": True,
    "lines.linewidth": 1.8,
}  # fmt: skip


def write_figure(path: Path, draw: Callable[..., Figure], *numbers: Any, source: str = "") -> None:
    """Draw with the style of the report and write a PNG. source: what it was drawn from, kept in the file as its Source."""
    with matplotlib.style.context(["default", STYLE]):
        figure = draw(*numbers)
        figure.set_dpi(DPI)
        canvas: Any = FigureCanvasAgg(figure)
        with atomic(path) as temporary:
            # A few flat colours need no more than a palette, which is half the size.
            canvas.draw()
            picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
            info = PngInfo()
            if source:
                info.add_text("Source", source)
            picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                temporary, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=info
            )


def _interval(axes: Axes, x: float, y: float, *, across: tuple[float, float], vertical: bool, colour: str) -> None:
    """An error bar from across[0] to across[1]; the interval need not hold the value itself."""
    middle = y if vertical else x
    reach = [[max(0.0, middle - across[0])], [max(0.0, across[1] - middle)]]
    axes.errorbar(
        [x], [y], yerr=reach if vertical else None, xerr=None if vertical else reach,
        fmt="none", ecolor=colour, elinewidth=1.6, capsize=3,
    )  # fmt: skip


def _dot(axes: Axes, x: float, y: float, kind: Kind, filled: bool = True) -> None:
    colour = COLOURS[kind]
    axes.plot([x], [y], MARKERS[kind], color=colour, markerfacecolor=colour if filled else "white", markersize=6.5, zorder=3)


def _names_down(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def quality(results: Results) -> Figure:
    """NDCG@10 of every variant with its interval, above the paired differences from the references in percent."""
    variants = list(results.variants)
    compared = [v for v in variants if v.kind != "baseline" and (c := results.own(v)) and c.base]
    below = [v for v in compared if v.kind in ("method", "control")]
    rows = [len(variants), len(below)] if below else [len(variants)]
    figure = Figure(figsize=(WIDTH, 1.35 * len(rows) + 0.28 * sum(rows)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.subplots(len(rows), 1, height_ratios=[row + 1.2 for row in rows], squeeze=False)[:, 0]
    _all_qualities(axes[0], variants, results)
    if below:
        _differences(axes[1], below, results)
    _legend(figure, axes[0], variants)
    return figure


def _legend(figure: Figure, axes: Axes, variants: Sequence[Variant]) -> None:
    present = {variant.kind for variant in variants}
    for kind in (kind for kind in WORDS if kind in present):
        axes.plot([], [], MARKERS[kind], color=COLOURS[kind], markersize=6.5, label=WORDS[kind])
    figure.legend(loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=0.9)


def _all_qualities(axes: Axes, variants: Sequence[Variant], results: Results) -> None:
    base = next((v for name in _references(results) if (v := results.get(name)) and v.kind == "model"), None)
    if base:
        axes.axvline(base.metrics["ndcg@10"], color=BLUE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for i, variant in enumerate(variants):
        values = variant.metrics
        across = (values["ndcg@10_low"], values["ndcg@10_high"])
        _interval(axes, values["ndcg@10"], i, across=across, vertical=False, colour=COLOURS[variant.kind])
        _dot(axes, values["ndcg@10"], i, variant.kind)
    _names_down(axes, [variant.name for variant in variants])
    axes.set_xlim(left=0)
    axes.set_title("NDCG@10 on test items, ranked against all items")
    axes.set_xlabel("mean over users, 95 % interval" + (f"; dashed: {base.name}" if base else ""), fontsize=10)


def _references(results: Results) -> list[str]:
    return [variant.reference for variant in results.variants if variant.reference]


def _differences(axes: Axes, variants: Sequence[Variant], results: Results) -> None:
    axes.axvline(0, color="#333333", linewidth=1.2, zorder=1)
    labels = []
    for i, variant in enumerate(variants):
        comparison = results.own(variant)
        assert comparison is not None
        low, value, high = (comparison.percent(x) or 0.0 for x in (comparison.low, comparison.difference, comparison.high))
        _interval(axes, value, i, across=(low, high), vertical=False, colour=COLOURS[variant.kind])
        _dot(axes, value, i, variant.kind, filled=comparison.verdict != "within noise")
        labels.append(f"{variant.name} − {variant.reference}")
    _names_down(axes, labels)
    axes.set_title("Difference from the reference, user by user")
    axes.set_xlabel("% of the reference, 95 % interval; hollow: within noise", fontsize=10)


def size(results: Results) -> Figure:
    """NDCG@10 against bytes on a logarithmic axis, with intervals. Baselines are no models to ship, and left out."""
    # The best first, so that the lines from the names to the points do not cross.
    variants = sorted(results.of_kind("model", "control", "method"), key=lambda variant: -variant.metrics["ndcg@10"])
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = np.log10([variant.metrics["bytes"] for variant in variants])
    width = max(float(np.ptp(sizes)), 0.3)
    # Room on the right for the names of the largest ones.
    axes.set_xlim(10 ** (sizes.min() - 0.1 * width), 10 ** (sizes.max() + 0.36 * width))
    axes.set_xscale("log")
    x = 10 ** side_by_side(sizes, 0.022 * width)
    for at, variant in zip(x, variants, strict=True):
        values = variant.metrics
        across = (values["ndcg@10_low"], values["ndcg@10_high"])
        _interval(axes, at, values["ndcg@10"], across=across, vertical=True, colour=COLOURS[variant.kind])
        _dot(axes, at, values["ndcg@10"], variant.kind)
    axes.set_title("Quality against size of the exported file")
    axes.set_ylabel("NDCG@10, 95 % interval")
    axes.set_xlabel("bytes, logarithmic; equal sizes side by side")
    axes.xaxis.set_major_locator(size_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value).replace(".00 ", " ").replace(".0 ", " ")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes, variants)
    _label_points(figure, axes, x, variants)
    return figure


def size_ticks(low: float, high: float) -> Any:
    steps = [1, 2, 5] if high / low > 3 else [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return FixedLocator([value for d in decades for step in steps if low <= (value := step * 10.0**d) <= high])


def _label_points(figure: Figure, axes: Axes, x: np.ndarray[Any, Any], variants: Sequence[Variant]) -> None:
    """Names to the right of each group of points of like size, kept apart, with a line to the point."""
    figure.draw_without_rendering()  # settles the layout, which places in pixels depend on
    points = axes.transData.transform([(at, v.metrics["ndcg@10"]) for at, v in zip(x, variants, strict=True)])
    to_pixels = figure.dpi / 72
    order = np.argsort(points[:, 0], kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if groups and points[i, 0] - points[groups[-1][-1], 0] < 30 * to_pixels:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    box = axes.get_window_extent()
    for group in groups:
        names_x = points[group, 0].max() + 14 * to_pixels
        heights = spread(points[group, 1], 14 * to_pixels, float(box.y0) + 6 * to_pixels, float(box.y1) - 6 * to_pixels)
        for i, y in zip(group, heights, strict=True):
            at = ((names_x - points[i, 0]) / to_pixels, (y - points[i, 1]) / to_pixels)
            axes.annotate(
                variants[i].name, (x[i], variants[i].metrics["ndcg@10"]), at, textcoords="offset points", va="center",
                fontsize=10.5, arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1,
                                           "shrinkB": 4, "relpos": (0, 0.5)},
            )  # fmt: skip


def curves(runs: dict[str, list[Curve]], results: Results) -> Figure:
    """Loss and validation NDCG@10 by epoch, a pair of panels for each variant that was trained, a line a seed."""
    columns = 3 if len(runs) > 2 else max(len(runs), 1)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.9 * max(rows, 1)), layout="constrained")
    if not runs:
        figure.text(0.5, 0.5, "No variant was trained for more than one epoch.", ha="center")
        return figure
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    tuned: Axes | None = None
    for i, (name, seeds) in enumerate(runs.items()):
        loss, ndcg = panels[2 * (i // columns), i % columns], panels[2 * (i // columns) + 1, i % columns]
        for j, run in enumerate(seeds):
            label = j == 0 and i == 0
            loss.plot(run.epochs, _gaps(run.train_loss), color=BLUE, label="training loss" if label else None)
            loss.plot(run.epochs, _gaps(run.validation_loss), color=ORANGE, linestyle="--",
                      label="validation loss" if label else None)  # fmt: skip
            ndcg.plot(run.epochs, _gaps(run.validation_ndcg), color=GREEN, label="validation NDCG@10" if label else None)
        loss.set_title(name)
        variant = results.get(name)
        # Fine-tuned variants share a scale, so that their heights compare.
        if variant and variant.kind != "model":
            if tuned is not None:
                ndcg.sharey(tuned)
            tuned = ndcg
        for axes in (loss, ndcg):
            axes.tick_params(labelsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        loss.tick_params(labelbottom=False)
        ndcg.set_xlabel("epoch", fontsize=9.5)
    for empty in range(len(runs), rows * columns):
        for k in (0, 1):
            panels[2 * (empty // columns) + k, empty % columns].set_axis_off()
    figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1.8)
    return figure


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def latency(times: dict[str, Latency]) -> Figure:
    """Milliseconds a batch for encoding and scoring, a panel for each batch size."""
    names = list(times)
    batches = times[names[0]].batches
    figure = Figure(figsize=(WIDTH, 1.3 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for k, (axes, batch) in enumerate(zip(panels, batches, strict=True)):
        encode = np.array([times[name].encode_ms[k] for name in names])
        score = np.array([times[name].score_ms[k] for name in names])
        axes.barh(range(len(names)), encode, 0.7, color=BLUE, label="encode the history" if k == 0 else None)
        axes.barh(range(len(names)), score, 0.7, left=encode, color="#E69F00", hatch="////", edgecolor="white",
                  linewidth=0, label="score all items, ten best" if k == 0 else None)  # fmt: skip
        total = encode + score
        for i, value in enumerate(total):
            text = f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
            axes.annotate(text, (value, i), (3, 0), textcoords="offset points", va="center", fontsize=9)
        _names_down(axes, names)
        axes.set_xlim(0, float(total.max()) * 1.32)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(axis="x", labelsize=9)
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("ms a batch", fontsize=10)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
