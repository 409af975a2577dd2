"""The exported folder: its bits, its sizes, that it computes in integers, and what it refuses."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sasrec.checkpoint import load_model, load_tensors, save_model, save_tensors
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.deploy import ArtefactError, Recommender
from sasrec.deploy.artefact import Item, export, sizes
from sasrec.deploy.graph import TYPES, Graph, float_operators
from sasrec.deploy.packing import pack
from sasrec.deploy.recommender.manifest import digest, read_manifest
from sasrec.deploy.recommender.tensors import Tensors, unpack
from sasrec.deploy.simulation import Agreement, Norm, Simulation, softmax
from sasrec.evaluation import rank
from sasrec.files import read_json, write_json
from sasrec.metrics import ndcg
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import from_tensors, to_tensors
from sasrec.quant.recipe import Run
from sasrec.quant.recipe import quantize as recipe
from sasrec.training import Trainer
from tests.conftest import SmallStore
from tests.deploy.conftest import CATALOGUE, ITEMS, build, files_of, quantize

METHODS = ["ptq", "ste", "lsq", "pact", "dorefa", "dorefa-paper", "apot", "adaround", "pq"]
Export = Callable[..., Path]
CPU = torch.device("cpu")


def test_bits_are_packed_least_significant_first() -> None:
    # Three-bit codes 1, 7, 2, 5: the stream, bit 0 first, is 100 111 010 101, in bytes 01111001 and 1010 upside down.
    assert pack(np.array([1, 7, 2, 5], np.uint8), 3).tolist() == [0b10111001, 0b1010]
    assert pack(np.array([1, 0, 1], np.uint8), 1).tolist() == [0b101]
    assert pack(np.array([200, 3], np.uint8), 8).tolist() == [200, 3]


@given(st.integers(1, 8), st.data())
def test_packing_round_trips_at_every_width(bits: int, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(max_dims=2, max_side=9))
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    stream = pack(codes, bits)
    assert len(stream) == -(-codes.size * bits // 8)
    assert (unpack(stream, bits, shape) == codes).all()


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_long_streams_round_trip(bits: int) -> None:
    """More codes than are worked on at once."""
    codes = np.random.default_rng(0).integers(0, 2**bits, 2**20 + 5).astype(np.uint8)
    assert (unpack(pack(codes, bits), bits, codes.shape) == codes).all()


def test_codes_that_do_not_fit_and_streams_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into 3 bits"):
        pack(np.array([8], np.uint8), 3)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(np.zeros(2, np.uint8), 3, (6,))


def histories() -> torch.Tensor:
    made = torch.randint(1, ITEMS + 1, (64, 8), generator=torch.Generator().manual_seed(1))
    made[:20, :3] = 0
    return made


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


def test_the_last_block_and_padding_change_nothing(exported: Export) -> None:
    """A history alone, and the same beside longer ones, padded."""
    model = Recommender.load(exported())
    alone = model.encode(np.array([[3, 1, 4]]))
    together = model.encode(np.array([[0, 0, 0, 0, 0, 3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]))
    assert (alone[0] == together[0]).all()


def operators(folder: Path, file: str, tmp_path: Path) -> Counter[str]:
    """What onnxruntime makes of a file of the artefact."""
    manifest = read_manifest(folder)
    tensors = Tensors(folder, manifest)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    names = manifest["given"][file]
    arrays = [tensors.initializer(name, manifest["scoring_table"]) for name in names]
    if names:
        options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays])
    onnxruntime.InferenceSession((folder / file).read_bytes(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(("method", "bits"), [("lsq", 8), ("lsq", 4), ("pact", 8), ("ptq", 2), ("dorefa", 3), ("apot", 4)])
@pytest.mark.parametrize("heads", [1, 2])
def test_every_product_is_one_of_integers(method: str, bits: int, heads: int, exported: Export, tmp_path: Path) -> None:
    folder = exported(method, bits, model={"heads": heads, "attention_output": True})
    products = read_manifest(folder)["products"]
    assert set(products.values()) == {"int8"}
    found = operators(folder, "encoder.onnx", tmp_path)
    integers = found["MatMulIntegerToFloat"] + found["QLinearMatMul"] + found["MatMulInteger"]
    # Two blocks of query, key, value, scores, context, output, inner, outer; sums of inputs where weights have an offset.
    assert integers == len(products) - 1 == 16 + sum(name.endswith(".sum") for name in products)
    assert not {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits"} & set(found)
    for file in ("scores.onnx", "top_k.onnx"):
        found = operators(folder, file, tmp_path)
        assert found["MatMulIntegerToFloat"] == 1
        assert not {"MatMul", "Gemm"} & set(found)


def test_levels_beyond_8_bits_are_said_to_be_multiplied_in_float32(exported: Export) -> None:
    manifest = read_manifest(exported("apot", 8))
    assert set(manifest["products"].values()) == {"integers in float32"}
    entry = manifest["tensors"]["item_table.weight"]
    assert (entry["bits"], entry["compute"], entry["accumulator"]) == (8, "integers in float32", "float32")


def test_sizes_count_packed_bits_and_scales(tmp_path: Path) -> None:
    frozen = quantize("lsq", 4, {}, embedding_bits=2)
    found = export(tmp_path, build(), frozen, CATALOGUE, {})
    # The item table: 31 rows of 16 two-bit codes and a float16 scale each; that of 8 positions has float32 scales.
    assert found.embedding_bytes == 31 * (16 * 2 // 8 + 2) + 8 * (16 * 2 // 8 + 4)
    assert found.weight_bytes == 10 * 16 * (16 * 4 // 8 + 4)
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file() and file.name != "items.csv")
    entries, weights = 39 * 16, 10 * 16 * 16
    assert found.bits == pytest.approx((entries * 2 + weights * 4) / (entries + weights))


def test_a_table_of_product_quantization_ships_as_its_centroids_and_their_numbers(tmp_path: Path) -> None:
    frozen = quantize("pq", 8, {}, embedding_bits=4)
    model = build()
    found = export(tmp_path, model, frozen, CATALOGUE, {})
    # 30 items of four numbers of three bits; four times eight centroids of four values of four bits; one scale. The eight
    # positions have 16 values of four bits and a scale each.
    numbers, book = ITEMS * 4 * 3 // 8, 4 * 8 * 4 * 4 // 8
    assert found.embedding_bytes == numbers + book + 4 + 8 * (16 * 4 // 8 + 4)
    assert (tmp_path / "item_table.bin").stat().st_size == 64 + book  # numbers, filled up to 64 bytes, and centroids
    entry = read_manifest(tmp_path)["tensors"]["item_table.weight"]
    assert (entry["bytes"], entry["compute"]) == (numbers + book, "int8")
    assert entry["bits"] == pytest.approx(8 * (numbers + book) / (31 * 16), abs=0.005)
    assert found.bits == pytest.approx((8 * (numbers + book) + 8 * 16 * 4 + 10 * 16 * 16 * 8) / (39 * 16 + 10 * 16 * 16))
    stored, tensors = frozen["item_table.weight"], Tensors(tmp_path, read_manifest(tmp_path))
    assert stored.codes is not None and stored.product is not None
    levels = stored.grid.levels[stored.codes.long()].numpy()
    assert (tensors.stored("item_table.weight") == levels).all() and not levels[0].any()


def test_a_table_of_product_quantization_and_few_bits_is_shortlisted_as_any_other(tmp_path: Path) -> None:
    frozen = quantize("pq", 8, {"hidden": 32}, embedding_bits=4)
    export(tmp_path, build(hidden=32), frozen, CATALOGUE, {}, shortlist_from=1)
    model = Recommender.load(tmp_path)
    assert model.shortlist is not None
    history = np.array([[3, 1, 4]])
    scores = model.scores(history)[0]
    values, items = model.top_k(model.encode(history), 5, [np.zeros(0, np.int64)])
    assert items[0].tolist() == (np.argsort(-scores[1:], kind="stable")[:5] + 1).tolist()
    assert values[0] == pytest.approx(scores[items[0]], rel=1e-5)


def test_a_table_of_product_quantization_beside_full_precision(tmp_path: Path) -> None:
    """rest: none. The scores of states in float32 are products with the integers of the table."""
    model = build()
    module, chosen = load_method("pq", {"splits": 4, "centroids": 8, "rest": "none"})
    live = build()
    attach(live, QuantParams(), module, chosen)
    frozen = freeze(live)
    assert list(frozen) == ["item_table.weight"]
    export(tmp_path, model, frozen, CATALOGUE, {})
    scores = torch.from_numpy(Recommender.load(tmp_path).scores(histories().numpy()))
    with torch.no_grad():
        expected = live.score(live.encode(histories(), last=True)[:, 0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("table", ["per_row", "per_tensor"])
def test_tables_of_one_bit_ship_as_one_bit(method: str, table: str, tmp_path: Path) -> None:
    """Packed eight to a byte, with a scale a row, and scored as simulated."""
    frozen = quantize(method, 8, {}, embedding_bits=1, table=table)
    model = build()
    export(tmp_path / "m", model, frozen, CATALOGUE, {})
    # 16 bits a row of items and of positions; a scale each of 2 and of 4 bytes, or one of 4 for the table.
    items, positions = ITEMS + 1, 8
    scales = 2 * items + 4 * positions if table == "per_row" else 4 + 4
    assert sizes(tmp_path / "m").embedding_bytes == 16 // 8 * (items + positions) + scales
    agreement = Agreement(Simulation(model, frozen), Recommender.load(tmp_path / "m"))
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    assert agreement.steps <= 1 and agreement.same_users >= 63
    assert int(((scores - expected).abs() <= 1e-5 * expected.abs().max()).all(1).sum()) >= 63


@pytest.mark.parametrize(("bits", "times"), [(8, 3.4), (4, 5.0), (2, 7.0)])
def test_the_size_of_a_model_of_hidden_50(bits: int, times: float, tmp_path: Path) -> None:
    """MovieLens-1M's 3,416 items, two blocks, length 50, against float32."""
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=50, hidden=50), 3416)
    module, options = load_method("ptq", {"range": "minmax"})
    full = sum(parameter.numel() * 4 for parameter in model.parameters())
    attach(model, QuantParams(bits=bits), module, options)
    calibrate(model, [torch.randint(1, 3417, (4, 50))])
    frozen = freeze(model)
    plain = SASRec(ModelParams(max_len=50, hidden=50), 3416)
    found = export(tmp_path, plain, frozen, [type(CATALOGUE[0])(str(i)) for i in range(3416)], {})
    assert full / found.bytes >= times


def test_nothing_of_the_size_of_float32_stays_inside(exported: Export) -> None:
    folder = exported("lsq", 8)
    weights = {f"blocks.{b}.attention.{w}.weight" for b in (0, 1) for w in ("query", "key", "value")}
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {kinds[name] for name in weights} == {onnx.TensorProto.INT8}
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.data_location == 0]
    assert max(int(np.prod(t.dims)) for t in floats) <= 16


def test_a_full_precision_model_is_exported_as_it_is(exported: Export) -> None:
    folder = exported(None)
    manifest = read_manifest(folder)
    assert sizes(folder).bits == 32
    assert set(manifest["products"].values()) == {"float32"}


def test_the_same_model_exports_to_the_same_bytes(exported: Export) -> None:
    first, second = exported("apot", 4, "a"), exported("apot", 4, "b")
    names = {str(file.relative_to(first)) for file in files_of(first)}
    runtime = ("__init__", "__main__", "answers", "command", "events", "manifest", "model", "tensors")
    assert names == {
        "encoder.onnx", "scores.onnx", "top_k.onnx", "item_table.bin", "weights.bin", "items.csv", "manifest.json",
        *(f"recommender/{name}.py" for name in runtime),
    }  # fmt: skip
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_titles_and_categories_of_any_characters_come_back(tmp_path: Path) -> None:
    odd = ["a\rb", "a\r", "a\r\n", "a\nb", 'a "b", c', " \x1c ", "\0", "\x85\u2028\v\f", "x" * 100_000]
    items = [Item(f"i{i}", odd[i % len(odd)], (odd[i % len(odd)], "b")) for i in range(ITEMS)]
    export(tmp_path, build(), {}, items, {})
    model = Recommender.load(tmp_path)
    assert model.titles[1:] == [item.title for item in items]
    assert model.categories[1:] == [item.categories for item in items]


def test_the_catalogue_of_plain_titles_is_lines_that_end_with_a_newline(exported: Export) -> None:
    lines = (exported() / "items.csv").read_bytes().split(b"\n")
    assert lines[:2] == [b"id,original,title,categories,count", b"1,sku/1,Title 1,a|b,7"]
    assert len(lines) == ITEMS + 2


def test_the_manifest_says_what_is_in_the_folder(exported: Export) -> None:
    manifest = read_manifest(exported("lsq", 4))
    assert manifest["valid_ndcg@10"] == 0.5
    entry = manifest["tensors"]["item_table.weight"]
    assert (entry["bits"], entry["levels"], entry["compute"], entry["accumulator"]) == (4, 16, "int8", "int32")
    assert entry["scales"] == {"dtype": "float16", "count": 31}
    # Two blocks: a norm before each half and one at the end; a softmax each, whose weights are made to shares and summed.
    expected = {"LayerNormalization": 5, "Softmax": 2, "ReduceMax": 2, "ReduceSum": 2, "Max": 2, "Relu": 2}
    assert manifest["float_operators"].items() >= expected.items()
    assert "MatMul" not in manifest["float_operators"]


def test_what_is_left_in_float32_is_counted_by_its_type() -> None:
    """Ids and times are worked on in int64 and float64."""
    graph = Graph("g")
    for kind in (np.float32, np.float64, np.int64):
        value = graph.node("Cast", "x", to=TYPES[np.dtype(kind).name])
        value = graph.node("Add", value, graph.constant(1, kind))
    last = graph.node("Cast", value, to=TYPES["float32"])
    assert float_operators(graph.serialized({"x": ("float32", (2,))}, {"y": (last, "float32", (2,))})) == {"Add": 1}


def test_truncated_edited_missing_and_foreign_files_are_refused(exported: Export, tmp_path: Path) -> None:
    good = exported("lsq", 4)
    for name in (str(file.relative_to(good)) for file in files_of(good)):
        content = (good / name).read_bytes()
        half = len(content) // 2
        for bad in (content[:half], content[:-2], content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :], b"", None):
            folder = tmp_path / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            (folder / name).unlink()
            if bad is not None:
                (folder / name).write_bytes(bad)
            with pytest.raises(ArtefactError, match=name):
                Recommender.load(folder)
    with pytest.raises(ArtefactError, match="cannot be read"):
        Recommender.load(tmp_path / "nowhere")


def test_another_format_and_other_json_are_refused(exported: Export) -> None:
    folder = exported()
    path = folder / "manifest.json"
    content = read_json(path)
    changed = {**content, "format": 99}
    write_json(path, {**changed, "digest": digest(changed)})
    with pytest.raises(ArtefactError, match="is of format 99, and this runtime reads"):
        Recommender.load(folder)
    others: list[object] = [[], {}, {"format": 3}, 3, None]
    for other in others:
        write_json(path, other)
        with pytest.raises(ArtefactError, match="not the manifest of an exported model"):
            Recommender.load(folder)
    changed = {**content, "files": {"../escape": content["files"]["items.csv"]}}
    write_json(path, {**changed, "digest": digest(changed)})
    with pytest.raises(ArtefactError, match="escape"):
        Recommender.load(folder)


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
