"""A cheap product for one request: the table at 4 bits shortlists items, which the runtime then scores exactly in integers.

With a table that does not fit the cache, reading it takes the time; onnxruntime's MatMulNBits reads 4 bits where the exact
product reads 8. It rounds the state to 8 bits once more, by its largest element m: each element moves by at most m / 254, and
a score by at most m / 254 times the sum of the magnitudes in its row. The largest of these sums stands in the manifest as
`bound`: with it the runtime knows whether an item outside the shortlist may be among the best, and widens it until none is.
"""

from typing import Any

import numpy as np

from sasrec.deploy.encoder import Value
from sasrec.deploy.form import integer_form
from sasrec.deploy.graph import Graph
from sasrec.deploy.recommender.model import SHORTLIST
from sasrec.deploy.recommender.tensors import NIBBLES, block_size
from sasrec.deploy.scorer import TABLE, best_of
from sasrec.quant.frozen import FrozenTensor

# Entries of a table from which on the cheap product pays: smaller ones lie in the cache.
FROM_ENTRIES = 4_000_000


def suits(state: Value, stored: FrozenTensor | None, from_entries: int) -> bool:
    """Whether states and table are integers of 8 and 4 bits, without a shift, and the table is large enough."""
    if not state.is_integer or stored is None or stored.codes is None:
        return False
    form = integer_form(stored.grid)
    rows, features = stored.codes.shape
    return (
        form is not None
        and not form.is_shifted
        and int(form.integers.min()) >= -8
        and int(form.integers.max()) <= 7
        and features % 16 == 0
        and rows * features >= from_entries
    )


def shortlist(state: Value, stored: FrozenTensor) -> tuple[Graph, bytes, dict[str, Any]]:
    """The graph, its content, and what the manifest says of it. Inputs and outputs are those of `scorer` with top_k; the
    values are approximate, in units of the state's scale."""
    assert stored.codes is not None and state.zero is not None and state.scale is not None
    rows, features = stored.codes.shape
    block = block_size(features)
    graph = Graph("shortlist")
    x = graph.node("DequantizeLinear", "state", graph.constant(1.0), graph.constant(state.zero, np.uint8))
    table = graph.given(f"{TABLE}/{NIBBLES}", "uint8", (rows, features // block, block // 2), "")
    scales = graph.given(f"{TABLE}/block_scales", "float32", (rows * features // block,), "")
    scores = graph.node(
        "MatMulNBits", x, table, scales,
        domain="com.microsoft", K=features, N=rows, bits=4, block_size=block, accuracy_level=4,
    )  # fmt: skip
    scores = graph.node("Squeeze", scores, graph.constant([1], np.int64))
    content = best_of(graph, scores, {"state": ("uint8", ("batch", 1, features))})
    form = integer_form(stored.grid)
    assert form is not None
    sums = np.abs(form.integers.astype(np.float64))[stored.codes.cpu().numpy()].sum(1)
    bound = float((sums * np.broadcast_to(np.asarray(form.scale, np.float64).reshape(-1), (rows,))).max())
    facts = {"width": SHORTLIST, "bound": bound, "state_scale": state.scale, "state_zero": state.zero}
    return graph, content, facts
