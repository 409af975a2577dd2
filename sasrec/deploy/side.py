"""What is known of past events, as part of the encoder's graph (`sasrec.models.side`): from the ratings and times that come
with the items to rows of small tables and to a bias of attention."""

from collections.abc import Callable, Sequence

import numpy as np

from sasrec.deploy.graph import Graph, Shape
from sasrec.deploy.recommender.events import KNOWN
from sasrec.models.side import TIME_BUCKETS, UNKNOWN, SideEmbeddings, TimeBias
from sasrec.models.taps import Table

# Type of each input beside the items; nan where nothing is known.
INPUTS = {name: np.dtype(kind).name for name, kind in KNOWN.items()}


def inputs(asked: Sequence[str]) -> dict[str, tuple[str, Shape]]:
    """Type and shape of the encoder's inputs by name: the items, and what is `asked` for of each event (`models.events`)."""
    kinds = {"items": "int64"} | {name: INPUTS[name] for name in asked}
    return {name: (kind, ("batch", "length")) for name, kind in kinds.items()}


# Gives the values of a small table, by its name, as a float32 value of the graph.
Rows = Callable[[str, Table], str]


def side_embeddings(graph: Graph, side: SideEmbeddings, rows: Rows) -> list[str]:
    """What is added to the input embeddings, (batch, length, hidden) each, in the model's order."""
    parts = []
    if side.rating_table is not None:
        table = rows("side.rating_table.weight", side.rating_table)
        parts.append(graph.node("Gather", table, rating_bins(graph, side.rating_edges.cpu().numpy())))
    if side.category_table is not None:
        table = rows("side.category_table.weight", side.category_table)
        parts.append(mean_categories(graph, side.item_categories.cpu().numpy(), table))
    if side.recency_table is not None:
        table = rows("side.recency_table.weight", side.recency_table)
        parts.append(graph.node("Gather", table, recency(graph)))
    return parts


def rating_bins(graph: Graph, edges: np.ndarray) -> str:
    """Rows of the rating table, (batch, length): 1 + how many edges a rating is above."""
    column = graph.node("Unsqueeze", "ratings", graph.constant([-1], np.int64))
    above = graph.node("Cast", graph.node("Greater", column, graph.constant(edges)), to=7)
    count = graph.node("ReduceSum", above, graph.constant([-1], np.int64), keepdims=0)
    bins = graph.node("Add", count, graph.constant(1, np.int64))
    return graph.node("Where", graph.node("IsNaN", "ratings"), graph.constant(UNKNOWN, np.int64), bins)


def mean_categories(graph: Graph, categories: np.ndarray, table: str) -> str:
    """(batch, length, hidden). The categories of all items, (items + 1, most), lie in the file."""
    smallest = np.min_scalar_type(int(categories.max()))
    slots = graph.node("Gather", graph.tensor("side.item_categories", categories.astype(smallest)), "items")
    slots = graph.node("Cast", slots, to=7)  # (batch, length, most)
    zero, one, last = (graph.constant(value, np.int64) for value in (0, 1, [-1]))
    real = graph.node("Cast", graph.node("Greater", slots, zero), to=1)
    share = graph.node("Div", graph.constant(1.0), graph.node("ReduceSum", real, last, keepdims=1))
    weights = graph.node("Mul", real, share)
    places = graph.node("Max", graph.node("Sub", slots, one), zero)
    total = ""
    for slot in range(categories.shape[1]):
        column = graph.constant([slot], np.int64)
        place, weight = (graph.node("Gather", part, column, axis=2) for part in (places, weights))  # (batch, length, 1)
        part = graph.node("Mul", graph.node("Gather", table, graph.node("Squeeze", place, last)), weight)
        total = graph.node("Add", total, part) if total else part
    return total


def time_bucket(graph: Graph, seconds: str) -> str:
    """`models.side.time_bucket` of float64 `seconds`: for a whole number n, floor(log2(n)) is that of log2(n + 1/2), which is
    never near a whole number, so that no rounding of the logarithm matters."""
    unknown = graph.node("IsNaN", seconds)
    zero = graph.constant(0.0, np.float64)
    whole = graph.node("Max", graph.node("Where", unknown, zero, seconds), zero)
    logarithm = graph.node("Log", graph.node("Add", whole, graph.constant(1.5, np.float64)))
    exponent = graph.node("Cast", graph.node("Mul", logarithm, graph.constant(1 / np.log(2), np.float64)), to=7)
    bucket = graph.node("Add", exponent, graph.constant(1, np.int64))
    bucket = graph.node("Min", bucket, graph.constant(TIME_BUCKETS, np.int64))
    return graph.node("Where", unknown, graph.constant(UNKNOWN, np.int64), bucket)


def recency(graph: Graph) -> str:
    """Buckets of the time from the event before, (batch, length)."""
    padded = graph.node("Pad", "times", graph.constant([0, 1, 0, 0], np.int64), graph.constant(np.nan, np.float64))
    ends = graph.constant([-1], np.int64), graph.constant([1], np.int64)
    before = graph.node("Slice", padded, graph.constant([0], np.int64), *ends)
    return time_bucket(graph, graph.node("Sub", "times", before))


def time_gaps(graph: Graph, last: bool) -> str:
    """Buckets of the time from key to query, (batch, length, length), or of the last query alone, (batch, 1, length)."""
    keys = graph.node("Unsqueeze", "times", graph.constant([1], np.int64))
    if last:
        # int64's largest as the end: to the end.
        ends = (graph.constant([value], np.int64) for value in (-1, np.iinfo(np.int64).max, 1))
        queries = graph.node("Slice", "times", *ends)
        queries = graph.node("Unsqueeze", queries, graph.constant([2], np.int64))
    else:
        queries = graph.node("Unsqueeze", "times", graph.constant([2], np.int64))
    return time_bucket(graph, graph.node("Sub", queries, keys))


def time_bias(graph: Graph, bias: TimeBias, gaps: str) -> str:
    """(batch, n, length), or (batch, heads, n, length) of several heads."""
    weight = bias.weight.detach().cpu().numpy()
    if weight.shape[1] == 1:
        return graph.node("Gather", graph.constant(weight[:, 0]), gaps)
    return graph.node("Transpose", graph.node("Gather", graph.constant(weight), gaps), perm=[0, 3, 1, 2])
