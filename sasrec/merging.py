"""Reading kept references as parts of a grid, and the grid's own files (`sasrec.merged` says what they hold)."""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sasrec.compared import Compared
from sasrec.config import EvaluateParams
from sasrec.errors import UserError
from sasrec.files import atomic_folder, read_json, write_json, write_text
from sasrec.merged import KEPT_PROTOCOLS, VALUES, Facts, Grid, Part, Run, changed, changes, control_recipe, facts_of
from sasrec.reference import ROOT, differences, named, packed, rank_file, same, unpacked
from sasrec.report.results import BASELINE_SEED

CURVES = "curves.csv"


def merge(name: str, parts: Sequence[str]) -> list[str]:
    """Add parts to the reference `name`, which need not exist yet; returns its variants. parts: names under
    metrics/reference, or paths of a part's .json or folder elsewhere. Raises UserError before anything is written where a part
    does not fit: other data or protocol, another checkpoint or control of a seed, a run that is there with other ranks."""
    grid: Grid | None = read(name) if (ROOT / f"{named(name)}.json").exists() else None
    # The widest first: the control that has no more to its name than that is then the one of the widest width.
    files = sorted(map(located, parts), key=lambda file: -_bits(file))
    for file in files:
        grid = add(grid, file)
    if grid is None:
        raise UserError("name at least one part to merge")
    grid.checked()
    write(name, grid)
    return list(grid.facts)


def _bits(file: Path) -> int:
    try:
        return int(read_json(file)["params"]["quant"]["bits"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file} is not what `python -m stages.reference keep` writes") from None


def located(part: str) -> Path:
    """The .json file of a part."""
    path = Path(part) if part.endswith(".json") or "/" in part else ROOT / part
    file = path if path.suffix == ".json" else path.with_name(f"{path.name}.json")
    if not file.is_file():
        raise UserError(f"{file} does not exist; name a reference that `python -m stages.reference keep` wrote, or its path")
    return file


def add(grid: Grid | None, file: Path) -> Grid:
    """`grid` with the runs of the kept reference in `file`; None: a new one."""
    content, name = read_json(file), file.stem
    if "runs" in content:
        raise UserError(f"{file} is merged itself; merge its parts")
    if grid is None:
        grid = Grid(content["data"], content["card"])
    if content["data"]["sha256"] != grid.data["sha256"]:
        raise UserError(f"{file} is of other data than what is merged: sha256 {content['data']['sha256']}")
    for key in grid.card.keys() | content["card"].keys():
        if content["card"].get(key) != grid.card.get(key):
            raise UserError(
                f"{file} was measured under another protocol: {key} is '{content['card'].get(key)}', not '{grid.card.get(key)}'"
            )
    folder = file.with_suffix("")
    lock = gzip.compress((folder / "dvc.lock").read_bytes(), mtime=0)
    tried = content["tried"]
    part = Part(
        content["command"], content["params"], content["environment"], lock, tried["configurations"], tried["test_reads"]
    )
    if name in grid.parts and dict(grid.parts[name].params) != part.params:
        raise UserError(f"a part {name} with other parameters is merged already; keep this one under another name")
    grid.parts[name] = part
    for variant, values in content["variants"].items():
        own, facts = facts_of(grid, variant, content["params"], str(file))
        seeds = (BASELINE_SEED,) if facts.kind == "baseline" else content["params"]["seeds"]
        for seed in seeds:
            ranks = {protocol: unpacked(rank_file(folder, variant, seed, protocol)) for protocol in KEPT_PROTOCOLS}
            curve: tuple[str, ...] = ()
            if facts.kind != "baseline":
                heading, *curve_rows = (folder / f"{variant}-{seed}.csv").read_text(encoding="utf-8").splitlines()
                if grid.heading not in ("", heading):
                    raise UserError(f"{folder / f'{variant}-{seed}.csv'}: the columns are not those of the other curves")
                grid.heading, curve = heading, tuple(curve_rows)
            grid.add(own, facts, seed, Run(name, {key: values[key] for key in VALUES}, ranks, curve))
    return grid


def evaluate_params(params: Mapping[str, Any]) -> EvaluateParams:
    return EvaluateParams(bootstrap=params["evaluate"]["bootstrap"], seed=params["evaluate"]["seed"])


def write(name: str, grid: Grid) -> None:
    """Write metrics/reference/NAME.json and its folder. Raises UserError."""
    first = next(iter(grid.parts.values()))
    compared = Compared(grid, evaluate_params(first.params))
    parts = list(grid.parts.items())
    content: dict[str, Any] = {
        "command": first.command,
        "params": first.params,
        "environment": {**first.environment, "seconds": sum(part.environment["seconds"] for _, part in parts)},
        "data": grid.data,
        "card": grid.card,
        "tried": {
            "count": sum(len(part.configurations) for _, part in parts),
            "configurations": [each for _, part in parts for each in part.configurations],
            "test_reads": max(part.test_reads for _, part in parts),
        },
        "published": [],
        "protocols": KEPT_PROTOCOLS,
        "parts": [
            {
                "name": own, "command": part.command, "params": changes(first.params, part.params),
                "environment": part.environment,
                "tried": {"configurations": part.configurations, "test_reads": part.test_reads},
            }
            for own, part in parts
        ],
        "runs": {variant: _runs(grid, variant) for variant in compared.names},
        "variants": compared.values,
        "comparisons": compared.comparisons,
        "frontier": compared.frontier,
        "choices": compared.choices,
    }  # fmt: skip
    with atomic_folder(ROOT / name) as folder:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["variant", "seed", *grid.heading.split(",")])
        for variant in compared.names:
            for seed, run in sorted(grid.runs[variant].items()):
                for protocol, ranks in run.ranks.items():
                    path = rank_file(folder, variant, seed, protocol)
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(packed(ranks))
                writer.writerows([variant, seed, *row.split(",")] for row in run.curve)
        write_text(folder / CURVES, text.getvalue())
        (folder / "locks").mkdir()
        for own, part in parts:
            (folder / "locks" / f"{own}.lock.gz").write_bytes(part.lock)
    write_json(ROOT / f"{name}.json", content)


def _runs(grid: Grid, variant: str) -> dict[str, Any]:
    """What a variant is, and by seed what its ranks do not tell."""
    ordered = sorted(grid.runs[variant].items())
    listed = {key: [run.values[key] for _, run in ordered] for key in VALUES}
    # "bits" is the nominal width here, and the mean one in the values.
    listed["mean_bits"] = listed.pop("bits")
    return {
        **asdict(grid.facts[variant]),
        "seeds": [seed for seed, _ in ordered],
        "parts": [run.part for _, run in ordered],
        **listed,
    }


def read(name: str) -> Grid:
    """The grid behind a merged reference, from its files. Raises UserError."""
    path, folder = ROOT / f"{name}.json", ROOT / name
    content = read_json(path)
    if "runs" not in content:
        raise UserError(f"{path} is one kept reference, not a merged one; choose another name to merge under")
    grid = Grid(content["data"], content["card"])
    for each in content["parts"]:
        tried = each["tried"]
        lock = folder / "locks" / f"{each['name']}.lock.gz"
        if not lock.exists():
            raise UserError(f"{lock} does not exist; it is part of the reference and has to be committed with it")
        params = changed(content["params"], each["params"])
        grid.parts[each["name"]] = Part(
            each["command"], params, each["environment"], lock.read_bytes(), tried["configurations"], tried["test_reads"]
        )
    for variant, runs in content["runs"].items():
        if runs["kind"] == "control":
            grid.controls[variant] = control_recipe(grid.parts[runs["parts"][0]].params)
    curves: dict[tuple[str, int], list[str]] = {}
    heading, *rows = (folder / CURVES).read_text(encoding="utf-8").splitlines()
    grid.heading = heading.removeprefix("variant,seed,")
    for row in rows:
        variant, seed, rest = row.split(",", 2)
        curves.setdefault((variant, int(seed)), []).append(rest)
    for variant, runs in content["runs"].items():
        facts = Facts(*(runs.get(key) for key in ("kind", "method", "bits", "line", "reference", "model")))
        for i, seed in enumerate(runs["seeds"]):
            values = {key: runs["mean_bits" if key == "bits" else key][i] for key in VALUES}
            ranks = {protocol: unpacked(rank_file(folder, variant, seed, protocol)) for protocol in KEPT_PROTOCOLS}
            run = Run(runs["parts"][i], values, ranks, tuple(curves.get((variant, seed), ())))
            grid.add(variant, facts, seed, run)
    grid.checked()
    return grid


def problems(name: str) -> list[str]:
    """Where a merged reference says something else than its ranks do; empty where all agrees. Raises UserError."""
    path = ROOT / f"{name}.json"
    content = read_json(path)
    compared = Compared(read(name), evaluate_params(content["params"]))
    found = differences(path, content, compared.values, compared.comparisons)
    for key, rows in (("frontier", compared.frontier), ("choices", compared.choices)):
        if len(rows) != len(content[key]):
            found.append(f"{path}: {key} has {len(content[key])} rows, the runs make {len(rows)}")
        for row, written in zip(rows, content[key], strict=False):
            own = row.get("variant") or f"{row['bits']} bits, {row['line']}"
            found += [
                f"{path}: {key} of {own}: {part} is {written.get(part)}, the ranks give {value}"
                for part, value in row.items()
                if not same(written.get(part), value)
            ]
    return found
