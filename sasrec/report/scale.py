"""How preparing grows with the rows (`python -m stages.scale`): figure and table for the documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sasrec.measurements import shown_rows
from sasrec.report.figures import BLUE, GREY, ORANGE, WIDTH

Row = Mapping[str, str]


def slopes(rows: Sequence[Row], column: str) -> list[float]:
    """From each size to the next: how much more of `column` an interaction takes; 1 is linear, below that is flatter."""
    values = [float(row[column]) / int(row["rows"]) for row in rows]
    return [after / before for before, after in zip(values, values[1:], strict=False)]


def scale_figure(rows: Sequence[Row]) -> Figure:
    """Seconds of the processor and megabytes against rows, both axes logarithmic, beside a line through the first point that
    grows as the rows do."""
    figure = Figure(figsize=(WIDTH, 5.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
    above, below = figure.subplots(2, 1, sharex=True)
    _panel(above, rows, "cpu_seconds", "Seconds of the processor to prepare", BLUE)
    _panel(below, rows, "peak_mb", "Most memory of the process, MB", ORANGE)
    below.set_xlabel("interactions; dashed: growing as they do", fontsize=10)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], column: str, title: str, colour: str) -> None:
    sizes = np.array([int(row["rows"]) for row in rows])
    values = np.array([float(row[column]) for row in rows])
    axes.loglog(sizes, values[0] * sizes / sizes[0], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.loglog(sizes, values, "o-", color=colour, markersize=6.5)
    for size, value in zip(sizes, values, strict=True):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(text, (size, value), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=10)
    axes.margins(x=0.08, y=0.22)
    axes.set_title(title)


def scale_table(path: Path, document: Path) -> str:
    """Markdown: the figure, and a row a size. "times linear" compares with the row above."""
    rows = shown_rows(path, "stages.scale")
    place = path.with_suffix(".png").relative_to(document.parent).as_posix()
    lines = [
        f"![Time and memory of preparing against rows]({place})\n",
        "| rows | users | items | csv, MB | processor, s | clock, s | times linear | most memory, MB | result, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, slope in zip(rows, ["", *(f"{slope:.2f}" for slope in slopes(rows, "cpu_seconds"))], strict=True):
        sizes = [f"{int(row[name]):,}" for name in ("rows", "users", "items")]
        megabytes = [f"{int(row[name]) / 1e6:,.0f}" for name in ("file_bytes", "prepared_bytes")]
        times = [f"{float(row[name]):.1f}" for name in ("cpu_seconds", "seconds")]
        memory = f"{int(row['peak_mb']):,}"
        lines.append(f"| {' | '.join([*sizes, megabytes[0], *times, slope, memory, megabytes[1]])} |")
    made = "; ".join(dict.fromkeys(f"{row['cpu']}, Python {row['python']}, pyarrow {row['pyarrow']}" for row in rows))
    return "\n".join(lines) + f"\n\nTimes linear: seconds of the processor a row, against the line above. {made}.\n"
