"""The bar chart of what rounding each tensor alone costs."""

from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sasrec.report.figures import BLUE, GREY, ORANGE, WIDTH

COLOURS = (BLUE, ORANGE, GREY)


class Cost(Protocol):
    """What `sasrec.quant.sensitivity` measures of a tensor at a width."""

    @property
    def tensor(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def rise(self) -> float: ...


def sensitivity(costs: Sequence[Cost], full: float) -> Figure:
    """A bar a tensor and width, the most sensitive tensor on top. full: the loss that everything rises from, in nats."""
    widths = sorted({cost.bits for cost in costs}, reverse=True)
    worst: dict[str, float] = {}
    for cost in costs:
        worst[cost.tensor] = max(cost.rise, worst.get(cost.tensor, cost.rise))
    names = sorted(worst, key=lambda name: worst[name])  # barh draws from the bottom up
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(widths)
    for i, bits in enumerate(widths):
        rises = {cost.tensor: cost.rise for cost in costs if cost.bits == bits}
        at = [row + (len(widths) - 1 - 2 * i) * height / 2 for row, name in enumerate(names) if name in rises]
        values = [rises[name] for name in names if name in rises]
        axes.barh(
            at, values, height, color=COLOURS[i % len(COLOURS)], hatch="//" * (i % 2), edgecolor="white", label=f"{bits} bits"
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_title("What rounding one tensor alone costs")
    axes.set_xlabel(f"rise of the validation loss from {full:.3f} nats", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.legend(loc="lower right")
    return figure
