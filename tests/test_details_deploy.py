"""Details of the artefact, its runtime and its service that whole models, exported and asked, do not show."""

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from starlette.exceptions import HTTPException

from sasrec.config import ModelParams
from sasrec.data.sequences import Sequences
from sasrec.deploy import ArtefactError, Recommender, artefact, service
from sasrec.deploy import serve as command
from sasrec.deploy.artefact import export
from sasrec.deploy.encoder import Encoder
from sasrec.deploy.form import integer_form, zero_point
from sasrec.deploy.graph import Graph
from sasrec.deploy.indices import index_of
from sasrec.deploy.recommender import Item as Found
from sasrec.deploy.recommender import Recommendation, events, model, tensors
from sasrec.deploy.recommender.command import main, table
from sasrec.deploy.recommender.manifest import digest, read_manifest
from sasrec.deploy.recommender.tensors import Tensors
from sasrec.deploy.service import Limits, Metrics, Service, load
from sasrec.deploy.shortlist import shortlist, suits
from sasrec.deploy.side import time_bucket
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.deploy.storage import Storage
from sasrec.errors import UserError
from sasrec.files import sha256, write_json
from sasrec.measurements import read_rows
from sasrec.models import side
from sasrec.models.scoring import Part
from sasrec.models.taps import Table
from sasrec.quant.frozen import FrozenTensor
from sasrec.quant.frozen import tensors as tensors_of
from sasrec.quant.grid import Grid
from stages import catalogues, shapes
from stages import export as stage
from tests.deploy.conftest import CATALOGUE, ITEMS, build, histories, quantize
from tests.deploy.test_operators import operators

NOTHING = np.zeros(0, np.int64)
ONE = torch.ones(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In full precision, which is enough for all that is not about numbers."""
    made = tmp_path_factory.mktemp("model")
    export(made, build(), {}, CATALOGUE, {"valid_ndcg@10": 0.5})
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Recommender:
    return Recommender.load(folder)


# The runtime


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


# The service


class Asked:
    """A model that notes what it is asked, and knows no item."""

    def __init__(self, ids: list[str] | None = None, titles: list[str] | None = None) -> None:
        self.ids, self.titles = ["", *(ids or [])], ["", *(titles or [])]
        self.asked: list[Any] = []
        self.shortlisted = self.widened = 0

    def recommend(self, history: Any, *options: Any, **known: Any) -> Any:
        self.asked.append((history, options, known))
        many = bool(history) and isinstance(history[0], list)
        return [Recommendation((), 2, True)] * len(history) if many else Recommendation((), 1, False)


def serve(*models: Asked, **limits: int) -> Service:
    made = Service({f"m{i}": own for i, own in enumerate(models)}, Limits(**limits))  # type: ignore[misc]
    made.app()
    return made


def request(path: str, body: bytes = b"", **query: str) -> Any:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    return SimpleNamespace(url=SimpleNamespace(path=path), query_params=query, stream=stream)


def test_what_is_at_a_limit_is_answered() -> None:
    many = serve(Asked(), users=2, history=3, ids=4, k=5)
    most = {"history": [["a"] * 3] * 2, "k": 5, "allow": ["b"] * 4, "block": ["b"] * 4}
    many._answer(most)
    for more in (
        {"history": [["a"]] * 3},
        {"k": 6},
        {"allow": ["b"] * 5},
        {"block": ["b"] * 5},
        {"history": [["a"], ["a"] * 4]},
    ):
        with pytest.raises(HTTPException, match="422"):
            many._answer({**most, **more})


def test_a_body_may_be_as_long_as_the_limit() -> None:
    body = b'{"history": []}'
    for room, fits in ((len(body), True), (len(body) - 1, False)):
        made = serve(Asked(), body_bytes=room)
        if fits:
            assert asyncio.run(made._body(request("/recommend", body))) == {"history": []}
        else:
            with pytest.raises(HTTPException, match="413"):
                asyncio.run(made._body(request("/recommend", body)))


def test_the_first_model_is_asked_with_the_defaults_unless_others_are_given() -> None:
    first, second = Asked(), Asked()
    made = serve(first, second)
    assert made._answer({"history": ["a"]})[1] == "m0"
    assert first.asked == [(["a"], (10, True, None, None), {"ratings": None, "times": None})] and not second.asked
    given = {"history": ["a"], "k": 3, "exclude_seen": False, "allow": ["b"], "block": ["c"], "ratings": [1], "times": [2]}
    assert made._answer({**given, "model": "m1"})[1] == "m1"
    assert second.asked == [(["a"], (3, False, ["b"], ["c"]), {"ratings": [1], "times": [2]})]


def test_counters_count_users_and_what_they_got() -> None:
    made = serve(Asked())
    for history in ([["a"], ["b"], ["c"]], ["a"]):
        asyncio.run(made.recommend(request("/recommend", json.dumps({"history": history}).encode())))
    lines = made.metrics.text().splitlines()
    assert {"sasrec_users_total 4", "sasrec_unknown_ids_total 7", "sasrec_answered_by_popularity_total 3"} <= set(lines)
    assert "sasrec_recommend_seconds_count 2" in lines  # of requests


def test_each_bucket_of_the_histogram_counts_all_up_to_its_end() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.02, 3.0):
        metrics.observe(seconds)
    found = [line.split('"')[1::2] + [line.split()[-1]] for line in metrics.text().splitlines() if "_bucket" in line]
    assert [count for _, count in found] == ["0", "1", "1", "1", "1", "2", "2", "2", "2", "3"]
    assert [end for end, _ in found] == [*map(str, service.BUCKETS), "+Inf"]


def test_a_search_gives_beginnings_first_and_at_most_twelve() -> None:
    titles = ["The Red Dog", "red", "", "Blue", "Redder"]
    made = serve(Asked(["1", "2", "reddish", "4", "5"], titles))
    found = json.loads(bytes(asyncio.run(made.search(request("/search", q=" RED "))).body))
    assert [(one["id"], one["title"]) for one in found] == [
        ("2", "red"), ("reddish", "reddish"), ("5", "Redder"), ("1", "The Red Dog"),
    ]  # fmt: skip
    many = serve(Asked([str(i) for i in range(20)], ["same"] * 20))
    found = json.loads(bytes(asyncio.run(many.search(request("/search", q="same"))).body))
    assert [one["id"] for one in found] == [str(i) for i in range(12)]


def test_unknown_paths_are_counted_as_one_and_the_page_has_its_policy() -> None:
    made = serve(Asked())
    for path in ("/a", "/b"):
        asyncio.run(made.refused(request(path), HTTPException(404, "no")))
    page = asyncio.run(made.index(request("/")))
    assert made.metrics.requests == {("other", 404): 2, ("/", 200): 1}
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_what_fails_is_counted_as_an_error_that_tells_nothing() -> None:
    made = serve(Asked())
    answer = asyncio.run(made.failed(request("/recommend"), ValueError("secret")))
    assert (answer.status_code, bytes(answer.body)) == (500, b'{"error":"internal error"}')
    assert made.metrics.requests == {("/recommend", 500): 1}


def test_shortlists_of_all_models_are_counted_together() -> None:
    first, second = Asked(), Asked()
    first.shortlisted, first.widened, second.shortlisted, second.widened = 5, 2, 7, 1
    lines = bytes(asyncio.run(serve(first, second).show_metrics(request("/metrics"))).body).decode().splitlines()
    assert {"sasrec_shortlisted_total 12", "sasrec_shortlists_widened_total 3"} <= set(lines)


def test_listeners_are_closed_where_one_of_them_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Noted(socket.socket):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    addresses = [(*kind, ("127.0.0.1", 0)), (*kind, ("203.0.113.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket, "socket", Noted)
    with pytest.raises(UserError, match="cannot listen"):
        command.listen("somewhere", 0)
    assert [one.fileno() for one in made] == [-1, -1]


def test_the_command_serves_with_as_many_threads_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loads(*given: Any) -> Any:
        raise UserError(f"loads {given}")

    monkeypatch.setattr(command, "load", loads)
    assert command.main(["--model", "a", "--model", "b", "--threads", "3"]) == 1
    assert capsys.readouterr().err == "error: loads (['a', 'b'], 3)\n"


def test_models_are_named_by_as_much_of_their_paths_as_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number alone, which is a seed, tells nothing."""
    monkeypatch.setattr(Recommender, "load", lambda path, threads: (str(path), threads))
    assert list(load(["/x/lsq/0"])) == ["lsq/0"]
    assert list(load(["/x/lsq/0", "/x/lsq/1"])) == ["lsq/0", "lsq/1"]
    named: dict[str, Any] = dict(load(["/x/one", "/x/two"], 3))
    assert named == {"one": ("/x/one", 3), "two": ("/x/two", 3)}
    assert list(load(["/x/a/m", "/x/b/m", "/x/a/m"])) == ["a/m", "b/m"]


# What is exported


def test_norms_are_exported_with_their_own_epsilon() -> None:
    plain = build(embedding_norm=True)
    norms = [part for part in plain.modules() if isinstance(part, torch.nn.LayerNorm)]
    for norm in norms:
        norm.eps = 0.125
    encoder = Encoder(plain, {}, Storage())
    encoder.build()
    made = [node for node in encoder.graph.nodes if node.op_type == "LayerNormalization"]
    assert [[a.f for a in node.attribute if a.name == "epsilon"] for node in made] == [[0.125]] * len(norms)


@pytest.mark.parametrize("method", [None, "ptq"])
def test_biases_and_what_norms_learned_are_exported(method: str | None, tmp_path: Path) -> None:
    """At the start of training the ones are 0, and the others change nothing."""

    def trained() -> Any:
        made = build(attention_output=True)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(len(parameter)))
        return made

    frozen = quantize(method, 8, {"attention_output": True}) if method else {}
    export(tmp_path, trained(), frozen, CATALOGUE, {})
    agreement = Agreement(Simulation(trained(), frozen), Recommender.load(tmp_path))
    agreement.exported(histories())
    agreement.simulated(histories())
    assert agreement.same_users >= 63 and agreement.steps <= 1
    assert agreement.same_elements >= 0.99 * agreement.elements if method else agreement.difference < 1e-4


def shifted(tensor: torch.Tensor, bits: int) -> FrozenTensor:
    least, most = tensor.amin(1, keepdim=True), tensor.amax(1, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp(min=1e-3)
    grid = Grid.uniform(bits, 0, 2**bits - 1, scale, least).with_half_scales()
    return FrozenTensor(grid, grid.encode(tensor))


def test_a_single_weight_on_a_shifted_grid_is_a_product_of_floats(tmp_path: Path) -> None:
    """Of which onnxruntime makes none that rounds them."""
    name = "blocks.0.feed_forward.inner.weight"
    frozen = {name: shifted(build().get_parameter(name).detach(), 4)}
    export(tmp_path, build(), frozen, CATALOGUE, {})
    assert "MatMulNBits" not in operators(tmp_path, "encoder.onnx", tmp_path)


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_and_tables_on_shifted_grids_are_exported(bits: int, activations: bool, tmp_path: Path) -> None:
    """From the least to the largest of each row, in levels from 0 on; with states of 8 bits and in full precision."""
    frozen = {name: own for name, own in quantize("ptq", 8, {}).items() if own.codes is None} if activations else {}
    frozen |= {name: shifted(tensor.detach(), bits) for name, tensor in tensors_of(build()).items()}
    export(tmp_path, build(), frozen, CATALOGUE, {})
    agreement = Agreement(Simulation(build(), frozen), Recommender.load(tmp_path))
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    close = (scores - expected).abs()[:, 1:] <= 1e-6 * expected.abs().max()
    assert int(close.all(1).sum()) >= (62 if activations else 64)
    assert agreement.same_users >= 62 and (agreement.steps <= 1 if activations else agreement.difference < 2e-6)


@pytest.mark.parametrize("place", ["queries", "feed_forward.input", "feed_forward.inner", "attention.context"])
@pytest.mark.parametrize(("method", "bits"), [("ptq", 8), ("apot", 6), ("ptq", 4)])
def test_what_a_layer_takes_may_stay_in_full_precision(place: str, method: str, bits: int, tmp_path: Path) -> None:
    """Its weight is quantized all the same: the product is of floats, of which none is rounded on the way."""
    overrides = {f"blocks.{i}.{place}": 32 for i in range(2)}
    options: dict[str, object] = {"attention_output": True}
    frozen = quantize(method, bits, options, overrides=overrides)
    export(tmp_path, build(**options), frozen, CATALOGUE, {})
    assert "MatMulNBits" not in operators(tmp_path, "encoder.onnx", tmp_path)
    agreement = Agreement(Simulation(build(**options), frozen), Recommender.load(tmp_path))
    agreement.exported(histories())
    agreement.simulated(histories())
    assert agreement.steps <= 1 and agreement.same_users >= 62
    assert agreement.same_elements >= 0.99 * agreement.elements


LEVELS: list[tuple[list[int], Any]] = [
    (list(range(-127, 128)), 0.5),
    (list(range(-128, 128)), 0.5),
    (list(range(-8, 8)), 0.5),
    (list(range(16)), 0.25),
    (list(range(-100, 156)), 0.5),
    (list(range(-7, 8)), [0.5, 1.0, 0.25]),
    ([-4, -2, -1, 0, 1, 2, 4], 0.5),
    ([0, 1, 2, 4, 8, 12], 1.0),
    ([-192, -64, -1, 0, 1, 64, 192], 0.5),
]


@pytest.mark.parametrize(("levels", "scale"), LEVELS)
@pytest.mark.parametrize("bare", [False, True])
def test_activations_of_the_graph_are_on_the_nearest_levels(levels: list[int], scale: Any, bare: bool) -> None:
    """Those of the grid, half-way and beyond its ends, too; as codes of 8 bits, or as levels where they do not fit."""
    grid = Grid(8, torch.tensor(levels, dtype=torch.float32), torch.tensor(scale), torch.zeros(()))
    encoder = Encoder(build(), {"x": FrozenTensor(grid, None)}, Storage())
    value = encoder.tap("x", "x", bare)
    shape = ("rows", 3)
    content = encoder.graph.serialized({"x": ("float32", shape)}, {"y": (value.name, value.type, shape)})
    x = np.array([*np.arange(-70, 100, 0.125), -1e6, 1e6], np.float32).reshape(-1, 3)
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    expected = grid.levels[grid.encode(torch.from_numpy(x)).long()].numpy()
    assert (found.astype(np.float32) - (value.zero or 0) == expected).all()


def test_rows_of_a_smaller_table_are_put_together_from_their_bytes() -> None:
    rows = np.array([0, 1, 255, 256, 70_000, 65_535, 511], np.int32)
    graph, storage = Graph("g"), Storage()
    part = Part("x.weight", Table(70_001, 1, padding=True), slice(0, 1), torch.from_numpy(rows))
    content = graph.serialized({}, {"y": (index_of(graph, storage, part), "int64", ("n",))})
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy((rows >> 8 * place & 255).astype(np.uint8)) for place in range(3)]
    options.add_external_initializers(graph.given_names, values)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == rows.tolist()


@pytest.mark.parametrize(
    ("low", "high", "first", "shift", "zero"),
    [
        (-128, 127, -128, 0, 128),
        (-127, 127, -127, 0, 128),
        (0, 255, -128, 256, 0),
        (0, 127, 0, 0, 0),
        (-100, 155, None, 0, 100),
        (-127, 128, None, 0, 127),
        (-129, 126, None, 0, 129),
        (-100, 156, None, 0, None),
        (0, 256, None, 0, None),
    ],
)
def test_which_levels_fit_8_bits(low: int, high: int, first: int | None, shift: float, zero: int | None) -> None:
    """As int8 of a weight, moved where they are not negative; and as uint8 of an activation. The scale is 2."""
    grid = Grid.uniform(8, low, high, 2 * ONE)
    form = integer_form(grid)
    assert zero_point(grid) == zero
    if first is None:
        assert form is None
        return
    assert form is not None
    assert form.integers.tolist() == list(range(first, first + high - low + 1)) and float(form.shift) == shift


def test_activations_on_a_shifted_grid_have_no_zero_point() -> None:
    assert zero_point(Grid.uniform(8, 0, 255, ONE, ONE)) is None


def test_shifts_are_counted_with_the_scales_and_equal_levels_are_listed_once() -> None:
    storage, scale = Storage(), torch.ones(3, 1)
    for name, shift, count in (("plain", 0 * scale, 3), ("shifted", scale, 6)):
        storage.describe(name, "weight", (3, 2), Grid.uniform(4, -8, 7, scale, shift), "int8")
        assert storage.tensors[name]["scales"] == {"dtype": "float32", "count": count}
    assert [storage._listed(np.array(levels)) for levels in ([0, 1], [0, 2], [0, 1])] == ["0", "1", "0"]
    assert storage.levels == {"0": [0, 1], "1": [0, 2]}


def test_a_scale_that_a_float16_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="is not what a float16 holds"):
        Storage()._half("x.bin", torch.tensor([[1.0], [1.0001]]))


def test_an_export_that_fails_at_a_file_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none that is half written."""
    monkeypatch.setattr(artefact, "RUNTIME", [])
    (tmp_path / "encoder.onnx").write_bytes(b"before")
    original = Path.write_bytes

    def fails(path: Path, content: bytes) -> int:
        original(path, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path, build(), {}, CATALOGUE, {})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["encoder.onnx"]
    assert (tmp_path / "encoder.onnx").read_bytes() == b"before"


def of_table(low: int, high: int, rows: int = 4, features: int = 16, **parts: torch.Tensor) -> FrozenTensor:
    grid = Grid.uniform(8, low, high, parts.get("scale", ONE), parts.get("shift"))
    codes = torch.arange(rows * features).view(rows, features) % (high - low + 1)
    return FrozenTensor(grid, codes.to(torch.uint8))


def test_a_table_suits_a_shortlist_where_its_integers_are_of_4_bits_and_blocks_divide_its_rows() -> None:
    state: Any = SimpleNamespace(is_integer=True)
    assert suits(state, of_table(-8, 7), 64) and not suits(state, of_table(-8, 7), 65)
    for other in (of_table(-8, 8), of_table(-9, 7), of_table(-8, 7, features=24), of_table(-8, 7, shift=ONE)):
        assert not suits(state, other, 1)
    assert not suits(SimpleNamespace(is_integer=False), of_table(-8, 7), 1)  # type: ignore[arg-type]


def test_the_bound_is_the_largest_sum_of_magnitudes_in_a_row() -> None:
    stored = of_table(-8, 7, scale=torch.tensor([[1.0], [2.0], [4.0], [3.0]]))
    state: Any = SimpleNamespace(scale=0.5, zero=3)
    _, _, facts = shortlist(state, stored)
    # Each row has all levels: 8 + 7 + 7 + 6 + 6 + ... + 1 + 1 = 64.
    assert facts == {"width": model.SHORTLIST, "bound": 256.0, "state_scale": 0.5, "state_zero": 3}


def test_times_of_the_graph_are_in_the_buckets_of_the_model() -> None:
    """Also at each power of two and beside it, beyond the last bucket, below 0 and unknown."""
    powers = 2.0 ** np.arange(41)
    seconds = np.concatenate([powers - 2, powers - 1, powers, [-1e9, 0, np.nan, 10.0**11]])
    graph = Graph("g")
    content = graph.serialized({"s": ("float64", ("n",))}, {"y": (time_bucket(graph, "s"), "int64", ("n",))})
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"s": seconds})[0]
    assert found.tolist() == side.time_bucket(torch.from_numpy(seconds)).tolist()
    assert found.max() == side.TIME_BUCKETS


# How an artefact and its simulation are compared


def test_an_agreement_is_of_the_worst_and_of_all_that_was_added() -> None:
    """Two batches of states on the levels -128 to 127, of which 2 is the scale."""
    codes = iter(np.array(batch, np.uint8)[:, None] for batch in ([[128, 4], [130, 7]], [[129, 198]]))
    states = iter(torch.tensor(batch)[:, None] for batch in ([[0.0, -256.0], [4.2, -242.0]], [[2.0, 142.0]]))
    # Eleven items behind padding, which is none. One of the users has his last two of ten exchanged; the last has another
    # score of padding.
    base = np.arange(12, 0, -1, dtype=np.float32)
    exchanged, padding = base.copy(), base.copy()
    exchanged[[9, 10]], padding[0] = exchanged[[10, 9]], -5
    scores = iter([np.stack([base, base]), base[None]])
    expected = iter([torch.from_numpy(np.stack([base, exchanged])), torch.from_numpy(padding[None])])
    frozen = {"final": FrozenTensor(Grid.uniform(8, -128, 127, 2 * ONE), None)}
    simulation: Any = SimpleNamespace(frozen=frozen, encode=lambda part: next(states), scores=lambda own: next(expected))
    runtime: Any = SimpleNamespace(encode=lambda *given: next(codes), scores_of=lambda state: next(scores))
    agreement = Agreement(simulation, runtime)
    for users in (2, 1):
        found = agreement.exported(torch.ones(users, 3, dtype=torch.int64))
        assert found.tolist() == [base.tolist()] * users
        agreement.simulated(torch.ones(users, 3, dtype=torch.int64))
    assert agreement.steps == 4  # -128 in place of -124
    assert agreement.difference == 8
    summary = agreement.summary()
    assert (summary["users"], summary["same_elements"], summary["same_top10"]) == (3, 4 / 6, 2 / 3)


# Stages


class Exporting:
    """data/ of two seeds of a variant, one of which the study no longer has; three users, of whom the last events of two are
    held out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared = Path("data/prepared")
        prepared.mkdir(parents=True)
        for name in stage.TRAINED_ON:
            (prepared / name).write_text(name)
        for seed in (0, 7):
            Path("data/models/some", str(seed)).mkdir(parents=True)
        self.exports: list[tuple[Any, ...]] = []
        items, offsets, ends = np.array([1, 2, 1, 3, 3, 2], np.int32), np.array([0, 4, 5, 6]), np.array([2, 4, 6])
        store = SimpleNamespace(items=items, offsets=offsets, train_ends=ends, items_count=3)
        monkeypatch.setattr(Sequences, "load", lambda path: store)
        monkeypatch.setattr(stage, "read_catalogue", lambda path: [("a", "A", ("x",)), ("b", "B", ()), ("c", "C", ())])
        monkeypatch.setattr(stage, "load_model", lambda path: (path.name, {"model": 1, "items": 3, "valid_ndcg@10": 0.5}))
        monkeypatch.setattr(stage, "export", self.export)
        self.fails = False

    def export(self, folder: Path, *given: Any) -> Any:
        (folder / "file").write_text(f"{len(self.exports)}")
        self.exports.append(given)
        if self.fails:
            raise OSError(28, "No space left on device")
        return SimpleNamespace(bytes=1, bits=8.0)


@pytest.fixture
def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporting:
    monkeypatch.chdir(tmp_path)
    return Exporting(monkeypatch)


STUDY: Any = SimpleNamespace(seeds=[0])


def test_a_model_is_exported_with_what_it_was_trained_on(exporting: Exporting) -> None:
    """Counts are of the training part; seeds of other studies go."""
    stage.main(STUDY, "some")
    ((name, frozen, items, card),) = exporting.exports
    assert (name, frozen) == ("0", {})
    assert [(item.original, item.title, item.categories, item.count) for item in items] == [
        ("a", "A", ("x",), 1), ("b", "B", (), 2), ("c", "C", (), 0),
    ]  # fmt: skip
    assert set(card) == {"valid_ndcg@10", "prepared"}
    assert [path.name for path in Path("data/models/some").iterdir()] == ["0"]
    assert [path.name for path in Path("data/exported/some").iterdir()] == ["0"]


@pytest.mark.parametrize("name", stage.TRAINED_ON)
def test_other_training_data_has_another_hash(name: str, exporting: Exporting) -> None:
    for content in ("one", "other"):
        Path("data/prepared", name).write_text(content)
        stage.main(STUDY, "some")
    assert exporting.exports[0][-1]["prepared"] != exporting.exports[1][-1]["prepared"]


def test_a_failed_export_leaves_the_one_before_it(exporting: Exporting) -> None:
    stage.main(STUDY, "some")
    exporting.fails = True
    with pytest.raises(OSError, match="No space left"):
        stage.main(STUDY, "some")
    assert [str(path) for path in Path("data/exported/some").rglob("*")] == [
        "data/exported/some/0",
        "data/exported/some/0/file",
    ]
    assert Path("data/exported/some/0/file").read_text() == "0"


def test_quantized_tensors_are_exported_where_there_are_any(exporting: Exporting, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data/models/some/0/quantized.safetensors").write_text("")
    monkeypatch.setattr(stage, "load_tensors", lambda path: (path.name, "bits"))
    monkeypatch.setattr(stage, "from_tensors", lambda *given: given)
    stage.main(STUDY, "some")
    assert exporting.exports[0][1] == ("quantized.safetensors", "bits")


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.main()


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--batches", "1", "-2"], ["--repeats", "2"]])
def test_shapes_refuse_what_cannot_be_timed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "network", lambda shape: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="--batches starts at 1, and --repeats at 3"):
        run(shapes, monkeypatch, *arguments)


def test_small_batches_are_timed_more_often_and_what_was_widened_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[tuple[int, int]] = []

    def measured(own: Any, others: Any, histories: np.ndarray, repeats: int, clock: Any) -> dict[str, Any]:
        repeated.append((len(histories), repeats))
        return {"all": np.array([1.0, 2.0, 9.0])}

    monkeypatch.setattr(shapes, "quantized", lambda shape, bits, folder: 5)
    monkeypatch.setattr(shapes, "loading", lambda folder: {"load_ms": 1.0})
    monkeypatch.setattr(shapes, "measured", measured)
    for shortlisted, share in ((8, "0.250"), (0, "")):
        own = SimpleNamespace(widened=2, shortlisted=shortlisted)
        monkeypatch.setattr(shapes, "Recommender", SimpleNamespace(load=lambda path, own=own: own))
        repeated.clear()
        rows = shapes.rows_of("S", 4, (1, 2, 32), 12, {})
        assert repeated == [(1, 48), (2, 24), (32, 12)]
        assert {(row["all_ms"], row["widened"]) for row in rows} == {("2.000", share)}


def test_rows_of_a_timed_network_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {"S": (ModelParams(hidden=64, max_len=8, blocks=1), 200)})
    lengths = shapes.network("S").item_table.weight.detach().norm(dim=1)[1:].log()
    # By a factor e^0.3; lengths of 64 random numbers alone by 0.09.
    assert 0.25 < float(lengths.std()) < 0.4


def test_catalogues_are_listed_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogues, "TABLE", tmp_path / "catalogues.csv")

    def row_of(items: int, hidden: int, *rest: Any) -> dict[str, str]:
        return dict.fromkeys(catalogues.COLUMNS, "0") | {"items": str(items), "hidden": str(hidden)}

    monkeypatch.setattr(catalogues, "row_of", row_of)
    for hidden in ("128", "64"):
        run(catalogues, monkeypatch, "1000", "200", "--hidden", hidden)
    found = [(row["items"], row["hidden"]) for row in read_rows(catalogues.TABLE)]
    assert found == [("200", "64"), ("200", "128"), ("1000", "64"), ("1000", "128")]


def test_steps_are_medians_of_those_after_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two trainers in turn; each predicts the next item."""
    now = [0.0]
    taken: list[int] = []

    class Steps:
        def __init__(self, seconds: list[float]) -> None:
            self.seconds = iter(seconds)
            self.model = SimpleNamespace(items=9, train=lambda: None)

        def _loss(self, *given: Any) -> None: ...

        def _step(self, work: Callable[..., Any], expected: int) -> None:
            batch = work.args[0]  # type: ignore[attr-defined]
            assert (batch.histories[:, 1:] == batch.targets[:, :-1]).all() and not (batch.histories == batch.targets).all()
            taken.append(id(self))
            now[0] += next(self.seconds)

    monkeypatch.setattr("time.process_time", lambda: now[0])
    made: list[Any] = [Steps([50, 60, 1, 9, 2]), Steps([70, 80, 3, 4, 90])]
    assert catalogues.steps(made, 3) == pytest.approx([2000, 4000])
    assert taken == [id(one) for _ in range(5) for one in made]


def test_random_users_have_a_full_window_and_two_held_out() -> None:
    store = catalogues.RandomStore(3, 5)
    assert np.diff(store.offsets).tolist() == [catalogues.LENGTH + 2] * 3
    assert (store.offsets[1:] - store.held("validation").positions).tolist() == [2] * 3
    assert store.items.min() >= 1 and store.items.max() <= 5
