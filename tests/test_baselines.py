"""The baselines on tables small enough to work out by hand, and what they may know."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sasrec import baselines
from sasrec.baselines import ItemKNN, RecentPopularity
from sasrec.config import BASELINES, EvaluateParams, Study
from sasrec.data.sequences import Part, Sequences
from sasrec.files import read_json
from stages.baselines import fit, main
from tests.test_pipeline import PIPELINE

DAY = 86_400


def sequences(users: Sequence[Sequence[tuple[int, int]]], items: int, **stats: Any) -> Sequences:
    """A store of the (item, time) of each user, whose sampled candidates are all the items it never had."""
    flat = np.array([pair for user in users for pair in user], np.int64).reshape(-1, 2)
    offsets = np.cumsum([0] + [len(user) for user in users])
    unseen = [sorted(set(range(1, items + 1)) - {item for item, _ in user}) for user in users if len(user) >= 3]
    negatives = np.zeros((len(unseen), items), np.int32)
    for row, some in zip(negatives, unseen, strict=True):
        row[: len(some)] = some
    known = {"items": items, "users": len(users), "times": "comparable", "time_unit": "s"}
    card = {"dataset": "toy", "sha256": "0", "candidates": items, "candidates_seed": 0, "filter": {}}
    few = {"few_candidates": 0, "few_popular_candidates": 0, "split": {"split": "leave_one_out"}}
    stats = {**known, **card, **few, "evaluated": len(unseen), **stats}
    evaluated = np.flatnonzero(np.diff(offsets) >= 3)
    test, validation = (np.stack([evaluated, offsets[evaluated + 1] - back], 1) for back in (1, 2))
    ends = np.where(np.diff(offsets) >= 3, offsets[1:] - 2, offsets[1:])
    return Sequences(
        flat[:, 0].astype(np.int32), offsets, flat[:, 1], None, ends, test, validation, negatives, negatives, negatives, stats
    )


def scored(scorer: Any, histories: Sequence[Sequence[int]], users: Sequence[int]) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = scorer(torch.tensor(histories), np.array(users)).numpy()
    return scores


def recent(items: Sequence[int], times: Sequence[int], now: Sequence[int], window: int, count: int = 4) -> RecentPopularity:
    known = np.ones(len(items), bool)
    return RecentPopularity.fit(np.array(items, np.int32), np.array(times), known, count, np.array(now), window)


def test_recent_popularity_counts_from_exactly_the_window_ago_to_just_before_the_request() -> None:
    #                 item 1  1  2  3  2
    #                 time 0  3  3  5  9
    scorer = recent([1, 1, 2, 3, 2], [0, 3, 3, 5, 9], now=[10, 3, 5, 0], window=7)
    scores = scored(scorer, [[1]] * 5, [1, 0, 3, 2, 0])
    assert scores.tolist() == [
        [0, 1 + 1 / 2, 0, 0, 0],  # at 3, of [-4, 3): item 1 once; what happens at 3 is not known yet
        [0, 1 + 2 / 3, 2 + 2 / 3, 1 + 1 / 3, 0],  # at 10, of [3, 10): what happened at 3 counts
        [0, 0, 0, 0, 0],  # at 0 nothing is known
        [0, 2 + 2 / 3, 1 + 1 / 3, 0, 0],  # at 5, of [-2, 5)
        [0, 1 + 2 / 3, 2 + 2 / 3, 1 + 1 / 3, 0],
    ]


def test_older_popularity_orders_what_is_not_recent() -> None:
    scores = scored(recent([1, 1, 1, 2, 2, 3], [0, 0, 0, 0, 0, 9], now=[10], window=2), [[1]], [0])
    assert scores.tolist() == [[0, 3 / 4, 2 / 4, 1 + 1 / 4, 0]]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(-5, 5)), max_size=20), st.lists(st.integers(-6, 6), min_size=1))
def test_recent_popularity_equals_brute_force(interactions: list[tuple[int, int]], now: list[int]) -> None:
    window = 3
    scorer = recent([item for item, _ in interactions], [time for _, time in interactions], now, window)
    for t, scores in zip(now, scored(scorer, [[1]] * len(now), range(len(now))), strict=True):
        past = [sum(item == i and time < t for item, time in interactions) for i in range(5)]
        inside = [sum(item == i and t - window <= time < t for item, time in interactions) for i in range(5)]
        assert scores.tolist() == [inside[i] + past[i] / (1.0 + max(past)) for i in range(5)]


@pytest.mark.parametrize(("unit", "second"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_the_window_is_in_the_unit_of_the_store(unit: str, second: int) -> None:
    other = [(2, 0), (3, 1), (4, 2), (4, 3)]
    asking = [(1, 0), (1, 0), (1, round(1.5 * DAY) + 1)]
    users = [[(item, time * second) for item, time in user] for user in (other, asking)]
    scorer = fit("recent_popularity", sequences(users, 4, time_unit=unit), "test", EvaluateParams(recent_days=1.5))
    # Item 2 is a second too old, item 3 just not; item 4 was asked of the other user once, and counts once.
    assert scored(scorer, [[1]], [1]).astype(int).tolist() == [[0, 0, 0, 1, 1]]


def knn(users: Sequence[Sequence[int]], count: int, neighbours: int = 100, last: int = 10, elements: int = 10**6) -> ItemKNN:
    items = np.array([item for user in users for item in user], np.int32)
    offsets = np.cumsum([0] + [len(user) for user in users])
    return ItemKNN.fit(items, np.ones(len(items), bool), count, offsets, neighbours, last, elements)


# Users of item 1: two, of 2: three, of 3: two, of 4: none. A repeated item counts once.
TABLE = [[1, 2, 1], [3, 1, 2], [3], [2]]


def test_similarities_are_cosines_of_the_sets_of_users() -> None:
    a, b, c = 2 / 6**0.5, 1 / 2, 1 / 6**0.5
    expected = [[0, 0, 0, 0, 0], [0, 0, a, b, 0], [0, a, 0, c, 0], [0, b, c, 0, 0], [0, 0, 0, 0, 0]]
    assert knn(TABLE, 4).nearest.toarray() == pytest.approx(np.array(expected))


def test_each_item_keeps_its_nearest() -> None:
    a, b = 2 / 6**0.5, 1 / 2
    expected = [[0, 0, 0, 0, 0], [0, 0, a, 0, 0], [0, a, 0, 0, 0], [0, b, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert knn(TABLE, 4, neighbours=1).nearest.toarray() == pytest.approx(np.array(expected))
    # All equally near: the lower ids stay.
    assert [row.indices.tolist() for row in knn([[4, 3, 2, 1]], 4, neighbours=2).nearest] == [
        [],
        [2, 3],
        [1, 3],
        [1, 2],
        [1, 2],
    ]


def test_the_last_items_count_for_more() -> None:
    a, b, c = 2 / 6**0.5, 1 / 2, 1 / 6**0.5
    scores = scored(knn(TABLE, 4), [[0, 1, 3], [0, 0, 2], [2, 3, 3]], [0, 1, 2])
    expected = [[0, b, c + a / 4, b / 4, 0], [0, a, 0, c, 0], [0, b + b / 4 + a / 9, c + c / 4, c / 9, 0]]
    assert scores == pytest.approx(np.array(expected), abs=1e-7)
    assert scored(knn(TABLE, 4, last=1), [[0, 1, 3]], [0]) == pytest.approx(np.array([[0, b, c, 0, 0]]), abs=1e-7)


def test_popularity_orders_equal_scores() -> None:
    scores = scored(knn([[1, 2], [3], [3], [4]], 5), [[1]], [0])[0]
    assert np.argsort(-scores, kind="stable").tolist() == [2, 3, 1, 4, 0, 5]
    assert scores[3] < 1e-9 and scores[5] == 0


def test_long_histories_take_part_with_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "LONGEST", 2)
    items, offsets = np.array([1, 2, 3, 4, 1, 3], np.int32), np.array([0, 4, 6])
    known = np.array([True, True, True, False, True, True])
    sets = baselines.user_sets(items, known, 4, offsets)
    assert sets.toarray().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]


@given(st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=12), st.integers(1, 10), st.integers(1, 40))
def test_blocks_of_rows_equal_one_dense_product(users: list[list[int]], neighbours: int, elements: int) -> None:
    sets = np.array([[i in user for i in range(10)] for user in users], np.float64)
    counts = sets.sum(0)
    cosines = np.divide(
        sets.T @ sets, np.sqrt(np.outer(counts, counts)), where=np.outer(counts, counts) > 0, out=np.zeros((10, 10))
    )
    np.fill_diagonal(cosines, 0)
    for row in cosines:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    assert (knn(users, 9, neighbours, elements=elements).nearest.toarray() == cosines.astype(np.float32)).all()


def some_users() -> list[list[tuple[int, int]]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 30)
    return [[(int(rng.integers(1, 13)), int(t) * DAY) for t in np.sort(rng.integers(0, 40, n))] for n in lengths]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("part", ["validation", "test"])
def test_held_out_items_tell_nothing(name: str, part: Part) -> None:
    users = some_users()
    first = sequences(users, 12)
    hidden = (-1,) if part == "test" else (-1, -2)
    for user in users:
        if len(user) >= 3:
            for place in hidden:
                user[place] = (user[place][0] % 12 + 1, user[place][1])
    second = sequences(users, 12)
    assert (first.items != second.items).sum() == len(first.test) * len(hidden)
    histories = np.random.default_rng(1).integers(0, 13, (len(first.test), 5)).tolist()
    params = EvaluateParams()
    asked = first.held(part).users.tolist()
    one, two = (scored(fit(name, store, part, params), histories, asked) for store in (first, second))
    assert (one == two).all()


def test_what_happens_from_the_request_on_tells_recent_popularity_nothing() -> None:
    users = some_users()
    first = sequences(users, 12)
    user = int(first.test[0, 0])
    now = users[user][-1][1]
    changed = [[(item % 12 + 1 if time >= now else item, time) for item, time in one] for one in users]
    second = sequences(changed, 12)
    assert (first.items != second.items).sum() > 20
    one, two = (scored(fit("recent_popularity", store, "test", EvaluateParams()), [[1]], [user]) for store in (first, second))
    assert (one == two).all() and one.sum() > 1


def test_after_a_cut_in_time_the_recent_days_are_those_before_it() -> None:
    store = sequences(some_users(), 12)
    cut = int(np.median(np.asarray(store.timestamps)))
    store.stats["split"] = {"split": "temporal", "test_cut": cut}
    scorer = fit("recent_popularity", store, "test", EvaluateParams())
    assert isinstance(scorer, RecentPopularity)
    assert scorer.times.max() < cut and scorer.now.max() == cut


def run(monkeypatch: pytest.MonkeyPatch, **stats: Any) -> None:
    monkeypatch.setattr("stages.baselines.Sequences.load", lambda path: sequences(some_users(), 12, **stats))
    main(Study(models=("sasrec",), quantized=(), variants=("sasrec",), seeds=(0,), evaluate=EvaluateParams(bootstrap=100)))


def test_the_stage_measures_every_baseline_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch)
    results = [read_json(f"metrics/{name}.json") for name in BASELINES]
    assert len({(tuple(result), result["card"], result["users"]) for result in results}) == 1
    assert all(result["valid_ndcg@10"] > 0 and result["bytes"] > 0 for result in results)


def test_without_comparable_times_recent_popularity_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/evaluated/recent_popularity")
    run(monkeypatch)
    assert (folder / "0/full.npy").exists()
    run(monkeypatch, times="order")
    assert "note: Recent popularity is left out: the times of different users cannot be compared" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["left_out.json"]
    left_out = read_json("metrics/recent_popularity.json")
    assert set(left_out.values()) == {None} and list(left_out) == list(read_json("metrics/item_knn.json"))
    run(monkeypatch)
    assert not (folder / "left_out.json").exists()
    assert read_json("metrics/recent_popularity.json")["ndcg@10"] > 0


def test_the_pipeline_and_the_report_know_the_same_baselines() -> None:
    stage = PIPELINE["baselines"]
    assert stage["outs"] == [f"data/evaluated/{name}" for name in BASELINES]
    assert [name for metric in stage["metrics"] for name in metric] == [f"metrics/{name}.json" for name in BASELINES]
