"""From a file through both stages to the store, and what the store refuses to load."""

import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasrec.data import arrays
from sasrec.data.sequences import Sequences, read_catalogue
from sasrec.errors import UserError

ALL = {"min_user": 1, "min_item": 1, "candidates": 2}
ROWS = "who,what,kind\nu-1,a,Toys|Games\nu-1,b,\n007,a,Toys\nu-1,c,Books\n007,d,\nu-1,a,Toys\n007,c,Books\nw,d,\n"
COLUMNS = {"user": "who", "item": "what", "category": "kind"}


@pytest.fixture
def prepared(stage: Callable[..., None], project: Path) -> Path:
    (project / "events.csv").write_bytes(ROWS.replace("\n", "\r\n").encode("utf-8-sig"))
    sections = {"dataset": {"name": "file", "path": "events.csv", "columns": COLUMNS}, "prepare": ALL}
    stage("fetch", **sections)
    stage("prepare", **sections)
    return project / "data" / "prepared"


def test_store(prepared: Path) -> None:
    store = Sequences.load(prepared)
    # Users in order of appearance: u-1 (a b c a), 007 (a d c), w (d). Items: a, b, c, d.
    assert store.items.tolist() == [1, 2, 3, 1, 1, 4, 3, 4] and store.offsets.tolist() == [0, 4, 7, 8]
    assert store.users == 3 and store.items_count == 4 and store.lengths.tolist() == [4, 3, 1]
    assert store.timestamps is None and store.ratings is None
    # Leave-one-out; w has fewer than 3 and trains on everything.
    assert store.train_ends.tolist() == [2, 5, 8]
    validation, test = store.held("validation"), store.held("test")
    assert validation.users.tolist() == test.users.tolist() == [0, 1] and store.stats["evaluated"] == 2
    assert store.items[validation.positions].tolist() == [3, 4] and store.items[test.positions].tolist() == [1, 3]
    assert store.known("validation").tolist() == [True, True, False, False, True, False, False, True]
    assert store.known("test").tolist() == [True, True, True, False, True, True, False, True]
    # The item c is in no training part.
    assert store.stats["cold_targets"] == 1
    # u-1 has never seen d, 007 has never seen b: one candidate where two are wanted. Both occur in training.
    assert test.negatives.tolist() == [[4, 0], [2, 0]] == validation.negatives.tolist()
    assert test.popular_negatives is not None and test.popular_negatives.tolist() == [[4, 0], [2, 0]]
    assert validation.popular_negatives is None
    assert store.stats["few_candidates"] == 2 == store.stats["few_popular_candidates"]
    assert store.stats["times"] == "order"
    assert isinstance(store.items, np.memmap)
    assert read_catalogue(prepared) == [
        ("a", "", ("Toys", "Games")),
        ("b", "", ()),
        ("c", "", ("Books",)),
        ("d", "", ()),
    ]
    with open(prepared / "users.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["id", "original"], ["1", "u-1"], ["2", "007"], ["3", "w"]]
    assert store.stats["sha256"] == hashlib.sha256((prepared.parents[1] / "events.csv").read_bytes()).hexdigest()


def test_ids_with_line_ends_are_read_back(stage: Callable[..., None], project: Path) -> None:
    ids = ["a\rb", "a\nb", "a\r\n", "\r"]
    objects = [{"user": "u", "item": item, "category": ["x\ry"]} for item in ids]
    (project / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
    for name in ("fetch", "prepare"):
        stage(name, dataset={"name": "file", "path": "events.jsonl"}, prepare=ALL)
    assert read_catalogue(project / "data" / "prepared") == [(item, "", ("x\ry",)) for item in ids]


def test_the_same_input_gives_the_same_bytes(stage: Callable[..., None], project: Path) -> None:
    sections = {"dataset": {"name": "sample"}, "sample": {"users": 60, "items": 40}, "prepare": {"candidates": 10}}
    contents = []
    for _ in range(2):
        stage("fetch", **sections)
        stage("prepare", **sections)
        files = sorted([*(project / "data" / "raw").iterdir(), *(project / "data" / "prepared").iterdir()])
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert contents[0] == contents[1] and len(contents[0]) == 16
    # Nothing of the machine or the moment.
    assert str(project).encode() not in b"".join(content for _, content in contents[0])


def test_another_seed_draws_other_candidates(stage: Callable[..., None], project: Path) -> None:
    drawn = []
    for seed in (0, 1):
        sections = {"dataset": {"name": "sample"}, "sample": {"users": 50, "items": 60}}
        sections["prepare"] = {"candidates": 20, "seed": seed}
        stage("fetch", **sections)
        stage("prepare", **sections)
        store = Sequences.load(project / "data" / "prepared")
        drawn.append(np.array(store.negatives))
        assert not np.array_equal(store.negatives, store.validation_negatives)
        for row, user in zip(store.negatives, store.held("test").users, strict=True):
            assert not set(row.tolist()) & set(store.items[store.offsets[user] : store.offsets[user + 1]].tolist())
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "offsets.npy").unlink(), "offsets.npy is missing"),
        (lambda path: (path / "stats.json").write_text("{"), "JSON"),
        (lambda path: (path / "items.npy").write_bytes(b""), "cannot be used"),
        (lambda path: np.save(path / "negatives.npy", np.zeros((1, 2), np.int32)), "negatives.npy has 1 rows for 2"),
        (lambda path: np.save(path / "popular_negatives.npy", np.zeros((3, 2), np.int32)), "negatives.npy has 3 rows for 2"),
        (lambda path: np.save(path / "train_ends.npy", np.array([2, 3, 8])), "train_ends.npy does not fit"),
        (lambda path: np.save(path / "test.npy", np.array([[0, 3, 1]])), "test.npy has 3 columns"),
        (lambda path: np.save(path / "test.npy", np.array([[1, 6], [0, 3]])), "test.npy names users"),
        (lambda path: np.save(path / "test.npy", np.array([[0, 3], [3, 8]])), "test.npy names users"),
        (lambda path: np.save(path / "test.npy", np.array([[0, 3], [1, 4]])), "test.npy holds a target without a history"),
        (lambda path: np.save(path / "test.npy", np.array([[0, 3], [1, 7]])), "test.npy holds a target without a history"),
        (lambda path: np.save(path / "validation.npy", np.array([[0, 1], [1, 5]])), "holds a target that is trained on"),
        (lambda path: np.save(path / "items.npy", np.zeros(8, np.int32)), "not in the catalogue"),
        (lambda path: np.save(path / "items.npy", np.ones(7, np.int32)), "different counts"),
        (lambda path: np.save(path / "items.npy", np.ones(8, np.int64)), "int64"),
        (lambda path: np.save(path / "ratings.npy", np.ones(3, np.float32)), "ratings.npy does not fit"),
    ],
)
def test_damaged_store_is_refused(prepared: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(prepared)
    with pytest.raises(UserError, match="run the prepare stage again") as refusal:
        Sequences.load(prepared)
    assert words in str(refusal.value)


def test_no_disk_space(prepared: Path, stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The old store stays whole, nothing half-written stays, and the message says what to do."""
    before = {file.name: file.read_bytes() for file in prepared.iterdir()}
    real = arrays.save_parts

    def full(path: Path, *arguments: Any) -> None:
        real(path, *arguments)
        if path.name == "negatives.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sasrec.data.store.save_parts", full)
    with pytest.raises(SystemExit) as ended:
        stage("prepare", dataset={"name": "file", "path": "events.csv", "columns": COLUMNS}, prepare=ALL)
    assert "No space left on device; free some disk space" in str(ended.value.code)
    assert "data/prepared" in str(ended.value.code)
    assert {file.name: file.read_bytes() for file in prepared.iterdir()} == before
    assert not [file.name for file in prepared.parent.iterdir() if file.name.startswith(".prepared")]


@pytest.mark.parametrize("name", ["fetch", "prepare"])
def test_a_real_limit_on_file_size(stage: Callable[..., None], project: Path, name: str) -> None:
    """The stage as dvc runs it, under a limit that makes writing fail as a full disk does."""
    sections = {"dataset": {"name": "sample"}, "sample": {"users": 200, "items": 50}}
    stage("fetch", **sections)
    root = Path(__file__).resolve().parents[2]
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        f"sys.argv = ['{name}']; runpy.run_module('stages.{name}', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: cannot write ") and ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stderr
    assert not (project / "data" / "prepared").exists()
    assert not [file for file in (project / "data").iterdir() if file.name.endswith(".tmp")]
    # What was there before is whole.
    assert json.loads((project / "data" / "raw" / "source.json").read_text())["name"] == "sample"


def test_neither_stage_imports_torch_or_pandas(stage: Callable[..., None], project: Path) -> None:
    stage("fetch", dataset={"name": "sample"}, sample={"users": 60, "items": 40}, prepare={"candidates": 10})
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys, runpy\n"
        "for name in ('fetch', 'prepare'): runpy.run_module(f'stages.{name}', run_name='__main__')\n"
        "assert not {'torch', 'pandas'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
