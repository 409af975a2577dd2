"""A disk that fills up while a stage writes: one clear line, status 1, no partial output."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

# A limit on the size of files stands in for a full disk: the write fails in the same place.
LIMITED = (
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
    "sys.argv = sys.argv[2:]; runpy.run_module(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    for name in ("sasrec", "stages"):
        (folder / name).symlink_to(ROOT / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sample"] |= {"users": 150, "items": 60}
    params["model"] |= {"max_len": 10, "hidden": 8}
    params["train"] |= {"epochs": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in (["fetch"], ["prepare"]):
        subprocess.run([sys.executable, "-m", f"stages.{stage[0]}"], cwd=folder, check=True, capture_output=True)
    return folder


def limited(project: Path, size: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *command], cwd=project, capture_output=True, text=True, check=False
    )


def test_a_full_disk_while_training(project: Path) -> None:
    # The resume file comes first, and is about three times the model.
    done = limited(project, 15_000, "stages.train", "sasrec", "0")
    assert done.returncode == 1
    assert "error: cannot write data/resume/train-sasrec-0.safetensors" in done.stderr
    assert "free some disk space and run again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "data/models/sasrec/0").exists()
    left = {path.name for path in (project / "data/resume").iterdir()}
    assert left <= {"train-sasrec-0.lock"}


def test_a_full_disk_while_exporting(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "stages.train", "sasrec", "0"], cwd=project, check=True, capture_output=True)
    done = limited(project, 2_000, "stages.export", "sasrec")
    assert done.returncode == 1
    assert "error: cannot write data/exported/sasrec/" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((project / "data/exported").rglob("*.*"))
