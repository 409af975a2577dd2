"""A small builder of ONNX graphs: nodes one after the other, initializers inside the file or given at load."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

# QuantizeLinear of opset 21 has an attribute that onnxruntime leaves behind when it rewrites signed to unsigned activations,
# and then refuses the model; 20 has all that is needed here.
OPSET = 20
IR_VERSION = 9

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}

# What computes; the rest moves, rounds, or is a matrix product. With float32 it is what an integer model leaves in floating
# point.
ARITHMETIC = (
    "LayerNormalization", "Softmax", "Add", "Sub", "Mul", "Div", "ReduceMax", "ReduceSum", "Max", "Min", "Relu", "Clip",
)  # fmt: skip

Shape = Sequence[int | str]


def float_operators(content: bytes) -> dict[str, int]:
    """How many operators of each kind a serialized graph computes in float32, matrix products aside."""
    graph = shape_inference.infer_shapes(onnx.load_model_from_string(content)).graph
    floats = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    kinds = [node.op_type for node in graph.node if node.output[0] in floats]
    return {kind: kinds.count(kind) for kind in ARITHMETIC if kind in kinds}


class Graph:
    """Values are named by numbers: the names are a tenth of a small file. Initializers that are stored or given from
    outside have names of their own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.given_names: list[str] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._values = 0

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or the names of its `outputs`."""
        names = [str(self._values + i) for i in range(outputs)]
        self._values += outputs
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initializer of the graph's own; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(f"c{len(self._constants)}", array)
        return self._constants[key]

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """A named initializer inside the file."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def given(self, name: str, dtype: str, shape: Sequence[int], file: str) -> str:
        """A named initializer that is not in this file: the runtime makes it of `file` and hands it over at load."""
        tensor = TensorProto(name=name, data_type=TYPES[dtype], dims=list(shape), data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=file or "given")
        self.initializers[name] = tensor
        self.given_names.append(name)
        return name

    def serialized(self, inputs: dict[str, tuple[str, Shape]], outputs: dict[str, tuple[str, str, Shape]]) -> bytes:
        """The model. inputs: type and shape by name. outputs: by name, the value that it is, its type and shape."""
        for name, (value, _, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (_, kind, shape) in outputs.items()],
            list(self.initializers.values()),
        )
        # Operators of onnxruntime's own are named with their domain.
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return model.SerializeToString(deterministic=True)
