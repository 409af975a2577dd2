"""The exported folder, copied alone, in an environment of its own with numpy and onnxruntime and nothing else."""

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from sasrec.deploy import Recommender
from tests.conftest import ROOT

HISTORIES = ["sku/3,sku/1,sku/4", "sku/9", "sku/2,what,sku/30"]
# Enough for an install from a package index; a machine without one gives up much sooner.
SECONDS = 120


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the pinned numpy and onnxruntime."""
    folder = tmp_path_factory.mktemp("fresh")
    pins = re.findall(r"^(?:numpy|onnxruntime)==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(pins) == 2
    venv.create(folder, with_pip=False)
    made = folder / "bin/python"
    # Installed from outside: the environment needs no pip of its own.
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(made),
        "install",
        "--quiet",
        "--no-compile",
        "--retries",
        "0",
        *pins,
    ]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install numpy and onnxruntime within {SECONDS} seconds")
    if done.returncode:
        pytest.skip(f"pip cannot install here: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return made


@pytest.mark.parametrize("bits", [8, 3])
def test_a_copied_folder_recommends_what_was_evaluated(
    bits: int, python: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = exported("lsq", bits)
    model = Recommender.load(folder)
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    shutil.rmtree(folder)
    for history in HISTORIES:
        command = [str(python), "-I", str(alone / "recommender"), "--history", history, "-k", "7", "--json"]
        done = subprocess.run(command, cwd=alone, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        expected = model.recommend(history.split(","), k=7)
        found = re.findall(r'"id": "([^"]+)"', done.stdout)
        scores = [float(score) for score in re.findall(r'"score": (\S+)', done.stdout)]
        assert found == [item.id for item in expected.items]
        assert scores == [item.score for item in expected.items]
    # Nothing but the two and what they need is there: torch for one is not.
    done = subprocess.run([str(python), "-I", "-c", "import torch"], env={}, capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in done.stderr
