"""Running the two data stages in a folder of their own, as `dvc repro` would."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.common import run

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Stage = Callable[..., None]


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """The path of a real data file; the test is skipped where it is not at hand."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"the real file {path} is not on this machine")
        return path

    return find


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, which is made the current one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".gitkeep").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """stage(name, dataset={...}, ...) writes params.yaml and runs the stage in this process."""

    def call(name: str, **sections: Any) -> None:
        write_params(project, **sections)
        module = importlib.import_module(f"stages.{name}")
        monkeypatch.setattr(sys, "argv", [name])
        run(module.main, module.SECTIONS)

    return call


@pytest.fixture
def refused(stage: Stage, project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run fetch, then prepare; one of them must end with one line and status not 0, and leave nothing behind.
    Returns the line."""

    def call(**sections: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            stage("fetch", **sections)
            stage("prepare", **sections)
        message = str(ended.value.code)
        assert message.startswith("error: ") and "\n" not in message
        assert "Traceback" not in capsys.readouterr().err
        assert not (project / "data" / "prepared").exists()
        assert [name for name in os.listdir(project / "data") if name.endswith(".tmp")] == []
        return message

    return call


def write_params(folder: Path, **sections: Any) -> None:
    study = {
        "models": ["sasrec"],
        "quantized": [],
        "variants": ["sasrec"],
        "seeds": [0],
        "per_model": {"sasrec": {}},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(study | sections), encoding="utf-8")
