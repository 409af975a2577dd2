"""Keep the results in metrics/ as a reference: python -m stages.reference NAME DATA_FILE SECONDS COMMAND

Writes metrics/reference/NAME.json: the command that made them, all parameters, the machine, the
data file's sha256, the protocol card, and every variant's metrics; and the curves beside it in metrics/reference/NAME/.
"""

import importlib.metadata
import platform
import re
import shutil
import sys
from pathlib import Path

import yaml

from sasrec.errors import UserError
from sasrec.files import read_json, sha256, write_json
from sasrec.report.results import BASELINES
from stages.common import PARAMS, read_study

PACKAGES = ("torch", "numpy", "pandas", "dvc")


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def main(name: str, file: str, seconds: str, command: str) -> None:
    study = read_study()
    card = read_json(Path("data/evaluated", study.variants[0], "card.json"))
    if not Path(file).is_file():
        raise UserError(f"{file} is not a file; name the data file that the results were made from")
    folder = Path("metrics/reference", name)
    write_json(
        folder.with_suffix(".json"),
        {
            "command": command,
            "params": yaml.safe_load(PARAMS.read_text(encoding="utf-8")),
            "environment": {
                "cpu": processor(),
                "threads": study.threads,
                "seconds": int(seconds),
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in PACKAGES},
            },
            "data": {"file": file, "sha256": sha256(file)},
            "card": card,
            "variants": {name: read_json(Path("metrics", f"{name}.json")) for name in (*BASELINES, *study.variants)},
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for variant in study.variants:
        for seed in study.seeds:
            shutil.copy(Path("plots/curves", f"{variant}-{seed}.csv"), folder)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
