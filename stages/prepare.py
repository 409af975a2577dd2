"""Stage prepare: data/raw to data/prepared: read, filter, order, renumber, split, draw the candidate negatives."""

from pathlib import Path

from sasrec.config import Study
from sasrec.data.store import prepare
from stages.common import run

SECTIONS = ("dataset", "prepare")
RAW = Path("data/raw")
PREPARED = Path("data/prepared")


def main(study: Study) -> None:
    stats = prepare(RAW, study.dataset, study.prepare, PREPARED)
    for note in (stats["times_note"], stats.get("category_note"), *stats.get("notes", ())):
        if note:
            print(f"note: {note}")
    print(
        f"{stats['dataset']}: {stats['users']} users, {stats['items']} items, {stats['interactions']} interactions "
        f"({stats['evaluated']} users evaluated, {stats['dropped']['thresholds']['rows']} rows below the thresholds)"
    )


if __name__ == "__main__":
    run(main, SECTIONS)
