"""Scores of all items for a state, and the best of them, as ONNX graphs: a product of integers, a scale per item, a top-k.

Where scores are a sum over several tables (`sasrec.models.scoring.Part`), one such product for each.
"""

from collections.abc import Sequence

import numpy as np
from onnx import helper

from sasrec.deploy.encoder import INT8, WIDE, Value, as_levels, compute
from sasrec.deploy.form import integer_form
from sasrec.deploy.graph import Graph, Shape
from sasrec.deploy.indices import index_of
from sasrec.deploy.storage import Storage
from sasrec.models.scoring import Part
from sasrec.quant.frozen import FrozenTensor

# What the runtime calls the table of the first part, turned over: (features, items + 1).
TABLE = "scoring_table"


def part_scores(
    graph: Graph, state: Value, part: Part, alone: bool, first: bool, stored: FrozenTensor | None
) -> tuple[str, str]:
    """The scores of one part, (batch, 1, its rows), and in what the product is computed (as `Encoder.products`). alone: it
    takes all of the state. first: its table is the one that the runtime turns over."""
    rows, features = part.table.weight.shape
    name = TABLE if first else part.name
    shape = (features, rows) if first else (rows, features)

    def table(dtype: str) -> str:
        given = graph.given(name, dtype, shape, "")
        return given if first else graph.node("Transpose", given, perm=[1, 0])

    def parameter(kind: str) -> str:
        """One number per row, (rows,)."""
        if first:
            return graph.given(f"{name}/{kind}", "float32", (rows,), "")
        given = graph.given(f"{name}/{kind}", "float32", (rows, 1), "")
        return graph.node("Reshape", given, graph.constant([rows], np.int64))

    in_8_bits = None if stored is None else integer_form(stored.grid) is not None
    x, kind = "state", compute(None if state.scale is None else state.is_integer, in_8_bits)
    if not alone:
        ends = [graph.constant([end], np.int64) for end in (part.columns.start, part.columns.stop, 2)]
        x = graph.node("Slice", x, *ends)
    one = np.float32(1 if state.scale is None else state.scale)
    if state.zero is not None:
        one_or_scale = graph.constant(1.0 if kind == WIDE else one)
        x = graph.node("DequantizeLinear", x, one_or_scale, graph.constant(state.zero, np.uint8))
    if stored is None:
        scores = graph.node("MatMul", x, table("float32"))
        if state.scale is not None and state.zero is None:
            scores = graph.node("Mul", scores, graph.constant(one))
        return scores, kind
    form = integer_form(stored.grid)
    scale, levels = parameter("scale"), table("float32" if form is None and first else "uint8" if form is None else "int8")
    if form is None and not first:
        levels = as_levels(graph, levels, stored.grid, form)
    if kind == INT8:
        scores = graph.node("MatMul", x, graph.node("DequantizeLinear", levels, scale, axis=1))
    else:
        if form is not None:
            levels = as_levels(graph, levels, stored.grid, form)
        if state.zero is None or kind == WIDE:
            scale = graph.node("Mul", graph.constant(one), scale)
        scores = graph.node("Mul", graph.node("MatMul", x, levels), scale)
    if form.is_shifted if form is not None else bool(stored.grid.shift.any()):
        # Of codes behind a DequantizeLinear onnxruntime would make a product that rounds states in float32 to 8 bits.
        if state.zero is None:
            ones = graph.constant(np.full((features, 1), one))
        else:
            ones = graph.constant(np.ones((features, 1)), np.int8)
            ones = graph.node("DequantizeLinear", ones, graph.constant(1.0 if kind == INT8 else one))
        scores = graph.node("Add", scores, graph.node("Mul", graph.node("MatMul", x, ones), parameter("shift")))
    return scores, kind


def scorer(
    name: str,
    state: Value,
    parts: Sequence[Part],
    frozen: dict[str, FrozenTensor],
    storage: Storage,
    top_k: bool,
) -> tuple[Graph, bytes, list[str]]:
    """The graph, its content, and in what the product of each part is computed.

    Inputs: state (batch, 1, features), as the encoder gives it; with top_k also `hidden` int64 (n, 2), pairs of row and item
    that must not be recommended, and `k` int64 (1,). Outputs: `scores` float32 (batch, rows), or `values` and `items`
    (batch, k), best first, ties by the lower item. The runtime gives the tables.
    """
    graph = Graph(name)
    features, rows = parts[-1].columns.stop, len(parts[0].table.weight)
    scores, kinds = "", []
    for part in parts:
        own, kind = part_scores(graph, state, part, len(parts) == 1, part is parts[0], frozen.get(part.name))
        if part.index is not None:
            own = graph.node("Gather", own, index_of(graph, storage, part), axis=2)
        scores = graph.node("Add", scores, own) if scores else own
        kinds.append(kind)
    scores = graph.node("Squeeze", scores, graph.constant([1], np.int64))
    inputs: dict[str, tuple[str, Shape]] = {"state": (state.type, ("batch", 1, features))}
    if not top_k:
        return graph, graph.serialized(inputs, {"scores": (scores, "float32", ("batch", rows))}), kinds
    return graph, best_of(graph, scores, inputs), kinds


def best_of(graph: Graph, scores: str, inputs: dict[str, tuple[str, Shape]]) -> bytes:
    """The content of a graph that ends in the k best of `scores` (batch, rows), as `scorer` describes it. inputs: the other
    inputs."""
    count = graph.node("Shape", "hidden", start=0, end=1)
    never = graph.node("ConstantOfShape", count, value=helper.make_tensor("never", 1, [1], [-np.inf]))
    scores = graph.node("ScatterND", scores, "hidden", never)
    values, items = graph.node("TopK", scores, "k", outputs=2, axis=-1, largest=1, sorted=1)
    outputs: dict[str, tuple[str, str, Shape]] = {
        "values": (values, "float32", ("batch", "k")),
        "items": (items, "int64", ("batch", "k")),
    }
    return graph.serialized(inputs | {"hidden": ("int64", ("pairs", 2)), "k": ("int64", (1,))}, outputs)
