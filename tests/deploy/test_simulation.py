"""The exported folder and the simulation of its checkpoint in torch give the same, to the bit where they can."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sasrec.checkpoint import load_model, load_tensors, save_model, save_tensors
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.simulation import Agreement, Norm, Simulation, softmax
from sasrec.evaluation import rank
from sasrec.metrics import ndcg
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import from_tensors, to_tensors
from sasrec.quant.recipe import Run
from sasrec.quant.recipe import quantize as recipe
from sasrec.training import Trainer
from tests.conftest import SmallStore
from tests.deploy.conftest import CATALOGUE, build, histories, quantize

METHODS = ["ptq", "ste", "lsq", "pact", "dorefa", "dorefa-paper", "apot", "adaround", "pq"]
Export = Callable[..., Path]
CPU = torch.device("cpu")


def compared(folder: Path, method: str, bits: int, **model: object) -> tuple[Agreement, torch.Tensor, torch.Tensor]:
    agreement = Agreement(Simulation(build(**model), quantize(method, bits, dict(model))), Recommender.load(folder))
    return agreement, agreement.exported(histories()), agreement.simulated(histories())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_artefact_scores_as_the_simulation(method: str, bits: int, exported: Export) -> None:
    agreement, scores, expected = compared(exported(method, bits), method, bits)
    assert agreement.users == 64
    assert agreement.steps <= 1
    assert agreement.same_elements >= 0.999 * agreement.elements
    assert agreement.same_users >= 63
    same = ((scores - expected).abs() <= 1e-5 * expected.abs().max()).all(1)
    assert int(same.sum()) >= 63  # one state may lie on another side of a rounding


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_a_learned_offset_ships_as_a_zero_point(bits: int, exported: Export) -> None:
    """At 8 bits its levels reach from anywhere to 255 further on, where others start at -128 or 0."""
    folder = exported("lsq-offset", bits)
    stored = quantize("lsq-offset", bits, {})
    # With the levels of the plain grid all of it would be the other tests'.
    assert any(float(each.grid.levels[0]) not in (0, -(2 ** (bits - 1))) for each in stored.values())
    assert "int8" in set(read_manifest(folder)["products"].values())
    agreement, scores, expected = compared(folder, "lsq-offset", bits)
    assert agreement.steps <= 1 and agreement.same_elements >= 0.999 * agreement.elements and agreement.same_users >= 63
    same = ((scores - expected).abs() <= 1e-5 * expected.abs().max()).all(1)
    assert int(same.sum()) >= 63


@pytest.mark.parametrize(
    "model",
    [
        {"block": "original"},
        {"block": "post_norm", "attention_output": True},
        {"heads": 4, "attention_output": True, "ffn_dim": 24},
        {"heads": 2, "blocks": 1, "position": "left"},
        {"blocks": 3, "position": "none", "embedding_norm": True, "final_norm": False},
        {"tied": False, "hidden": 20},
    ],
)
@pytest.mark.parametrize("method", ["lsq", "apot"])
def test_every_kind_of_model_is_exported(model: dict[str, object], method: str, exported: Export) -> None:
    agreement, _, _ = compared(exported(method, 8, model=model), method, 8, **model)
    assert agreement.same_elements >= 0.995 * agreement.elements
    assert agreement.same_users >= 61
    plain = Simulation(build(**model), {})
    model_folder = exported(None, name="plain", model=model)
    scores = torch.from_numpy(Recommender.load(model_folder).scores(histories().numpy()))
    expected = plain.scores(plain.encode(histories().numpy()))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["pre_norm", "original"])
@pytest.mark.parametrize(
    "places", [["query"], ["key"], ["value"], ["weights"], ["key", "value", "weights"], ["query.weight"], ["key.weight", "key"]]
)
def test_any_place_of_attention_may_stay_in_full_precision(block: str, places: list[str], tmp_path: Path) -> None:
    """Then its products are not of integers, and those of the layers before them still are."""
    overrides = {f"blocks.{i}.attention.{place}": 32 for i in range(2) for place in places}
    frozen = quantize("ptq", 8, {"block": block}, overrides=overrides)
    assert not set(frozen) & set(overrides)
    export(tmp_path, build(block=block), frozen, CATALOGUE, {"valid_ndcg@10": 0.5, "data": "abc"})
    agreement = Agreement(Simulation(build(block=block), frozen), Recommender.load(tmp_path))
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    assert agreement.steps <= 1 and agreement.same_elements >= 0.99 * agreement.elements and agreement.same_users >= 61
    assert ((scores - expected).abs() <= 1e-5 * expected.abs().max()).all(1).sum() >= 55


def test_the_last_block_and_padding_change_nothing(exported: Export) -> None:
    """A history alone, and the same beside longer ones, padded."""
    model = Recommender.load(exported())
    alone = model.encode(np.array([[3, 1, 4]]))
    together = model.encode(np.array([[0, 0, 0, 0, 0, 3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]))
    assert (alone[0] == together[0]).all()


def test_what_is_trained_ships(tmp_path: Path, chains: SmallStore) -> None:
    """From training to recommendations: validation of the exported model is that of the training run."""
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=10, hidden=16, dropout=0.1), chains.items_count)
    train = TrainParams(loss="cross_entropy", epochs=2, batch_size=16, lr=0.01, schedule="constant", warmup=0.0)
    Trainer(model, chains, train, 0, device=CPU).run(log=lambda line: None)
    quant = QuantParams(epochs=2, lr=0.003, calibration_batches=1)
    run = Run(chains, quant, train, 0, CPU, tmp_path / "resume", "key", lambda line: None)
    outcome = recipe(run, model, "pq", {"splits": 4, "centroids": 8})
    saved = {name: tensor for name, tensor in outcome.model.state_dict().items() if ".quantizer." not in name}
    save_model(tmp_path / "saved", outcome.model, saved, {})
    save_tensors(tmp_path / "saved/quantized.safetensors", *to_tensors(freeze(outcome.model)))
    read, _ = load_model(tmp_path / "saved")
    frozen = from_tensors(*load_tensors(tmp_path / "saved/quantized.safetensors"))
    items = [Item(str(i)) for i in range(1, chains.items_count + 1)]
    export(tmp_path / "exported", read, frozen, items, {})
    agreement = Agreement(Simulation(read, frozen), Recommender.load(tmp_path / "exported"))
    found = [
        float(ndcg(rank(scorer, chains, "validation", 10, only="full").full.astype(np.float64), 10).mean())
        for scorer in (agreement.exported, agreement.simulated)
    ]
    # Integers that are equal in floating point as well share ranks in one and not in the other.
    assert found[0] == pytest.approx(found[1], abs=0.01)
    assert found[0] == pytest.approx(outcome.ndcg, abs=0.02)
    assert agreement.same_elements >= 0.999 * agreement.elements
    assert outcome.ndcg > 0.3


@pytest.mark.parametrize("size", [8, 16, 50, 64])
def test_the_simulated_norm_has_onnxruntimes_bits(size: int) -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx2" not in flags.read_text():
        pytest.skip("the order of sums is that of processors with AVX2")
    node = onnx.helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], axis=-1, epsilon=1e-8)
    values = [onnx.helper.make_tensor_value_info(name, 1, [None] if name in "gb" else [None, size]) for name in "xgby"]
    graph = onnx.helper.make_graph([node], "norm", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    norm = torch.nn.LayerNorm(size, eps=1e-8)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(500, size) * 3 + 0.5
    given = {"x": x.numpy(), "g": norm.weight.detach().numpy(), "b": norm.bias.detach().numpy()}
    assert (session.run(None, given)[0] == Norm(norm)(x).detach().numpy()).all()


def test_the_simulated_softmax_is_a_softmax() -> None:
    """It is onnxruntime's: here held against float64."""
    x = torch.randn(7, 50, 50, generator=torch.Generator().manual_seed(0)) * 4
    x[:, :10, 20:] = -1e9
    torch.testing.assert_close(softmax(x), x.double().softmax(-1).float(), rtol=2e-6, atol=1e-12)
    assert (softmax(x)[:, :10, 20:] == 0).all()


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_long_histories_and_large_weights_turn_no_rounding(method: str, tmp_path: Path) -> None:
    """200 places and sharp attention, where last bits of torch's softmax moved states by two steps."""
    params = ModelParams(max_len=200, hidden=64)

    def made() -> SASRec:
        torch.manual_seed(1)
        model = SASRec(params, 1000).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("table.weight"):
                    parameter.mul_(20)
                elif parameter.dim() == 2:
                    parameter.normal_(std=1.5 * 64**-0.5)
        return model

    model = made()
    module, options = load_method(method, {})
    attach(model, QuantParams(bits=8), module, options)
    calibrate(model, [torch.randint(1, 1001, (16, 200))])
    frozen = freeze(model)
    export(tmp_path, made(), frozen, [type(CATALOGUE[0])(str(i)) for i in range(1000)], {})
    agreement = Agreement(Simulation(made(), frozen), Recommender.load(tmp_path))
    some = torch.randint(1, 1001, (192, 200))
    agreement.exported(some)
    agreement.simulated(some)
    flags = Path("/proc/cpuinfo")
    same_norms = flags.exists() and "avx2" in flags.read_text()
    assert agreement.steps == 0 if same_norms else agreement.steps <= 2
    assert agreement.same_elements >= (1 if same_norms else 0.999) * agreement.elements
