"""The cheap product of one request: what it proposes is scored exactly, and nothing that belongs to the best is left out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.config import ModelParams, QuantParams
from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender.model import SHORTLIST
from sasrec.deploy.recommender.tensors import block_size
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import FrozenTensor

ITEMS = 2_000
PARAMS = ModelParams(max_len=8, hidden=32, blocks=1)
NOTHING = np.zeros(0, np.int64)


def made(seed: int = 0) -> SASRec:
    torch.manual_seed(seed)
    model = SASRec(PARAMS, ITEMS).eval()
    with torch.no_grad():
        model.item_table.weight.mul_(20)
    return model


def frozen(method: str, bits: int, table: str = "per_row") -> dict[str, FrozenTensor]:
    model = made()
    module, options = load_method(method, {})
    quant = QuantParams(bits=8, embedding_bits=bits, table=table)  # type: ignore[arg-type]
    attach(model, quant, module, options)
    calibrate(model, [torch.randint(1, ITEMS + 1, (16, 8))])
    return freeze(model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(method: str = "lsq", bits: int = 4, table: str = "per_row", shortlist_from: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("model")
        items = [Item(f"sku/{i}", f"Title {i}", (), i % 7) for i in range(1, ITEMS + 1)]
        export(folder, made(), frozen(method, bits, table), items, {}, shortlist_from)
        return folder

    return make


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> Recommender:
    return Recommender.load(exported())


def exact(model: Recommender, state: np.ndarray, k: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranked by all scores of the integer product."""
    scores = model.scores_of(state)[0]
    scores[np.append(hidden, 0)] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(k, ITEMS)]
    return scores[best], best


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_best_are_those_of_the_exact_product_to_the_bit(model: Recommender, data: st.DataObject) -> None:
    """Whatever the state, also one with a single large element, where the cheap product is coarsest."""
    values = st.sampled_from([0, 1, 100, 127, 128, 129, 140, 254, 255])
    state = np.array(data.draw(st.lists(values, min_size=32, max_size=32)), np.uint8)[None, None]
    k = data.draw(st.sampled_from([1, 10, 60, 500, ITEMS]))
    hidden = np.array(data.draw(st.lists(st.integers(1, ITEMS), max_size=40, unique=True)), np.int64)
    found_values, found_items = model.top_k(state, k, [hidden])
    expected_values, expected_items = exact(model, state, k, hidden)
    assert found_items[0].tolist() == expected_items.tolist()
    assert (found_values[0] == expected_values).all()


@pytest.mark.parametrize(
    ("method", "bits", "table"), [("ptq", 4, "per_tensor"), ("lsq", 3, "per_row"), ("dorefa", 2, "per_row")]
)
def test_other_tables_of_small_integers_are_shortlisted_too(
    method: str, bits: int, table: str, exported: Callable[..., Path]
) -> None:
    model = Recommender.load(exported(method, bits, table))
    rng = np.random.default_rng(0)
    histories = rng.integers(1, ITEMS + 1, (20, 8))
    for one in histories:
        state = model.encode(one[None])
        found_values, found = model.top_k(state, 10, [one])
        values, items = exact(model, state, 10, one)
        assert found[0].tolist() == items.tolist()
        assert (found_values[0] == values).all()
    assert model.shortlisted == 20


def test_a_shortlist_that_is_too_short_is_widened_and_counted(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dict(model.shortlist or {})
    monkeypatch.setattr(model, "shortlist", {**facts, "width": 10, "bound": 20 * facts["bound"]})
    state = model.encode(np.array([[3, 1, 4]]))
    before = model.widened
    _, items = model.top_k(state, 2, [NOTHING])
    assert items[0].tolist() == exact(model, state, 2, NOTHING)[1].tolist()
    assert model.widened > before
    # As wide as the catalogue nothing is left to widen to.
    monkeypatch.setattr(model, "shortlist", {**facts, "width": ITEMS + 1})
    before = model.widened
    model.top_k(state, 2, [NOTHING])
    assert model.widened == before


def test_cheap_scores_are_off_by_less_than_the_bound(model: Recommender) -> None:
    facts = model.shortlist
    assert facts is not None
    rng = np.random.default_rng(0)
    largest = 0.0
    for spread in (0.3, 3, 30, 100):
        state = np.clip(rng.normal(128, spread, (1, 1, 32)).round(), 0, 255).astype(np.uint8)
        cheap, items = model._ranked(model._candidates, state, ITEMS, [NOTHING])
        levels = state[0, 0].astype(np.float64) - 128
        own = model._rows[items[0]].astype(np.float64) @ levels * model._row_scales[items[0]] / facts["state_scale"]
        error = np.abs(levels).max() / 254 * facts["bound"]
        assert np.abs(cheap[0] - own).max() <= error * 1.0001
        largest = max(largest, np.abs(cheap[0] - own).max() / error)
    assert largest > 0.02  # the cheap product does round


def test_batches_are_scored_by_the_exact_product(model: Recommender) -> None:
    before = model.shortlisted
    states = model.encode(np.arange(1, 41).reshape(5, 8))
    values, items = model.top_k(states, 10, [NOTHING] * 5)
    assert model.shortlisted == before
    for i in range(5):
        expected_values, expected_items = exact(model, states[i : i + 1], 10, NOTHING)
        assert items[i].tolist() == expected_items.tolist()
        assert (values[i] == expected_values).all()


def test_which_tables_are_shortlisted(exported: Callable[..., Path], tmp_path: Path) -> None:
    listed = {
        ("lsq", 8): False,  # the exact product reads as few bits
        ("apot", 4): False,  # levels up to 10
        ("ptq", 4): True,
        ("adaround", 2): True,
    }
    for (method, bits), expected in listed.items():
        folder = exported(method, bits)
        assert (folder / "shortlist.onnx").exists() == expected
        assert (Recommender.load(folder).shortlist is not None) == expected
    assert not (exported(shortlist_from=ITEMS * 64) / "shortlist.onnx").exists()


def test_the_manifest_says_so(model: Recommender) -> None:
    entry = model.manifest["tensors"]["item_table.weight"]
    assert entry["single_request"] == f"4 bits shortlist {SHORTLIST}, scored again in int8"
    graph = onnx.load(model.folder / "shortlist.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 1


@pytest.mark.parametrize(("features", "block"), [(16, 16), (48, 16), (64, 64), (96, 32), (128, 128), (256, 256), (512, 256)])
def test_blocks_divide_a_row(features: int, block: int) -> None:
    assert block_size(features) == block
