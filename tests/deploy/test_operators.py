"""What the exported graphs compute in: integers, and what is left in floating point."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sasrec.deploy.graph import TYPES, Graph, float_operators
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.recommender.tensors import Tensors

Export = Callable[..., Path]


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


def test_what_is_left_in_float32_is_counted_by_its_type() -> None:
    """Ids and times are worked on in int64 and float64."""
    graph = Graph("g")
    for kind in (np.float32, np.float64, np.int64):
        value = graph.node("Cast", "x", to=TYPES[np.dtype(kind).name])
        value = graph.node("Add", value, graph.constant(1, kind))
    last = graph.node("Cast", value, to=TYPES["float32"])
    assert float_operators(graph.serialized({"x": ("float32", (2,))}, {"y": (last, "float32", (2,))})) == {"Add": 1}


def test_nothing_of_the_size_of_float32_stays_inside(exported: Export) -> None:
    folder = exported("lsq", 8)
    weights = {f"blocks.{b}.attention.{w}.weight" for b in (0, 1) for w in ("query", "key", "value")}
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {kinds[name] for name in weights} == {onnx.TensorProto.INT8}
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.data_location == 0]
    assert max(int(np.prod(t.dims)) for t in floats) <= 16
