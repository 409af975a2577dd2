"""Models that know of ratings, categories and times: exported, served, and asked for recommendations with and without them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sasrec.benchmarking import benchmark
from sasrec.config import BenchmarkParams, ModelParams, QuantParams
from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender import Recommendation
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.service import Service
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.models.events import Events
from sasrec.models.facts import Facts, item_categories
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import from_tensors, to_tensors
from tests.conftest import ROOT
from tests.deploy.test_service import call, serving

ITEMS = 30
CATEGORIES: list[tuple[str, ...]] = [("a",), ("b", "a"), (), ("c", "b", "a"), ("b",)] * 6
CATALOGUE = [Item(f"sku/{i}", f"Title {i}", own, i * 7 % 11) for i, own in enumerate(CATEGORIES, 1)]
ALL = {"side": ("rating", "category", "recency"), "time_bias": True}
NAN = float("nan")


def build(**options: Any) -> SASRec:
    """With weights large enough for everything to matter."""
    torch.manual_seed(0)
    params = ModelParams(**{"max_len": 8, "hidden": 16, **ALL, **options})
    model = SASRec(params, ITEMS, Facts(torch.tensor([1.5, 2.5, 3.5, 4.5]), item_categories(CATEGORIES))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("table.weight"):
                parameter.mul_(20)
            elif "time_bias" in name:
                parameter.normal_()
    return model


def some_events(rows: int = 64) -> Events:
    """Some begin with padding; some ratings and times are not known; gaps from none to years, powers of two among them."""
    rng = np.random.default_rng(1)
    items = rng.integers(1, ITEMS + 1, (rows, 8))
    items[: rows // 3, :3] = 0
    gaps = np.where(rng.random((rows, 8)) < 0.5, 2 ** rng.integers(0, 30, (rows, 8)) - 1, rng.integers(0, 10**6, (rows, 8)))
    ratings, times = rng.integers(1, 11, (rows, 8)) / 2, 10.0**9 + gaps.cumsum(1)
    for known in (ratings, times):
        known[(rng.random((rows, 8)) < 0.15) | (items == 0)] = np.nan
    return Events(torch.from_numpy(items), torch.from_numpy(ratings.astype(np.float32)), torch.from_numpy(times))


def exported(folder: Path, method: str | None, bits: int = 8, **options: Any) -> tuple[Recommender, Simulation]:
    frozen = {}
    if method:
        made = build(**options)
        module, chosen = load_method(method, {"iterations": 20} if method == "adaround" else {})
        attach(made, QuantParams(bits=bits), module, chosen)
        calibrate(made, [some_events()])
        if hasattr(module, "reconstruct") and method == "adaround":
            module.reconstruct(made, [some_events()], chosen, 0)
        frozen = from_tensors(*to_tensors(freeze(made.eval())))
    export(folder, build(**options), frozen, CATALOGUE, {"valid_ndcg@10": 0.5, "data": "abc"})
    return Recommender.load(folder), Simulation(build(**options), frozen)


@pytest.mark.parametrize(
    ("method", "bits", "options"),
    [
        ("lsq", 8, {}),
        ("lsq", 4, {"heads": 2, "attention_output": True}),
        ("apot", 4, {"blocks": 1, "heads": 2}),
        ("ptq", 3, {"block": "original", "position": "left"}),
        ("adaround", 8, {"position": "none", "block": "post_norm"}),
        ("lsq", 8, {"side": ("category",), "time_bias": False}),
        ("lsq", 8, {"side": ()}),
    ],
)
def test_the_artefact_scores_as_the_simulation(method: str, bits: int, options: dict[str, Any], tmp_path: Path) -> None:
    artefact, simulation = exported(tmp_path, method, bits, **options)
    agreement = Agreement(simulation, artefact)
    events = some_events()
    agreement.exported(events)
    agreement.simulated(events)
    assert agreement.users == 64
    assert agreement.steps <= 1
    assert agreement.same_elements >= 0.995 * agreement.elements
    assert agreement.same_users >= 62


@pytest.mark.parametrize("options", [{}, {"heads": 2, "blocks": 1}, {"side": ("recency",)}])
def test_the_graph_in_full_precision_is_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    artefact, _ = exported(tmp_path, None, **options)
    model, events = build(**options), some_events()
    assert events.ratings is not None and events.times is not None
    expected = model.score(model.encode(events, last=True)[:, 0]).detach()
    found = torch.from_numpy(artefact.scores(events.items.numpy(), events.ratings.numpy(), events.times.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Nothing known is as nothing given.
    alone = torch.from_numpy(artefact.scores(events.items.numpy()))
    torch.testing.assert_close(alone, model.score(model.encode(events.items, last=True)[:, 0]).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, found, atol=1e-2)


def test_side_tables_are_stored_as_the_position_table_is(tmp_path: Path) -> None:
    artefact, _ = exported(tmp_path, "lsq", 4)
    tensors = artefact.manifest["tensors"]
    alike = ("kind", "bits", "levels", "compute", "file")
    position = {key: tensors["position_table.weight"][key] for key in alike}
    for name, rows in (("rating", 6), ("category", 4), ("recency", 33)):
        entry = tensors[f"side.{name}_table.weight"]
        assert {key: entry[key] for key in alike} == position
        assert entry["shape"] == [rows, 16]
    assert set(artefact.manifest["products"].values()) == {"int8"}
    assert artefact.inputs == ("ratings", "times")
    # 31 rows of two-byte scales; positions, ratings, categories and recency with four bytes a row.
    small = 8 + 6 + 4 + 33
    assert artefact.manifest["sizes"]["embedding_bytes"] == 31 * (16 // 2 + 2) + small * (16 // 2 + 4)


@pytest.fixture
def model(tmp_path: Path) -> Recommender:
    return exported(tmp_path / "all", "lsq")[0]


HISTORY = ["sku/3", "what", "sku/1", "sku/4"]
RATINGS: list[float | None] = [5, 1, None, 2.5]
TIMES: list[float | None] = [10**9, 10**9 + 2, 10**9 + 7.9, None]


def ids(result: Recommendation) -> list[str]:
    return [item.id for item in result.items]


def test_ratings_and_times_go_with_the_items_they_are_given_for(model: Recommender) -> None:
    """The unknown item is left out with its own; times count in whole seconds."""
    result = model.recommend(HISTORY, k=5, ratings=RATINGS, times=TIMES)
    scores = model.scores(np.array([[3, 1, 4]]), np.array([[5, NAN, 2.5]], np.float32), np.array([[10**9, 10**9 + 7, NAN]]))[0]
    scores[[0, 3, 1, 4]] = -np.inf
    assert ids(result) == [f"sku/{i}" for i in np.argsort(-scores, kind="stable")[:5]]
    assert [item.score for item in result.items] != [item.score for item in model.recommend(HISTORY, k=5).items]
    nothing = model.recommend(HISTORY, k=5, ratings=[None] * 4, times=[None] * 4)
    assert nothing == model.recommend(HISTORY, k=5)


def test_many_users_get_what_each_gets_alone(model: Recommender) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 20, 40)
    histories = [[f"sku/{i}" for i in rng.integers(1, ITEMS + 1, n)] for n in lengths]
    ratings = [rng.integers(1, 6, n).tolist() for n in lengths]
    times = [(10**9 + rng.integers(0, 10**5, n).cumsum()).tolist() for n in lengths]
    together = model.recommend(histories, k=5, ratings=ratings, times=times)
    alone = [
        model.recommend(*one[:1], k=5, ratings=one[1], times=one[2]) for one in zip(histories, ratings, times, strict=True)
    ]
    assert [ids(one) for one in together] == [ids(one) for one in alone]


def test_a_model_that_does_not_ask_for_them_ignores_them_but_not_what_is_wrong(tmp_path: Path) -> None:
    plain = exported(tmp_path / "plain", "lsq", side=(), time_bias=False)[0]
    assert plain.inputs == ()
    assert plain.recommend(HISTORY, ratings=RATINGS, times=TIMES) == plain.recommend(HISTORY)
    with pytest.raises(ValueError, match="ratings has 1 entries for a history of 4"):
        plain.recommend(HISTORY, ratings=[1])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ratings": [1, 2]}, "ratings has 2 entries for a history of 4"),
    ({"times": [1, 2, 3, 4, 5]}, "times has 5 entries for a history of 4"),
    ({"ratings": "1234"}, "ratings must be a list of numbers as long as the history"),
    ({"ratings": {"sku/3": 5}}, "ratings must be a list of numbers as long as the history"),
    ({"ratings": 5}, "ratings must be a list of numbers as long as the history"),
    ({"ratings": [5, "4", 3, 2]}, "ratings[1] must be a number or null, not '4'"),
    ({"ratings": [5, 4, True, 2]}, "ratings[2] must be a number or null, not True"),
    ({"ratings": [5, 4, [3], 2]}, "ratings[2] must be a number or null, not [3]"),
    ({"ratings": [5, 4, NAN, 2]}, "ratings[2] must be a number of usual size, not nan"),
    ({"times": [1, 2, 3, 10**30]}, "times[3] must be a number of usual size, not 1000000000"),
    ({"times": [1, 2, 3, 978_300_000_000]}, "times[3] is 978300000000; give seconds since 1970"),
    ({"times": [5, None, 4, 6]}, "times must not fall: the history is oldest first"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_others_are_refused(model: Recommender, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        model.recommend(HISTORY, **wrong)
    assert message in str(caught.value)
    if isinstance(wrong.get("ratings"), list):
        with pytest.raises(ValueError, match="ratings has 1 lists for 2 histories"):
            model.recommend([HISTORY, HISTORY], ratings=[wrong["ratings"]])


@pytest.fixture
def port(model: Recommender) -> Iterator[int]:
    with serving(Service({"all": model})) as port:
        yield port


def test_the_service_takes_them_and_refuses_what_is_wrong(port: int, model: Recommender) -> None:
    expected = model.recommend(HISTORY, 4, ratings=RATINGS, times=TIMES)
    status, answer = call(port, "/recommend", {"history": HISTORY, "k": 4, "ratings": RATINGS, "times": TIMES})
    assert (status, [item["id"] for item in answer["items"]]) == (200, ids(expected))
    both = {"history": [HISTORY, []], "ratings": [RATINGS, []], "times": [TIMES, []]}
    status, answer = call(port, "/recommend", both)
    assert status == 200
    assert [item["score"] for item in answer["users"][0]["items"][:4]] == [item.score for item in expected.items]
    assert call(port, "/models")[1][0]["inputs"] == ["history", "ratings", "times"]
    for wrong, message in WRONG:
        status, answer = call(port, "/recommend", {"history": HISTORY, **wrong})
        assert status == 422
        assert message in answer["error"]
    status, answer = call(port, "/recommend", {"history": [HISTORY], "times": TIMES})
    assert (status, answer["error"]) == (422, "times has 4 lists for 1 histories")
    assert call(port, "/health")[0] == 200


def test_the_command_takes_them(model: Recommender) -> None:
    expected = model.recommend(HISTORY, 3, ratings=RATINGS, times=TIMES)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sasrec", "recommend", "--model", str(model.folder), "--history", ",".join(HISTORY)]
        return subprocess.run([*command, "-k", "3", *options], cwd=ROOT, capture_output=True, text=True, check=False)

    done = run("--ratings", "5,1,,2.5", "--times", "1000000000,1000000002,1000000007.9,", "--json")
    assert [(item["id"], item["score"]) for item in json.loads(done.stdout)["items"]] == [
        (i.id, i.score) for i in expected.items
    ]
    wrong = run("--ratings", "5,good,,")
    assert (wrong.returncode, wrong.stderr) == (1, "error: --ratings: could not convert string to float: 'good'\n")
    assert run("--times", "5").stderr == "error: times has 1 entries for a history of 4\n"


def test_it_is_benchmarked_beside_the_same_network_in_full_precision(model: Recommender) -> None:
    table = benchmark(model.folder, BenchmarkParams(batch_sizes=(2,), repeats=3))
    header, row = (line.split(",") for line in table.splitlines())
    assert all(
        float(dict(zip(header, row, strict=True))[name]) > 0 for name in ("encode_ms", "torch_ms", "onnxruntime_fp32_ms")
    )
    assert read_manifest(model.folder)["rating_edges"] == [1.5, 2.5, 3.5, 4.5]
