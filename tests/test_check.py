"""`make` after a kill: what DVC was writing when it died does not stop the next one."""

import contextlib
import errno
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from dvc.fs import localfs
from dvc.lock import make_lock
from dvc.rwlock import RWLockFileCorruptedError, rwlock

from sasrec.errors import UserError
from stages import check, prepare, train, tune
from stages.check import mend
from stages.common import run


def use(folder: Path) -> None:
    """What DVC does before it runs a stage."""
    with rwlock(str(folder), localfs, "dvc repro", [], [str(folder / "model")], False):
        assert json.loads((folder / "rwlock").read_text())["write"]


@pytest.mark.parametrize("left", ["", '{"write": {"/data/mod'])
def test_a_note_that_was_cut_off_is_removed_and_dvc_starts(tmp_path: Path, left: str) -> None:
    (tmp_path / "rwlock").write_text(left)
    with pytest.raises(RWLockFileCorruptedError):
        use(tmp_path)
    assert mend(tmp_path)
    use(tmp_path)


def test_a_whole_note_stays_as_it_is(tmp_path: Path) -> None:
    assert not mend(tmp_path)
    use(tmp_path)
    before = (tmp_path / "rwlock").read_bytes()
    assert not mend(tmp_path)
    assert (tmp_path / "rwlock").read_bytes() == before


def test_a_note_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rwlock").write_text("{")
    with make_lock(str(tmp_path / "rwlock.lock"), tmp_dir=str(tmp_path)), pytest.raises(UserError, match="another DVC"):
        mend(tmp_path)
    assert (tmp_path / "rwlock").read_text() == "{"


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        (prepare, ["all"], "error: 1 arguments, not 0; usage: python -m stages.prepare"),
        (train, ["sasrec"], "error: 1 arguments, not 2; usage: python -m stages.train NAME SEED"),
        (train, [], "error: 0 arguments, not 2; usage: python -m stages.train NAME SEED"),
    ],
)
def test_other_arguments_than_a_stage_takes_are_answered_by_those_it_takes(
    stage: ModuleType, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__file__, *arguments])
    with pytest.raises(SystemExit) as ended:
        run(stage.main, stage.SECTIONS)
    assert ended.value.code == said


@pytest.mark.parametrize(("stage", "said"), [(check, "stages.check\n"), (train, "stages.train NAME SEED"), (tune, "--target")])
def test_help_says_what_a_stage_takes_and_does(
    stage: ModuleType, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [stage.__file__, "--help"])
    with contextlib.suppress(SystemExit):  # that of argparse
        run(stage.main, stage.SECTIONS)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "error: not enough memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "error: not enough memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[99, 99]"), "error: not enough memory"),
        (
            FileNotFoundError(errno.ENOENT, "no", "data/models/x/0/config.json"),
            "config.json does not exist; dvc repro runs the",
        ),
        (OSError(errno.ENOSPC, "No space left", "data/models/x"), "cannot write data/models/x: No space left; free some disk"),
    ],
)
def test_what_the_machine_lacks_ends_with_one_line(raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(study: object) -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit, match=said):
        run(main, ())


def test_other_errors_of_torch_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(study: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(RuntimeError, match="mat1"):
        run(main, ())


def use_changed_params(changes: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder with the project's params.yaml, but for `changes` of keys that it has once."""
    text = Path("params.yaml").read_text()
    for key, value in changes.items():
        assert text.count(f"  {key}:") == 1
        text = text.replace(f"  {key}:", f"  {key}: {value}  #", 1)
    (folder / "params.yaml").write_text(text)
    shutil.copytree("sasrec/quant", folder / "sasrec/quant")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["check"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "cvs"}, "unknown format in dataset.format 'cvs'"),
        ({"delay_epochs": "5"}, "5 epochs are too few for quant.delay_epochs: 5 and 1 width"),
        ({"progressive": "[8, 7, 6, 5, 4]"}, "quant.progressive ends at 4 bits, and no tensor has fewer than 8"),
        ({"progressive": "[8, 7, 6, 5, 4]", "bits": "2"}, "5 epochs are too few for quant.delay_epochs: 0 and 6 width"),
    ],
)
def test_what_cannot_be_run_is_found_before_anything_runs(
    changes: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_changed_params(changes, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=f"error: params.yaml: {said}"):
        run(check.main, check.SECTIONS)


@pytest.mark.parametrize("trained", [True, False])
def test_phases_of_a_training_count_only_where_something_is_trained_with_quantizers(
    trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_changed_params({"delay_epochs": "5"}, tmp_path, monkeypatch)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["quantized"] = ["control", "ptq", *(["lsq"] if trained else [])]
    params["variants"] = ["sasrec", *params["quantized"]]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(SystemExit, match="too few for quant.delay_epochs") if trained else contextlib.nullcontext():
        run(check.main, check.SECTIONS)
    assert trained or "in order" in capsys.readouterr().out
