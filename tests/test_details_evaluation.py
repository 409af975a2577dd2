"""Details of ranking, of intervals and of the baselines, by tables worked out to the digit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sasrec import evaluation, metrics, protocol
from sasrec.baselines import Markov, Popularity
from sasrec.config import BASELINES, EvaluateParams
from sasrec.data.sequences import Part
from sasrec.evaluation import Ranks
from stages import baselines
from tests.conftest import SmallStore
from tests.report.conftest import STATS
from tests.test_baselines import run


def test_what_was_seen_long_ago_is_no_candidate(small_store: type[SmallStore]) -> None:
    """The scorer is given the last two of 300 items; none of them all stands before the target."""
    store = small_store([[*range(1, 301), 301, 302]], 304)
    scores = torch.cat([torch.zeros(1), torch.arange(304, 0, -1)])
    ranks = evaluation.rank(lambda histories, users: scores.repeat(len(histories), 1), store, "test", 2)
    assert ranks.full.tolist() == [1.0] and ranks.recommended.nonzero()[0].tolist() == [302, 303, 304]


def test_the_interval_is_the_middle_95_percent_of_the_resampled_means() -> None:
    values = np.random.default_rng(3).random((2, 30))
    rng, means = np.random.default_rng(7), []
    for _ in range(400):
        users, seeds = rng.integers(0, 30, 30), rng.integers(0, 2, 2)
        means.append(values[np.ix_(seeds, users)].mean())
    expected = tuple(np.quantile(means, [0.025, 0.975]))
    assert metrics.bootstrap_interval(values, 400, 7) == pytest.approx(expected, rel=1e-12)
    assert metrics.bootstrap_intervals(values[None], 400, 7)[0] == pytest.approx(expected, rel=1e-12)


def test_the_deviation_over_seeds_is_that_of_a_sample() -> None:
    assert metrics.deviation(np.array([1.0, 3.0])) == pytest.approx(2**0.5)
    assert metrics.deviation(np.array([1.0])) is None


def test_each_protocol_has_its_own_numbers() -> None:
    """Two seeds of three users; deviations and the interval are each of the ranks that their names say."""
    full, sampled = np.array([[1.0, 30, 2], [4, 10, 2]]), np.array([[1.0, 2, 1], [1, 8, 1]])
    params = EvaluateParams(bootstrap=100)
    found = protocol.quality({"full": full, "sampled": sampled}, params)
    gains, of_sampled = metrics.ndcg(full, 10), metrics.ndcg(sampled, 10)
    low, high = metrics.bootstrap_interval(gains, params.bootstrap, params.seed)
    assert (found["ndcg@10_low"], found["ndcg@10_high"]) == (round(low, 5), round(high, 5))
    assert found["hr@10_std"] == round(2**-0.5 / 3, 5)  # two of three, and all
    assert found["ndcg@10_std"] == round(float(np.std(gains.mean(1), ddof=1)), 5)
    assert found["sampled_ndcg@10_std"] == round(float(np.std(of_sampled.mean(1), ddof=1)), 5)
    assert (found["ndcg@10"], found["sampled_ndcg@10"]) == (round(gains.mean(), 5), round(of_sampled.mean(), 5))
    assert (found["seeds"], found["users"]) == (2, 3)


def test_coverage_is_the_mean_over_seeds_without_padding() -> None:
    ranks = np.array([1.0], np.float32)
    recommended = (np.array([9, 1, 0, 0, 0]), np.array([9, 1, 2, 3, 0]))
    runs = [Ranks(ranks, ranks, ranks, own) for own in recommended]
    values = protocol.flat_metrics(runs, EvaluateParams(bootstrap=100), {}, [{"bits": 8}] * 2, 0.25)
    assert (values["coverage@10"], values["valid_ndcg@10"]) == (0.5, 0.25)


def test_the_card_says_whether_seen_items_are_candidates() -> None:
    cards = [protocol.card(STATS, EvaluateParams(exclude_seen=exclude)) for exclude in (True, False)]
    assert [card["full"] for card in cards] == ["ranked against every item not seen before", "ranked against every item"]
    assert cards[0] | {"full": ""} == cards[1] | {"full": ""}
    assert len({protocol.short_hash(card) for card in cards}) == 2


USERS = ([1, 2, 3], [2, 3, 1], [3, 1])


def chain() -> Markov:
    items, offsets = np.array([item for user in USERS for item in user], np.int32), np.array([0, 3, 6, 8])
    return Markov.fit(items, np.ones(8, bool), 4, offsets)


def test_what_follows_an_item_is_counted_within_a_user_and_forwards() -> None:
    """1 was followed by 2 once, 2 by 3 twice and 3 by 1 twice; the items occur 3, 2, 3 and 0 times."""
    scores = chain()(torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]]), np.arange(4))
    assert scores[:, 1:].tolist() == [[0.75, 1.5, 0.75, 0], [0.75, 0.5, 2.75, 0], [2.75, 0.5, 0.75, 0], [0.75, 0.5, 0.75, 0]]


def test_bytes_of_what_is_counted() -> None:
    """Four bytes for each count and follower, and eight for where the followers of each of items + 2 begin."""
    assert Popularity(np.zeros(5, np.int64)).nbytes == 20
    assert chain().nbytes == 6 * 8 + 3 * 4 + 3 * 4 + 20


def test_baselines_are_judged_on_a_part_by_what_is_known_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[Any, Part]] = []
    asked: list[tuple[Part, Part]] = []
    fit, rank = baselines.fit, evaluation.rank

    def fit_and_note(name: str, store: Any, part: Part, params: EvaluateParams) -> Any:
        fitted.append((fit(name, store, part, params), part))
        return fitted[-1][0]

    def rank_and_note(scorer: Any, store: Any, part: Part, *arguments: Any, **options: Any) -> Ranks:
        asked.append((next(own for each, own in fitted if each is scorer), part))
        return rank(scorer, store, part, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "fit", fit_and_note)
    monkeypatch.setattr(baselines, "rank", rank_and_note)
    run(monkeypatch)
    assert asked == [("validation", "validation"), ("test", "test")] * len(BASELINES)
