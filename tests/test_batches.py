from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec.data import batches
from sasrec.data.batches import Batch, Batching, NegativeSampler, epoch_batches, left_padded, packed_batch, packed_rows, windows
from tests.conftest import SmallStore

BATCHINGS: tuple[Batching, ...] = ("bucketed", "shuffled", "packed")


def test_the_last_window_holds_the_last_training_pairs() -> None:
    offsets, ends = np.array([0, 6, 8]), np.array([4, 8])
    users, starts, stops = windows(offsets, ends, 2, False, np.random.default_rng(0))
    assert users.tolist() == [0, 1]
    # User 0 trains on items 0..3: pairs (0,1) (1,2) (2,3), the last two of them. User 1 has two items: one pair.
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == [(1, 3), (6, 7)]


@given(st.lists(st.integers(0, 23), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 5))
def test_every_pair_is_in_exactly_one_window(lengths: list[int], max_len: int, seed: int) -> None:
    offsets = np.cumsum([0, *lengths])
    users, starts, stops = windows(offsets, offsets[1:], max_len, True, np.random.default_rng(seed))
    assert (stops - starts <= max_len).all()
    assert (stops > starts).all()
    covered = sorted(i for a, b in zip(starts, stops, strict=True) for i in range(a, b))
    assert covered == [i for u, n in enumerate(lengths) for i in range(offsets[u], offsets[u] + n - 1)]
    assert all(offsets[u] <= a and b < offsets[u + 1] for u, a, b in zip(users, starts, stops, strict=True))


def test_padding_is_on_the_left() -> None:
    items = np.array([5, 6, 7, 8], np.int32)
    assert left_padded(items, np.array([0, 2]), np.array([3, 3]), 4).tolist() == [[0, 5, 6, 7], [0, 0, 0, 7]]


def test_targets_follow_their_histories_and_held_out_items_are_never_seen(chains: SmallStore) -> None:
    drawn = epoch_batches(chains, 8, 16, True, 0, 1)
    count, epoch = drawn.count, drawn.batches
    held_out = 0
    seen = list(epoch)
    assert len(seen) == count
    for batch in seen:
        real = batch.histories > 0
        assert ((batch.targets > 0) == real).all()
        assert (batch.targets[real] == batch.histories[real] % 40 + 1).all()
        assert real[:, -1].all()
    tokens = sum(int((batch.targets > 0).sum()) for batch in seen)
    held_out = 2 * len(chains.evaluated)
    assert tokens == len(chains.items) - len(chains.sequences) - held_out


def test_an_epoch_can_be_repeated_and_differs_from_the_next(chains: SmallStore) -> None:
    first, again, other = (list(epoch_batches(chains, 8, 16, True, 3, epoch).batches) for epoch in (1, 1, 2))
    assert all((a.histories == b.histories).all() for a, b in zip(first, again, strict=True))
    assert any(
        a.histories.shape != b.histories.shape or (a.histories != b.histories).any() for a, b in zip(first, other, strict=False)
    )


def padding(epoch: list[Batch]) -> float:
    """Share of the cells of an epoch's batches."""
    return sum(int((b.histories == 0).sum()) for b in epoch) / sum(b.histories.size for b in epoch)


def test_buckets_hold_windows_of_like_length_and_shuffled_batches_of_any(small_store: type[SmallStore]) -> None:
    rng = np.random.default_rng(0)
    store = small_store([[1] * int(n) for n in rng.integers(4, 52, 2000)], 3)
    bucketed, shuffled, packed = (list(epoch_batches(store, 50, 32, True, 0, 0, way).batches) for way in BATCHINGS)
    assert padding(bucketed) < 0.03
    assert padding(shuffled) > 0.3
    assert padding(packed) < 0.1
    # In random order: no batch is all short or all long, and the batches are about equally long.
    lengths = [(batch.histories > 0).sum(1) for batch in shuffled if len(batch.histories) == 32]
    assert min(x.max() - x.min() for x in lengths) > 20
    assert np.ptp([x.mean() for x in lengths]) < 20


def content(batch: Batch) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(user, inputs, targets) of each window of a batch, sorted."""
    numbers = (batch.histories > 0).astype(int) if batch.windows is None else batch.windows
    found = []
    for row in range(len(numbers)):
        for number in set(numbers[row].tolist()) - {0}:
            own = numbers[row] == number
            (user,) = set(batch.users[row, own].tolist())
            found.append((user, tuple(batch.histories[row, own].tolist()), tuple(batch.targets[row, own].tolist())))
    return sorted(found)


@pytest.mark.parametrize("every", [True, False])
def test_all_ways_of_batching_hold_the_same_windows_each_epoch(chains: SmallStore, every: bool) -> None:
    for epoch in (1, 2):
        windows_of = {}
        for way in BATCHINGS:
            drawn = epoch_batches(chains, 8, 16, every, 3, epoch, way)
            found = [content(batch) for batch in drawn.batches]
            assert len(found) == drawn.count
            assert [len(windows) for windows in found].count(16) == drawn.count - 1
            windows_of[way] = found
        assert len({tuple(sorted(sum(found, []))) for found in windows_of.values()}) == 1
        # Packing changes the layout of a batch, not what is in it.
        assert windows_of["packed"] == windows_of["shuffled"]


@pytest.mark.parametrize("way", BATCHINGS)
def test_every_position_knows_its_place_in_the_store(chains: SmallStore, way: Batching) -> None:
    for batch in epoch_batches(chains, 8, 16, True, 3, 1, way).batches:
        assert batch.places is not None
        real = batch.histories > 0
        assert ((batch.places >= 0) == real).all()
        assert (chains.items[batch.places[real]] == batch.histories[real]).all()
        assert (chains.items[batch.places[real] + 1] == batch.targets[real]).all()
        user = np.searchsorted(chains.offsets, batch.places[real], "right") - 1
        assert (user == batch.users[real]).all()


def test_small_data_has_smaller_batches_rather_than_few(chains: SmallStore) -> None:
    size = len(list(epoch_batches(chains, 8, 10**6, True, 0, 1, "shuffled").batches)[0].histories)
    for least in (1, 7, size, 10 * size):
        drawn = epoch_batches(chains, 8, 16, True, 0, 1, "shuffled", least)
        sizes = [len(batch.histories) for batch in drawn.batches]
        assert len(sizes) == drawn.count >= min(least, size)
        assert max(sizes) == max(1, min(16, size // least))
        assert sum(sizes) == size


def test_windows_are_packed_first_fit_longest_first_from_the_right() -> None:
    items = np.arange(1, 21, dtype=np.int32)
    starts, stops = np.array([0, 5, 10, 15]), np.array([2, 9, 11, 17])  # lengths 2, 4, 1, 2
    batch = packed_batch(items, np.array([7, 8, 9, 5]), starts, stops)
    # The longest fills a row; the two of two share the next, the first of them at the right; the single one begins a third.
    assert batch.histories.tolist() == [[6, 7, 8, 9], [16, 17, 1, 2], [0, 0, 0, 11]]
    assert batch.targets.tolist() == [[7, 8, 9, 10], [17, 18, 2, 3], [0, 0, 0, 12]]
    assert batch.windows is not None
    assert batch.windows.tolist() == [[1, 1, 1, 1], [2, 2, 1, 1], [0, 0, 0, 1]]
    assert batch.users[batch.targets > 0].tolist() == [8, 8, 8, 8, 5, 5, 7, 7, 9]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_packed_windows_neither_overlap_nor_leave_the_row(lengths: list[int]) -> None:
    rows, taken = packed_rows(np.array(lengths))
    cells = [(row, right + i) for row, right, n in zip(rows, taken, lengths, strict=True) for i in range(n)]
    assert len(set(cells)) == len(cells)
    assert max(column for _, column in cells) < max(lengths)
    assert sorted(set(rows.tolist())) == list(range(int(rows.max()) + 1))


@pytest.mark.parametrize("shape", [(), (3,), (4, 2)])
@pytest.mark.parametrize("bit_table", [0, 2**28])
def test_negatives_are_uniform_over_unseen_items(
    small_store: type[SmallStore], shape: tuple[int, ...], bit_table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BIT_TABLE", bit_table)
    store = small_store([[1, 2, 3, 4, 5], [6, 7, 8]], 8)
    users = np.repeat([0, 1], 4000)
    drawn = NegativeSampler(store, True).draw(users, (8000, *shape), np.random.default_rng(0)).reshape(8000, -1)
    # Of user 0 the first three are training items; the held-out ones may be drawn, training does not know them.
    for user, unseen in ((0, [4, 5, 6, 7, 8]), (1, [1, 2, 3, 4, 5, 7, 8])):
        values, counts = np.unique(drawn[users == user], return_counts=True)
        assert values.tolist() == unseen
        assert counts.min() / counts.max() > 0.8


@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 12))
def test_both_ways_of_looking_up_what_was_seen_agree(sequences: list[list[int]], rows: int) -> None:
    """However few interactions are gone through at once."""
    store = SmallStore(sequences, 20)
    users, items = (axis.ravel() for axis in np.meshgrid(np.arange(len(sequences)), np.arange(1, 21), indexing="ij"))
    known = [store.items[store.offsets[u] : store.train_ends[u]].tolist() for u in range(len(sequences))]
    for bit_table in (0, 2**28):
        with mock.patch.object(batches, "BIT_TABLE", bit_table), mock.patch.object(batches, "ROWS", rows):
            seen = batches.Seen(store)
        assert (seen.bits is None) == (bit_table == 0)
        assert seen(users, items).tolist() == [item in known[u] for u, item in zip(users, items, strict=True)]
        assert seen.counts.tolist() == [len(set(own)) for own in known]


def test_negatives_of_a_row_are_in_no_history_of_its_users(small_store: type[SmallStore]) -> None:
    # Training items 1 2 3, and 6; the last two of each are held out.
    store = small_store([[1, 2, 3, 4, 5], [6, 7, 8]], 8)
    users, real = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]), np.ones((3, 4), bool)
    real[2, :2] = False
    drawn = NegativeSampler(store, True).draw_by_row(users, real, 3000, np.random.default_rng(0))
    for row, unseen in enumerate(([4, 5, 7, 8], [4, 5, 7, 8], [4, 5, 6, 7, 8])):
        values, counts = np.unique(drawn[row], return_counts=True)
        assert values.tolist() == unseen
        assert counts.min() / counts.max() > 0.8
    anything = NegativeSampler(store, False).draw_by_row(users, real, 3000, np.random.default_rng(0))
    assert set(anything[0].tolist()) == set(range(1, 9))


def test_users_who_have_seen_everything_between_them_get_any_item(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 1], [3, 3, 1, 2]], 3)
    users, real = np.array([[0, 1]]), np.ones((1, 2), bool)
    drawn = NegativeSampler(store, True).draw_by_row(users, real, 20, np.random.default_rng(0))
    assert set(drawn.ravel().tolist()) <= {1, 2, 3}


def test_shared_negatives_follow_the_training_counts(small_store: type[SmallStore]) -> None:
    # The last two items of a user with three or more are held out: 5 and 6 occur only there, 4 nowhere.
    store = small_store([[1, 1, 1, 2, 5, 6], [2, 3], [1, 1, 6, 5]], 6)
    sampler = NegativeSampler(store, True, by_popularity=True)
    drawn = sampler.draw_shared(80_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=7)
    assert counts[[0, 4, 5, 6]].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(counts[1:4] / len(drawn), [5 / 8, 2 / 8, 1 / 8], atol=0.005)
    log_expected = sampler.log_expected(np.array([1, 3, 2, 2]))
    assert log_expected is not None
    np.testing.assert_allclose(log_expected, np.log([4 * 5 / 8, 4 / 8, 4 * 2 / 8, 4 * 2 / 8]), rtol=1e-6)
    assert log_expected.dtype == np.float32


def test_uniform_shared_negatives_need_no_correction(chains: SmallStore) -> None:
    sampler = NegativeSampler(chains, True)
    drawn = sampler.draw_shared(500, np.random.default_rng(0))
    assert (drawn == np.random.default_rng(0).integers(1, 41, 500)).all()
    assert sampler.log_expected(drawn) is None


def test_a_user_who_has_seen_everything_gets_any_item(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 1, 2]], 3)
    drawn = NegativeSampler(store, True).draw(np.zeros(50, np.int64), (50,), np.random.default_rng(0))
    assert set(drawn.tolist()) == {1, 2, 3}


def test_negatives_from_all_items_ignore_the_history(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 4]], 4)
    drawn = NegativeSampler(store, False).draw(np.zeros(200, np.int64), (200,), np.random.default_rng(0))
    assert set(drawn.tolist()) == {1, 2, 3, 4}
