"""The study as a person runs it, in temporary clones, with DVC and tiny sizes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

TINY: dict[str, Any] = {
    "models": ["sasrec"],
    "quantized": ["ptq", "lsq"],
    "variants": ["sasrec", "ptq", "lsq"],
    "sample": {"users": 150, "items": 60},
    "model": {"max_len": 10, "hidden": 8},
    "train": {"epochs": 2, "negatives": 16, "min_batches": 1},
    "quant": {"epochs": 1, "calibration_batches": 1},
    "evaluate": {"bootstrap": 100},
    "benchmark": {"batch_sizes": [1], "repeats": 3},
}
OF_METHODS = {f"{stage}@{m}" for m in ("ptq", "lsq") for stage in ("export", "evaluate", "benchmark")}


class Project:
    """A clone with its own DVC cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.environment.pop("DVC_STAGE", None)

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, *command: str, ok: bool = True) -> str:
        process = self.start(*command)
        output, _ = process.communicate(timeout=900)
        assert (process.returncode == 0) == ok, f"{' '.join(command)}: exit {process.returncode}\n{output}"
        return output

    def git(self, *command: str) -> str:
        return self.run("git", "-c", "user.name=test", "-c", "user.email=test@example.com", *command)

    def params(self, **changes: Any) -> None:
        path = self.path / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for section, value in changes.items():
            params[section] = {**params[section], **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def weights(self, name: str = "sasrec") -> bytes:
        return (self.path / "data/models" / name / "0/model.safetensors").read_bytes()


def contents(folder: Path) -> dict[Path, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def clone(target: Path) -> Project:
    """The working tree as it is, committed or not, as a repository of its own without results."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, files.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith(("metrics/", "plots/")) and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    project = Project(target)
    project.git("init", "-q", "-b", "main")
    return project


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny study that has run once and is committed."""
    project = clone(tmp_path_factory.mktemp("study"))
    project.params(**TINY)
    project.git("add", "-A")
    project.git("commit", "-qm", "tiny")
    output = project.run("dvc", "repro")
    assert ran(output) == {
        "fetch",
        "prepare",
        "preflight",
        "train@sasrec-0",
        "quantize@ptq-0",
        "quantize@lsq-0",
        "baselines",
        "sensitivity",
        "report",
    } | {f"{stage}@{v}" for v in ("sasrec", "ptq", "lsq") for stage in ("export", "evaluate", "benchmark")}
    project.git("add", "-A")
    project.git("commit", "-qm", "results")
    tracked = project.git("ls-files").split()
    assert {"dvc.lock", "metrics/lsq.json", "plots/quality.png", "plots/curves/lsq-0.csv", "plots/benchmark/ptq.csv"} <= set(
        tracked
    )
    assert not [name for name in tracked if name.startswith("data/") and name != "data/.gitkeep"]
    return project


@pytest.fixture
def clean(study: Project) -> Iterator[Project]:
    """The study, put back as committed afterwards."""
    yield study
    study.git("reset", "-q", "--hard")
    study.git("clean", "-fdq")
    study.run("dvc", "checkout", "-q")


def test_a_second_repro_does_nothing(study: Project) -> None:
    output = study.run("dvc", "repro")
    assert not ran(output)
    assert "up to date" in output
    assert study.git("status", "--porcelain") == ""


def test_a_fresh_clone_reproduces_every_result(study: Project, tmp_path: Path) -> None:
    study.git("clone", "-q", str(study.path), str(tmp_path / "clone"))
    fresh = Project(tmp_path / "clone")
    output = fresh.run("dvc", "repro")
    assert {"train@sasrec-0", "quantize@lsq-0"} <= ran(output)
    fresh.git("diff", "--exit-code", "dvc.lock", "metrics")
    assert fresh.weights() == study.weights()


def test_a_tagged_model_is_had_by_name_and_works_alone(study: Project, tmp_path: Path) -> None:
    source, other = Project(tmp_path / "source"), Project(tmp_path / "other")
    study.run("git", "clone", "-q", str(study.path), str(source.path))
    source.run("dvc", "cache", "dir", "--local", str(study.path / ".dvc/cache"))
    source.run("dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    source.git("commit", "-qam", "A remote")
    source.run("dvc", "push", "-q", "data/exported/lsq")
    source.git("tag", "-a", "lsq@v1.0.0", "-m", "first release")
    other.path.mkdir()
    other.run("dvc", "artifacts", "get", str(source.path), "lsq")
    other.run("dvc", "get", str(source.path), "data/exported/lsq/0", "-o", "by_path")
    exported = study.path / "data/exported/lsq/0"
    for folder in (other.path / "lsq/0", other.path / "by_path"):
        assert contents(folder) == contents(exported)
    history = ",".join(line.split(",")[1] for line in (exported / "items.csv").read_text().splitlines()[1:4])
    found = json.loads(other.run(sys.executable, "lsq/0/recommender", "--history", history, "-k", "5", "--json"))
    assert len(found["items"]) == 5 and not found["unknown"] and not found["by_popularity"]


def test_other_bits_run_the_quantized_stages_and_nothing_else(clean: Project) -> None:
    command = ("dvc", "exp", "run", "-S", "quant.bits=4")
    assert ran(clean.run(*command)) == {"quantize@ptq-0", "quantize@lsq-0", "report"} | OF_METHODS
    assert json.loads((clean.path / "metrics/lsq.json").read_text())["bits"] == 4
    difference = clean.run("dvc", "metrics", "diff", "--json")
    assert json.loads(difference)["metrics/lsq.json"]["bits"] == {"old": 8, "new": 4, "diff": -4}
    assert "metrics/sasrec.json" not in difference
    clean.run("dvc", "plots", "diff", "HEAD", "-o", "compared")
    names = {path.name for path in (clean.path / "compared/static").rglob("*.png")}
    assert any("quality" in name for name in names)
    clean.git("reset", "-q", "--hard")
    clean.run("dvc", "checkout", "-q")
    again = clean.run(*command)
    assert not ran(again), again


def test_a_methods_option_runs_that_methods_stages(clean: Project) -> None:
    output = clean.run("dvc", "exp", "run", "-S", "methods.lsq.start=paper")
    assert ran(output) == {"quantize@lsq-0", "export@lsq", "evaluate@lsq", "benchmark@lsq", "report"}


def test_an_edit_of_a_method_runs_that_methods_stages(clean: Project) -> None:
    path = clean.path / "sasrec/quant/lsq.py"
    head = "def initialize(self, values: Tensor) -> None:\n"
    assert head in path.read_text()
    path.write_text(path.read_text().replace(head, f"{head}        values = values * 1.2\n"))
    output = clean.run("dvc", "repro")
    assert ran(output) == {"quantize@lsq-0", "export@lsq", "evaluate@lsq", "benchmark@lsq", "report"}


def test_a_rate_in_scientific_notation_is_trained_with(clean: Project) -> None:
    clean.run(
        "dvc", "exp", "run", "-S", "train.lr=5e-5", "-S", "train.schedule=constant", "-S", "train.warmup=0", "train@sasrec-0"
    )
    assert "5e-05" in (clean.path / "params.yaml").read_text()
    rows = (clean.path / "plots/curves/sasrec-0.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[1]) == 0.00005


def test_metrics_are_one_table_and_plots_are_pictures(study: Project) -> None:
    table = json.loads(study.run("dvc", "metrics", "show", "--json"))[""]["data"]
    baselines = ("popularity", "recent_popularity", "markov", "item_knn")
    names = {f"metrics/{name}.json" for name in ("sasrec", "ptq", "lsq", *baselines)}
    assert set(table) == names
    keys = {frozenset(value["data"]) for value in table.values()}
    assert len(keys) == 1
    wanted = {
        "hr@10",
        "ndcg@10",
        "mrr",
        "coverage@10",
        "sampled_hr@10",
        "sampled_ndcg@10",
        "ndcg@10_low",
        "users",
        "bits",
        "bytes",
    }
    assert wanted | {"embedding_bytes", "weight_bytes", "card"} <= set(next(iter(keys)))
    assert len({value["data"]["card"] for value in table.values()}) == 1
    study.run("dvc", "plots", "show", "-o", "shown")
    pictures = {path.name for path in (study.path / "shown").rglob("*.png")}
    assert {"quality", "size", "curves", "latency"} <= {re.sub(r".*_(\w+)\.png", r"\1", name) for name in pictures}
    shutil.rmtree(study.path / "shown")


def test_a_queue_of_widths(clean: Project) -> None:
    queued = clean.run("dvc", "exp", "run", "--queue", "-S", "quant.bits=2,3", "evaluate@lsq")
    assert queued.count("Queued experiment") == 2
    clean.run("dvc", "queue", "start", "-j", "1")
    for _ in range(120):
        status = clean.run("dvc", "queue", "status")
        if not re.search(r"Queued|Running", status.split("Worker status")[0]):
            break
        time.sleep(1)
    assert status.count("Success") == 2, status + clean.run("dvc", "queue", "logs", "0", ok=False)
    shown = clean.run("dvc", "exp", "show", "--csv", "--no-pager")
    assert len([line for line in shown.splitlines() if line.count(",exp") or "lsq" in line]) >= 1
    clean.run("dvc", "queue", "remove", "--all")


def test_tune_has_as_many_trials_of_each_target_and_chooses_by_validation(clean: Project) -> None:
    output = clean.run("python", "-m", "stages.tune", "-S", "train.lr=1e-3,2e-2", "--target", "sasrec", "ptq")
    lines = output.splitlines()
    head = next(i for i, line in enumerate(lines) if "sasrec valid_ndcg@10" in line)
    assert lines[head].split() == ["experiment", "train.lr", "sasrec", "valid_ndcg@10", "ptq", "valid_ndcg@10"]
    trials = [re.findall(r"0\.\d{5}", line) for line in lines[head + 1 : head + 3]]
    assert [len(scores) for scores in trials] == [2, 2], output
    for name, line in zip(("sasrec", "ptq"), lines[-2:], strict=True):
        assert re.match(rf"best of {name} on validation: dvc exp apply \w+-\w+$", line), output
    assert "sampled_ndcg" not in output
    assert clean.git("status", "--porcelain") == ""
    assert "No experiment tasks in the queue" in clean.run("dvc", "queue", "status")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.bits=9"], "params.yaml: quant.bits must be between 2 and 8, not 9"),
        (["quant.embedding_bits=0"], "params.yaml: quant.embedding_bits must be between 1 and 8, not 0"),
        (["train.loss=bcee"], "unknown value of train.loss 'bcee'; did you mean 'bce'?"),
        (["+train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["dataset.name=mll-1m"], "did you mean 'ml-1m'?"),
        (["dataset.name=file"], "dataset.path"),
        (["dataset.name=file", "dataset.path=absent.csv"], "absent.csv"),
        (["dataset.name=file", "dataset.path=sasrec"], "directory"),
        (["quantized=[lsqq]", "variants=[lsqq]"], "lsqq"),
        (["models=[sasrecc]"], "sasrecc"),
    ],
)
def test_a_mistake_ends_with_its_key_and_without_a_traceback(clean: Project, overrides: list[str], message: str) -> None:
    output = clean.run("dvc", "exp", "run", *(part for o in overrides for part in ("-S", o)), ok=False)
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+methods.lsq.lrr=1"], "unknown key 'methods.lsq.lrr'; did you mean 'methods.lsq.lr'?"),
        (["quant.budget_kb=0.1"], "quant.budget_kb: 0.1 kB do not hold the weights and tables"),
        (["quant.delay_epochs=1"], "1 epochs are too few for quant.delay_epochs: 1"),
    ],
)
def test_what_does_not_suit_a_method_is_refused_before_the_training(clean: Project, overrides: list[str], message: str) -> None:
    for training, begun in (("train.epochs=3", {"train@sasrec-0"}), ("seeds=[0,1]", None)):
        asked = [training, *overrides]
        output = clean.run("dvc", "exp", "run", *(part for o in asked for part in ("-S", o)), ok=False)
        assert message in output and "Traceback" not in output
        # What checks the models first is restored where it has passed before.
        assert "epoch 1:" not in output and (begun is None or ran(output) - {"preflight"} == begun)
        clean.git("reset", "-q", "--hard")


def test_the_users_own_file(clean: Project, tmp_path: Path) -> None:
    """String ids, CRLF line ends, columns of other names."""
    rng = random.Random(0)
    lines = ["who,what,when"]
    for user in range(40):
        start = rng.randrange(30)
        lines += [f"üser-{user},sku/{(start + i) % 30:03d},{1000 + i}" for i in range(12)]
    path = tmp_path / "mine.csv"
    path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    columns = ("dataset.columns.user=who", "dataset.columns.item=what", "dataset.columns.timestamp=when")
    overrides = ("dataset.name=file", f"dataset.path={path}", *columns)
    clean.run("dvc", "exp", "run", *(part for o in overrides for part in ("-S", o)), "evaluate@lsq")
    stats = json.loads((clean.path / "data/prepared/stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (40, 30, 480)
    assert "sku/007" in (clean.path / "data/prepared/catalogue.csv").read_text()


def test_cafe_on_the_users_own_categories(clean: Project, tmp_path: Path) -> None:
    """Trained and quantized where the file has categories, some items without; refused with what to do where it has none."""
    rng = random.Random(0)
    lines = ["user,item,category"]
    for user in range(40):
        start = rng.randrange(30)
        items = [(start + i) % 30 for i in range(12)]
        lines += [f"u{user},i{item},{'' if item % 7 == 0 else f'shelf {item // 10}'}" for item in items]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    study = ("models=[cafe]", "quant.model=cafe", "quantized=[lsq]", "variants=[cafe,lsq]")
    overrides = ("dataset.name=file", f"dataset.path={path}", *study, "dataset.columns.category=category")
    output = clean.run("dvc", "exp", "run", *(part for o in overrides for part in ("-S", o)), "evaluate@lsq")
    assert {"train@cafe-0", "quantize@lsq-0", "export@lsq", "evaluate@lsq"} <= ran(output)
    manifest = json.loads((clean.path / "data/exported/lsq/0/manifest.json").read_text())
    assert manifest["model"]["kind"] == "cafe"
    assert set(manifest["products"].values()) == {"int8"}
    # Three shelves, the items on none, and padding.
    assert manifest["tensors"]["coarse.item_table.weight"]["shape"] == [5, 8]
    path.write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    overrides = (*overrides[:-1], "dataset.columns.category=null")
    output = clean.run("dvc", "exp", "run", *(part for o in overrides for part in ("-S", o)), "train@cafe-0", ok=False)
    assert "whose intents are categories of items, and this data has none" in output
    assert "dataset.columns.category" in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, bytes]:
    """A project whose training takes some seconds, prepared; and the weights of a run that was not interrupted."""
    project = clone(tmp_path_factory.mktemp("killed"))
    project.params(**{**TINY, "train": {"epochs": 60, "negatives": 16, "patience": 60, "min_batches": 4}})
    project.git("add", "-A")
    project.git("commit", "-qm", "longer")
    project.run("dvc", "repro", "train@sasrec-0")
    return project, project.weights()


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    children: dict[int, list[int]] = {}
    for child, parent in zip(found[::2], found[1::2], strict=True):
        children.setdefault(int(parent), []).append(int(child))
    result, pending = [], [pid]
    while pending:
        own = children.get(pending.pop(), [])
        result += own
        pending += own
    return result


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps to find the trainer's process")
@pytest.mark.parametrize("victims", ["trainer", "dvc", "both"])
def test_a_killed_run_ends_with_the_same_bits(longer: tuple[Project, bytes], victims: str) -> None:
    project, expected = longer
    shutil.rmtree(project.path / "data/models")
    shutil.rmtree(project.path / ".dvc/cache")
    log = project.path / "data/logs/train-sasrec-0.log"
    kills = 0
    for attempt in range(3):
        log.unlink(missing_ok=True)
        project.run("python", "-m", "stages.check")  # as `make` does
        process = project.start("dvc", "repro", "--force", "--single-item", "train@sasrec-0")
        wanted = random.randint(2, 12)
        while process.poll() is None and (not log.exists() or log.read_text().count(" epoch ") < wanted):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        time.sleep(random.random() * 0.2)
        targets = {"trainer": descendants(process.pid), "dvc": [process.pid]}
        targets["both"] = targets["trainer"] + targets["dvc"]
        for pid in targets[victims]:
            try:
                os.kill(pid, signal.SIGKILL)
                kills += 1
            except ProcessLookupError:
                pass
        if process.stdout:
            process.stdout.close()
        process.wait(30)
        assert attempt == 0 or "resuming after epoch" in log.read_text()
    assert kills
    project.run("python", "-m", "stages.check")
    output = project.run("dvc", "repro", "--force", "--single-item", "train@sasrec-0")
    assert "resuming after epoch" in output
    assert project.weights() == expected
    assert not list((project.path / "data/resume").glob("*.safetensors"))
