"""Writes the prepared data; `sequences` describes and reads it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sasrec.config import DatasetParams, PrepareParams
from sasrec.data.arrays import save_array, save_parts
from sasrec.data.candidates import Unseen
from sasrec.data.doubts import notes, of_rows
from sasrec.data.explain import quote
from sasrec.data.interactions import Interactions, build, looks_ranked
from sasrec.data.readers import read
from sasrec.data.sequences import joined, training_counts
from sasrec.data.source import Source
from sasrec.data.split import repeated, split
from sasrec.data.spool import CHUNK, Array, Column
from sasrec.data.table import Numbers, Table
from sasrec.errors import UserError
from sasrec.files import atomic_folder, csv_writer, write_json

LONGEST = 131_072  # characters in a field that Python's csv reads
WRITTEN = {"original": "an id", "title": "a title", "categories": "an item with categories"}


def prepare(raw: Path, dataset: DatasetParams, params: PrepareParams, prepared: Path) -> dict[str, Any]:
    """Turn the raw folder into the store at `prepared`; returns what is in stats.json. Raises UserError.

    Memory: what is kept of each distinct user and item, and a bounded part of the rows (`interactions.ROWS`,
    `collect.GROUP`); the rows themselves are in temporary files beside the store.
    """
    source = Source.load(raw)
    with atomic_folder(prepared) as folder:
        table = read(raw, source, dataset, folder)
        interactions = build(table, params, folder)
        times, note = _times(dataset, source, interactions)
        items, offsets, n_items = interactions.items, interactions.offsets, len(interactions.item_codes)
        parts = split(interactions, params, times)
        counts = training_counts(items, offsets, parts.train_ends, n_items)
        _save(folder / "items.npy", items)
        save_array(folder / "offsets.npy", offsets)
        if interactions.timestamps is not None:
            _save(folder / "timestamps.npy", interactions.timestamps)
        if interactions.ratings is not None:
            _save(folder / "ratings.npy", interactions.ratings)
        save_array(folder / "train_ends.npy", parts.train_ends)
        save_array(folder / "test.npy", parts.test)
        save_array(folder / "validation.npy", parts.validation)
        unit = _unit(interactions.timestamps)
        unseen = Unseen(items, offsets, n_items, folder)
        asked, asked_before = parts.test[:, 0], parts.validation[:, 0]
        few = {}
        for name, users, drawn in (
            ("negatives", asked, unseen.draw(asked, params.candidates, [params.seed, 0])),
            ("validation_negatives", asked_before, unseen.draw(asked_before, params.candidates, [params.seed, 1])),
            ("popular_negatives", asked, unseen.draw_popular(asked, params.candidates, counts, [params.seed, 2])),
        ):
            few[name] = _save_candidates(folder / f"{name}.npy", (len(users), params.candidates), drawn)
        _write_ids(folder, table, interactions)
        stats: dict[str, Any] = {
            "dataset": source.name,
            "sha256": source.sha256,
            **interactions.stats,
            "candidates": params.candidates,
            "candidates_seed": params.seed,
            "few_candidates": few["negatives"],
            "few_popular_candidates": few["popular_negatives"],
            "split": parts.facts,
            "evaluated": len(parts.test),
            "cold_targets": int((counts[items[parts.test[:, 1]]] == 0).sum()),
            "repeated_targets": repeated(items, offsets, parts.test),
            "times": times,
            "times_note": note,
            "time_unit": unit,
            **({"category_note": table.note} if table.note else {}),
            "filter": {
                "min_user": params.min_user,
                "min_item": params.min_item,
                "min_rating": params.min_rating,
                "filter": params.filter,
                "duplicates": params.duplicates,
            },
        }
        doubts = notes(dataset, source, table, interactions.timestamps, unit)
        doubts += of_rows(stats, params, interactions.timestamps is not None)
        if doubts:
            stats["notes"] = doubts
        write_json(folder / "stats.json", stats)
    return stats


def _save(path: Path, numbers: Numbers) -> None:
    if isinstance(numbers, Column):
        save_parts(path, numbers.dtype, (len(numbers),), numbers.chunks())
    else:
        save_array(path, numbers)


def _save_candidates(path: Path, shape: tuple[int, int], drawn: Iterable[Array]) -> int:
    """Write them as they are drawn; returns how many rows have too few."""
    few = 0

    def counted() -> Iterator[Array]:
        nonlocal few
        for rows in drawn:
            few += int((rows[:, -1] == 0).sum())
            yield rows

    save_parts(path, np.int32, shape, counted())
    return few


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


def _unit(timestamps: Numbers | None) -> str | None:
    """The unit of the stored numbers, if they count from 1970; by size, as they do not say."""
    if timestamps is None:
        return None
    largest = max(int(np.abs(timestamps[a : a + CHUNK]).max()) for a in range(0, len(timestamps), CHUNK))
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
        writer = csv_writer(file)
        writer.writerow(header)
        for row in rows:
            for name, value in zip(header[1:], row[1:], strict=True):
                if len(value) > LONGEST:
                    raise UserError(
                        f"{path.name}: {WRITTEN[name]} of {len(value)} characters, beyond the {LONGEST} that can be read back: "
                        f"{quote(value)}; shorten it in the data file, or close the quote that it begins after"
                    )
            writer.writerow(row)
