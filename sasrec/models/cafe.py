"""CaFe (Li et al., SIGIR 2022, arXiv 2204.01839): intents first, coarse and dense, then items.

The coarse encoder is a SASRec over the sequence of intents (`sasrec.models.intents`), the fine encoder one over the items
themselves, with local heads (`sasrec.models.locality`). With their states m and f after a history, and the embeddings e_v of
an item and g_c of an intent (f + m: equation 7; both scores: equation 10; c(v) the intent of v):

    item part    (f + m) e_v        intent part    m g_c(v)        score(v) = (f + m) e_v + m g_c(v)

Equation 10 asks for the item with the highest joint probability P(c) P(v). With softmax probabilities its logarithm is that sum
less something that all items share, so that both rank alike; the paper writes sigmoids, but the authors' code adds the two
products, as here. The sum is one product: of the state [f + m ; m] with the row [e_v ; g_c(v)] of a table that is put together
from both, twice as wide. So everything that knows states and a table (losses, ranking, distillation) works as for SASRec.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sasrec.config import ModelParams
from sasrec.errors import UserError
from sasrec.models.events import Histories, ids
from sasrec.models.intents import item_intents
from sasrec.models.sasrec import SASRec
from sasrec.models.scoring import Part, scores
from sasrec.models.taps import Table, Tap
from sasrec.models.transfer import real_tokens


@dataclass(frozen=True)
class JointTable:
    """Rows [e_v ; g_c(v)] of both encoders' scoring tables. intents: (items + 1,)."""

    items: Table
    of_intents: Table
    intents: Tensor

    def lookup(self, ids: Tensor) -> Tensor:
        """(*ids.shape, 2 hidden)"""
        return torch.cat([self.items.lookup(ids), self.of_intents.lookup(self.intents[ids].long())], -1)

    def all(self) -> Tensor:
        """(items + 1, 2 hidden)"""
        return torch.cat([self.items.all(), self.of_intents.all()[self.intents.long()]], -1)


class CAFE(nn.Module):
    """intents: (items + 1,) the intent 1, 2, ... of each item, 0 for padding; a buffer, so that a checkpoint holds it. The
    "items" of the coarse encoder are the intents."""

    intents: Tensor

    def __init__(self, params: ModelParams, intents: Tensor) -> None:
        super().__init__()
        self.refuse_side(params)
        self.params, self.items = params, len(intents) - 1
        self.register_buffer("intents", intents.to(torch.int32))
        # The paper's coarse encoder is a plain SASRec: intents repeat, and what is far back tells of long-term preferences.
        self.coarse = SASRec(replace(params, local_heads=0, local_window=None), int(intents.max()), scored=False)
        self.fine = SASRec(params, self.items, scored=False)
        self.final_tap = Tap("activation", 2 * params.hidden, scoring=True)

    @staticmethod
    def refuse_side(params: ModelParams) -> None:
        if params.side or params.time_bias:
            raise UserError(
                "params.yaml: model.side and model.time_bias are not for model.kind: cafe; set them to [] and false for it in "
                "per_model.<name>.model"
            )

    @classmethod
    def require(cls, params: ModelParams, categories: Sequence[Sequence[str]]) -> None:
        """Raise UserError where such a model cannot be made of items 1, 2, ... with these categories."""
        cls.refuse_side(params)
        item_intents(categories)

    @property
    def scoring_table(self) -> JointTable:
        return JointTable(self.fine.scoring_table, self.coarse.scoring_table, self.intents)

    @property
    def item_tables(self) -> tuple[Table, ...]:
        """The tables that have a row for each item."""
        return self.fine.item_tables

    @property
    def scoring_parts(self) -> tuple[Part, ...]:
        """The items' table times the first half of the state, and the intents' times the second."""
        (fine,), (coarse,) = self.fine.scoring_parts, self.coarse.scoring_parts
        hidden = self.params.hidden
        return (
            Part(f"fine.{fine.name}", fine.table, slice(0, hidden)),
            Part(f"coarse.{coarse.name}", coarse.table, slice(hidden, 2 * hidden), self.intents),
        )

    def encode(self, histories: Histories, last: bool = False, windows: Tensor | None = None) -> Tensor:
        """As `SASRec.encode`, with states [f + m ; m] of twice the width; of the events only the items count."""
        histories = ids(histories)
        own = real_tokens(histories[:, -1:] if last else histories) if windows is None else windows
        coarse = self.coarse.encode(self.intents[histories].long(), last, windows)
        fine = self.fine.encode(histories, last, windows)
        return self.final_tap(torch.cat([fine + coarse, coarse], -1), mask=own)

    def score(self, states: Tensor, items: Tensor | None = None) -> Tensor:
        """As `SASRec.score`."""
        return scores(self.scoring_table, states, items)
