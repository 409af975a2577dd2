"""Scores of all items for a state, and the best of them, as ONNX graphs: a product of integers, a scale per item, a top-k."""

import numpy as np
from onnx import helper

from sasrec.deploy.encoder import INT8, WIDE, Value, compute
from sasrec.deploy.form import integer_form
from sasrec.deploy.graph import Graph, Shape
from sasrec.quant.frozen import FrozenTensor

TABLE = "scoring_table"


def scorer(
    name: str, state: Value, hidden: int, rows: int, stored: FrozenTensor | None, top_k: bool
) -> tuple[Graph, bytes, str]:
    """The graph, its content, and in what the product is computed (as `Encoder.products`).

    Inputs: state (batch, 1, hidden), as the encoder gives it; with top_k also `hidden` int64 (n, 2), pairs of row and item
    that must not be recommended, and `k` int64 (1,). Outputs: `scores` float32 (batch, rows), or `values` and `items`
    (batch, k), best first, ties by the lower item. The runtime gives the table, turned over: (hidden, rows).
    """
    graph = Graph(name)
    in_8_bits = None if stored is None else integer_form(stored.grid) is not None
    x, kind = "state", compute(None if state.scale is None else state.is_integer, in_8_bits)
    one = np.float32(1 if state.scale is None else state.scale)
    if state.zero is not None:
        one_or_scale = graph.constant(1.0 if kind == WIDE else one)
        x = graph.node("DequantizeLinear", x, one_or_scale, graph.constant(state.zero, np.uint8))
    if stored is None:
        scores = graph.node("MatMul", x, graph.given(TABLE, "float32", (hidden, rows), ""))
        if state.scale is not None and state.zero is None:
            scores = graph.node("Mul", scores, graph.constant(one))
    else:
        form = integer_form(stored.grid)
        scale = graph.given(f"{TABLE}/scale", "float32", (rows,), "")
        table = graph.given(TABLE, "float32" if form is None else "int8", (hidden, rows), "")
        if kind == INT8:
            scores = graph.node("MatMul", x, graph.node("DequantizeLinear", table, scale, axis=1))
        else:
            if form is not None:
                table = graph.node("Cast", table, to=1)
            if state.zero is None or kind == WIDE:
                scale = graph.node("Mul", graph.constant(one), scale)
            scores = graph.node("Mul", graph.node("MatMul", x, table), scale)
        if form.is_shifted if form is not None else bool(stored.grid.shift.any()):
            ones = graph.constant(np.ones((hidden, 1)), np.int8)
            ones = graph.node("DequantizeLinear", ones, graph.constant(1.0 if kind == INT8 else one))
            shift = graph.given(f"{TABLE}/shift", "float32", (rows,), "")
            scores = graph.node("Add", scores, graph.node("Mul", graph.node("MatMul", x, ones), shift))
    scores = graph.node("Squeeze", scores, graph.constant([1], np.int64))
    inputs: dict[str, tuple[str, Shape]] = {"state": (state.type, ("batch", 1, hidden))}
    if not top_k:
        return graph, graph.serialized(inputs, {"scores": (scores, "float32", ("batch", rows))}), kind
    return graph, best_of(graph, scores, inputs), kind


def best_of(graph: Graph, scores: str, inputs: dict[str, tuple[str, Shape]]) -> bytes:
    """The content of a graph that ends in the k best of `scores` (batch, rows), as `scorer` says. inputs: the others."""
    count = graph.node("Shape", "hidden", start=0, end=1)
    never = graph.node("ConstantOfShape", count, value=helper.make_tensor("never", 1, [1], [-np.inf]))
    scores = graph.node("ScatterND", scores, "hidden", never)
    values, items = graph.node("TopK", scores, "k", outputs=2, axis=-1, largest=1, sorted=1)
    outputs: dict[str, tuple[str, str, Shape]] = {
        "values": (values, "float32", ("batch", "k")),
        "items": (items, "int64", ("batch", "k")),
    }
    return graph.serialized(inputs | {"hidden": ("int64", ("pairs", 2)), "k": ("int64", (1,))}, outputs)
