"""Details of preparing and batching that tables made for something else do not show."""

from pathlib import Path

import numpy as np
import pytest

from sasrec.config import DatasetParams, PrepareParams
from sasrec.data.batches import Batching, epoch_batches, windows
from sasrec.data.interactions import build, looks_ranked
from sasrec.data.sequences import Sequences
from sasrec.data.store import prepare
from sasrec.files import write_json
from tests.conftest import SmallStore
from tests.data.test_interactions import KEEP_ALL, named, sequence, table


def test_times_too_far_apart_for_a_key_with_the_row_keep_the_order_of_the_file_on_ties() -> None:
    """Users and times fit together in 64 bits, but not with the places of the rows besides."""
    far = 2**60
    rows = [("u", "c", far), ("u", "a", 0), ("v", "b", 0), ("u", "b", far), ("u", "d", 0), ("v", "a", 0), ("v", "c", far)]
    assert 2 * (far + 1) < 2**63 <= 2 * (far + 1) * len(rows)
    source = table([(*row, 1.0) for row in rows])
    assert named(source, build(source, PrepareParams(**KEEP_ALL))) == {"u": "adcb", "v": "bac"}


def test_ties_at_the_end_count_for_those_who_are_evaluated_alone() -> None:
    rows = [*sequence("u", "ab"), ("u", "c", 1, 3.0), ("v", "a", 5, 3.0), ("v", "b", 5, 3.0), *sequence("w", "abc")]
    stats = build(table(rows), PrepareParams(**KEEP_ALL)).stats
    assert (stats["ties"], stats["last_two_tie"]) == (4, 1)


def test_ties_with_what_is_filtered_out_are_none_of_those_kept() -> None:
    rows = [*sequence("u", "abc"), ("u", "x", 1, 3.0), *sequence("v", "abc")]
    stats = build(table(rows), PrepareParams(min_user=1, min_item=2)).stats
    assert (stats["ties"], stats["ties_kept"]) == (2, 0)


@pytest.mark.parametrize(("users", "at_once", "ranked"), [(10, 4, False), (10, 5, False), (10, 6, True), (9, 9, False)])
def test_times_are_ranks_where_more_than_half_of_ten_users_or_more_begin_at_once(
    users: int, at_once: int, ranked: bool
) -> None:
    begins = [0] * at_once + list(range(1, users - at_once + 1))
    rows = [row for user, begin in enumerate(begins) for row in sequence(f"u{user}", "abc", begin)]
    assert looks_ranked(build(table(rows), PrepareParams(**KEEP_ALL))) == ranked


def test_popular_candidates_follow_the_training_part_alone(tmp_path: Path) -> None:
    """Of what neither evaluated user has seen, only e and f are trained on; c, x, d and y are held out."""
    lines = [f"{user},{item}" for user, items in (("u", "abcx"), ("v", "bady"), ("w", "ef")) for item in items]
    source = {"name": "file", "format": "table", "file": "rows.csv", "extras": [], "original": "rows.csv", "sha256": "0"}
    write_json(tmp_path / "raw" / "source.json", source | {"local": True, "times": "comparable"})
    (tmp_path / "raw" / "rows.csv").write_text("\n".join(["user,item", *lines]) + "\n")
    params = PrepareParams(min_user=1, min_item=1, candidates=3)
    prepare(tmp_path / "raw", DatasetParams(name="file"), params, tmp_path / "prepared")
    store = Sequences.load(tmp_path / "prepared")
    assert np.sort(store.popular_negatives, axis=1).tolist() == [[0, 7, 8], [0, 7, 8]]
    # Uniform ones are of all items that the user has never had: d, y, e, f; and c, x, e, f.
    assert [set(row.tolist()) <= own for row, own in zip(store.negatives, ({5, 6, 7, 8}, {3, 4, 7, 8}), strict=True)]


def test_the_first_cut_of_a_long_history_falls_anywhere() -> None:
    """Seven pairs in windows of three: the last of them has one, two or three pairs."""
    offsets, ends = np.array([0, 8]), np.array([8])
    found = [windows(offsets, ends, 3, True, np.random.default_rng(seed)) for seed in range(60)]
    assert {int(stops[0] - starts[0]) for _, starts, stops in found} == {1, 2, 3}


def together(store: SmallStore, way: Batching, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The users of each batch."""
    batches = epoch_batches(store, 8, 16, True, seed, epoch, way).batches
    return [tuple(sorted(set(batch.users[batch.targets > 0].tolist()))) for batch in batches]


def test_epochs_and_seeds_put_other_windows_together(small_store: type[SmallStore]) -> None:
    """All windows are equally long, so that nothing but chance tells what is in a batch."""
    store = small_store([[1, 2, 3, 4, 5]] * 64, 6)
    ways: tuple[Batching, ...] = ("packed", "shuffled", "bucketed")
    for way in ways:
        found = [together(store, way, seed, epoch) for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
        assert found[0] == found[1] and [len(users) for users in found[0]] == [16] * 4
        assert len({frozenset(batches) for batches in found}) == 3, way
        assert all(users != tuple(range(users[0], users[0] + 16)) for batches in found for users in batches), way


def test_buckets_do_not_come_in_the_order_of_their_lengths(small_store: type[SmallStore]) -> None:
    store = small_store([[1] * (4 + user % 40) for user in range(400)], 3)
    lengths = [batch.histories.shape[1] for batch in epoch_batches(store, 50, 16, True, 0, 1, "bucketed").batches]
    assert len(lengths) == 25 and lengths not in (sorted(lengths), sorted(lengths, reverse=True))
