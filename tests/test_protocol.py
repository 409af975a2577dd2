"""The protocol card in words, and the files of one variant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasrec import protocol
from sasrec.config import EvaluateParams
from sasrec.evaluation import Ranks

STATS: dict[str, Any] = {
    "dataset": "toy", "sha256": "0" * 64, "items": 30, "evaluated": 2, "candidates": 100, "candidates_seed": 0,
    "few_candidates": 0, "few_popular_candidates": 0, "filter": {"min_user": 5}, "split": {"split": "leave_one_out"},
    "time_unit": None,
}  # fmt: skip
TEMPORAL = {
    "split": "temporal", "validation_share": 0.125, "test_share": 0.1, "target": "first", "validation_cut": 889236966,
    "test_cut": 891000000,
}  # fmt: skip


def test_leave_one_out_in_words() -> None:
    card = protocol.card(STATS, EvaluateParams())
    assert card["split"] == "leave-one-out: the last item of a user is for test, the last but one for validation"
    assert card["popsampled"] == (
        "ranked against 100 items the user never interacted with, drawn by how often they occur in training"
    )
    few = protocol.card(STATS | {"few_popular_candidates": 3}, EvaluateParams())
    assert few["popsampled"].endswith("(all of those for the 3 users who have fewer)")
    assert few["sampled"] == card["sampled"]


@pytest.mark.parametrize(
    ("unit", "cuts", "words"),
    [
        ("s", (889236966, 891000000), ("1998-03-07T02:16:06", "1998-03-27T12:00:00")),
        ("ms", (889236966000, 891000000500), ("1998-03-07T02:16:06.000", "1998-03-27T12:00:00.500")),
        # Too small for seconds since 1970: some other count.
        ("s", (6, 8), ("6", "8")),
    ],
)
def test_a_cut_in_time_in_words(unit: str, cuts: tuple[int, int], words: tuple[str, str]) -> None:
    facts = TEMPORAL | {"validation_cut": cuts[0], "test_cut": cuts[1]}
    assert protocol.card(STATS | {"split": facts, "time_unit": unit}, EvaluateParams())["split"] == (
        f"temporal: training before, validation from {words[0]} on (12.5 % of all interactions), test from {words[1]} on (10 % "
        "of all interactions); the target is the first item of a user in the period, its history everything of the user "
        "before it"
    )


def test_all_three_protocols_are_in_the_metrics_and_the_ranks(tmp_path: Path) -> None:
    full, sampled, popsampled = np.array([[1, 20], [1, 3], [2, 11]], np.float32)
    ranks = Ranks(full, sampled, popsampled, np.ones(31, np.int64))
    card = protocol.card(STATS, EvaluateParams())
    values = protocol.flat_metrics(
        [ranks], EvaluateParams(bootstrap=100), card, [{"bits": 8, "bytes": 5}, {"bits": 5.5, "bytes": 8}], None
    )
    assert (values["hr@10"], values["sampled_hr@10"], values["popsampled_hr@10"]) == (0.5, 1.0, 0.5)
    assert (values["bits"], values["bytes"]) == (6.75, 6)
    assert values["popsampled_ndcg@10"] == round(1 / np.log2(3) / 2, 5)
    assert values["popsampled_mrr"] == round((1 / 2 + 1 / 11) / 2, 5)
    protocol.write_ranks(tmp_path, [ranks], [7], card)
    for name in ("full", "sampled", "popsampled"):
        assert np.array_equal(np.load(tmp_path / "7" / f"{name}.npy"), getattr(ranks, name))
