"""Print the results table again, from metrics/*.json: python -m sasrec.report.show [VARIANT ...]

Without names: those of plots/summary.csv, or all that are in metrics/. The comparison columns
come from that file where it fits.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sasrec.errors import UserError
from sasrec.files import read_json
from sasrec.report.tables import COMPARED, results_table

SUMMARY = Path("plots/summary.csv")
PAGE = Path("plots/report.html")


def stored_rows(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for `results_table`. names: which and in what order; all of metrics/ where empty. Raises UserError."""
    summary = {}
    if SUMMARY.exists():
        with open(SUMMARY, encoding="utf-8", newline="") as file:
            summary = {row["name"]: row for row in csv.DictReader(file)}
    found = sorted(path.stem for path in Path("metrics").glob("*.json"))
    known = list(summary)
    # The summary holds the variants of the last study; metrics of earlier ones may still lie beside theirs.
    chosen = names or known or found
    if not chosen:
        raise UserError("metrics/ holds no results; run `dvc repro`")
    rows = []
    for name in chosen:
        path = Path("metrics", f"{name}.json")
        if not path.exists():
            raise UserError(f"{path} does not exist; run `dvc repro` to make it")
        row = {"name": name, **read_json(path)}
        if row["ndcg@10"] is None:
            if name in names:
                raise UserError(f"{name} was left out of this study; the report says why")
            continue
        line = summary.get(name)
        # A summary of another run says nothing about these numbers.
        if line and line["reference"] and float(line["ndcg@10"]) == row["ndcg@10"]:
            row |= {key: line[key] for key in COMPARED}
            row["relative_percent"] = float(line["relative_percent"]) if line["relative_percent"] else None
        rows.append(row)
    return rows


def main() -> None:
    try:
        print(results_table(stored_rows(sys.argv[1:])), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
    if PAGE.exists():
        print(f"report: {PAGE}")


if __name__ == "__main__":
    main()
