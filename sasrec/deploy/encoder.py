"""The encoder of a SASRec model as an ONNX graph: from item ids to the state after the last one.

Quantized activations are QuantizeLinear / DequantizeLinear pairs in uint8, quantized weights int8 initializers behind a
DequantizeLinear: onnxruntime turns each product between two of them into one of integers, as long as it is not a plain
matrix product with a bias (that it makes a Gemm in floating point), so everything here has three axes. The last block is
computed for the last position alone, which changes nothing of the result.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sasrec.deploy import side
from sasrec.deploy.form import Form, float_form, integer_form, zero_point
from sasrec.deploy.graph import Graph
from sasrec.deploy.storage import Storage
from sasrec.models.attention import HIDDEN_SCORE, Attention
from sasrec.models.sasrec import Block, FeedForward, SASRec
from sasrec.models.taps import Linear, Table
from sasrec.quant.frozen import FrozenTensor
from sasrec.quant.grid import Grid

LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: float32, or where it is quantized (`scale` says what 1 is worth) its levels: as uint8 codes, of
    which `zero` stands for 0, or, where the levels need more than 8 bits, as float32 (zero is None). scale: one number, or
    (features,) of what enters no product."""

    name: str
    scale: float | NDArray[np.float32] | None = None
    zero: int | None = None

    @property
    def is_integer(self) -> bool:
        return self.zero is not None

    @property
    def type(self) -> str:
        return "uint8" if self.is_integer else "float32"


INT8, WIDE, FLOAT = "int8", "integers in float32", "float32"


def compute(*operands: bool | None) -> str:
    """In what a product is computed. operands: whether each is in 8 bits, None where it is not quantized."""
    if None in operands:
        return FLOAT
    return INT8 if all(operands) else WIDE


def as_levels(graph: Graph, codes: str, grid: Grid, form: Form | None) -> str:
    """The levels that `codes` stand for, as float32: integers of `form`, or without one codes of levels beyond int8, of which
    there is a table in the file. Of what is known when the model is loaded onnxruntime does this once."""
    if form is not None:
        return str(graph.node("Cast", codes, to=1))
    return str(graph.node("Gather", graph.constant(grid.levels.cpu().numpy()), graph.node("Cast", codes, to=6)))


@dataclass
class Encoder:
    """Builds the graph. products: by name, in what each matrix product is computed: int8, integers in float32 (exact as long
    as sums stay below 2^24), or float32. prefix: what the names of the model's tensors begin with, where it is a part of
    another."""

    model: SASRec
    frozen: dict[str, FrozenTensor]
    storage: Storage
    graph: Graph = field(default_factory=lambda: Graph("encoder"))
    products: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def build(self) -> Value:
        """The whole encoder; returns the state (batch, 1, hidden)."""
        return self.tap(self.state("items"), "final")

    def state(self, items: str) -> str:
        """The state (batch, 1, hidden) after the (batch, length) ids, before it is rounded."""
        params = self.model.params
        x = self._embed(items)
        length = self._length(items)
        hidden = self.graph.node("Equal", items, self.graph.constant(0, np.int64))
        padding = self.graph.node("Where", hidden, self.graph.constant(HIDDEN_SCORE), self.graph.constant(0.0))
        axes = [1] if params.heads == 1 else [1, 2]
        last_bias = self.graph.node("Unsqueeze", padding, self._ints(*axes))  # (batch, [1,] 1, length)
        full_bias = ""
        if params.blocks > 1:
            square = self.graph.node("Concat", length, length, axis=0)
            future = self.graph.node("Expand", self.graph.constant(HIDDEN_SCORE), square)
            future = self.graph.node("Trilu", future, self.graph.constant(1, np.int64), upper=1)
            full_bias = self.graph.node("Add", last_bias, future)  # (batch, [1,] length, length)
        gaps: dict[bool, str] = {}
        for i, block in enumerate(self.model.blocks):
            last = i == params.blocks - 1
            assert isinstance(block, Block)
            bias = last_bias if last else full_bias
            if block.time_bias is not None:
                if last not in gaps:
                    gaps[last] = side.time_gaps(self.graph, last)
                bias = self.graph.node("Add", bias, side.time_bias(self.graph, block.time_bias, gaps[last]))
            x = self._block(x, f"{self.prefix}blocks.{i}", block, bias, last)
        state = self._float(x)
        if self.model.final_norm is not None:
            state = self._norm(state, self.model.final_norm)
        return state

    # Places of the model

    def _embed(self, items: str) -> Value:
        """(batch, length) ids to (batch, length, hidden)."""
        params, graph = self.model.params, self.graph
        x = self._lookup(items, f"{self.prefix}item_table.weight", self.model.item_table, params.hidden**0.5)
        if self.model.position_table is not None:
            positions = self._rows(f"{self.prefix}position_table.weight", self.model.position_table)
            if params.position == "right":
                start = graph.node("Neg", self._length(items))
                own = graph.node("Slice", positions, start, self._ints(LAST), self._ints(0))
            else:
                zero = graph.constant(0, np.int64)
                padded = graph.node("Cast", graph.node("Equal", items, zero), to=7)
                padded = graph.node("ReduceSum", padded, self._ints(1), keepdims=1)
                scalar = graph.node("Squeeze", self._length(items))
                place = graph.node("Range", zero, scalar, graph.constant(1, np.int64))
                place = graph.node("Max", graph.node("Sub", place, padded), zero)
                own = graph.node("Gather", positions, place)
            x = graph.node("Add", own, x)
        if self.model.side is not None:
            for known in side.side_embeddings(graph, self.model.side, self._rows):
                x = graph.node("Add", x, known)
        if self.model.embedding_norm is not None:
            x = self._norm(x, self.model.embedding_norm)
        return self.tap(x, f"{self.prefix}embedding")

    def _block(self, x: Value, name: str, block: Block, bias: str, last: bool) -> Value:
        graph = self.graph
        attention, inner = block.attention, block.feed_forward
        if block.kind == "original":
            own = self._norm(self._float(self._last(x, last)), block.attention_norm)
            queries = self.tap(own, f"{name}.queries")
            keys = x if block.keys_tap is None else self.tap(self._float(x), f"{name}.keys")
            own = graph.node("Add", own, self._attention(queries, keys, f"{name}.attention", attention, bias, last))
            own = self._norm(own, block.feed_forward_norm)
            own = self._feed_forward(own, own, f"{name}.feed_forward", inner)
        elif block.kind == "pre_norm":
            keys = self.tap(self._norm(self._float(x), block.attention_norm), f"{name}.queries")
            seen = self._attention(self._last(keys, last), keys, f"{name}.attention", attention, bias, last)
            own = graph.node("Add", self._float(self._last(x, last)), seen)
            own = self._feed_forward(self._norm(own, block.feed_forward_norm), own, f"{name}.feed_forward", inner)
        else:
            keys = self.tap(self._float(x), f"{name}.queries")
            seen = self._attention(self._last(keys, last), keys, f"{name}.attention", attention, bias, last)
            own = self._norm(graph.node("Add", self._float(self._last(x, last)), seen), block.attention_norm)
            own = self._norm(self._feed_forward(own, own, f"{name}.feed_forward", inner), block.feed_forward_norm)
        return self.tap(own, f"{name}.output")

    def _attention(self, queries: Value, keys: Value, name: str, attention: Attention, bias: str, last: bool) -> str:
        """(batch, n, hidden), (batch, length, hidden) -> (batch, n, hidden)"""
        graph, heads = self.graph, attention.heads
        query = self.tap(self._linear(queries, f"{name}.query", attention.query), f"{name}.query")
        key = self.tap(self._linear(keys, f"{name}.key", attention.key), f"{name}.key")
        value = self.tap(self._linear(keys, f"{name}.value", attention.value), f"{name}.value")
        query, value = self._split(query, heads), self._split(value, heads)
        key = self._split(key, heads, transposed=True)
        # The codes of the queries are worth 1 / sqrt(d) of what they were: the product then needs no scaling of its own.
        shrunk = (self.model.params.hidden // heads) ** -0.5
        scores = self._product(query, key, f"{name}.scores", shrunk)
        if attention.locality is not None:
            scores = graph.node("Add", scores, self._locality(value, attention, last))
        context = self._average(graph.node("Softmax", graph.node("Add", scores, bias), axis=-1), value, name)
        if heads > 1:
            context = graph.node("Transpose", context, perm=[0, 2, 1, 3])
            context = graph.node("Reshape", context, self._ints(0, 0, self.model.params.hidden))
        if attention.output is None:
            return context
        return self._linear(self.tap(context, f"{name}.context", bare=True), f"{name}.output", attention.output)

    def _average(self, weights: str, value: Value, name: str) -> str:
        """The values weighted, (batch, [heads,] n, hidden / heads). Weights that are quantized are so as shares of the largest
        of their row, and are divided by the sum of what they are rounded to: of integers, as their product with the values."""
        graph, place = self.graph, f"{name}.weights"
        if place not in self.frozen:
            return self._product(Value(weights), value, f"{name}.context")
        largest = graph.node("ReduceMax", weights, self._ints(-1), keepdims=1)
        shares = self.tap(graph.node("Div", weights, largest), place)
        levels = Value(shares.name, 1.0, shares.zero)  # what a level is worth drops out
        total = graph.node("ReduceSum", self._levels(levels), self._ints(-1), keepdims=1)
        total = graph.node("Max", total, graph.constant(np.finfo(np.float32).tiny))
        return graph.node("Div", self._product(levels, value, f"{name}.context"), total)

    def _locality(self, values: Value, attention: Attention, last: bool) -> str:
        """What local heads add to the scores (`sasrec.models.locality`), (batch, [heads,] n, length), in float32 and element
        by element. values: as `_split` gives them."""
        graph, heads = self.graph, attention.heads
        assert attention.locality is not None
        content, distance = (part.detach().cpu().numpy() for part in attention.locality.by_head())
        own = content[:, None] if heads > 1 else content[0]
        weighted = graph.node("Mul", self._float(values), graph.constant(own))
        by_key = graph.node("ReduceSum", weighted, self._ints(-1), keepdims=0)  # (batch, [heads,] length)
        by_key = graph.node("Unsqueeze", by_key, self._ints(-2))
        scalar = graph.node("Squeeze", graph.node("Shape", values.name, start=-2, end=-1))
        places = graph.node("Range", graph.constant(0, np.int64), scalar, graph.constant(1, np.int64))
        asking = graph.node("Slice", places, self._ints(-1), self._ints(LAST), self._ints(0)) if last else places
        back = graph.node("Sub", graph.node("Unsqueeze", asking, self._ints(1)), places)  # (n, length)
        back = graph.node("Max", back, graph.constant(0, np.int64))
        table = graph.constant(distance if heads > 1 else distance[0])
        return graph.node("Add", by_key, graph.node("Gather", table, back, axis=int(heads > 1)))

    def _feed_forward(self, x: str, residual: str, name: str, layer: FeedForward) -> str:
        hidden = self._linear(self.tap(x, f"{name}.input"), f"{name}.inner", layer.inner)
        hidden = self.graph.node("Relu", hidden)
        outer = self._linear(self.tap(hidden, f"{name}.inner"), f"{name}.outer", layer.outer)
        return self.graph.node("Add", residual, outer)

    # Tensors

    def tap(self, x: str, name: str, bare: bool = False) -> Value:
        """x on the grid of the activation `name`; as it is where that is not quantized. bare: x comes straight from a
        product."""
        if name not in self.frozen:
            return Value(x)
        grid, graph = self.frozen[name].grid, self.graph
        scale, zero = one_or_all(grid), zero_point(grid)
        if not grid.is_uniform:
            return self._nearest(x, grid, zero)
        low, high = float(grid.levels[0]), float(grid.levels[-1])
        if zero is None:
            raise ValueError(f"{name}: a uniform grid from {low:g} to {high:g} does not fit 8 bits")
        if isinstance(scale, np.ndarray):
            # Divided first, because QuantizeLinear with a scale per feature takes longer than all the rest of the encoder.
            x, step = graph.node("Div", x, graph.constant(scale)), 1.0
        else:
            step = scale
        if (low + zero, high + zero) != (0, 255):
            ends = graph.constant(low * step), graph.constant(high * step)
            # Behind a product without a bias a Clip makes onnxruntime leave the product in floating point.
            x = graph.node("Min", graph.node("Max", x, ends[0]), ends[1]) if bare else graph.node("Clip", x, *ends)
        codes = graph.node("QuantizeLinear", x, graph.constant(step), graph.constant(zero, np.uint8))
        return Value(codes, scale, zero)

    def _nearest(self, x: str, grid: Grid, zero: int | None) -> Value:
        """The nearest of levels that are not consecutive: a look-up by half units (`sasrec.quant.grid.nearest`)."""
        graph = self.graph
        table = grid.nearest_codes.cpu().numpy()
        low = float(grid.levels[0])
        scale = one_or_all(grid)
        halves = graph.node("Div", x, graph.constant(scale))
        halves = graph.node("Mul", halves, graph.constant(2.0))
        halves = graph.node("Add", halves, graph.constant(-2.0 * low))
        halves = graph.node("Clip", halves, graph.constant(0.0), graph.constant(float(len(table) - 1)))
        index = graph.node("Cast", halves, to=6)
        # Codes by half units, and levels by code: onnxruntime joins the two to one table when it loads the file.
        codes = graph.node("Cast", graph.constant(table, np.uint8), to=6)
        levels = grid.levels.cpu().numpy()
        if zero is None:
            values = graph.node("Gather", graph.constant(levels), codes)
            return Value(graph.node("Gather", values, index), scale)
        integers = graph.node("Gather", graph.constant(levels + zero, np.uint8), codes)
        return Value(graph.node("Gather", integers, index), scale, zero)

    def _float(self, x: Value, times: float = 1.0) -> str:
        """The values of x, in float32, times a factor."""
        graph = self.graph
        factor = np.float32(times) * np.asarray(1 if x.scale is None else x.scale, np.float32)
        if x.zero is not None and factor.ndim == 0:
            return graph.node("DequantizeLinear", x.name, graph.constant(factor), graph.constant(x.zero, np.uint8))
        if x.zero is not None:
            return graph.node("Mul", self._levels(x), graph.constant(factor))
        return x.name if np.all(factor == 1) else graph.node("Mul", x.name, graph.constant(factor))

    def _product(self, a: Value, b: Value, name: str, times: float = 1.0) -> str:
        graph = self.graph
        kind = compute(*(None if x.scale is None else x.is_integer for x in (a, b)))
        self.products[name] = kind
        if kind != WIDE:
            return graph.node("MatMul", self._float(a, times), self._float(b))
        product = graph.node("MatMul", self._levels(a), self._levels(b))
        return graph.node("Mul", product, graph.constant(np.float32(a.scale) * np.float32(times) * np.float32(b.scale)))

    def _levels(self, x: Value) -> str:
        """The levels of a quantized x as float32."""
        if x.zero is None:
            return x.name
        return self.graph.node("DequantizeLinear", x.name, self.graph.constant(1.0), self.graph.constant(x.zero, np.uint8))

    def _linear(self, x: Value, name: str, layer: Linear) -> str:
        """x W^T + b, (batch, n, inputs) -> (batch, n, outputs)."""
        graph = self.graph
        bias = graph.constant(layer.bias.detach().cpu().numpy())
        stored = self.frozen.get(f"{name}.weight")
        if stored is None or stored.codes is None:
            self.products[name] = FLOAT
            weight = self._floats(f"{name}.weight", layer.weight, turned=True)
            return graph.node("Add", graph.node("MatMul", self._float(x), weight), bias)
        codes, grid = stored.codes.cpu().numpy(), stored.grid
        form = integer_form(grid)
        kind = compute(None if x.scale is None else x.is_integer, form is not None)
        self.products[name] = kind
        self.storage.describe(f"{name}.weight", "weight", codes.shape, grid, kind)
        place = self._initializer(f"{name}.weight", codes.T, grid, form)
        scale, shift = (
            _per_column(part, len(codes)) for part in ((grid.scale, grid.shift) if form is None else (form.scale, form.shift))
        )
        ones: str | None = None
        if kind == WIDE:
            source = self._levels(x)
            y = graph.node("MatMul", source, as_levels(graph, place, grid, form))
            y = graph.node("Mul", y, graph.constant(np.float32(x.scale) * scale))
            ones = graph.constant(np.full((codes.shape[1], 1), x.scale))
        else:
            source = self._float(x)
            # A DequantizeLinear that no product of integers takes in, onnxruntime refuses to run where integers lie beyond
            # -64..64 (session.x64quantprecision), or turns into a product that rounds x to 8 bits (MatMulNBits).
            if form is None or kind == FLOAT:
                weight = graph.node("Mul", as_levels(graph, place, grid, form), graph.constant(scale))
            else:
                weight = graph.node("DequantizeLinear", place, graph.constant(scale), axis=1)
            y = graph.node("MatMul", source, weight)
        if np.any(shift):
            # x (s L + m)^T = s x L^T + m sum(x), the sum again a product of integers.
            if kind == FLOAT:
                ones = graph.constant(np.ones((codes.shape[1], 1)))
            elif ones is None:
                ones = graph.constant(np.ones((codes.shape[1], 1)), np.int8)
                ones = graph.node("DequantizeLinear", ones, graph.constant(np.float32(1)))
            total = graph.node("MatMul", source, ones)  # (batch, n, 1)
            self.products[f"{name}.sum"] = kind
            y = graph.node("Add", y, graph.node("Mul", total, graph.constant(shift)))
        return graph.node("Add", y, bias)

    def _initializer(self, name: str, codes: NDArray[np.uint8], grid: Grid, form: Form | None) -> str:
        """The integers of the codes, or the codes where those do not fit int8. In this file at 8 bits; else packed in a file
        of its own and unpacked at load."""
        array = codes if form is None else form.integers[codes]
        if grid.bits == 8:
            self.storage.place_inside(name)
            return self.graph.tensor(name, array)
        self.storage.pack("weights.bin", name, codes, None if form is None else form.integers)
        return self.graph.given(name, str(array.dtype), array.shape, "weights.bin")

    def _rows(self, name: str, table: Table) -> str:
        """The rows of a small table as float32 values; worked out once when the model is loaded."""
        graph = self.graph
        stored = self.frozen.get(name)
        if stored is None or stored.codes is None:
            return self._floats(name, table.weight)
        codes, grid = stored.codes.cpu().numpy(), stored.grid
        form = integer_form(grid)
        self.storage.describe(name, "table", codes.shape, grid, "float32")
        levels = as_levels(graph, self._initializer(name, codes, grid, form), grid, form)
        shift = grid.shift.cpu().numpy() if form is None else form.shift
        values = graph.node("Mul", levels, graph.constant(grid.scale.cpu().numpy()))
        return graph.node("Add", values, graph.constant(shift)) if np.any(shift) else values

    def _floats(self, name: str, tensor: Tensor, turned: bool = False) -> str:
        """A tensor in full precision inside the file, stored in 16 bits where that loses nothing. turned: (inputs, outputs)."""
        array = float_form(tensor)
        stored = self.graph.tensor(name, array.T if turned else array)
        if array.dtype == np.float32:
            return stored
        self.storage.halves[name] = array.nbytes
        return str(self.graph.node("Cast", stored, to=1))

    def _lookup(self, ids: str, name: str, table: Table, times: float) -> str:
        """Rows of the large table, which lies in a file of its own, times a factor: (batch, length, hidden)."""
        graph, storage = self.graph, self.storage
        stored = self.frozen.get(name)
        file = storage.table(name, table, stored)
        shape = tuple(table.weight.shape)
        if stored is None or stored.codes is None:
            rows = graph.node("Gather", graph.given(name, "float32", shape, file), ids)
            return graph.node("Mul", rows, graph.constant(times))
        grid = stored.grid
        form = integer_form(grid)
        given = graph.given(name, "uint8" if form is None else "int8", shape, file)
        rows = as_levels(graph, graph.node("Gather", given, ids), grid, form)
        for part, op in (("scale", "Mul"), ("shift", "Add")):
            parameter = (grid.scale if part == "scale" else grid.shift) if form is None else getattr(form, part)
            parameter = np.asarray(parameter)
            if part == "shift" and not np.any(parameter):
                continue
            if parameter.ndim == 0:
                own = graph.constant(parameter)
            else:
                given = graph.given(f"{name}/{part}", "float32", (shape[0], 1), file)
                own = graph.node("Gather", given, ids)
            rows = graph.node(op, rows, own)
        return graph.node("Mul", rows, graph.constant(times))

    # Shapes

    def _norm(self, x: str, norm: Any) -> str:
        gain, offset = (self.graph.constant(part.detach().cpu().numpy()) for part in (norm.weight, norm.bias))
        return self.graph.node("LayerNormalization", x, gain, offset, axis=-1, epsilon=norm.eps)

    def _length(self, items: str) -> str:
        """(1,) int64: how long the histories are."""
        return self.graph.node("Shape", items, start=1, end=2)

    def _ints(self, *values: int) -> str:
        return self.graph.constant(values, np.int64)

    def _last(self, x: Value, last: bool) -> Value:
        """The last position of x, (batch, 1, hidden), where only that is needed."""
        if not last:
            return x
        name = self.graph.node("Slice", x.name, self._ints(-1), self._ints(LAST), self._ints(1))
        return Value(name, x.scale, x.zero)

    def _split(self, x: Value, heads: int, transposed: bool = False) -> Value:
        """(batch, n, hidden) to (batch, heads, n, hidden / heads), or as it is with one head; transposed: the last two axes
        exchanged."""
        name = x.name
        if heads > 1:
            name = self.graph.node("Reshape", name, self._ints(0, 0, heads, self.model.params.hidden // heads))
            name = self.graph.node("Transpose", name, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])
        elif transposed:
            name = self.graph.node("Transpose", name, perm=[0, 2, 1])
        return Value(name, x.scale, x.zero)


def one_or_all(grid: Grid) -> float | NDArray[np.float32]:
    """The scale of an activation: one number, or one per feature."""
    return grid.scale.cpu().numpy() if grid.scale.dim() else float(grid.scale)


def _per_column(parameter: Any, columns: int) -> NDArray[np.float32]:
    """A parameter per row of W, (rows, 1) or (), as one per column of W^T, (rows,)."""
    return np.broadcast_to(np.asarray(parameter, np.float32).reshape(-1), (columns,))
