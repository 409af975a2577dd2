"""What is trained on and what is held out: hand-made time lines with exact answers, and what holds for all of them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec import evaluation
from sasrec.config import ModelParams, PrepareParams, TrainParams
from sasrec.data.sequences import Sequences
from sasrec.data.split import Split, leave_one_out, temporal
from sasrec.errors import UserError
from sasrec.models.sasrec import SASRec
from sasrec.training import Trainer

FIFTHS: dict[str, Any] = {"split": "temporal", "test_share": 0.2, "validation_share": 0.2}


def cut(times: list[list[int]], **params: Any) -> Split:
    """The temporal split of users whose interactions have these times."""
    flat = np.array([time for one in times for time in one], np.int64)
    return temporal(np.cumsum([0, *map(len, times)]), flat, PrepareParams(**FIFTHS | params))


def test_leave_one_out() -> None:
    split = leave_one_out(np.array([0, 4, 6, 9]))
    assert split.train_ends.tolist() == [2, 6, 7]
    assert split.validation.tolist() == [[0, 2], [2, 7]] and split.test.tolist() == [[0, 3], [2, 8]]


def test_leave_one_out_needs_something_to_train_on() -> None:
    """Of three interactions one is left, which is followed by nothing."""
    with pytest.raises(UserError, match="nothing is left to train on"):
        leave_one_out(np.array([0, 3, 6, 7]))
    assert leave_one_out(np.array([0, 3, 6, 8])).train_ends.tolist() == [1, 4, 8]


def test_two_cuts_in_time_for_all_users() -> None:
    # Ten interactions: the last two are at 8 and 9, the two before at 6 and 7.
    split = cut([[0, 1, 2, 8], [3, 4, 6, 9], [5, 7]])
    assert (split.facts["validation_cut"], split.facts["test_cut"]) == (6, 8)
    assert split.train_ends.tolist() == [3, 6, 9]
    assert split.validation.tolist() == [[1, 6], [2, 9]]
    assert split.test.tolist() == [[0, 3], [1, 7]]


def test_what_happens_at_a_cut_is_after_it() -> None:
    # The last two of ten begin at 7, and a third happened at the same time; the last four begin at 5, so does a fifth.
    split = cut([[0, 1, 5, 7], [2, 3, 5, 7], [4, 7]])
    assert (split.facts["validation_cut"], split.facts["test_cut"]) == (5, 7)
    assert split.train_ends.tolist() == [2, 6, 9]
    assert split.validation.tolist() == [[0, 2], [1, 6]] and split.test.tolist() == [[0, 3], [1, 7], [2, 9]]


@pytest.mark.parametrize(
    ("target", "validation", "test"),
    [
        # The second user comes in the validation period, the third in the test period: nothing is before their first item.
        ("last", [[0, 3], [1, 6]], [[0, 4], [1, 7], [2, 9]]),
        ("first", [[0, 3]], [[0, 4], [1, 7]]),
    ],
)
def test_the_target_is_the_last_or_the_first_of_a_user_in_the_period(
    target: str, validation: list[list[int]], test: list[list[int]]
) -> None:
    split = cut([[0, 1, 2, 5, 9], [6, 7, 10], [8, 9]], target=target, test_share=0.4, validation_share=0.3)
    assert (split.facts["validation_cut"], split.facts["test_cut"]) == (5, 8)
    # The later two have no training part.
    assert split.train_ends.tolist() == [3, 5, 8]
    assert split.validation.tolist() == validation and split.test.tolist() == test


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted), min_size=1, max_size=8),
    st.sampled_from(["last", "first"]),
    st.sampled_from([0.1, 0.25, 0.4]),
    st.sampled_from([0.1, 0.3]),
)
def test_every_temporal_split(times: list[list[int]], target: str, test_share: float, validation_share: float) -> None:
    try:
        split = cut(times, target=target, test_share=test_share, validation_share=validation_share)
    except UserError:
        return
    offsets = [0]
    for one in times:
        offsets.append(offsets[-1] + len(one))
    flat = [time for one in times for time in one]
    begin, end = split.facts["validation_cut"], split.facts["test_cut"]
    for name, share, low, high in (
        ("test", test_share, end, 31),
        ("validation", validation_share + test_share, begin, 31),
    ):
        # The period holds its share; without what happens at its cut it would hold less.
        wanted = max(1, round(share * len(flat)))
        assert sum(low <= time < high for time in flat) >= wanted > sum(low < time for time in flat), name
    for user, (first, last) in enumerate(pairwise(offsets)):
        trained = int(split.train_ends[user])
        assert all(time < begin for time in flat[first:trained]) and all(time >= begin for time in flat[trained:last])
        for rows, low, high in ((split.validation, begin, end), (split.test, end, 31)):
            inside = [place for place in range(first, last) if low <= flat[place] < high]
            place = inside[0 if target == "first" else -1] if inside else first
            # Whoever has a target with something before it is evaluated.
            assert rows[rows[:, 0] == user, 1].tolist() == ([place] if place > first else [])
    for rows in (split.validation, split.test):
        assert (np.diff(rows[:, 0]) > 0).all() and len(rows)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([[0, 1, 2, 8], [3, 4, 5, 9], [6], [7]], ("in the validation period, which begins at time 6", "validation_share")),
        ([[0, 1, 2, 6], [3, 4, 5, 7], [8], [9]], ("in the test period, which begins at time 8", "prepare.test_share")),
        ([[0, 6, 8], [1, 7, 9], [2], [3], [4], [5]], ("nothing is left to train on", "before the time 6", "leave_one_out")),
        ([[1, 1, 1, 1], [1, 1, 1]], ("in the validation period", "leave_one_out")),
    ],
)
def test_a_split_without_targets_or_training_is_refused(times: list[list[int]], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        cut(times, target="first")
    assert all(word in str(refusal.value) for word in words)


def test_times_that_cannot_be_compared_are_refused(refused: Callable[..., str], project: Path) -> None:
    (project / "events.csv").write_text("user,item\nu,a\nu,b\nu,c\nv,a\nv,b\nv,c\n")
    prepare = {"split": "temporal", "min_user": 1, "min_item": 1}
    message = refused(dataset={"name": "file", "path": "events.csv"}, prepare=prepare)
    assert "prepare.split is 'temporal'" in message and "dataset.columns.timestamp" in message
    message = refused(dataset={"name": "sample", "times": "order"}, sample={"users": 60, "items": 40}, prepare=prepare)
    assert "prepare.split to leave_one_out" in message and "dataset.times to comparable" in message


def test_the_ranks_of_ml_1m_are_refused(refused: Callable[..., str], shared: Callable[[str], Path]) -> None:
    message = refused(dataset={"name": "ml-1m", "path": str(shared("ml-1m/ml-1m.zip"))}, prepare={"split": "temporal"})
    assert "only order each user's own interactions" in message


@pytest.fixture
def prepared(stage: Callable[..., None], project: Path) -> Callable[..., Sequences]:
    def call(dataset: dict[str, Any], **prepare: Any) -> Sequences:
        sections = {"dataset": dataset, "sample": {"users": 150, "items": 60}, "prepare": {"split": "temporal", **prepare}}
        stage("fetch", **sections)
        stage("prepare", **sections)
        return Sequences.load(project / "data" / "prepared")

    return call


@pytest.mark.parametrize("target", ["last", "first"])
def test_a_stored_temporal_split(prepared: Callable[..., Sequences], target: str) -> None:
    store = prepared({"name": "sample"}, candidates=10, target=target, test_share=0.3, min_user=2)
    facts, times = store.stats["split"], store.timestamps
    assert facts["target"] == target and times is not None
    known = store.known("validation")
    assert times[known].max() < facts["validation_cut"] <= times[~known].min()
    assert (store.known("test") == (times < facts["test_cut"])).all() and store.stats["evaluated"] == len(store.test)
    trained = set(store.items[known].tolist())
    test = store.held("test")
    assert store.stats["cold_targets"] == sum(item not in trained for item in store.items[test.positions].tolist())
    for held in (test, store.held("validation")):
        for negatives in (held.negatives, held.popular_negatives):
            if negatives is None:
                continue
            for user, row in zip(held.users, negatives, strict=True):
                drawn = row[row > 0].tolist()
                history = store.items[store.offsets[user] : store.offsets[user + 1]].tolist()
                assert len(set(drawn)) == len(drawn) and not set(drawn) & set(history)


def test_a_model_trains_where_some_users_have_no_training_part(prepared: Callable[..., Sequences]) -> None:
    store = prepared({"name": "sample"}, candidates=10, test_share=0.4, validation_share=0.3)
    assert (store.train_ends == store.offsets[:-1]).any()
    for loss in ("bce", "sampled_softmax"):
        model = SASRec(ModelParams(max_len=10, hidden=16), store.items_count)
        params = TrainParams(loss=loss, negatives=4, epochs=2, batch_size=32)
        progress = Trainer(model, store, params, 0, device=torch.device("cpu")).run(log=lambda line: None)
        assert progress.epoch == 2 and progress.best_ndcg > 0
        ranks = evaluation.rank(evaluation.model_scorer(model), store, "test", 10)
        for found in (ranks.full, ranks.sampled, ranks.popsampled):
            assert len(found) == store.stats["evaluated"] and (found >= 1).all()


def test_ml_100k_by_time(prepared: Callable[..., Sequences], shared: Callable[[str], Path]) -> None:
    store = prepared({"name": "ml-100k", "path": str(shared("ml-100k/ml-100k.zip"))}, min_user=1, min_item=1)
    assert store.timestamps is not None
    facts = store.stats["split"]
    # 214 days from 1997-09-20; the last tenth begins in the spring.
    assert np.datetime64("1998-03") < np.datetime64(facts["test_cut"], "s") < np.datetime64("1998-04-22")
    periods = [int((store.timestamps >= facts[f"{part}_cut"]).sum()) for part in ("validation", "test")]
    assert 20_000 <= periods[0] < 20_100 and 10_000 <= periods[1] < 10_100
    # Most users rate on one day only, so that few have anything before the cuts.
    assert len(store.test) < 943 / 4 and len(store.validation) < 943 / 4 and store.stats["evaluated"] == len(store.test)
    assert not np.array_equal(store.test[:, 0], store.validation[:, 0])
    assert 0 < store.stats["cold_targets"] < len(store.test) / 5
