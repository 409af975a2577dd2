"""`make` after a kill: what DVC was writing when it died does not stop the next one."""

import json
from pathlib import Path

import pytest
from dvc.fs import localfs
from dvc.lock import make_lock
from dvc.rwlock import RWLockFileCorruptedError, rwlock

from sasrec.errors import UserError
from stages.check import mend


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
