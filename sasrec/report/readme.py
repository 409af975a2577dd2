"""Keep the tables of the documents in step with the committed metrics: python -m sasrec.report.readme [--check]

The documents are README.md and metrics/reference/README.md. A table stands between `<!-- table: PATH -->` and `<!-- end of
table -->`; PATH is the folder of metrics files, one reference file, or the folder of references for a summary of them. With
--check nothing is written, and the exit status is 1 where a table is out of date.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sasrec.errors import UserError
from sasrec.files import read_json, write_text
from sasrec.report.results import BASELINES
from sasrec.report.tables import size_text

DOCUMENTS = (Path("README.md"), Path("metrics/reference/README.md"))
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# Rows come in this order; what is not named here follows as it is stored.
ORDER = (
    "popularity", "recent_popularity", "markov", "item_knn", "sasrec", "gsasrec", "cafe", "control",
    "ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround",
)  # fmt: skip


def variants(path: Path) -> dict[str, Mapping[str, Any]]:
    """The flat metrics of every variant that was measured, in a folder of metrics files or in a reference file."""
    if path.is_dir():
        found = {file.stem: read_json(file) for file in sorted(path.glob("*.json"))}
    elif path.exists():
        found = read_json(path)["variants"]
    else:
        raise UserError(f"a table names {path}, which does not exist")
    measured = [pair for pair in found.items() if pair[1]["ndcg@10"] is not None]
    return dict(sorted(measured, key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER)))


def summary(path: Path) -> str:
    """One row for each learned full-precision model of each reference in the folder `path` that names published figures."""
    lines = [
        "| reference | model | HR@10 | NDCG@10 | sampled HR@10 | sampled NDCG@10 | published for the same file |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for file in sorted(path.glob("*.json")):
        content = read_json(file)
        for name in content["params"]["models"] if content["published"] else ():
            row = content["variants"][name]
            figures = [f"{row[key]:.4f}" for key in ("hr@10", "ndcg@10", "sampled_hr@10", "sampled_ndcg@10")]
            lines.append(
                f"| [{file.stem}]({file.as_posix()}) | {name} | {' | '.join(figures)} | {_figures(content['published'][0])} |"
            )
    return "\n".join(lines) + "\n"


def _figures(published: Mapping[str, Any]) -> str:
    """A published row in words."""
    words = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "sampled_hr@10": "sampled HR@10", "sampled_ndcg@10": "sampled NDCG@10"}
    return ", ".join(f"{words[key]} {published[key]:.4f}" for key in words if key in published) + f": {published['source']}"


def table(path: Path) -> str:
    """The Markdown table of `path`: quality under both protocols with its interval, width and size; of a reference file
    also the paired change, and what others have published."""
    rows = variants(path)
    content: Mapping[str, Any] = {} if path.is_dir() else read_json(path)
    # The first of a variant is with its own reference; a model against the baselines is in their rows.
    own = [row for row in content.get("comparisons", []) if row["reference"] not in BASELINES]
    changes = {row["variant"]: row for row in reversed(own)}
    change, kept = bool(changes), bool(content)
    lines = [
        "| variant | bits | size | NDCG@10 (95 % interval) |" + " change (95 % interval) |" * change
        + " HR@10 | sampled NDCG@10 | sampled HR@10 |" + f" {_validation(content)} |" * kept,
        "|---|---:|---:|---|" + "---|" * change + "---:|---:|---:|" + "---:|" * kept,
    ]  # fmt: skip
    for name, row in rows.items():
        spread = "" if row["ndcg@10_std"] is None else f" ± {row['ndcg@10_std']:.4f}"
        interval = f"{row['ndcg@10']:.4f}{spread} ({row['ndcg@10_low']:.4f} to {row['ndcg@10_high']:.4f})"
        lines.append(
            f"| {name} | {row['bits']:g} | {size_text(row['bytes'])} | {interval} |"
            + f" {_change(changes.get(name))} |" * change
            + f" {row['hr@10']:.4f} | {row['sampled_ndcg@10']:.4f} | {row['sampled_hr@10']:.4f} |"
            + f" {_figure(None if name in BASELINES else row['valid_ndcg@10'])} |" * kept
        )
    lines += [_published(row, change) for row in content.get("published", [])]
    first = next(reversed(rows.values()))
    facts = f"{first['users']:,} users; protocol card `{first['card']}`"
    if not content:
        return "\n".join(lines) + f"\n\n{facts}.\n"
    made = content["environment"]
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    facts += f"; made in {made['seconds'] / 60:.0f} minutes with {threads} of {made['cpu']}"
    return "\n".join(lines) + f"\n\n{facts}.\n\nProtocol: {protocol(content['card'])}.\n"


def _change(row: Mapping[str, Any] | None) -> str:
    """A paired difference of NDCG@10 from a reference file."""
    if row is None:
        return ""
    text = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) against {row['reference']}, {row['verdict']}"
    return text.replace("-", "−")


def _published(row: Mapping[str, Any], change: bool) -> str:
    """What others report for the same file: source, and some of the metrics."""
    cells = [_figure(row.get(key)) for key in ("ndcg@10", "hr@10", "sampled_ndcg@10", "sampled_hr@10")]
    return f"| *{row['source']}* | | | {cells[0]} |" + " |" * change + f" {' | '.join(cells[1:])} | |"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _validation(content: Mapping[str, Any]) -> str:
    """The head of the column that checkpoints and configurations were chosen by."""
    sampled = content["params"]["train"]["select_on"] == "sampled" if content else False
    return f"validation {'sampled ' * sampled}NDCG@10"


def protocol(card: Mapping[str, Any]) -> str:
    """The protocol card on one line."""
    return "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in card.items())


def filled(text: str) -> str:
    """`text` with every table made anew."""

    def made(match: re.Match[str]) -> str:
        path = Path(match[2])
        return f"{match[1]}{summary(path) if path.name == 'reference' else table(path)}{match[3]}"

    return TABLE.sub(made, text)


def main() -> None:
    try:
        for document in DOCUMENTS:
            text = document.read_text(encoding="utf-8")
            new = filled(text)
            if "--check" not in sys.argv[1:]:
                write_text(document, new)
            elif new != text:
                raise UserError(f"{document} is out of date: run python -m sasrec.report.readme")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
