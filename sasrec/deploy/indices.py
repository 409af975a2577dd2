"""Which row of a smaller table each item has, packed, as a value of a graph."""

from sasrec.deploy.graph import Graph
from sasrec.deploy.storage import Storage
from sasrec.models.scoring import Part


def index_of(graph: Graph, storage: Storage, part: Part) -> str:
    """The rows of `part.table` by item, (items + 1,) int64, put together when the model is loaded; written into a file of
    their own, once, in as few bits as they need."""
    assert part.index is not None
    name = part.name.removesuffix(".weight") + ".rows"
    values = part.index.cpu().numpy()
    if f"{name}.0" not in storage.tensors:
        storage.index(f"{name}.bin", name, values)
    total = ""
    for place, own in enumerate(key for key in storage.tensors if key.rpartition(".")[0] == name):
        byte = graph.node("Cast", graph.given(own, "uint8", values.shape, f"{name}.bin"), to=7)
        if place:
            byte = graph.node("Mul", byte, graph.constant(256**place, "int64"))
        total = graph.node("Add", total, byte) if total else byte
    return total
