"""What is known of past events beside the item: embeddings that are added to the input, and a bias of attention by time.

Only events of the past enter: a position sees the ratings, categories and times of its own event and of those before it,
never of the item that is asked for. HSTU (Zhai et al., ICML 2024, arXiv 2402.17152) and FuXi, as published, feed attention the
time from each past event to the target, t_(i+1) - t_j. When the next item is asked for, it is not known when it will
come: that time is a leak, and a strong hint where many events share a second. Here it is t_i - t_j, between past events alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasrec.models.events import Events
from sasrec.models.facts import NONE, Facts
from sasrec.models.taps import Table

# Row 0 of each table stands for what is not known.
UNKNOWN = 0

# Times between events are told apart by powers of two: 0 s; 1 and 2; 3 to 6; ...; from 2^31 - 1 s, which is 68 years, on.
TIME_BUCKETS = 32

# Share of the training windows in which nothing is known of any event: it is what trains the unknown embeddings.
BLANK = 0.1


def time_bucket(seconds: Tensor) -> Tensor:
    """1 + floor(log2(1 + seconds)), at most TIME_BUCKETS, for whole seconds of any shape; those below 0 count as 0, and nan
    is UNKNOWN. int64."""
    whole = seconds.nan_to_num(0.0).clamp(min=0)
    # frexp gives the exact exponent e of 1 + seconds = m 2^e with m in [0.5, 1).
    exponent = torch.frexp(1 + whole).exponent.long()
    return exponent.clamp(max=TIME_BUCKETS).masked_fill(seconds.isnan(), UNKNOWN)


def time_gaps(times: Tensor) -> Tensor:
    """Buckets of the time from key to query, (batch, length, length) [b, query, key], for times (batch, length)."""
    return time_bucket(times[:, :, None] - times[:, None])


def recency(times: Tensor, windows: Tensor | None) -> Tensor:
    """Buckets of the time from the event before, (batch, length); UNKNOWN for the first event of an input.

    Not the time to the last event of the input: in training every position is asked for its next item, and would see
    in it how far away events of its future are.
    """
    before = F.pad(times[:, :-1], (1, 0), value=torch.nan)
    if windows is not None:
        before = before.masked_fill(windows != F.pad(windows[:, :-1], (1, 0)), torch.nan)
    return time_bucket(times - before)


def blank(events: Events, windows: Tensor | None) -> Events:
    """The events with ratings and times unknown in a share BLANK of the windows, drawn anew at each call."""
    number = torch.zeros_like(events.items) if windows is None else windows
    # A draw for each number. A GPU is not asked for the largest: there are no more windows than places.
    most = int(number.max()) if number.device.type == "cpu" else number.shape[1]
    drawn = torch.rand(len(number), most + 1, device=number.device) < BLANK
    hidden = drawn.gather(1, number)
    return Events(
        events.items,
        *(None if part is None else part.masked_fill(hidden, torch.nan) for part in (events.ratings, events.times)),
    )


class SideEmbeddings(nn.Module):
    """The tables of `model.side`, all with a first row for the unknown: ratings by bins, categories, recency by buckets.

    An item of several categories gets the mean of their embeddings: the order in which data sets list them says nothing (it
    is that of the alphabet in MovieLens), so that the first would be an accident. Whatever their number, the sum is of a
    category's own size.
    """

    item_categories: Tensor
    rating_edges: Tensor

    def __init__(self, side: tuple[str, ...], hidden: int, facts: Facts) -> None:
        super().__init__()
        self.rating_table = self.category_table = self.recency_table = None
        if "rating" in side:
            self.register_buffer("rating_edges", facts.rating_edges.clone())
            self.rating_table = Table(len(facts.rating_edges) + 2, hidden, padding=False)
        if "category" in side:
            self.register_buffer("item_categories", facts.item_categories.clone())
            self.category_table = Table(facts.categories + 1, hidden, padding=False)
        if "recency" in side:
            self.recency_table = Table(TIME_BUCKETS + 1, hidden, padding=False)

    def forward(self, events: Events, windows: Tensor | None) -> list[Tensor]:
        """What is added to the input embeddings, (batch, length, hidden) each."""
        parts = []
        if self.rating_table is not None:
            parts.append(self.rating_table.lookup(self.rating_bins(events)))
        if self.category_table is not None:
            parts.append(self.mean_categories(events.items, self.category_table))
        if self.recency_table is not None:
            unknown = torch.zeros_like(events.items)
            parts.append(self.recency_table.lookup(unknown if events.times is None else recency(events.times, windows)))
        return parts

    def rating_bins(self, events: Events) -> Tensor:
        """Rows of the rating table, (batch, length): 1 + how many edges a rating is above."""
        if events.ratings is None:
            return torch.zeros_like(events.items)
        bins = 1 + torch.bucketize(events.ratings.contiguous(), self.rating_edges)
        return bins.masked_fill(events.ratings.isnan(), UNKNOWN)

    def mean_categories(self, items: Tensor, table: Table) -> Tensor:
        """(batch, length, hidden). One category after the other, as the exported graph does, for the same bits."""
        slots = self.item_categories[items].long()  # (batch, length, most)
        real = (slots != NONE).float()
        weights = real * (1 / real.sum(-1, keepdim=True))
        rows, values = (slots - 1).clamp(min=0), table.all()
        total = torch.zeros((), device=items.device)
        for slot in range(slots.shape[-1]):
            total = total + F.embedding(rows[..., slot], values) * weights[..., slot, None]
        return total


class TimeBias(nn.Module):
    """A number per head and bucket of the time between query and key, added to the scores of attention, all 0 at the start.

    As with the biases of linear layers, no tap: 33 numbers a head, added to sums in float32.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(TIME_BUCKETS + 1, heads))

    def forward(self, gaps: Tensor) -> Tensor:
        """gaps: (batch, n, length) of `time_gaps`. Returns (batch * heads, n, length)."""
        found = F.embedding(gaps, self.weight)
        return found.squeeze(-1) if found.shape[-1] == 1 else found.permute(0, 3, 1, 2).flatten(0, 1)


def event_inputs(params: Any) -> tuple[str, ...]:
    """What a model of these parameters wants to know of each event (`events.NAMES`)."""
    times = params.time_bias or "recency" in params.side
    return ("ratings",) * ("rating" in params.side) + ("times",) * times
