"""Stage fetch: the raw data file, simulated, downloaded or taken from `dataset.path`, into data/raw."""

from pathlib import Path

from sasrec.config import Study
from sasrec.data.raw import fetch
from stages.common import run

SECTIONS = ("dataset", "sample")
RAW = Path("data/raw")
# Not an output of the stage: DVC deletes outputs before a run, and a download must survive that.
DOWNLOADS = Path("data/downloads")


def main(study: Study) -> None:
    source = fetch(study.dataset, study.sample, RAW, DOWNLOADS)
    print(f"{source.name}: {source.file} ({source.format}) from {source.original}, sha256 {source.sha256}")


if __name__ == "__main__":
    run(main, SECTIONS)
