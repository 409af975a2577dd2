"""Prepare more and more rows and measure it: python -m stages.scale [ROWS ...] [--folder FOLDER]

A csv file of so many interactions is made up (users and items of very different activity, rows in no order), and the prepare
stage runs on it in a process of its own with the default parameters. Seconds of the clock and of the processor, and the most
memory the process had, go into metrics/reference/scale.csv, a row a size; those measured again are replaced. The figure beside
it is drawn anew. 100 million rows take 2.4 GB for the file, 2 GB for the result and 7 GB for temporary files in FOLDER.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from sasrec.data.source import Source
from sasrec.errors import UserError
from sasrec.files import read_json, sha256, write_json, write_text
from sasrec.machine import processor
from sasrec.measurements import read_rows, replace_rows
from sasrec.report.figures import write_figure
from sasrec.report.scale import scale_figure

TABLE = Path("metrics/reference/scale.csv")
COLUMNS = (
    "rows", "users", "items", "file_bytes", "seconds", "cpu_seconds", "peak_mb", "prepared_bytes", "cpu", "python", "pyarrow",
)  # fmt: skip
DEFAULT = (1_000_000, 10_000_000, 100_000_000)
AT_A_TIME = 1 << 18
STUDY = {"models": ["sasrec"], "quantized": [], "variants": ["sasrec"], "seeds": [0], "per_model": {"sasrec": {}}}

# A process counts the memory of the one that started it as its own; this one is small.
LAUNCH = (
    "import json, resource, subprocess, sys\n"
    "status = subprocess.run(sys.argv[2:]).returncode\n"
    "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "json.dump([usage.ru_utime + usage.ru_stime, usage.ru_maxrss], open(sys.argv[1], 'w'))\n"
    "sys.exit(status)"
)


def write(path: Path, rows: int) -> None:
    """A csv file of `rows` interactions, 100 a user and 1,000 an item on average: activity of users is lognormal, that of items
    falls with their rank; ids have gaps, times are seconds of three years, ratings 1 to 5."""
    random = np.random.default_rng(0)
    users, items = max(rows // 100, 10), max(rows // 1000, 1000)
    activity = np.cumsum(random.lognormal(size=users))
    popularity = np.cumsum(1 / np.arange(10, items + 10))
    schema = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("rating", pa.int64()), ("timestamp", pa.int64())])
    with pyarrow.csv.CSVWriter(str(path), schema) as writer:
        for begin in range(0, rows, AT_A_TIME):
            n = min(AT_A_TIME, rows - begin)
            user = np.searchsorted(activity, random.random(n) * activity[-1])
            item = np.searchsorted(popularity, random.random(n) * popularity[-1])
            rating, seconds = random.integers(1, 6, n), random.integers(1_400_000_000, 1_500_000_000, n)
            columns = (user * 7919 % (users * 13), item * 3 + 1, rating, seconds)
            # Buffers, because pa.array imports pandas.
            arrays = [pa.Array.from_buffers(pa.int64(), n, [None, pa.py_buffer(c.astype(np.int64))]) for c in columns]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def measure(rows: int, parent: Path | None) -> dict[str, str]:
    """The row of the table for so many interactions. parent: where the files are made for as long as it takes."""
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        raw = folder / "data" / "raw"
        raw.mkdir(parents=True)
        file = raw / "rows.csv"
        write(file, rows)
        write_json(
            raw / "source.json", asdict(Source("file", "table", file.name, [], file.name, sha256(file), True, "comparable"))
        )
        write_text(folder / "params.yaml", yaml.safe_dump(STUDY | {"dataset": {"name": "file"}}))
        begun = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", LAUNCH, "usage.json", sys.executable, "-m", "stages.prepare"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
            check=False,
        )
        seconds = time.perf_counter() - begun
        if ended.returncode:
            raise UserError(f"preparing {rows} rows ended with status {ended.returncode}; what it said is above")
        cpu_seconds, peak = read_json(folder / "usage.json")
        prepared = folder / "data" / "prepared"
        stats = read_json(prepared / "stats.json")
        return {
            "rows": str(rows),
            "users": str(stats["users"]),
            "items": str(stats["items"]),
            "file_bytes": str(file.stat().st_size),
            "seconds": f"{seconds:.2f}",
            "cpu_seconds": f"{cpu_seconds:.2f}",
            # Kilobytes on Linux, bytes on macOS.
            "peak_mb": f"{peak / (1 << 20 if sys.platform == 'darwin' else 1 << 10):.0f}",
            "prepared_bytes": str(sum(path.stat().st_size for path in prepared.iterdir())),
            "cpu": processor(),
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", type=int, metavar="ROWS", help=f"default: {' '.join(map(str, DEFAULT))}")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: where the system keeps temporary ones")
    options = parser.parse_args()
    try:
        if min(options.rows or DEFAULT) < 10_000:
            raise UserError("ROWS starts at 10000: less takes no time that could be compared")
        for rows in options.rows or DEFAULT:
            row = measure(rows, options.folder)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            replace_rows(TABLE, [row], ["rows"], COLUMNS, order=lambda row: int(row["rows"]))
            write_figure(TABLE.with_suffix(".png"), scale_figure, read_rows(TABLE, COLUMNS), source=f"sha256 {sha256(TABLE)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
