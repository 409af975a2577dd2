"""The metrics against a table worked by hand, against their definition one item at a time, and against torchmetrics."""

from itertools import permutations
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG
from torchmetrics.retrieval.base import RetrievalMetric

from sasrec import metrics
from sasrec.evaluation import mean_rank

# Distinct, and exact in float32; above 0, because to torchmetrics an item that scores 0 or less is not retrieved at all.
Rows = list[list[int]]
DISTINCT = st.integers(2, 30).flatmap(
    lambda n: st.lists(st.lists(st.integers(1, 2**20), min_size=n, max_size=n, unique=True), min_size=1, max_size=8)
)


def test_scores_worked_by_hand() -> None:
    """Four users of five items each; the target is the first column."""
    scores = torch.tensor(
        [
            [9.0, 1, 2, 3, 4],  # rank 1
            [3.0, 5, 4, 2, 1],  # rank 3
            [2.0, 2, 7, 1, 0],  # second and third are the same: rank 2.5
            [0.0, 0, 0, 0, 0],  # all the same: rank 3
        ]
    )
    ranks = mean_rank(scores, scores[:, 0]).numpy().astype(np.float64)
    assert ranks.tolist() == [1, 3, 2.5, 3]
    found = metrics.summarize(ranks)
    assert found["hr@1"] == found["ndcg@1"] == 1 / 4
    assert found["hr@5"] == found["hr@20"] == 1
    assert found["ndcg@5"] == pytest.approx((1 + 1 / 2 + 1 / log2(3.5) + 1 / 2) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2.5 + 1 / 3) / 4)


@pytest.mark.parametrize(
    ("rank", "k", "hit", "gain"),
    [
        (1, 1, 1, 1), (1.5, 1, 0, 0), (2, 5, 1, 1 / log2(3)), (5, 5, 1, 1 / log2(6)), (5.5, 5, 0, 0), (6, 5, 0, 0),
        (10, 10, 1, 1 / log2(11)), (10.5, 10, 0, 0), (20, 20, 1, 1 / log2(21)), (21, 20, 0, 0),
    ],
)  # fmt: skip
def test_the_cut_off_is_inclusive(rank: float, k: int, hit: float, gain: float) -> None:
    assert metrics.hit_rate(np.array([rank]), k).tolist() == [hit]
    assert metrics.ndcg(np.array([rank]), k).tolist() == pytest.approx([gain])


@given(DISTINCT, st.data())
def test_without_ties_they_equal_torchmetrics(rows: Rows, data: st.DataObject) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    places = torch.tensor([data.draw(st.integers(0, scores.shape[1] - 1)) for _ in rows])
    own = scores.gather(1, places[:, None]).squeeze(1)
    ours = metrics.summarize(mean_rank(scores, own).numpy().astype(np.float64))
    target = torch.nn.functional.one_hot(places, scores.shape[1]).bool()
    users = torch.arange(len(rows))[:, None].expand_as(scores)
    theirs: dict[str, RetrievalMetric] = {"mrr": RetrievalMRR()}
    theirs |= {f"hr@{k}": RetrievalHitRate(top_k=k) for k in metrics.CUTOFFS}
    theirs |= {f"ndcg@{k}": RetrievalNormalizedDCG(top_k=k) for k in metrics.CUTOFFS}
    assert set(theirs) == set(ours)
    for name, metric in theirs.items():
        expected = metric(scores.flatten(), target.flatten(), indexes=users.flatten()).item()
        assert ours[name] == pytest.approx(expected, abs=1e-6), name


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_with_ties_the_rank_is_the_mean_over_all_orders(values: list[int], data: st.DataObject) -> None:
    """Every order of the items that is sorted by score, the target's place in each."""
    target = data.draw(st.integers(0, len(values) - 1))
    orders = [
        order
        for order in permutations(range(len(values)))
        if all(values[a] >= values[b] for a, b in zip(order, order[1:], strict=False))
    ]
    expected = sum(order.index(target) + 1 for order in orders) / len(orders)
    scores = torch.tensor([values], dtype=torch.float32)
    assert mean_rank(scores, scores[:, target]).item() == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=25, max_size=25), min_size=1, max_size=6), st.integers(0, 24))
def test_with_ties_they_equal_counting_pairs(rows: Rows, place: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    ours = metrics.summarize(mean_rank(scores, scores[:, place]).numpy().astype(np.float64))
    ranks = []
    for row in rows:
        rank = 1.0
        for i, value in enumerate(row):
            if i != place:
                rank += 1 if value > row[place] else 0.5 if value == row[place] else 0
        ranks.append(rank)
    for k in metrics.CUTOFFS:
        assert ours[f"hr@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
        assert ours[f"ndcg@{k}"] == pytest.approx(sum(1 / log2(rank + 1) for rank in ranks if rank <= k) / len(ranks))
    assert ours["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
