"""dvc.yaml tells the truth: every stage names the files it imports and the parameters it reads, and nothing more."""

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sasrec.deploy.artefact import RUNTIME
from stages.common import read_study
from tests.conftest import ROOT

PIPELINE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
# What a person runs besides the stages: a module has to be reached from a stage or from one of these.
COMMANDS = [
    f"stages/{name}.py" for name in ("tune", "reference", "check", "shapes", "bench", "scale", "catalogues", "ablation")
]
COMMANDS += [f"sasrec/report/{name}.py" for name in ("show", "readme")]
COMMANDS += ["sasrec/__main__.py", "sasrec/bench/alone.py", "sasrec/deploy/recommender/__main__.py"]


def module_file(name: str) -> Path | None:
    path = Path(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / file).exists():
            return file
    return None


def imports(file: Path) -> set[Path]:
    """The project's files that `file` imports directly, with the packages on the way."""
    names: list[str] = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Relative imports are of the one package that is copied elsewhere.
            package = ".".join(file.parts[: len(file.parts) - node.level]) + "." if node.level else ""
            names += [f"{package}{node.module}.{alias.name}" for alias in node.names]
    found = {module_file(".".join(name.split(".")[: i + 1])) for name in names for i in range(name.count(".") + 1)}
    return {file for file in found if file is not None}


def closure(files: Iterable[Path]) -> set[Path]:
    """Everything that is imported when `files` run."""
    reached: set[Path] = set()
    pending = set(files)
    while pending:
        file = pending.pop()
        reached.add(file)
        pending |= imports(file) - reached
        for parent in file.parents:
            package = parent / "__init__.py"
            if parent != Path() and (ROOT / package).exists() and package not in reached:
                pending.add(package)
    return {file for file in reached if not is_empty(file)}


def code(stage: str) -> list[Path]:
    """The files of code that a stage names, those of a folder one by one; empty files have nothing to depend on."""
    named = [Path(dep) for dep in PIPELINE[stage]["deps"] if dep.split("/")[0] in ("sasrec", "stages")]
    files = [file for dep in named for file in ([dep] if dep.suffix else sorted((ROOT / dep).glob("*.py")))]
    return [path.relative_to(ROOT) if path.is_absolute() else path for path in files if not is_empty(path)]


def is_empty(file: Path) -> bool:
    return (ROOT / file).exists() and (ROOT / file).stat().st_size == 0


def script(stage: str) -> Path:
    match = re.match(r"python -m (stages\.\w+)", PIPELINE[stage]["cmd"])
    assert match, f"{stage}: every command is python -m stages.<name>"
    file = module_file(match[1])
    assert file is not None
    return file


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage: str) -> None:
    declared = code(stage)
    assert len(declared) == len(set(declared)), "a file is named twice"
    if stage == "quantize":
        # The one import by name: the method's own file, and what that imports, for each method.
        own = Path("sasrec/quant/${item.method}.py")
        declared.remove(own)
        for method in PARAMS["quantized"]:
            needed = closure([script(stage), Path(f"sasrec/quant/{method}.py")]) - {Path(f"sasrec/quant/{method}.py")}
            missing = needed - set(declared)
            assert not missing, f"quantize@{method} imports {sorted(map(str, missing))}, dvc.yaml does not name it"
        methods = [Path(f"sasrec/quant/{method}.py") for method in PARAMS["quantized"]]
        needed = closure([script(stage), *methods]) - set(methods)
    else:
        needed = closure([script(stage)])
    if stage == "export":
        needed |= {file.relative_to(ROOT) for file in RUNTIME}
    assert set(declared) == needed


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_declares_exactly_the_parameters_it_reads(stage: str) -> None:
    module = importlib.import_module(".".join(script(stage).with_suffix("").parts))
    declared = [re.sub(r"\$\{(?:item\.)?([\w.]+)\}", r"<\1>", name) for name in PIPELINE[stage].get("params", [])]
    assert sorted(declared) == sorted(module.SECTIONS)
    # Each declared section is used: as study.<name>, or through study.of_model.
    text = (ROOT / script(stage)).read_text()
    for section in module.SECTIONS:
        top = section.split(".")[0]
        used = f"study.{top}" in text or (top in ("model", "train", "per_model") and "study.of_model" in text)
        assert used or "study)" in text, f"{stage} declares {section} but does not read it"


def test_every_module_is_reached_by_a_stage_or_a_command() -> None:
    roots = [script(stage) for stage in PIPELINE] + [Path(file) for file in COMMANDS]
    roots += [Path(f"sasrec/quant/{method}.py") for method in PARAMS["methods"]]
    every = {path.relative_to(ROOT) for folder in ("sasrec", "stages") for path in (ROOT / folder).rglob("*.py")}
    assert not {file for file in every if not is_empty(file)} - closure(roots)


def test_the_library_does_not_know_the_pipeline() -> None:
    for file in (ROOT / "sasrec").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) (dvc|stages|yaml)\b", text, re.MULTILINE), file


def test_the_lists_name_what_exists_and_every_variant_is_made() -> None:
    study = read_study(ROOT / "params.yaml")
    assert set(study.variants) == set(study.models) | set(study.quantized)
    # These are no methods of the default study, and for one's own.
    assert set(study.methods) == {*study.quantized, "pq", "fp16"}


def stage_count() -> int:
    sizes = {"models": len(PARAMS["models"]), "quantized": len(PARAMS["quantized"]), "variants": len(PARAMS["variants"])}
    total = 0
    for stage in PIPELINE.values():
        count = 1
        for axis in stage.get("matrix", {}).values():
            count *= {**sizes, "seeds": len(PARAMS["seeds"])}[axis.strip("${}")]
        total += count
    return total


def test_the_default_study_has_at_most_50_stages() -> None:
    assert stage_count() <= 50


def test_light_stages_do_not_import_torch() -> None:
    for stage in ("fetch", "prepare", "report"):
        for file in closure([script(stage)]):
            assert not re.search(r"^\s*(import|from) torch\b", (ROOT / file).read_text(), re.MULTILINE), (stage, file)


def test_uncached_outputs_are_metrics_or_plots() -> None:
    """A plain output with cache: false is never restored from the run cache."""
    for name, stage in PIPELINE.items():
        for out in stage.get("outs", []):
            assert isinstance(out, str), f"{name}: {out}"


def test_lists_are_written_as_dvc_rewrites_them() -> None:
    """`dvc exp run -S` rewrites the file; block lists without indentation keep its difference to the changed line."""
    text = (ROOT / "params.yaml").read_text()
    assert not re.search(r":\s*\[[^\]]", text)
    assert not re.search(r"^\s+- ", text.split("\nbenchmark:")[0], re.MULTILINE)
