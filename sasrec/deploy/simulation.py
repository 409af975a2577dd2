"""The quantized model in torch, computed as the exported one is: what the artefact is checked against.

Training simulates quantization in floating point, where a product of values on two grids is off by some last bits. Here
a linear layer between two such tensors, and the scoring, multiply the integers themselves, which float32 holds exactly up
to 2^24, and scale the sum once, as onnxruntime does; norms add up in onnxruntime's order; and the softmax is that of
onnxruntime. Torch's differs from it in the last bit of a third of its values, which now and then turns the rounding of an
attention weight, and what follows from one turned rounding can move a final state by two steps. What is left to differ by
a last bit is, on processors without AVX2, the norms.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sasrec.deploy.form import Factors, factors, zero_point
from sasrec.deploy.graph import Graph
from sasrec.deploy.recommender.model import CHUNK, Recommender
from sasrec.evaluation import best
from sasrec.models.attention import Attention
from sasrec.models.events import Events, Histories
from sasrec.models.registry import Model, encoders
from sasrec.models.sasrec import Block
from sasrec.models.scoring import Part
from sasrec.models.taps import Linear
from sasrec.quant.frozen import FrozenTensor, thaw


def integer_product(x: Tensor, scale: Tensor, weight: Factors) -> Tensor:
    """x W^T for x = scale * integers, (..., inputs), and W (outputs, inputs): (..., outputs)."""
    integers = (x / scale).round()
    product = (integers @ weight.integers.T) * (scale * weight.scale.flatten())
    if weight.shift is not None:
        product = product + integers.sum(-1, keepdim=True) * scale * weight.shift.flatten()
    return product


class IntegerLinear(nn.Module):
    """A linear layer whose input lies on a grid, as a product of integers."""

    def __init__(self, layer: Linear, weight: Factors, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return integer_product(x, self.scale, self.weight) + self.bias


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c with one rounding, as a processor's fused multiply-add: the product is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


class Norm(nn.Module):
    """Layer norm with the roundings of onnxruntime 1.31 on a processor with AVX2 and FMA (found by comparing bits, and checked
    by a test): the mean from a sum in float64, the variance from eight running sums of squares."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        centred = x - x.double().mean(-1, keepdim=True).float()
        whole = size - size % 8
        sums = x.new_zeros(*x.shape[:-1], 8)
        for at in range(0, whole, 8):
            sums = fused(centred[..., at : at + 8], centred[..., at : at + 8], sums)
        for half in (4, 2, 1):
            sums = sums[..., :half] + sums[..., half:]
        for at in range(whole, size):
            sums = fused(centred[..., at : at + 1], centred[..., at : at + 1], sums)
        # torch rounds a root in float32 last bit wrong on some processors, but not by way of float64.
        inverse = 1 / (sums / size + self.eps).double().sqrt().float()
        return fused(centred * inverse, self.weight, self.bias)


@functools.cache
def softmax_session() -> onnxruntime.InferenceSession:
    graph = Graph("softmax")
    y = graph.node("Softmax", "x", axis=-1)
    shape = ("batch", "queries", "keys")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = graph.serialized({"x": ("float32", shape)}, {"y": (y, "float32", shape)})
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def softmax(x: Tensor) -> Tensor:
    """Over the last of three axes, with the bits of onnxruntime on this processor."""
    return torch.from_numpy(softmax_session().run(None, {"x": x.contiguous().numpy()})[0])


class IntegerAttention(nn.Module):
    """Attention whose two products are of integers; what happens around them is that of `attention`."""

    def __init__(self, attention: Attention, scales: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.scales = attention, scales

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None,
        by_head: Tensor | None = None,
        reorder: bool = False,  # what is rounded between products keeps them in order
    ) -> Tensor:
        own = self.inner
        query, key, value, bias = own.projected(queries, keys, bias, mask, query_mask, by_head)
        shrunk = self.scales["query"] * query.new_tensor(query.shape[-1] ** -0.5)
        scores = self._integers(query, "query") @ self._integers(key, "key").transpose(1, 2)
        weights = softmax(scores * (shrunk * self.scales["key"]) + bias)
        levels = self._integers(own.weights_tap(weights / weights.amax(-1, keepdim=True)), "weights")
        total = levels.sum(-1, keepdim=True).clamp_min_(torch.finfo(levels.dtype).tiny)
        context = own._join((levels @ self._integers(value, "value")) * self.scales["value"] / total)
        if own.output is None or own.context_tap is None:
            return context
        return own.output(own.context_tap(context))

    def _integers(self, x: Tensor, tap: str) -> Tensor:
        return (x / self.scales[tap]).round()


class Simulation:
    """model: in full precision; it is changed. frozen: its quantized tensors."""

    @torch.no_grad()
    def __init__(self, model: Model, frozen: dict[str, FrozenTensor]) -> None:
        thaw(model, frozen)
        self.model, self.frozen = model.eval(), frozen
        # Of a model in full precision nothing is rounded, so that last bits do not matter.
        for parent in list(model.modules()) if frozen else []:
            for name, child in parent.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, Norm(child))
        blocks = {f"{part}blocks.{i}": block for part, own in encoders(model).items() for i, block in enumerate(own.blocks)}
        for name, block in blocks.items():
            assert isinstance(block, Block)
            keys = "keys" if block.keys_tap is not None else "queries"
            inputs = {"query": "queries", "key": keys, "value": keys, "output": "attention.context"}
            for layer, source in inputs.items():
                self._replace(block.attention, layer, f"{name}.attention", f"{name}.{source}")
            places = {tap: f"{name}.attention.{tap}" for tap in ("query", "key", "weights", "value")}
            if all(place in frozen for place in places.values()):
                scales = {tap: frozen[place].grid.scale for tap, place in places.items()}
                block.attention = IntegerAttention(block.attention, scales)  # type: ignore[assignment]
            self._replace(block.feed_forward, "inner", f"{name}.feed_forward", f"{name}.feed_forward.input")
            self._replace(block.feed_forward, "outer", f"{name}.feed_forward", f"{name}.feed_forward.inner")
        self.values = model.scoring_table.all()
        parts = model.scoring_parts
        self.tables: list[tuple[Part, Factors]] = []
        if "final" in frozen and all(part.name in frozen for part in parts):
            self.tables = [(part, factors(frozen[part.name].grid, _codes(frozen[part.name]))) for part in parts]

    def _replace(self, parent: nn.Module, layer: str, name: str, source: str) -> None:
        old, stored = getattr(parent, layer), self.frozen.get(f"{name}.{layer}.weight")
        if old is not None and stored is not None and source in self.frozen:
            weight = factors(stored.grid, _codes(stored))
            setattr(parent, layer, IntegerLinear(old, weight, self.frozen[source].grid.scale))

    @torch.no_grad()
    def encode(self, histories: Histories | NDArray[np.int64]) -> Tensor:
        """(batch, length) ids, or Events, to the states (batch, 1, hidden), float32."""
        if isinstance(histories, np.ndarray):
            histories = torch.from_numpy(histories)
        return self.model.encode(histories, last=True)

    @torch.no_grad()
    def scores(self, states: Tensor) -> Tensor:
        """(batch, 1, hidden) to the scores of all items, (batch, items + 1)."""
        if not self.tables:
            return states[:, 0] @ self.values.T
        total = torch.zeros(())
        for part, table in self.tables:
            own = integer_product(states[:, 0, part.columns], self.frozen["final"].grid.scale, table)
            total = total + (own if part.index is None else own[:, part.index.long()])
        return total


def _codes(stored: FrozenTensor) -> Tensor:
    assert stored.codes is not None
    return stored.codes


@dataclass
class Agreement:
    """How an artefact compares with the simulation, over the users that were added. elements: of the final states, and how
    many of them are the same. steps: by how many steps of their grid two differ at most; difference: by how much in value.
    same_users: whose ten best of all items are the same, in the same order."""

    simulation: Simulation
    artefact: Recommender
    users: int = 0
    elements: int = 0
    same_elements: int = 0
    same_users: int = 0
    steps: int = 0
    difference: float = 0.0
    _pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def exported(self, histories: Histories, users: Any = None) -> Tensor:
        """Scores of the artefact (batch, items + 1) for (batch, length) ids, or Events; what `simulated` compares with is
        kept."""
        states, scores = [], []
        for part in histories.split(CHUNK):
            events = part if isinstance(part, Events) else Events(part)
            known = (None if values is None else values.numpy() for values in (events.ratings, events.times))
            states.append(self.artefact.encode(events.items.numpy(), *known))
            scores.append(self.artefact.scores_of(states[-1]))
        found = torch.from_numpy(np.concatenate(scores))
        self._pending.append((torch.from_numpy(np.concatenate(states)), self._best(found)))
        return found

    def simulated(self, histories: Histories, users: Any = None) -> Tensor:
        """Scores of the simulation, for the same batches in the same order."""
        codes, expected = self._pending.pop(0)
        own = torch.cat([self.simulation.encode(part) for part in histories.split(CHUNK)])
        other = codes.float()
        stored = self.simulation.frozen.get("final")
        if stored is not None:
            grid = stored.grid
            other = (other - (zero_point(grid) or 0)) * grid.scale
            apart = grid.encode(own).int() - grid.encode(other).int()
            self.steps = max(self.steps, int(apart.abs().max()))
            self.same_elements += int((apart == 0).sum())
        else:
            self.same_elements += int((own == other).sum())
        self.difference = max(self.difference, float((own - other).abs().max()))
        scores = self.simulation.scores(own)
        self.users += len(own)
        self.elements += own.numel()
        self.same_users += int((self._best(scores) == expected).all(1).sum())
        return scores

    @staticmethod
    def _best(scores: Tensor) -> Tensor:
        """Column 0, that of padding, is nothing to recommend."""
        return best(scores[:, 1:], 10)

    def summary(self) -> dict[str, float | int]:
        """Shares of the same, and the largest differences."""
        return {
            "users": self.users,
            "steps": self.steps,
            "difference": self.difference,
            "same_elements": self.same_elements / max(1, self.elements),
            "same_top10": self.same_users / max(1, self.users),
        }
