import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec.data import batches
from sasrec.data.batches import Batch, NegativeSampler, epoch_batches, left_padded, windows
from tests.conftest import SmallStore


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
    bucketed, shuffled = (list(epoch_batches(store, 50, 32, True, 0, 0, b).batches) for b in (True, False))
    assert padding(bucketed) < 0.03
    assert padding(shuffled) > 0.3
    # In random order: no batch is all short or all long, and the batches are about equally long.
    lengths = [(batch.histories > 0).sum(1) for batch in shuffled if len(batch.users) == 32]
    assert min(x.max() - x.min() for x in lengths) > 20
    assert np.ptp([x.mean() for x in lengths]) < 20


@pytest.mark.parametrize("every", [True, False])
def test_both_ways_of_batching_hold_the_same_windows_each_epoch(chains: SmallStore, every: bool) -> None:
    for epoch in (1, 2):
        content = []
        for bucketed in (True, False):
            drawn = epoch_batches(chains, 8, 16, every, 3, epoch, bucketed)
            count, batches = drawn.count, drawn.batches
            found = list(batches)
            assert len(found) == count
            assert [len(b.users) for b in found].count(16) == count - 1
            rows = [
                (int(user), *(tuple(x[x > 0].tolist()) for x in (history, target)))
                for b in found
                for user, history, target in zip(b.users, b.histories, b.targets, strict=True)
            ]
            content.append(sorted(rows))
        assert content[0] == content[1]


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


@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=1, max_size=6))
def test_both_ways_of_looking_up_what_was_seen_agree(sequences: list[list[int]]) -> None:
    store = SmallStore(sequences, 20)
    users, items = (axis.ravel() for axis in np.meshgrid(np.arange(len(sequences)), np.arange(1, 21), indexing="ij"))
    seen = batches.Seen(store)
    expected = [item in store.items[store.offsets[u] : store.train_ends[u]] for u, item in zip(users, items, strict=True)]
    assert seen(users, items).tolist() == expected
    seen.bits = None
    assert seen(users, items).tolist() == expected


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
