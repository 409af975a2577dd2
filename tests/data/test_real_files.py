"""The counts that real files must give (README of the shared data); skipped where the files are not at hand."""

import gzip
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasrec.data.sequences import Sequences, read_catalogue

Find = Callable[[str], Path]
EVERYTHING = {"min_user": 1, "min_item": 1}


@pytest.fixture
def prepare(stage: Callable[..., None], project: Path) -> Callable[..., Sequences]:
    def call(name: str, path: Path, more: dict[str, Any] | None = None, **prepare: Any) -> Sequences:
        sections = {"dataset": {"name": name, "path": str(path), **(more or {})}, "prepare": prepare}
        stage("fetch", **sections)
        stage("prepare", **sections)
        return Sequences.load(project / "data" / "prepared")

    return call


def counts(store: Sequences) -> tuple[int, int, int]:
    assert store.stats["interactions"] == len(store.items)
    return store.users, store.items_count, len(store.items)


def test_ml_1m_is_the_file_of_the_sasrec_paper(shared: Find, prepare: Callable[..., Sequences], project: Path) -> None:
    paper = shared("ml-1m-sasrec/ml-1m.txt")
    store = prepare("ml-1m", shared("ml-1m/ml-1m.zip"))
    assert counts(store) == (6040, 3416, 999_611)
    stats = store.stats
    assert stats["dropped"]["thresholds"]["items"] == 290 and stats["dropped"]["thresholds"]["rows"] == 598
    assert (stats["length"]["min"], stats["length"]["median"], stats["length"]["max"]) == (18, 96, 2277)
    assert stats["raw"]["users"] == 6040 and stats["raw"]["items"] == 3706 and stats["raw"]["interactions"] == 1_000_209
    # The copy's surrogate times are ranks, which the stage sees by itself.
    assert stats["times"] == "order" and stats["times_note"]
    catalogue = read_catalogue(project / "data" / "prepared")
    assert ("1193", "One Flew Over the Cuckoo's Nest (1975)", ("Drama",)) in catalogue

    theirs = np.loadtxt(paper, dtype=np.int64)
    user, item = theirs[np.argsort(theirs[:, 0], kind="stable")].T
    # Their users by naming alone: a user is known by its sequence once the items are named. Item names first: align
    # users of unique length, check that the naming of items is one to one, and then compare all sequences as a set.
    lengths = np.bincount(user)[1:]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    unique = {int(length) for length in np.unique(lengths) if (lengths == length).sum() == 1}
    ours_by_length = {int(length): u for u, length in enumerate(store.lengths) if int(length) in unique}
    naming: dict[int, int] = {}
    for u in np.flatnonzero(np.isin(lengths, list(unique))):
        mine = ours_by_length[int(lengths[u])]
        ours = store.items[store.offsets[mine] : store.offsets[mine + 1]].tolist()
        for a, b in zip(item[starts[u] : starts[u + 1]].tolist(), ours, strict=True):
            assert naming.setdefault(a, b) == b
    assert len(naming) > 3000 and len(set(naming.values())) == len(naming)
    # The rare items that no such user has all get the same name, 0, on both sides.
    to_ours = np.zeros(3417, np.int32)
    to_ours[list(naming)] = list(naming.values())
    known = np.zeros(3417, np.int32)
    known[list(naming.values())] = list(naming.values())
    renamed, mine_all = to_ours[item], known[store.items]
    expected = sorted(renamed[starts[u] : starts[u + 1]].tobytes() for u in range(6040))
    assert sorted(mine_all[store.offsets[u] : store.offsets[u + 1]].tobytes() for u in range(6040)) == expected


def test_ml_100k(shared: Find, prepare: Callable[..., Sequences], project: Path) -> None:
    store = prepare("ml-100k", shared("ml-100k/ml-100k.zip"), **EVERYTHING)
    assert counts(store) == (943, 1682, 100_000)
    assert store.stats["last_two_tie"] == 415 and round(store.stats["ties"] / 1000, 1) == 75.8
    assert store.stats["times"] == "comparable" and store.stats["time_unit"] == "s"
    assert ("1", "Toy Story (1995)", ("Animation", "Children's", "Comedy")) in read_catalogue(project / "data/prepared")
    assert store.timestamps is not None
    inside = np.ones(len(store.items), bool)
    inside[store.offsets[:-1]] = False
    assert (np.diff(store.timestamps)[inside[1:]] >= 0).all()


def test_plain_member_of_an_archive_gives_the_same_store(
    shared: Find, prepare: Callable[..., Sequences], project: Path
) -> None:
    with zipfile.ZipFile(shared("ml-100k/ml-100k.zip")) as archive:
        (project / "u.data").write_bytes(archive.read("ml-100k/u.data"))
    first = prepare("ml-100k", shared("ml-100k/ml-100k.zip"))
    stored = [np.array(first.items), np.array(first.negatives)]
    second = prepare("ml-100k", project / "u.data")
    assert np.array_equal(stored[0], second.items) and np.array_equal(stored[1], second.negatives)
    third = prepare("file", shared("ml-100k/ml-100k.zip"))
    assert np.array_equal(stored[0], third.items)


def test_games_of_the_sasrec_paper(shared: Find, prepare: Callable[..., Sequences]) -> None:
    path = shared("sasrec-games/Video.txt")
    store = prepare("sasrec", path, **EVERYTHING)
    assert counts(store) == (31_013, 23_715, 287_107)
    assert store.stats["times"] == "order" and store.stats["length"]["max"] == 860
    # The paper's own single pass leaves these below its threshold; a k-core leaves none.
    assert ((store.lengths < 5).sum(), (np.bincount(store.items)[1:] < 5).sum(), (store.lengths < 3).sum()) == (
        1672,
        11_604,
        112,
    )
    assert len(store.test) == 31_013 - 112
    core = prepare("sasrec", path, filter="k_core")
    assert core.lengths.min() >= 5 and np.bincount(core.items)[1:].min() >= 5


def test_beauty_of_the_s3rec_paper(shared: Find, prepare: Callable[..., Sequences]) -> None:
    store = prepare("s3rec", shared("s3rec-beauty/Beauty.txt"))
    assert counts(store) == (22_363, 12_101, 198_502)
    # Its ids are already in order of first appearance.
    assert store.items[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4]


@pytest.mark.parametrize("packed", [True, False])
def test_subscription_boxes(shared: Find, prepare: Callable[..., Sequences], project: Path, packed: bool) -> None:
    path = shared("amazon2023-subscription-boxes/Subscription_Boxes.jsonl.gz")
    if not packed:
        with gzip.open(path) as source, open(project / "boxes.jsonl", "wb") as target:
            shutil.copyfileobj(source, target)
        path = project / "boxes.jsonl"
    store = prepare("amazon-video-games-2023", path, **EVERYTHING)
    assert counts(store) == (15_237, 641, 16_216)
    assert (store.stats["duplicates"], store.stats["exact_duplicates"]) == (263, 200)
    assert store.stats["time_unit"] == "ms" and store.stats["times"] == "comparable"
