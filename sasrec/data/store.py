"""Writes the prepared data; `sequences` describes and reads it."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sasrec.config import DatasetParams, PrepareParams
from sasrec.data.arrays import save_array
from sasrec.data.candidates import Unseen
from sasrec.data.interactions import Interactions, build, looks_ranked
from sasrec.data.readers import read
from sasrec.data.sequences import joined, training_counts
from sasrec.data.source import Source
from sasrec.data.split import split
from sasrec.data.table import Table
from sasrec.errors import UserError
from sasrec.files import atomic_folder, write_json


def prepare(raw: Path, dataset: DatasetParams, params: PrepareParams, prepared: Path) -> dict[str, Any]:
    """Turn the raw folder into the store at `prepared`; returns what is in stats.json. Raises UserError."""
    source = Source.load(raw)
    table = read(raw, source, dataset)
    interactions = build(table, params)
    times, note = _times(dataset, source, interactions)
    items, offsets, n_items = interactions.items, interactions.offsets, len(interactions.item_codes)
    parts = split(interactions, params, times)
    counts = training_counts(items, offsets, parts.train_ends, n_items)
    unseen = Unseen(items, offsets, n_items)
    negatives = unseen.draw(parts.test[:, 0], params.candidates, [params.seed, 0])
    validation_negatives = unseen.draw(parts.validation[:, 0], params.candidates, [params.seed, 1])
    popular = unseen.draw_popular(parts.test[:, 0], params.candidates, counts, [params.seed, 2])
    stats = {
        "dataset": source.name,
        "sha256": source.sha256,
        **interactions.stats,
        "candidates": params.candidates,
        "candidates_seed": params.seed,
        "few_candidates": int((negatives[:, -1] == 0).sum()),
        "few_popular_candidates": int((popular[:, -1] == 0).sum()),
        "split": parts.facts,
        "evaluated": len(parts.test),
        "cold_targets": int((counts[items[parts.test[:, 1]]] == 0).sum()),
        "times": times,
        "times_note": note,
        "time_unit": _unit(interactions.timestamps),
        **({"category_note": table.note} if table.note else {}),
        "filter": {
            "min_user": params.min_user,
            "min_item": params.min_item,
            "min_rating": params.min_rating,
            "filter": params.filter,
            "duplicates": params.duplicates,
        },
    }
    with atomic_folder(prepared) as folder:
        save_array(folder / "items.npy", items)
        save_array(folder / "offsets.npy", offsets)
        if interactions.timestamps is not None:
            save_array(folder / "timestamps.npy", interactions.timestamps)
        if interactions.ratings is not None:
            save_array(folder / "ratings.npy", interactions.ratings)
        save_array(folder / "train_ends.npy", parts.train_ends)
        save_array(folder / "test.npy", parts.test)
        save_array(folder / "validation.npy", parts.validation)
        save_array(folder / "negatives.npy", negatives)
        save_array(folder / "validation_negatives.npy", validation_negatives)
        save_array(folder / "popular_negatives.npy", popular)
        _write_ids(folder, table, interactions)
        write_json(folder / "stats.json", stats)
    return stats


def _times(dataset: DatasetParams, source: Source, interactions: Interactions) -> tuple[str, str | None]:
    """Whether times of different users can be compared, and a note where that is not as the data set promises."""
    if interactions.timestamps is None:
        if dataset.times == "comparable":
            raise UserError(
                "params.yaml: dataset.times is 'comparable', but the data has no timestamps; set it to null, or "
                "name the column in dataset.columns.timestamp"
            )
        return "order", None
    if dataset.times is not None:
        return dataset.times, None
    if source.times == "comparable" and looks_ranked(interactions):
        return "order", (
            "most users begin at the very same timestamp, so times are taken as an order within each user only; "
            "dataset.times: comparable overrules this"
        )
    return source.times, None


def _unit(timestamps: np.ndarray | None) -> str | None:
    """The unit of the stored numbers, if they count from 1970; by size, as they do not say."""
    if timestamps is None:
        return None
    largest = int(np.abs(timestamps).max())
    return next((unit for unit, limit in (("s", 10**11), ("ms", 10**14), ("us", 10**17)) if largest < limit), "ns")


def _write_ids(folder: Path, table: Table, interactions: Interactions) -> None:
    originals = [table.item_ids[code] for code in interactions.item_codes.tolist()]
    _write_csv(
        folder / "catalogue.csv",
        ("id", "original", "title", "categories"),
        (
            (i, original, table.titles.get(original, ""), joined(table.categories.get(original, ())))
            for i, original in enumerate(originals, 1)
        ),
    )
    users = (table.user_ids[code] for code in interactions.user_codes.tolist())
    _write_csv(folder / "users.csv", ("id", "original"), enumerate(users, 1))


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
