from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasrec import evaluation, metrics
from sasrec.data.batches import Ints
from sasrec.data.sequences import Part
from sasrec.errors import UserError
from sasrec.models.events import Events, Histories
from sasrec.models.events import ids as item_ids
from tests.conftest import SmallStore


def test_metrics_of_a_table_worked_by_hand() -> None:
    ranks = np.array([1.0, 2.5, 10.0, 11.0])
    assert metrics.hit_rate(ranks, 10).tolist() == [1, 1, 1, 0]
    assert metrics.ndcg(ranks, 10).tolist() == pytest.approx([1, 1 / np.log2(3.5), 1 / np.log2(11), 0])
    assert metrics.reciprocal_rank(ranks).tolist() == pytest.approx([1, 0.4, 0.1, 1 / 11])
    summary = metrics.summarize(ranks, "sampled_")
    assert summary["sampled_hr@1"] == 0.25
    assert summary["sampled_hr@20"] == 1.0
    assert set(summary) == {f"sampled_{m}@{k}" for m in ("hr", "ndcg") for k in (1, 5, 10, 20)} | {"sampled_mrr"}


def test_the_bootstrap_interval_covers_the_mean_and_shrinks_with_the_users() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(50), rng.random(5000)
    low, high = metrics.bootstrap_interval(few, 500, 0)
    assert low < few.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 50**0.5, rel=0.2)
    narrow = metrics.bootstrap_interval(many, 500, 0)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert metrics.bootstrap_interval(np.full(9, 0.5), 100, 1) == (0.5, 0.5)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.data())
def test_the_rank_is_the_mean_over_all_orders_of_ties_and_does_not_depend_on_the_place(
    values: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(values) - 1))
    scores = torch.tensor([values], dtype=torch.float32)
    rank = evaluation.mean_rank(scores, scores[:, place]).item()
    higher = sum(v > values[place] for v in values)
    equal = sum(v == values[place] for v in values)
    assert rank == np.mean([higher + i for i in range(1, equal + 1)])
    shuffled = data.draw(st.permutations(values))
    again = evaluation.mean_rank(torch.tensor([shuffled], dtype=torch.float32), scores[:, place]).item()
    assert again == rank


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 8))
def test_the_best_are_sorted_and_ties_go_to_the_lower_id(rows: list[list[int]], k: int) -> None:
    ids = evaluation.best(torch.tensor(rows, dtype=torch.float32), k)
    expected = [sorted(range(6), key=lambda i, row=row: (-row[i], i))[:k] for row in rows]  # type: ignore[misc]
    assert ids.tolist() == expected


def brute_force(store: SmallStore, table: np.ndarray, part: str, exclude: bool) -> list[float]:
    """Full ranks by definition, one user and one item at a time."""
    ranks = []
    for user in store.evaluated:
        sequence = store.sequences[user]
        held = -1 if part == "test" else -2
        target, history = sequence[held], sequence[:held]
        candidates = [i for i in range(1, store.items_count + 1) if i == target or not (exclude and i in history)]
        mine = table[user, target]
        higher = sum(table[user, i] > mine for i in candidates)
        equal = sum(table[user, i] == mine for i in candidates if i != target)
        ranks.append(1 + higher + equal / 2)
    return ranks


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ranks_equal_brute_force(chains: SmallStore, part: Part, exclude: bool, size: int) -> None:
    table = np.random.default_rng(1).integers(0, 6, (len(chains.sequences), 41)).astype(np.float32)

    def scorer(histories: Tensor, users: Ints) -> Tensor:
        return torch.from_numpy(table[users])

    ranks = evaluation.rank(scorer, chains, part, 50, exclude_seen=exclude, batch_size=size)
    assert ranks.full.tolist() == brute_force(chains, table, part, exclude)
    held = chains.held(part)
    for found, negatives in ((ranks.sampled, held.negatives), (ranks.popsampled, held.popular_negatives)):
        if negatives is None:
            assert part == "validation" and np.isnan(found).all()
            continue
        for row, user in enumerate(held.users):
            others = [table[user, i] for i in negatives[row]]
            mine = table[user, chains.items[held.positions[row]]]
            assert found[row] == 1 + sum(o > mine for o in others) + sum(o == mine for o in others) / 2
    alone = evaluation.rank(scorer, chains, part, 50, exclude_seen=exclude, batch_size=size, only="full")
    assert np.array_equal(alone.full, ranks.full) and np.isnan(alone.sampled).all() and not alone.recommended.any()


SEQUENCES = st.lists(st.lists(st.integers(1, 23), min_size=3, max_size=12), min_size=1, max_size=9)


@settings(max_examples=60)
@given(SEQUENCES, st.integers(5, 60), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_scores_in_blocks_of_items_rank_as_those_of_all_items_at_once(
    sequences: list[list[int]], elements: int, size: int, exclude: bool, seed: int
) -> None:
    """Small integers as states and table, so that ties are many and products exact."""
    store = SmallStore(sequences, 23)
    rng = np.random.default_rng(seed)
    states, table = (torch.from_numpy(rng.integers(-2, 3, (rows, 2)).astype(np.float32)) for rows in (len(sequences), 24))
    factored = evaluation.Factored(lambda histories, users: states[users], table)
    options: dict[str, Any] = {"exclude_seen": exclude, "batch_size": size}
    whole = evaluation.rank(lambda histories, users: factored(histories, users), store, "test", 5, **options)
    with mock.patch.dict(evaluation.FACTORED_ELEMENTS, cpu=elements):
        parts = evaluation.rank(factored, store, "test", 5, **options)
    for name in ("full", "sampled", "popsampled", "recommended"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name


class Rounding(evaluation.Factored):
    """The targets' own products come out a little lower than in the blocks, as sums in another order may."""

    def own(self, blocks: Any, target: Tensor) -> Tensor:
        return super().own(blocks, target) - 1e-3


def test_a_target_is_compared_by_its_score_in_the_blocks(chains: SmallStore) -> None:
    states, table = torch.rand(60, 3), torch.rand(41, 3)
    with mock.patch.dict(evaluation.FACTORED_ELEMENTS, cpu=50):
        found, rounded = (
            evaluation.rank(kind(lambda histories, users: states[users], table), chains, "test", 5)
            for kind in (evaluation.Factored, Rounding)
        )
    assert np.array_equal(found.full, rounded.full) and np.array_equal(found.sampled, rounded.sampled)


@pytest.mark.parametrize("item", [1, 20, 40])
def test_a_row_that_is_not_a_number_is_an_error_wherever_it_stands(chains: SmallStore, item: int) -> None:
    states, table = torch.rand(60, 3), torch.rand(41, 3)
    table[item] = torch.nan
    factored = evaluation.Factored(lambda histories, users: states[users], table)
    with mock.patch.dict(evaluation.FACTORED_ELEMENTS, cpu=50), pytest.raises(UserError, match="not a number"):
        evaluation.rank(factored, chains, "test", 5)


def test_the_history_at_test_includes_the_validation_item(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 4, 5], [6, 7, 8]], 9)
    given: dict[str, list[list[int]]] = {}
    for part in ("validation", "test"):
        seen: list[list[int]] = []

        def scorer(histories: Tensor, users: Ints, seen: list[list[int]] = seen) -> Tensor:
            seen.extend([i for i in row if i] for row in histories.tolist())
            return torch.zeros(len(histories), 10)

        evaluation.rank(scorer, store, part, 3)
        given[part] = sorted(seen)
    assert given == {"validation": [[1, 2, 3], [6]], "test": [[2, 3, 4], [6, 7]]}


def test_candidates_that_do_not_exist_do_not_count(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 4]], 6, candidates=5)  # two unseen items only
    assert (store.negatives == 0).sum() == 3
    ranks = evaluation.rank(lambda h, u: torch.arange(7.0).flip(0).repeat(len(h), 1), store, "test", 5)
    assert ranks.sampled.tolist() == ranks.popsampled.tolist() == [1.0]
    ranks = evaluation.rank(lambda h, u: torch.arange(7.0).repeat(len(h), 1), store, "test", 5)
    assert ranks.sampled.tolist() == ranks.popsampled.tolist() == [3.0]


def test_a_target_that_was_seen_before_stays_a_candidate(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 1]], 5)
    ranks = evaluation.rank(lambda h, u: torch.tensor([[0.0, 5.0, 9.0, 9.0, 1.0, 1.0]]), store, "test", 5)
    assert ranks.full.tolist() == [1.0]


def test_a_score_that_is_not_a_number_is_an_error(chains: SmallStore) -> None:
    with pytest.raises(UserError, match="not a number"):
        evaluation.rank(lambda h, u: torch.full((len(h), 41), torch.nan), chains, "test", 5)


def test_what_may_not_be_recommended_is_not_covered(small_store: type[SmallStore]) -> None:
    """Eleven items, seven of them seen: three are left beside the target, fewer than ten."""
    store = small_store([[*range(1, 8), 8]], 11)
    scores = torch.arange(12.0).repeat(1, 1)
    ranks = evaluation.rank(lambda histories, users: scores.clone(), store, "test", 10)
    assert ranks.recommended.nonzero()[0].tolist() == [8, 9, 10, 11]


def test_coverage_counts_items_in_somebodys_ten_best(small_store: type[SmallStore]) -> None:
    store = small_store([[1, 2, 3, 4], [5, 6, 7]], 40)
    ranks = evaluation.rank(lambda h, u: torch.arange(41.0).repeat(len(h), 1), store, "test", 5)
    assert ranks.coverage == 10 / 40


class Encoder:
    """States are sums of ids, and ratings where there are any; notes the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, histories: Histories, last: bool) -> Tensor:
        assert last
        self.shapes.append(tuple(item_ids(histories).shape))
        known = item_ids(histories).float()
        if isinstance(histories, Events):
            assert histories.ratings is not None
            known = known + histories.ratings
        return known.sum(1)[:, None, None]


@pytest.mark.parametrize(("length", "users"), [(200, 32), (50, 128), (8, 128), (9000, 1)])
def test_histories_are_encoded_in_parts_of_so_many_positions(length: int, users: int) -> None:
    histories = torch.randint(1, 100, (2 * users + 1, length), generator=torch.Generator().manual_seed(0))
    for given_, expected in (
        (histories, histories.float().sum(1)),
        (Events(histories, ratings=torch.ones(histories.shape)), histories.float().sum(1) + length),
    ):
        encoder = Encoder()
        states = evaluation.last_states(encoder, given_)
        assert torch.equal(states, expected[:, None])
        assert encoder.shapes == [(users, length), (users, length), (1, length)]
