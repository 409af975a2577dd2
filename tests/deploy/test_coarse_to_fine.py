"""CaFe by every method: quantized, trained where the method trains, exported, in integers, and equal to its simulation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec.checkpoint import load_model, load_tensors, save_model, save_tensors
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.graph import Graph
from sasrec.deploy.indices import index_of
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.recommender.tensors import Tensors
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.deploy.storage import Storage
from sasrec.models.cafe import CAFE
from sasrec.models.scoring import Part
from sasrec.models.taps import Table, taps
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import from_tensors, to_tensors
from sasrec.quant.recipe import Run, quantize
from tests.conftest import SmallStore
from tests.deploy.test_operators import operators

ITEMS = 30
CATALOGUE = [Item(f"sku/{i}", f"Title {i}", (f"c{i % 4}",), i) for i in range(1, ITEMS + 1)]
CPU = torch.device("cpu")


def build(**options: object) -> CAFE:
    torch.manual_seed(0)
    params = {"kind": "cafe", "max_len": 8, "hidden": 16, "local_heads": 1, "dropout": 0.1, **options}
    model = CAFE(ModelParams(**params), torch.tensor([0, *(1 + i % 4 for i in range(ITEMS))]))  # type: ignore[arg-type]
    with torch.no_grad():
        # At the start of training the states hardly differ, and distances do not count; here they do.
        for name, parameter in model.named_parameters():
            if name.endswith("table.weight"):
                parameter.mul_(20)
            elif "locality" in name:
                parameter.normal_()
    return model.eval()


def histories() -> torch.Tensor:
    made = torch.randint(1, ITEMS + 1, (64, 8), generator=torch.Generator().manual_seed(1))
    made[:20, :3] = 0
    return made


@pytest.mark.parametrize("method", ["control", "ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround", "pq"])
def test_every_method_quantizes_exports_and_agrees(method: str, tmp_path: Path) -> None:
    """The way of the stages: the recipe, a checkpoint, the artefact, and both compared."""
    store = SmallStore([row.tolist() for row in torch.randint(1, ITEMS + 1, (40, 9))], ITEMS)
    train = TrainParams(epochs=1, batch_size=16, min_batches=1)
    quant = QuantParams(bits=4, epochs=1, calibration_batches=1)
    options = {"adaround": {"iterations": 5}, "pq": {"splits": 4, "centroids": 8}}.get(method, {})
    run = Run(store, quant, train, 0, CPU, tmp_path / "resume", "key", lambda line: None)
    model = quantize(run, build(), method, options).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".quantizer." not in name}
    save_model(tmp_path, model, before, {})
    frozen, bits = to_tensors(freeze(model))
    if frozen:
        save_tensors(tmp_path / "quantized.safetensors", frozen, bits)
        loaded = from_tensors(*load_tensors(tmp_path / "quantized.safetensors"))
        assert set(loaded) == set(taps(model))
    else:
        loaded = {}
    folder = tmp_path / "exported"
    export(folder, load_model(tmp_path)[0], loaded, CATALOGUE, {"valid_ndcg@10": 0.5})
    artefact = Recommender.load(folder)
    agreement = Agreement(Simulation(load_model(tmp_path)[0], loaded), artefact)
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    assert agreement.steps <= 1
    assert agreement.same_users >= 63
    assert int(((scores - expected).abs() <= 1e-4 * expected.abs().max()).all(1).sum()) >= 63
    assert len(artefact.recommend(["sku/3", "sku/1", "sku/4"], k=5).items) == 5
    if loaded:
        assert agreement.same_elements >= 0.999 * agreement.elements
        assert set(read_manifest(folder)["products"].values()) == {"int8"}
        # What trained, without anything shipped, scores the same but for last bits and the roundings that those turn.
        live = model.eval().score(model.encode(histories(), last=True)[:, 0])
        close = (live - expected)[:, 1:].abs() <= 0.02 * expected.abs().max()
        assert float(close.float().mean()) > 0.97


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "local_heads": 2, "local_window": 3, "block": "original"}, {"tied": False, "position": "left"}]
)
def test_every_product_is_one_of_integers(bits: int, options: dict[str, object], tmp_path: Path) -> None:
    model = build(**options)
    attach(model, QuantParams(bits=bits), *load_method("ptq", {}))
    calibrate(model, [histories()])
    frozen = freeze(model)
    folder = tmp_path / "model"
    sizes = export(folder, build(**options), frozen, CATALOGUE, {"valid_ndcg@10": 0.5})
    products = read_manifest(folder)["products"]
    assert set(products.values()) == {"int8"}
    found = operators(folder, "encoder.onnx", tmp_path)
    integers = found["MatMulIntegerToFloat"] + found["QLinearMatMul"] + found["MatMulInteger"]
    # Two encoders of two blocks of query, key, value, scores, context, inner, outer; and two products of scoring.
    assert integers == len(products) - 2 == 28
    assert not {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"} & set(found)
    for file in ("scores.onnx", "top_k.onnx"):
        found = operators(folder, file, tmp_path)
        assert found["MatMulIntegerToFloat"] == 2
        assert not {"MatMul", "Gemm", "Transpose", "Cast"} & set(found)
    # Of the intents, a number of 3 bits an item; tables, positions and their scales.
    assert (folder / "coarse.item_table.rows.bin").exists() or (folder / "coarse.output_table.rows.bin").exists()
    rows = (31 + 5) * (2 if options.get("tied") is False else 1)
    assert sizes.embedding_bytes == rows * (16 * bits // 8 + 2) + 2 * 8 * (16 * bits // 8 + 4)


def test_full_precision_scores_as_the_model(tmp_path: Path) -> None:
    model = build()
    export(tmp_path, model, {}, CATALOGUE, {"valid_ndcg@10": 0.5})
    scores = torch.from_numpy(Recommender.load(tmp_path).scores(histories().numpy()))
    expected = model.score(model.encode(histories(), last=True)[:, 0])
    torch.testing.assert_close(scores[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("most", "bits"), [(1, [1]), (18, [5]), (255, [8]), (256, [8, 1]), (70_000, [8, 8, 1])])
def test_intents_are_packed_in_as_few_bits_as_they_need(most: int, bits: list[int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.array([0, most, *rng.integers(1, most + 1, 20)], np.int32)
    storage, graph = Storage(), Graph("g")
    part = Part("x.weight", Table(most + 1, 1, padding=True), slice(0, 1), torch.from_numpy(rows))
    index_of(graph, storage, part)
    names = [f"x.rows.{i}" for i in range(len(bits))]
    assert graph.given_names == names
    assert [storage.tensors[name]["bits"] for name in names] == bits
    (tmp_path / "x.rows.bin").write_bytes(storage.files["x.rows.bin"])
    stored = Tensors(tmp_path, {"tensors": storage.tensors, "levels": {}})
    total = np.zeros(len(rows), np.int64)
    for i, name in enumerate(names):
        total += stored.stored(name).astype(np.int64) << 8 * i
    assert total.tolist() == rows.tolist()
