"""Named places of a model where a tensor may be quantized.

A tap is the identity until a quantizer is put on it (`sasrec.quant.attach`). Its name is its path in the module tree,
for example `blocks.0.query.weight_tap`; `taps(model)` lists them without the suffix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of every matrix at the start, as in GPT-2 and BERT.
INITIAL_STD = 0.02

Kind = Literal["weight", "table", "activation"]


@dataclass(frozen=True)
class Place:
    """What is known of a tensor from where it stands in the model, before any data is seen.

    signed: whether it can be negative. features: elements that share one statistic per row or token (the fan-in of a
    weight, the width of a table or of an activation). rows: output channels of a weight, entries of a table, 0 for an
    activation. scoring: a table that items are scored against, or the states that are scored. stream: states that blocks read
    and add to, which enter no matrix product as they are.
    """

    name: str
    kind: Kind
    signed: bool
    features: int
    rows: int = 0
    scoring: bool = False
    stream: bool = False


class Tap(nn.Module):
    """The identity, or the quantizer put here."""

    def __init__(
        self, kind: Kind, features: int, signed: bool = True, rows: int = 0, scoring: bool = False, stream: bool = False
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.features, self.signed, self.rows, self.scoring, self.stream = features, signed, rows, scoring, stream
        self.quantizer: nn.Module | None = None
        self.given: Tensor | None = None  # what the quantizer makes of a weight, where that is known already

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: any shape. rows: for looked-up table rows, their ids, of x's leading shape. mask: not 0 at real tokens, of x's
        leading shape, and where rows hold several histories, a number for each of these; None where all are real."""
        if self.given is not None:
            return self.given
        return x if self.quantizer is None else self.quantizer(x, rows, mask)

    def place(self, name: str) -> Place:
        return Place(name, self.kind, self.signed, self.features, self.rows, self.scoring, self.stream)


def taps(model: nn.Module) -> dict[str, Tap]:
    """Every tap of the model by name, in the order of the forward pass as far as the model declares it so."""
    return {
        name.removesuffix("_tap").removesuffix(".tap"): module
        for name, module in model.named_modules()
        if isinstance(module, Tap)
    }


class Linear(nn.Module):
    """y = x W^T + b with a tap on W: (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_tap = Tap("weight", inputs, rows=outputs)
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_tap(self.weight), self.bias)


class Table(nn.Module):
    """An embedding table (rows, features) with a tap; the first row may be padding, which stays zero."""

    def __init__(self, rows: int, features: int, padding: bool, scoring: bool = False) -> None:
        super().__init__()
        self.padding = padding
        # What `all` gives, and whether it is kept now.
        self._kept: Tensor | None = None
        self._keeps = False
        self.sparse = False  # whether look-ups give gradients of the looked-up rows alone (`sasrec.lazy_adam`)
        self.weight = nn.Parameter(torch.empty(rows, features))
        self.weight_tap = Tap("table", features, rows=rows, scoring=scoring)
        nn.init.normal_(self.weight, std=INITIAL_STD)
        if padding:
            with torch.no_grad():
                self.weight[0] = 0

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of ids, (*ids.shape, features). Quantizes either the looked-up rows or the table, whichever is smaller, with
        `sparse` always the rows; the values are the same to the bit."""
        padding = 0 if self.padding else None
        if not self.sparse and (self.weight_tap.quantizer is None or ids.numel() >= len(self.weight)):
            return F.embedding(ids, self.all(), padding)
        return self.weight_tap(F.embedding(ids, self.weight, padding, sparse=self.sparse), ids)

    def all(self) -> Tensor:
        # Without a quantizer it is the weight itself, which is not to become a parameter for a second time.
        if self.weight_tap.quantizer is None or not (self._keeps and torch.is_grad_enabled()):
            return self.weight_tap(self.weight)
        if self._kept is None:
            self._kept = self.weight_tap(self.weight)
        return self._kept

    @contextmanager
    def quantized_once(self) -> Iterator[None]:
        """Within it, in which the weights must not change, the whole table is quantized once, however often a training step
        looks rows up or scores with it."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._kept = False, None
