"""Scores are products of states with tables: of one table, or a sum over several, each for a part of the state."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sasrec.models.taps import Table


class Rows(Protocol):
    """What items are scored with: a `Table`, or something made of several."""

    def lookup(self, ids: Tensor) -> Tensor: ...
    def all(self) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """One addend of the scores: the `columns` of the state times the rows of `table`. name: of the table's tensor. index:
    (items + 1,) the row of each item; None: item i has row i."""

    name: str
    table: Table
    columns: slice
    index: Tensor | None = None


def scores(rows: Rows, states: Tensor, items: Tensor | None = None) -> Tensor:
    """Scores of `states` (..., features): against all items, (..., items + 1) with the padding's score first and meaningless,
    or against the given ids: of the states' leading shape plus one axis n, giving (..., n); of shape (n,), shared by all
    states; or of shape (batch, n) for states (batch, length, features), shared by each sequence."""
    if items is None:
        return states @ rows.all().T
    found = rows.lookup(items)
    if items.dim() == 1:
        return states @ found.T
    if items.dim() < states.dim():
        return states @ found.transpose(1, 2)
    # A batch of tiny matrix products is slower than a product and a sum while there are few items.
    if items.shape[-1] <= 4:
        return (found * states.unsqueeze(-2)).sum(-1)
    return (found @ states.unsqueeze(-1)).squeeze(-1)
