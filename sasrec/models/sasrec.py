"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781): self-attention over a user's past items.

The three kinds of block differ in where layer norm stands. `original` is the authors' code: the query is normalised,
keys and values are not, and the residual adds the normalised query. `pre_norm` normalises the input of each sub-layer,
`post_norm` the sum after it. Sequences are padded on the left, and positions are counted from the right end, as in the
authors' code, so that the last item always has the last position whatever the padding; or from the first real token.
"""

import torch
from torch import Tensor, nn

from sasrec.config import ModelParams
from sasrec.models.attention import HIDDEN_SCORE, Attention
from sasrec.models.dropout import Dropping, add_dropped, dropout
from sasrec.models.events import Events, Histories
from sasrec.models.facts import Facts
from sasrec.models.scoring import Part, scores
from sasrec.models.side import SideEmbeddings, TimeBias, blank, event_inputs, time_gaps
from sasrec.models.taps import Linear, Table, Tap
from sasrec.models.transfer import real_tokens


class FeedForward(Dropping):
    """Two linear layers with a ReLU, position by position (equation 6)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        inner = params.ffn_dim or params.hidden
        self.rate = params.dropout
        self.input_tap = Tap("activation", params.hidden)
        self.inner = Linear(params.hidden, inner)
        self.inner_tap = Tap("activation", inner, signed=False)
        self.outer = Linear(inner, params.hidden)

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
        """residual plus the network's output for x, both (batch, n, hidden)."""
        hidden = self.inner_tap(self.inner(self.input_tap(x, mask=mask)).relu_(), mask=mask)
        outer = self.outer(dropout(hidden, self.rate, self.training))
        return add_dropped(residual, outer, self.rate, self.training)


class Block(nn.Module):
    """Attention and feed-forward with residuals; `kind` says where the norms stand."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.kind = params.block
        self.attention_norm = nn.LayerNorm(params.hidden, eps=1e-8)
        self.queries_tap = Tap("activation", params.hidden)
        # In the authors' block keys are not normalised, so that queries and keys are two tensors with a range each.
        self.keys_tap = Tap("activation", params.hidden) if params.block == "original" else None
        self.attention = Attention(params)
        self.time_bias = TimeBias(params.heads) if params.time_bias else None
        self.feed_forward_norm = nn.LayerNorm(params.hidden, eps=1e-8)
        self.feed_forward = FeedForward(params)
        self.output_tap = Tap("activation", params.hidden, stream=True)

    def forward(
        self, x: Tensor, bias: Tensor, mask: Tensor | None, last: bool, reorder: bool, gaps: Tensor | None = None
    ) -> Tensor:
        """x: (batch, length, hidden). gaps: (batch, length, length) of `side.time_gaps`, for a time bias. With `last` only
        the last position is computed: (batch, 1, hidden). reorder: as `Attention.forward` has it."""
        keep = slice(-1, None) if last else slice(None)
        query_mask = None if mask is None else mask[:, keep]
        own, bias = x[:, keep], bias[:, keep]
        by_head = None if self.time_bias is None or gaps is None else self.time_bias(gaps[:, keep])
        if self.kind == "original":
            own = self.attention_norm(own)
            keys = x if self.keys_tap is None else self.keys_tap(x, mask=mask)
            own = own + self.attention(self.queries_tap(own, mask=query_mask), keys, bias, mask, query_mask, by_head, reorder)
            own = self.feed_forward_norm(own)
            own = self.feed_forward(own, own, query_mask)
        elif self.kind == "pre_norm":
            keys = self.queries_tap(self.attention_norm(x), mask=mask)
            own = own + self.attention(keys[:, keep], keys, bias, mask, query_mask, by_head, reorder)
            own = self.feed_forward(self.feed_forward_norm(own), own, query_mask)
        else:
            keys = self.queries_tap(x, mask=mask)
            own = self.attention_norm(own + self.attention(keys[:, keep], keys, bias, mask, query_mask, by_head, reorder))
            own = self.feed_forward_norm(self.feed_forward(own, own, query_mask))
        return self.output_tap(own, mask=query_mask)


@torch.no_grad()
def start_with_xavier(model: nn.Module) -> None:
    """Every matrix from Glorot and Bengio's normal distribution, as the authors' PyTorch port does."""
    for module in model.modules():
        if isinstance(module, Linear | Table):
            nn.init.xavier_normal_(module.weight)
        if isinstance(module, Table) and module.padding:
            module.weight[0] = 0


class SASRec(Dropping):
    """Scores of items given a history. `items`: how many items there are; ids are 1..items, 0 is padding. scored: whether
    its states are what items are scored with; else they are parts of another model's, and have no tap. `facts`: what
    `model.side` has to know of the data. `event_inputs`: what the model asks for besides item ids (`events.Events`)."""

    def __init__(self, params: ModelParams, items: int, facts: Facts | None = None, scored: bool = True) -> None:
        super().__init__()
        self.params, self.items, self.facts, self.rate = params, items, facts or Facts(), params.dropout
        self.event_inputs = event_inputs(params)
        self.item_table = Table(items + 1, params.hidden, padding=True, scoring=params.tied)
        self.position_table = Table(params.max_len, params.hidden, padding=False) if params.position != "none" else None
        self.embedding_norm = nn.LayerNorm(params.hidden, eps=1e-8) if params.embedding_norm else None
        self.embedding_tap = Tap("activation", params.hidden, stream=True)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.blocks))
        self.final_norm = nn.LayerNorm(params.hidden, eps=1e-8) if params.final_norm else None
        self.final_tap = Tap("activation", params.hidden, scoring=True) if scored else None
        self.output_table = None if params.tied else Table(items + 1, params.hidden, padding=True, scoring=True)
        # Linear and Table start with small normal numbers of their own.
        if params.init == "xavier":
            start_with_xavier(self)
        # Last, so that the rest starts with the same numbers as without it.
        self.side = SideEmbeddings(params.side, params.hidden, self.facts) if params.side else None
        if self.side is not None and params.init == "xavier":
            start_with_xavier(self.side)

    @property
    def scoring_table(self) -> Table:
        return self.item_table if self.output_table is None else self.output_table

    @property
    def item_tables(self) -> tuple[Table, ...]:
        """The tables that have a row for each item."""
        return (self.item_table,) if self.output_table is None else (self.item_table, self.output_table)

    @property
    def scoring_parts(self) -> tuple[Part, ...]:
        """The table and all of the state."""
        name = "item_table.weight" if self.output_table is None else "output_table.weight"
        return (Part(name, self.scoring_table, slice(0, self.params.hidden)),)

    def encode(self, histories: Histories, last: bool = False, windows: Tensor | None = None) -> Tensor:
        """histories: (batch, length) item ids, padded with 0 on the left, length at most max_len; as Events with what is
        known of each event, else that is unknown. windows: (batch, length) for rows that hold several histories side by
        side: a number for each position, 0 for padding, and another one where another history begins; histories do not
        see each other.

        Returns the state after each position, (batch, length, hidden), or with `last` after the last one only,
        (batch, 1, hidden): the same values, for less work.
        """
        events = histories if isinstance(histories, Events) else Events(histories)
        if self.training and self.event_inputs:
            events = blank(events, windows)
        histories = events.items
        length = histories.shape[1]
        mask = real_tokens(histories)
        own = mask if windows is None else windows  # what quantizers are told of tokens
        x, scale = self.item_table.lookup(histories), self.params.hidden**0.5  # (batch, length, hidden)
        if self.position_table is None:
            x = x * scale
        else:
            x = torch.add(self.position_table.lookup(self._positions(length, mask, windows)), x, alpha=scale)
        if self.side is not None:
            for known in self.side(events, windows):
                x = x + known
        x = dropout(x, self.rate, self.training)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.embedding_tap(x, mask=own)
        bias = x.new_full((length, length), HIDDEN_SCORE).triu_(1)[None]  # (1, length, length)
        if windows is not None:
            bias = bias.masked_fill(windows[:, :, None] != windows[:, None], HIDDEN_SCORE)  # (batch, length, length)
        elif mask is not None:
            bias = bias + x.new_zeros(mask.shape).masked_fill_(~mask, HIDDEN_SCORE)[:, None]
        gaps = self._gaps(events)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, own, last and i == len(self.blocks) - 1, last, gaps)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.final_tap is None else self.final_tap(x, mask=own if own is None or not last else own[:, -1:])

    def _gaps(self, events: Events) -> Tensor | None:
        """Buckets of the time between any two events, (batch, length, length), where a bias is learned for them."""
        if not self.params.time_bias:
            return None
        if events.times is None:
            return torch.zeros_like(events.items)[:, :, None].expand(-1, -1, events.items.shape[1])
        return time_gaps(events.times)

    def _positions(self, length: int, mask: Tensor | None, windows: Tensor | None) -> Tensor:
        """Rows of the position table: (length,), or (batch, length) where padding or other histories shift them."""
        places = torch.arange(length, device=self.item_table.weight.device)
        right = self.params.position == "right"
        if windows is not None:
            # Padding, a history of its own here, may lie further from the end than max_len.
            begin, end = self._borders(windows, places)
            return (self.params.max_len - 1 - end + places).clamp_(min=0) if right else places - begin
        if right:
            return places + self.params.max_len - length
        if mask is None:
            return places
        # Padding shares position 0 with the first token; nothing sees it.
        return (places - (~mask).sum(1, keepdim=True)).clamp_(min=0)

    @staticmethod
    def _borders(windows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last place of the history that each place is in, (batch, length) each."""
        length = len(places)
        change = windows[:, 1:] != windows[:, :-1]
        begin, end = torch.zeros_like(windows), torch.full_like(windows, length - 1)
        begin[:, 1:] = places[1:] * change
        end[:, :-1] = torch.where(change, places[:-1], length - 1)
        return begin.cummax(1).values, end.flip(1).cummin(1).values.flip(1)

    def score(self, states: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores of `states` (..., hidden): against all items, (..., items + 1) with the padding's score first and
        meaningless, or against the given ids: of the states' leading shape plus one axis n, giving (..., n); of shape (n,),
        shared by all states; or of shape (batch, n) for states (batch, length, hidden), shared by each sequence."""
        return scores(self.scoring_table, states, items)
