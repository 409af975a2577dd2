"""The numbers behind the curves and the latency figure, read from the CSV files that the stages wrote."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sasrec.errors import UserError

CURVE = ("epoch", "train_loss", "validation_loss", "validation_ndcg")
LATENCY = ("batch", "encode_ms", "score_ms", "sequences_per_second")


@dataclass(frozen=True)
class Curve:
    """One run, by epoch; None where a value was not measured (there is no training loss before the first epoch)."""

    epochs: list[float]
    train_loss: list[float | None]
    validation_loss: list[float | None]
    validation_ndcg: list[float | None]


@dataclass(frozen=True)
class Latency:
    """Of one variant, by batch size: milliseconds for the whole batch."""

    batches: list[int]
    encode_ms: list[float]
    score_ms: list[float]


def _columns(path: Path, names: Sequence[str]) -> list[list[float | None]]:
    """The named columns, None where a cell is empty. Raises UserError with file and line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = reader.fieldnames or []
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro` to make it") from None
    for name in names:
        if name not in header:
            raise UserError(f"{path} has no column '{name}'; run `dvc repro` to make it again")
    columns: list[list[float | None]] = [[] for _ in names]
    for line, row in enumerate(rows, 2):
        for column, name in zip(columns, names, strict=True):
            try:
                column.append(float(row[name]) if row[name] else None)
            except (TypeError, ValueError):
                raise UserError(f"{path}, line {line}: '{row[name]}' is not a number; run `dvc repro`") from None
    return columns


def _whole(path: Path, column: list[float | None], name: str) -> list[float]:
    if None in column:
        raise UserError(f"{path}, line {column.index(None) + 2}: {name} is missing; run `dvc repro`")
    return [value for value in column if value is not None]


def load_curves(names: Sequence[str], seeds: Sequence[int], folder: Path = Path("plots/curves")) -> dict[str, list[Curve]]:
    """The runs of each variant, one a seed; variants that were not trained, with at most one row, are left out."""
    curves: dict[str, list[Curve]] = {}
    for name in names:
        for seed in seeds:
            path = folder / f"{name}-{seed}.csv"
            epochs, *rest = _columns(path, CURVE)
            if len(epochs) > 1:
                curves.setdefault(name, []).append(Curve(_whole(path, epochs, "epoch"), *rest))
    return curves


def load_latencies(names: Sequence[str], folder: Path = Path("plots/benchmark")) -> dict[str, Latency]:
    """The latency of each variant."""
    found = {}
    for name in names:
        path = folder / f"{name}.csv"
        batches, encode, score, _ = (
            _whole(path, column, heading) for column, heading in zip(_columns(path, LATENCY), LATENCY, strict=True)
        )
        found[name] = Latency([int(batch) for batch in batches], encode, score)
    return found
