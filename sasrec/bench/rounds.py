"""Timing that survives a busy machine: everything takes turns, and ratios are taken within a round."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Clock = Callable[[], float]


@dataclass
class Timed:
    """Of one work, a value per round: seconds on the wall, and of the processor in all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        q1, median, q3 = np.percentile(np.array(values, np.float64), (25, 50, 75))
        return cls(float(median), float(q1), float(q3), len(values))


def ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of the ratios round by round, in which what else the machine did is the same for both."""
    return Spread.of([own / other for own, other in zip(values, base, strict=True)])


def in_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    log: Callable[[str], None] = lambda line: None,
    wait: Callable[[], object] = lambda: None,
    wall: Clock = time.perf_counter,
    cpu: Clock = time.process_time,
) -> dict[str, Timed]:
    """Each work once a round, for `warm_up` rounds that do not count and `rounds` that do. Every other round goes backwards,
    so that none always follows the same one. A work that returns a number of units (steps) is given per unit. wait: called
    before a clock is read, for what a GPU still has to do."""
    timed = {name: Timed() for name in works}
    for number in range(-warm_up, rounds):
        names = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in names:
            wait()
            wall_began, cpu_began = wall(), cpu()
            units = works[name]()
            wait()
            seconds = wall() - wall_began, cpu() - cpu_began
            if number >= 0:
                per = units if isinstance(units, int) and not isinstance(units, bool) else 1
                timed[name].wall.append(seconds[0] / per)
                timed[name].cpu.append(seconds[1] / per)
        if number >= 0:
            log(
                f"round {number + 1} of {rounds}: "
                + ", ".join(f"{name} {seconds_text(t.wall[-1])}" for name, t in timed.items())
            )
    return timed


def seconds_text(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
