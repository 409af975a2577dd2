"""Details of the runtime that whole models, asked, do not show."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasrec.deploy import ArtefactError, Recommender
from sasrec.deploy.artefact import export
from sasrec.deploy.recommender import Item as Found
from sasrec.deploy.recommender import Recommendation, events, model, tensors
from sasrec.deploy.recommender.command import main, table
from sasrec.deploy.recommender.manifest import digest, read_manifest
from sasrec.deploy.recommender.tensors import Tensors
from sasrec.files import sha256, write_json
from tests.deploy.conftest import CATALOGUE, ITEMS, build

NOTHING = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In full precision, which is enough for all that is not about numbers."""
    made = tmp_path_factory.mktemp("model")
    export(made, build(), {}, CATALOGUE, {"valid_ndcg@10": 0.5})
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Recommender:
    return Recommender.load(folder)


def test_of_a_long_history_the_end_is_what_the_model_sees(plain: Recommender) -> None:
    found = plain.recommend([f"sku/{i}" for i in range(1, 13)], k=ITEMS, exclude_seen=False)
    scores = plain.scores(np.arange(5, 13)[None])[0]
    assert {item.id: item.score for item in found.items} == {f"sku/{i}": float(scores[i]) for i in range(1, ITEMS + 1)}


def test_k_may_be_a_number_of_numpy(plain: Recommender) -> None:
    for k in (np.int64(3), np.int32(3)):
        assert len(plain.recommend(["sku/3"], k=k).items) == len(plain.recommend([], k=k).items) == 3  # type: ignore[arg-type]


def test_allowed_items_come_once_each_and_tie_to_the_lower_id(plain: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order they are allowed."""
    equal = np.zeros((1, ITEMS + 1), np.float32)
    equal[0, [7, 20]] = 1
    monkeypatch.setattr(plain, "scores_of", lambda state: equal)
    allow = [f"sku/{i}" for i in [*range(ITEMS, 1, -1), 9, 9, 7]]
    found = plain.recommend(["sku/3"], k=ITEMS, allow=allow)
    assert [item.id for item in found.items] == [f"sku/{i}" for i in (7, 20, *(set(range(2, ITEMS + 1)) - {3, 7, 20}))]


def test_every_event_of_an_unknown_item_is_counted(plain: Recommender) -> None:
    found = plain.recommend(["x", "sku/3", "x", "sku/3"], allow=["sku/2", "y", "y"], block=["z", "z"])
    assert (found.unknown, found.unknown_allow, found.unknown_block) == (2, 2, 2)


@pytest.mark.parametrize("items", [ITEMS - 1, ITEMS + 1])
def test_a_catalogue_of_another_length_than_the_model_is_refused(items: int, plain: Recommender) -> None:
    other = SimpleNamespace(folder=plain.folder, items_count=items)
    with pytest.raises(ArtefactError, match=f"has {ITEMS} items, and the model {items}"):
        Recommender._read_items(other)  # type: ignore[arg-type]


def test_sessions_take_their_threads_and_leave_the_processor_to_others(folder: Path) -> None:
    loaded = Recommender.load(folder, threads=3)
    for session in (loaded._encoder, loaded._exact("top_k.onnx"), loaded._exact("scores.onnx")):
        options = session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_exact_scores_of_more_items_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "RESCORED", 4)
    rows = np.arange(-30, 30, dtype=np.int8).reshape(20, 3)
    own: Any = SimpleNamespace(_rows=rows, _row_scales=np.arange(20, dtype=np.float32))
    items, levels = np.arange(19, 8, -1), np.array([1, -2, 3], np.float32)
    expected = (rows[items] * levels).sum(1) * np.arange(20)[items]
    assert Recommender._scored(own, levels, items).tolist() == expected.tolist()


def by_shortlist(
    cheap: list[float], exact: list[float], k: int, width: int, bound: float
) -> tuple[list[float], list[int], bool]:
    """The k best of made-up cheap and exact scores by item, for a state whose largest level is 1; and whether it widened."""

    def ranked(session: Any, state: Any, width: int, hidden: Any) -> tuple[Any, Any]:
        order = np.argsort(-np.array(cheap), kind="stable")[:width]
        return np.array(cheap)[order][None], order[None]

    own: Any = SimpleNamespace(
        _ranked=ranked,
        _scored=lambda levels, items: np.array(exact)[items],
        _row_scales=np.ones(len(cheap)),
        _candidates=None,
        _lock=threading.Lock(),
        shortlisted=0,
        widened=0,
    )
    facts = {"state_zero": 128, "state_scale": 1.0, "bound": bound, "width": width}
    values, items = Recommender._by_shortlist(own, np.array([[[129, 128]]], np.uint8), k, NOTHING, facts)
    assert own.shortlisted == 1
    return values.tolist(), items.tolist(), bool(own.widened)


def test_a_shortlist_is_widened_until_no_error_within_the_bound_can_matter() -> None:
    """A cheap score is off by m / 254 of the bound: by up to 1 here. Item 4, which is best, is 0.96 better than it seems, so
    that four others come before it."""
    cheap, exact = [10, 10, 10, 9.1, 9.09, *[0.0] * 35], [10, 10, 10, 9.1, 10.05, *[0.0] * 35]
    assert by_shortlist(cheap, exact, 1, 1, 254.0) == ([10.05], [4], True)
    assert by_shortlist(cheap, exact, 1, 1, 254 * 0.8) == ([10], [0], False)  # nothing left out is better than 9.91


def test_a_shortlist_has_four_times_as_many_as_asked_for() -> None:
    scores = [float(i) for i in range(40, 0, -1)]
    assert by_shortlist(scores, scores, 3, 1, 0.0) == ([40, 39, 38], [0, 1, 2], False)


def test_what_is_hidden_does_not_come_back_through_the_exact_product() -> None:
    cheap, exact = [-np.inf, 3.0, 2.0, -np.inf, 1.0], [99.0, 3, 2, 98, 1]
    assert by_shortlist(cheap, exact, 3, 5, 0.0)[:2] == ([3, 2, 1], [1, 2, 4])
    assert by_shortlist(cheap, exact, 5, 5, 0.0)[0] == [3, 2, 1, -np.inf, -np.inf]


def test_bounds_and_types_of_what_is_known_of_events() -> None:
    assert events.numbers("times", [events.LATEST - 1], 1).tolist() == [10**11 - 1]
    assert events.numbers("ratings", [2**52 - 1, 1 - 2**52], 2).tolist() == [2**52 - 1, 1 - 2**52]
    for name, value in (("times", events.LATEST), ("ratings", 2**52), ("ratings", -(2**52))):
        with pytest.raises(ValueError, match=rf"{name}\[0\]"):
            events.numbers(name, [value], 1)
    assert events.numbers("ratings", [np.int64(3), np.float32(2.5), None], 3)[:2].tolist() == [3, 2.5]
    assert events.numbers("times", [-0.5, 5, 5.9, None, 5.9], 5)[:3].tolist() == [-1, 5, 5]  # the same second twice


def small_tensors(table: np.ndarray) -> Tensors:
    made = Tensors(Path(), {"tensors": {"t": {"shape": list(table.shape)}}, "levels": {}})
    made._kept["t"] = table
    return made


def test_nibbles_of_more_rows_than_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "ROWS", 4)
    rows = np.random.default_rng(0).integers(-8, 8, (10, 48)).astype(np.int8)
    packed = small_tensors(rows).nibbles("t")
    assert packed.shape == (10, 3, 8)
    assert (np.stack([packed & 15, packed >> 4], -1).reshape(10, 48).astype(int) - 8 == rows).all()


def test_every_block_of_a_row_has_the_scale_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_tensors(np.zeros((2, 48), np.int8))
    monkeypatch.setattr(made, "part", lambda name, part: np.array([[5], [7]], np.float32))
    assert made.initializer("scoring_table/block_scales", "t").tolist() == [5, 5, 5, 7, 7, 7]


def test_manifests_of_an_older_format_and_files_elsewhere_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.write_bytes(b"abc")
    files = {str(other): {"bytes": 3, "sha256": sha256(other)}}
    for content, message in (({"format": 4, "files": {}}, "is of format 4"), ({"format": 5, "files": files}, "is missing")):
        write_json(tmp_path / "manifest.json", {**content, "digest": digest(content)})
        with pytest.raises(ArtefactError, match=message):
            read_manifest(tmp_path)


def test_a_recommendation_as_a_table() -> None:
    items = (Found("sku/3", "A title", ("x", "y"), 2.5), Found("7", "", (), -1.0))
    assert table(Recommendation(items, 0, False)).splitlines() == [
        "      item       score  title",
        "   1  sku/3     2.5000  A title (x, y)",
        "   2  7        -1.0000",
    ]
    lines = table(Recommendation((), 2, True)).splitlines()[1:]
    assert lines == [
        "ignored 2 of the history that the model does not know",
        "no known item in the history: these are the most popular; the score counts interactions",
    ]


def test_the_command_recommends_seen_items_when_told_and_takes_empty_options(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(folder), "--history", "sku/3", "--allow", "sku/3", "--json"]
    for options, expected in (([], []), (["--include-seen"], ["sku/3"])):
        assert main([*given, *options], "recommend") == 0
        assert [item["id"] for item in json.loads(capsys.readouterr().out)["items"]] == expected
    assert main(["--model", str(folder), "--history", "", "--ratings", "", "--times", ""], "recommend") == 0
