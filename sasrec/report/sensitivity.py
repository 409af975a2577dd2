"""The numbers of the sensitivity figure and table, read from the CSV files that the stage wrote."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec.errors import UserError


@dataclass(frozen=True)
class Cost:
    """A tensor at a width, alone: the rise of the validation loss in nats."""

    tensor: str
    kind: str
    bits: int
    rise: float


@dataclass(frozen=True)
class Assignment:
    """Widths of all weights and tables. name, bits: uniform at that width, or what is held against it. size: bytes of them
    with their scales. rise: of the validation loss, in nats. widths: how many tensors have how many bits, in words."""

    name: str
    bits: int
    size: int
    rise: float
    widths: str


@dataclass(frozen=True)
class Sensitivity:
    """full: the validation loss in full precision, in nats."""

    full: float
    costs: tuple[Cost, ...]
    assignments: tuple[Assignment, ...]


def load_sensitivity(folder: Path = Path("plots")) -> Sensitivity:
    """Raises UserError with file and line."""
    costs = _rows(
        folder / "sensitivity.csv", lambda row: Cost(row["tensor"], row["kind"], int(row["bits"]), float(row["loss_rise"]))
    )
    full, *rest = _rows(folder / "mixed.csv", _assignment)
    return Sensitivity(full[1], tuple(costs), tuple(assignment for assignment, _ in rest))


def _assignment(row: dict[str, str]) -> tuple[Assignment, float]:
    widths = Counter(int(word.rsplit(" ", 1)[1]) for word in filter(None, row["widths"].split("; ")))
    words = ", ".join(f"{count} at {bits}" for bits, count in sorted(widths.items(), reverse=True))
    size = int(row["bytes"] or 0)
    return Assignment(row["assignment"], int(row["bits"]), size, float(row["loss_rise"]), words), float(row["loss"])


def _rows(path: Path, read: Any) -> list[Any]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro` to make it") from None
    found = []
    for line, row in enumerate(rows, 2):
        try:
            found.append(read(row))
        except (KeyError, ValueError, TypeError, IndexError):
            raise UserError(f"{path}, line {line} is not what the stage sensitivity writes; run `dvc repro`") from None
    if not found:
        raise UserError(f"{path} is empty; run `dvc repro` to make it again")
    return found
