"""Keep the results in metrics/ as a reference, or check the kept ones from their ranks.

    python -m stages.reference keep NAME --data FILE --seconds N --command COMMAND [--notes FILE]
    python -m stages.reference merge NAME [PART ...]
    python -m stages.reference check [NAME ...]

`keep` writes metrics/reference/NAME.json and, beside it in metrics/reference/NAME/, the curves, every user's rank and the
study's part of dvc.lock. --notes: a YAML file with `configurations`, those that were compared on validation to choose this
one, a list of {params, valid_ndcg@10}; `published`, what others report for the file, a list of {source, metrics}; and
`test_reads`, how many of the configurations were measured on the test items, where that is more than this one.
`merge` puts kept references of one width, line and seed each (names, or paths of their .json) together to the grid of
quality against bytes, or adds them to the one that NAME is already, and draws metrics/reference/NAME/quality.png;
without a PART, what there is, anew.
`check` recomputes every metric, interval and comparison from the ranks alone.
"""

import argparse
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sasrec import merging, reference
from sasrec.config import BASELINES, Study
from sasrec.dotted import of_key
from sasrec.errors import UserError
from sasrec.files import atomic_folder, read_json, sha256, write_json, write_text
from sasrec.machine import gpu, processor
from sasrec.protocol import PROTOCOLS
from sasrec.report.figures import write_figure
from sasrec.report.results import BASELINE_SEED
from sasrec.report.widths import load
from sasrec.report.widths_figure import quality_against_bytes
from stages.common import PARAMS, read_study

PACKAGES = ("torch", "numpy", "pandas", "dvc")


def notes(file: str | None) -> dict[str, Any]:
    """How the configuration was chosen, and the published figures to compare with."""
    try:
        content = (yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else None) or {}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--notes {file} is not a file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--notes {file} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--notes {file}: write keys with values: configurations, published, test_reads")
    if strange := set(content) - {"configurations", "published", "test_reads"}:
        raise UserError(f"--notes {file}: unknown key {strange.pop()}; known: configurations, published, test_reads")
    lists = {key: content.get(key) or [] for key in ("configurations", "published")}
    for key, value in lists.items():
        if not isinstance(value, list):
            raise UserError(f"--notes {file}: {key} must be a list, not {value!r}")
    configurations = lists["configurations"]
    tried = {"count": len(configurations), "configurations": configurations, "test_reads": content.get("test_reads", 1)}
    return {"tried": tried, "published": lists["published"]}


def lock(study: Study, params: Mapping[str, Any]) -> str:
    """The entries of dvc.lock that the metrics come from; an experiment leaves those of earlier ones in place. Raises UserError
    where one is missing, or was made with other parameters than `params`, those of params.yaml."""
    content = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))
    wanted = {"fetch", "prepare", "baselines"}
    wanted |= {f"train@{model}-{seed}" for model in study.models for seed in study.seeds}
    wanted |= {f"quantize@{method}-{seed}" for method in study.quantized for seed in study.seeds}
    wanted |= {f"{stage}@{variant}" for stage in ("export", "evaluate") for variant in study.variants}
    if missing := sorted(wanted - content["stages"].keys()):
        raise UserError(f"dvc.lock does not say what {missing[0]} ran with; dvc repro, and keep that")
    content["stages"] = {name: entry for name, entry in content["stages"].items() if name in wanted}
    for name, entry in content["stages"].items():
        for key, value in entry.get("params", {}).get(str(PARAMS), {}).items():
            if (now := of_key(params, key)) != value:
                raise UserError(f"{PARAMS}: {key} is {now}, but {name} ran with {value} (dvc.lock); dvc repro, and keep that")
    return str(yaml.safe_dump(content, sort_keys=False))


def keep(options: argparse.Namespace) -> None:
    reference.named(options.name)
    study = read_study()
    if (kept := reference.ROOT / f"{options.name}.json").exists() and "runs" in read_json(kept):
        raise UserError(f"{kept} is merged of several parts, which this would replace; keep this one under another name")
    if not Path(options.data).is_file():
        raise UserError(f"--data {options.data} is not a file; name the data file that the results were made from")
    record, params = notes(options.notes), yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    digest, prepared = sha256(options.data), read_json("data/prepared/stats.json")["sha256"]
    if digest != prepared:
        raise UserError(f"--data {options.data} has sha256 {digest}, but data/prepared is of {prepared}; name that file")
    found = {name: read_json(Path("metrics", f"{name}.json")) for name in (*BASELINES, *study.variants)}
    # What the data does not allow has no figures.
    variants = {name: values for name, values in found.items() if values["ndcg@10"] is not None}
    baselines = [name for name in BASELINES if name in variants]
    cards = {values["card"] for values in variants.values()}
    if len(cards) > 1:
        raise UserError(f"the files in metrics/ were measured under different protocols ({', '.join(sorted(cards))})")
    content: dict[str, Any] = {
        "command": options.command,
        "params": params,
        "environment": {
            "cpu": processor(),
            **({"gpu": on} if (on := gpu(study.device)) else {}),
            "threads": study.threads,
            "seconds": options.seconds,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "data": {"file": options.data, "sha256": digest},
        "card": read_json(Path("data/evaluated", study.variants[0], "card.json")),
        **record,
        "variants": variants,
    }
    with atomic_folder(reference.ROOT / options.name) as folder:
        for name in variants:
            for seed in (BASELINE_SEED,) if name in baselines else study.seeds:
                source = Path("data/evaluated", name, str(seed))
                for protocol in PROTOCOLS:
                    path = reference.rank_file(folder, name, seed, protocol)
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(reference.packed(np.load(source / f"{protocol}.npy")))
                if name not in baselines:
                    shutil.copy(Path("plots/curves", f"{name}-{seed}.csv"), folder)
        write_text(folder / "dvc.lock", lock(study, params))
        # Before the folder is in its place: this takes a while, and what is killed meanwhile leaves the old reference.
        _, content["comparisons"] = reference.recomputed(folder, content)
    write_json(reference.ROOT / f"{options.name}.json", content)


def merge(name: str, parts: Sequence[str]) -> None:
    variants = merging.merge(name, parts)
    draw(name)
    print(f"{reference.ROOT / name}.json: {len(variants)} variants; now python -m sasrec.report.readme")


def draw(name: str) -> None:
    """The figure of a merged reference, marked with the sha256 of the file whose numbers it shows."""
    file = reference.ROOT / f"{name}.json"
    picture = reference.ROOT / name / "quality.png"
    write_figure(picture, quality_against_bytes, load(read_json(file)), source=f"sha256 {sha256(file)}")


def problems(name: str) -> list[str]:
    path = reference.ROOT / f"{name}.json"
    merged = path.exists() and "runs" in read_json(path)
    return merging.problems(name) if merged else reference.problems(name)


def check(names: Sequence[str]) -> None:
    found = [problem for name in names or reference.names() for problem in problems(name)]
    if found:
        raise UserError("\n".join(found))
    print(f"{len(names or reference.names())} references agree with their ranks")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="task", required=True)
    keeper = commands.add_parser("keep")
    keeper.add_argument("name")
    keeper.add_argument("--data", required=True)
    keeper.add_argument("--seconds", required=True, type=int)
    keeper.add_argument("--command", required=True)
    keeper.add_argument("--notes")
    merger = commands.add_parser("merge")
    merger.add_argument("name")
    merger.add_argument("parts", nargs="*", metavar="PART")
    commands.add_parser("check").add_argument("names", nargs="*")
    options = parser.parse_args()
    try:
        if options.task == "merge":
            merge(options.name, options.parts)
        else:
            keep(options) if options.task == "keep" else check(options.names)
    except UserError as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} does not exist; run the command whose results are to be kept first")


if __name__ == "__main__":
    main()
