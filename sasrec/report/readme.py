"""Keep the tables of the documents in step with the committed metrics: python -m sasrec.report.readme [--check]

The documents are README.md and metrics/reference/README.md. A table stands between `<!-- table: PATH -->` and `<!-- end of
table -->`; PATH is the folder of metrics files, one reference file, the folder of references for a summary of them, or a CSV
file that is shown as it is. In the same way `widths` has the figure, words and table of a merged reference, `choices` its
figure and the choice at each width, `short` that choice alone, and `beside` the variants of a reference beside the published
figures of the same methods; these four stay empty as long as the file does not exist. With --check nothing is written, and the
exit status is 1 where a table is out of date.
"""

import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sasrec.config import BASELINES
from sasrec.errors import UserError
from sasrec.files import read_json, write_text
from sasrec.report import widths as grid
from sasrec.report.scale import scale_table
from sasrec.report.shapes import shapes
from sasrec.report.speed import speed
from sasrec.report.tables import MINUS, percent_text, size_text

DOCUMENTS = (Path("README.md"), Path("metrics/reference/README.md"))
TABLE = re.compile(r"(<!-- (table|widths|choices|short|beside): (\S+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
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
        published = [row for row in content["published"] if "variant" not in row]
        for name in content["params"]["models"] if published else ():
            row = content["variants"][name]
            figures = [f"{row[key]:.4f}" for key in ("hr@10", "ndcg@10", "sampled_hr@10", "sampled_ndcg@10")]
            lines.append(f"| [{file.stem}]({file.as_posix()}) | {name} | {' | '.join(figures)} | {_figures(published[0])} |")
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
    lines += [_published(row, change) for row in content.get("published", []) if "variant" not in row]
    first = next(reversed(rows.values()))
    facts = f"{first['users']:,} users; protocol card `{first['card']}`"
    if not content:
        return "\n".join(lines) + f"\n\n{facts}.\n"
    made = content["environment"]
    facts += f"; made in {made['seconds'] / 60:.0f} minutes with {machine(made)}"
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


def machine(environment: Mapping[str, Any]) -> str:
    """What results were made with."""
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''} of {environment['cpu']}"
    return f"{threads} and {environment['gpu']}" if "gpu" in environment else threads


def _validation(content: Mapping[str, Any]) -> str:
    """The head of the column that checkpoints and configurations were chosen by."""
    sampled = content["params"]["train"]["select_on"] == "sampled" if content else False
    return f"validation {'sampled ' * sampled}NDCG@10"


def plain(path: Path) -> str:
    """The Markdown table of a CSV file, its cells as they are; columns of numbers stand right."""
    if not path.exists():
        raise UserError(f"a table names {path}, which does not exist")
    with open(path, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    numbers = [all(re.fullmatch(r"[-+.\d]*", row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in head) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in numbers) + "|")
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def protocol(card: Mapping[str, Any]) -> str:
    """The protocol card on one line."""
    return "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in card.items())


CAPTION = (
    "NDCG@10 on the test items against the bytes of the exported model, means over seeds. Bars: 95 % intervals of the "
    "difference from the reference, user by user and seed by seed: trained methods against the control of the same seed and "
    "recipe, `ptq` and `adaround` against the checkpoint they start from. Band: the interval of the control, the "
    "full-precision model trained on for as long. Black: models in full precision with fewer or more features, and float16. "
    "Hollow: a quantized model that is not above that line beyond noise, which counts as not worth it."
)


def picture(path: Path, document: Path) -> str:
    """The figure of a merged reference with its caption, as seen from a document."""
    image = path.with_suffix("") / "quality.png"
    place = image.relative_to(document.parent).as_posix()
    return f"![Quality against bytes, a line a method]({place})\n\n{CAPTION}\n\n"


def widths(path: Path, document: Path) -> str:
    """Everything of a merged reference: figure, words, table, and where it comes from."""
    content = read_json(path)
    found = grid.load(content)
    machines = dict.fromkeys(machine(part["environment"]) for part in content["parts"])
    facts = (
        f"Bold: the choice, which has the highest NDCG@10 on validation. {len(content['parts'])} parts, "
        f"{content['environment']['seconds'] / 3600:.1f} hours in all with {' or '.join(machines)}; each part's command and "
        "parameters are in "
        f"the file.\n\nProtocol: {protocol(content['card'])}.\n"
    )
    return f"{picture(path, document)}{grid.words(found)}\n{smallest(found)}\n{grid.table(found)}\n{facts}"


def smallest(found: grid.Widths) -> str:
    """What to ship at each size, with what that says."""
    lead = (
        "Smallest first, the models that no other of about their size or smaller equals on validation, over the seeds of both "
        "(the Pareto front):"
    )
    return f"{lead}\n\n{grid.smallest_table(found)}"


def choices(path: Path, document: Path) -> str:
    """The figure of a merged reference, which method to choose at each width, and what to ship at each size."""
    content = read_json(path)
    table_of = (path.parent / "README.md").relative_to(document.parent).as_posix()
    lead = f"On real data ([{path.stem}]({table_of}): {_extent(content)}):\n\n"
    found = grid.load(content)
    how = " ".join(filter(None, [grid.untrained_sentence(found), grid.options_sentence(found)]))
    return f"{lead}{picture(path, document)}{grid.short_table(found)}\n{how}\n\n{smallest(found)}"


def short(path: Path, document: Path) -> str:
    """Which method to choose at each width of a merged reference, and of how much data and how many seeds that is."""
    content = read_json(path)
    return f"{grid.short_table(grid.load(content))}\n{_extent(content)}.\n"


def _extent(content: Mapping[str, Any]) -> str:
    """Users, items and seeds of a merged reference."""
    card = content["card"]
    counts = {row["seeds"] for name, row in content["variants"].items() if name not in BASELINES}
    least, most = min(counts), max(counts)
    seeds = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    return f"{card['users']:,} users, {card['items']:,} items, {seeds}"


def beside(path: Path, document: Path) -> str:
    """The variants of a reference beside the published figures that name the same variant: NDCG@10 among sampled candidates,
    and what a method changes in its own study."""
    content = read_json(path)
    published = {row["variant"]: row["sampled_ndcg@10"] for row in content["published"] if "variant" in row}
    source = next(row["source"] for row in content["published"] if "variant" in row)
    compared = {(row["variant"], row["reference"]): row for row in content["comparisons"]}
    lines = [
        f"| method | {source}: NDCG@10 | its change | here: sampled NDCG@10 | its change | change of full NDCG@10 |",
        "|---|---:|---:|---:|---:|---|",
    ]
    full = content["variants"]["control"]["sampled_ndcg@10"]
    for name in ("control", *(name for name in ORDER if name in content["params"]["quantized"] and name != "control")):
        theirs, own = published.get(name), content["variants"][name]
        change = None if theirs is None or name == "control" else 100 * (theirs / published["control"] - 1)
        row = compared.get((name, "control"))
        cells = [
            "full precision" if name == "control" else name,
            _figure(theirs),
            "" if change is None else percent_text(change, MINUS),
            f"{own['sampled_ndcg@10']:.4f}",
            "" if name == "control" else percent_text(100 * (own["sampled_ndcg@10"] / full - 1), MINUS),
            "" if row is None else _change(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nProtocol here: {protocol(content['card'])}.\n"


OPTIONAL = {"widths": widths, "choices": choices, "short": short, "beside": beside}


def filled(text: str, document: Path) -> str:
    """`text`, that of `document`, with every table made anew."""

    def made(match: re.Match[str]) -> str:
        kind, path = match[2], Path(match[3])
        if kind in OPTIONAL:
            content = OPTIONAL[kind](path, document) if path.exists() else ""
        else:
            makers = {
                "reference": summary,
                "shapes.csv": shapes,
                "speed.csv": speed,
                "scale.csv": lambda path: scale_table(path, document),
            }
            make = makers.get(path.name, plain if path.suffix == ".csv" else table)
            content = make(path)
        return f"{match[1]}{content}{match[4]}"

    return TABLE.sub(made, text)


def main() -> None:
    try:
        for document in DOCUMENTS:
            text = document.read_text(encoding="utf-8")
            new = filled(text, document)
            if "--check" not in sys.argv[1:]:
                write_text(document, new)
            elif new != text:
                raise UserError(f"{document} is out of date: run python -m sasrec.report.readme")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
