"""Filters, order and numbers of small tables, with exact answers."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.config import PrepareParams
from sasrec.data import candidates
from sasrec.data.candidates import Unseen
from sasrec.data.interactions import Interactions, build, looks_ranked
from sasrec.data.table import Table, in_order_of_appearance
from sasrec.errors import UserError

KEEP_ALL: dict[str, Any] = {"min_user": 1, "min_item": 1}


def table(rows: list[tuple[str, str, int, float]]) -> Table:
    """A table of (user, item, timestamp, rating)."""

    def encode(values: list[str]) -> tuple[Any, list[str]]:
        ids, codes = np.unique(values, return_inverse=True)
        return in_order_of_appearance(codes.astype(np.int32), ids.tolist())

    users, items, times, ratings = (list(column) for column in zip(*rows, strict=True))
    return Table(*encode(users), *encode(items), np.array(times, np.int64), np.array(ratings, np.float32))


def named(source: Table, built: Interactions) -> dict[str, str]:
    """The items of each user in order, by their original names of one letter."""
    names = [source.item_ids[code] for code in built.item_codes]
    users = [source.user_ids[code] for code in built.user_codes]
    ends = built.offsets.tolist()
    return {user: "".join(names[item - 1] for item in built.items[ends[u] : ends[u + 1]]) for u, user in enumerate(users)}


def joined(drawn: Iterator[Any]) -> Any:
    return np.concatenate(list(drawn))


def sequence(user: str, items: str, start: int = 0) -> list[tuple[str, str, int, float]]:
    return [(user, item, start + place, 3.0) for place, item in enumerate(items)]


def test_order_is_by_time_and_file_order_on_ties() -> None:
    rows = [("u", "c", 2, 1.0), ("v", "a", 9, 1.0), ("u", "b", 1, 1.0), ("u", "a", 2, 1.0), ("u", "d", 1, 1.0)]
    source = table(rows)
    built = build(source, PrepareParams(**KEEP_ALL))
    assert named(source, built) == {"u": "bdca", "v": "a"}
    # Ids in order of first appearance in the file: c, a, b, d.
    assert built.items[:].tolist() == [3, 4, 1, 2, 2]
    assert built.offsets.tolist() == [0, 4, 5]
    assert built.timestamps is not None and built.timestamps[:].tolist() == [1, 1, 2, 2, 9]
    assert built.stats["ties"] == 4 and built.stats["last_two_tie"] == 1


def test_huge_times_are_ordered_too() -> None:
    source = table([("u", "a", 2**62, 1.0), ("v", "a", 0, 1.0), ("u", "b", -(2**62), 1.0), ("u", "c", 0, 1.0)])
    assert named(source, build(source, PrepareParams(**KEEP_ALL))) == {"u": "bca", "v": "a"}


def test_once_counts_on_the_raw_data_and_does_not_repeat() -> None:
    # d has 1 user; without d, w has only 2 interactions, and stays.
    rows = sequence("u", "abc") + sequence("v", "abc") + sequence("w", "abd") + sequence("x", "ab")
    source = table(rows)
    built = build(source, PrepareParams(min_user=3, min_item=2))
    assert named(source, built) == {"u": "abc", "v": "abc", "w": "ab"}
    assert built.stats["dropped"]["thresholds"] == {
        "rows": 3,
        "users": 1,
        "items": 1,
        "users_below": 1,
        "items_below": 1,
        "rounds": 1,
    }
    assert built.stats["raw"]["interactions"] == 11 and built.stats["interactions"] == 8


def test_k_core_is_iterated() -> None:
    rows = sequence("u", "abc") + sequence("v", "abc") + sequence("w", "abd") + sequence("x", "abc")
    source = table(rows)
    built = build(source, PrepareParams(min_user=3, min_item=2, filter="k_core"))
    assert named(source, built) == {"u": "abc", "v": "abc", "x": "abc"}
    assert built.stats["dropped"]["thresholds"]["rounds"] == 3


@pytest.mark.parametrize(("duplicates", "left"), [("keep", "abcab"), ("first", "abc"), ("last", "cab")])
def test_duplicates(duplicates: Any, left: str) -> None:
    source = table(sequence("u", "abcab"))
    built = build(source, PrepareParams(**KEEP_ALL, duplicates=duplicates))
    assert named(source, built) == {"u": left}
    assert built.stats["duplicates"] == 2 and built.stats["exact_duplicates"] == 0


def test_exact_duplicates_share_time_and_rating() -> None:
    rows = [("u", "a", 1, 5.0), ("u", "b", 1, 2.0), ("u", "a", 1, 5.0), ("u", "a", 1, 4.0), ("v", "a", 1, 5.0)]
    stats = build(table(rows), PrepareParams(**KEEP_ALL)).stats
    assert (stats["duplicates"], stats["exact_duplicates"], stats["ties"]) == (2, 1, 4)


def test_min_rating_comes_first() -> None:
    rows = [("u", "a", 1, 5.0), ("u", "a", 2, 1.0), ("u", "b", 3, 4.0), ("u", "c", 4, 4.5), ("v", "a", 1, 3.0)]
    source = table(rows)
    built = build(source, PrepareParams(**KEEP_ALL, min_rating=4, duplicates="last"))
    assert named(source, built) == {"u": "abc"}
    assert built.stats["dropped"]["min_rating"] == {"rows": 2, "users": 1, "items": 0}
    assert built.stats["dropped"]["duplicates"]["rows"] == 0


def test_quantiles_and_short_users() -> None:
    built = build(table(sequence("u", "abcd") + sequence("v", "ab")), PrepareParams(**KEEP_ALL))
    length = {"min": 2, "quarter": 2.5, "median": 3, "three_quarters": 3.5, "max": 4}
    assert built.stats["length"] == length


@pytest.mark.parametrize(
    ("rows", "params", "words"),
    [
        (sequence("u", "abcd"), {"min_user": 5}, ("min_user = 5", "most active user has 4", "lower")),
        (sequence("u", "ab"), KEEP_ALL, ("no user has the 3",)),
        (sequence("u", "aaa"), KEEP_ALL, ("only one item",)),
        (sequence("u", "abc"), KEEP_ALL | {"min_rating": 4}, ("min_rating = 4", "highest is 3")),
    ],
)
def test_nothing_left_is_refused(rows: Any, params: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        build(table(rows), PrepareParams(**params))
    assert all(word in str(refusal.value) for word in words)


def test_min_rating_without_ratings_is_refused() -> None:
    source = Table(np.zeros(3, np.int32), ["u"], np.arange(3, dtype=np.int32), ["a", "b", "c"])
    assert build(source, PrepareParams(**KEEP_ALL)).items[:].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="no ratings"):
        build(source, PrepareParams(min_rating=1))


def test_ranks_are_told_from_times() -> None:
    ranks = [row for user in "abcdefghijkl" for row in sequence(user, "xyz")]
    times = [row for place, user in enumerate("abcdefghijkl") for row in sequence(user, "xyz", place * 1000)]
    assert looks_ranked(build(table(ranks), PrepareParams(**KEEP_ALL)))
    assert not looks_ranked(build(table(times), PrepareParams(**KEEP_ALL)))


@settings(max_examples=60)
@given(st.data())
def test_candidates_are_distinct_unseen_items(data: st.DataObject) -> None:
    n_items, count = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 30))
    lists = data.draw(st.lists(st.lists(st.integers(1, n_items), min_size=1, max_size=60), min_size=1, max_size=8))
    offsets = np.cumsum([0, *map(len, lists)])
    users = np.arange(len(lists))[:: data.draw(st.integers(1, 2))]
    unseen = Unseen(np.concatenate([np.array(one, np.int32) for one in lists]), offsets, n_items)
    drawn = joined(unseen.draw(users, count, [3]))
    assert np.array_equal(drawn, joined(unseen.draw(users, count, [3])))
    for user, row in zip(users, drawn.tolist(), strict=True):
        left = set(range(1, n_items + 1)) - set(lists[user])
        chosen = [item for item in row if item]
        assert len(chosen) == min(count, len(left)) and len(set(chosen)) == len(chosen) and set(chosen) <= left
        assert row == sorted(chosen) + [0] * (count - len(chosen))


@settings(max_examples=60)
@given(st.data())
def test_popular_candidates_are_distinct_unseen_items_that_occur(data: st.DataObject) -> None:
    n_items, count = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 30))
    lists = data.draw(st.lists(st.lists(st.integers(1, n_items), min_size=1, max_size=60), min_size=1, max_size=8))
    weights = np.array([0, *data.draw(st.lists(st.sampled_from([0, 1, 1000]), min_size=n_items, max_size=n_items))])
    weights[data.draw(st.integers(1, n_items))] = 5
    offsets = np.cumsum([0, *map(len, lists)])
    users = np.arange(len(lists))[:: data.draw(st.integers(1, 2))]
    unseen = Unseen(np.concatenate([np.array(one, np.int32) for one in lists]), offsets, n_items)
    drawn = joined(unseen.draw_popular(users, count, weights, [3]))
    assert drawn.dtype == np.int32 and np.array_equal(drawn, joined(unseen.draw_popular(users, count, weights, [3])))
    for user, row in zip(users, drawn.tolist(), strict=True):
        left = set(np.flatnonzero(weights).tolist()) - set(lists[user])
        chosen = [item for item in row if item]
        assert len(chosen) == min(count, len(left)) and len(set(chosen)) == len(chosen) and set(chosen) <= left
        assert row == chosen + [0] * (count - len(chosen))


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_popular_candidates_follow_the_counts(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of drawing, and one that the other finishes: pairs of items in the order drawn, of weights 9, 3, 2, 1 with a
    seen item of weight 20 beside them, against their probabilities by a chi-square bound of 5 standard deviations."""
    monkeypatch.setattr(candidates, "ROUNDS", rounds)
    users, weights = 20_000, np.array([0, 9, 20, 3, 0, 2, 1])
    unseen = Unseen(np.full(users, 2, np.int32), np.arange(users + 1), 6)
    first, second = joined(unseen.draw_popular(np.arange(users), 2, weights, [0])).T
    statistic = 0.0
    for one, other in permutations([1, 3, 5, 6], 2):
        expected = users * weights[one] / 15 * weights[other] / (15 - weights[one])
        statistic += (((first == one) & (second == other)).sum() - expected) ** 2 / expected
    assert statistic < 11 + 5 * np.sqrt(2 * 11)


@pytest.mark.parametrize("n_items", [9, 12, 40])
def test_candidates_are_uniform(n_items: int) -> None:
    """Both ways of drawing (shuffling where few are left, rejection elsewhere) choose every unseen item alike."""
    users, count = 20_000, 5
    offsets = np.arange(users + 1) * 2
    drawn = joined(Unseen(np.tile(np.array([2, 7], np.int32), users), offsets, n_items).draw(np.arange(users), count, [0]))
    share = np.bincount(drawn.ravel(), minlength=n_items + 1)[1:] / users
    expected = np.full(n_items, count / (n_items - 2))
    expected[[1, 6]] = 0
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected.max() / users)
