"""Keep the tables of README.md in step with the committed metrics: python -m sasrec.report.readme [--check]

A table stands between `<!-- table: PATH -->` and `<!-- end of table -->`; PATH is a folder of metrics files or one
reference file. With --check nothing is written, and the exit status is 1 where a table is out of date.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sasrec.errors import UserError
from sasrec.files import read_json, write_text
from sasrec.report.tables import size_text

README = Path("README.md")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# Rows come in this order; what is not named here follows by name.
ORDER = (
    "popularity", "recent_popularity", "markov", "item_knn", "sasrec", "gsasrec", "control",
    "ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround",
)  # fmt: skip


def variants(path: Path) -> dict[str, Mapping[str, Any]]:
    """The flat metrics of every variant that was measured, in a folder of metrics files or in a reference file."""
    if path.is_dir():
        found = {file.stem: read_json(file) for file in sorted(path.glob("*.json"))}
    elif path.exists():
        found = read_json(path)["variants"]
    else:
        raise UserError(f"README.md names {path}, which does not exist")
    measured = [pair for pair in found.items() if pair[1]["ndcg@10"] is not None]
    return dict(sorted(measured, key=lambda pair: (ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER), pair[0])))


def table(path: Path) -> str:
    """The Markdown table of `path`: quality under both protocols with its interval, width and size."""
    rows = variants(path)
    lines = [
        "| variant | bits | size | NDCG@10 (95 % interval) | HR@10 | sampled NDCG@10 | sampled HR@10 |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, row in rows.items():
        interval = f"{row['ndcg@10']:.4f} ({row['ndcg@10_low']:.4f} to {row['ndcg@10_high']:.4f})"
        lines.append(
            f"| {name} | {row['bits']:g} | {size_text(row['bytes'])} | {interval} | {row['hr@10']:.4f} "
            f"| {row['sampled_ndcg@10']:.4f} | {row['sampled_hr@10']:.4f} |"
        )
    first = next(iter(rows.values()))
    facts = f"{first['users']:,} users; protocol card `{first['card']}`"
    if not path.is_dir():
        made = read_json(path)["environment"]
        facts += f"; made in {made['seconds'] / 60:.0f} minutes with {made['threads']} threads of {made['cpu']}"
    return "\n".join(lines) + f"\n\n{facts}.\n"


def filled(text: str) -> str:
    """`text` with every table made anew."""
    return TABLE.sub(lambda match: f"{match[1]}{table(Path(match[2]))}{match[3]}", text)


def main() -> None:
    try:
        text = README.read_text(encoding="utf-8")
        new = filled(text)
    except UserError as error:
        sys.exit(f"error: {error}")
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else "README.md is out of date: run python -m sasrec.report.readme")
    write_text(README, new)


if __name__ == "__main__":
    main()
