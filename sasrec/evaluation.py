"""Ranks of every held-out item, under all three protocols, for anything that scores items.

The history of a target is everything of its user before it; at test that includes what validation held out. Full ranking
is against all items that the user has not seen in that history, sampled ranking against stored candidates; the target
itself is always among them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.batches import Ints, items_at, left_placed
from sasrec.data.sequences import Held, Part
from sasrec.errors import UserError
from sasrec.models.events import Histories, gather, on
from sasrec.models.transfer import send

# Scores held at once, in elements; bounds the memory of ranking whatever the catalogue.
BLOCK_ELEMENTS = 8_000_000


class Store(Protocol):
    """What evaluation needs of `sasrec.data.sequences.Sequences`."""

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def items_count(self) -> int: ...
    def held(self, part: Part) -> Held: ...


# (histories (batch, length) padded left, users (batch,)) -> scores of all items (batch, items + 1), column 0 ignored. With what
# the scorer asks for of each event (`rank`), histories are Events.
Scorer = Callable[[Any, Ints], Tensor]


@dataclass(frozen=True)
class Ranks:
    """full, sampled, popsampled: (users,) float32, one rank per evaluated user in their order, against all items, uniform
    candidates, and candidates drawn by popularity (of test only: nan on validation). recommended: (items + 1,) how many
    users have the item among their ten best."""

    full: NDArray[np.float32]
    sampled: NDArray[np.float32]
    popsampled: NDArray[np.float32]
    recommended: NDArray[np.int64]

    @property
    def coverage(self) -> float:
        """Share of the catalogue that is among the ten best of at least one user."""
        return float((self.recommended[1:] > 0).mean())


def blocks(store: Store, held: Held, max_len: int, size: int, asked: Sequence[str] = ()) -> Iterator[tuple[Ints, Histories]]:
    """(rows of `held`, their histories (batch, length)) in batches of about equal length. asked: what is wanted of each event
    beside the item (`events.NAMES`)."""
    ends = held.positions
    begins = np.maximum(np.asarray(store.offsets)[held.users], ends - max_len)
    order = np.argsort(ends - begins, kind="stable")
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        places = left_placed(begins[rows], ends[rows], int((ends - begins)[rows].max()))
        yield rows, gather(store, items_at(store.items, places), places, asked)


def mean_rank(scores: Tensor, target: Tensor) -> Tensor:
    """scores: (batch, n), -inf where not a candidate, the target among them; target: (batch,) its score. Mean-tie rank."""
    higher = (scores > target[:, None]).sum(1)
    equal = (scores == target[:, None]).sum(1) - 1
    return 1 + higher + equal.to(torch.float32) / 2


def candidate_rank(scores: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
    """Mean-tie rank of a target of score `target` (batch,) among `candidates` (batch, n), ids of these `scores`, 0 = none."""
    return mean_rank(torch.cat([scores.masked_fill(candidates == 0, -torch.inf), target[:, None]], 1), target)


def refuse_nan(undefined: Sequence[Tensor]) -> None:
    """Raise UserError where a score is not a number. undefined: () each, whether any of a block is not."""
    if len(undefined) and bool(torch.stack(list(undefined)).any()):
        raise UserError("a score is not a number: the training diverged; lower the learning rates (train.lr, quant.lr)")


def best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best columns of each row, (batch, k), best first; ties go to the lower id."""
    k = min(k, scores.shape[1])
    values, ids = scores.topk(k)
    least = values[:, -1:]
    if scores.device.type != "cpu":
        return in_order(scores, lowest_best(scores, least, k))
    # topk takes any of those that tie at the edge; only rows where some are left out need care, and inside the k best a
    # stable sort by descending value of ids in ascending order settles the rest.
    crowded = ((scores >= least).sum(1) > k).nonzero().squeeze(1)
    if len(crowded):
        part, edge = scores[crowded], least[crowded]
        room = k - (part > edge).sum(1, keepdim=True)
        tied = part == edge
        taken = (part > edge) | (tied & (tied.cumsum(1) <= room))
        ids[crowded] = taken.nonzero()[:, 1].view(-1, k)
    return in_order(scores, ids.sort(dim=1).values)


def lowest_best(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """Ids of the k best columns, (batch, k), ascending, where least (batch, 1) is the k-th best score, with passes over all
    columns instead of the look for rows that need them, which a GPU would have to be waited for."""
    better, tied = scores > least, scores == least
    taken = better | (tied & (tied.cumsum(1) <= k - better.sum(1, keepdim=True)))
    # Of numbers that fall with the id, the k highest: those taken, in ascending order of ids.
    columns = scores.shape[1]
    numbers = torch.arange(columns, 0, -1, device=scores.device) * taken
    return columns - numbers.topk(k).values.clamp(min=1)  # none is taken of scores that are no numbers


def in_order(scores: Tensor, ids: Tensor) -> Tensor:
    """ids (batch, k), ascending, by descending score; ties stay in that order."""
    order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)


@torch.no_grad()
def rank(
    scorer: Scorer,
    store: Store,
    part: Part,
    max_len: int,
    *,
    exclude_seen: bool = True,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    only: Literal["full"] | None = None,
    asked: Sequence[str] = (),
) -> Ranks:
    """Rank the held-out item of every evaluated user.

    max_len: how much of the history the scorer is given. asked: what it is given of each event beside the item
    (`events.NAMES`). only: leave the rest out; its ranks are nan, and nothing is recommended. Raises UserError where a score
    is not a number.
    """
    held = store.held(part)
    targets = np.asarray(store.items)[held.positions].astype(np.int64)
    # One copy to the host at the end, and nothing before that has to be waited for.
    full, sampled, popsampled = torch.full((3, len(targets)), torch.nan, device=device)
    undefined: list[Tensor] = []
    recommended = torch.zeros(store.items_count + 1, dtype=torch.int64, device=device)
    size = max(1, min(batch_size, BLOCK_ELEMENTS // (store.items_count + 1)))
    for rows, histories in blocks(store, held, max_len, size, asked):
        users = held.users[rows]
        scores, at = scorer(on(histories, device), users), send(rows, device)
        scores[:, 0] = -torch.inf
        undefined.append(scores.isnan().any())
        target = send(targets[rows], device)
        own = scores.gather(1, target[:, None]).squeeze(1)
        for ranks, negatives in ((sampled, held.negatives), (popsampled, held.popular_negatives)):
            if only is None and negatives is not None:
                candidates = send(negatives[rows].astype(np.int64), device)
                ranks[at] = candidate_rank(scores.gather(1, candidates), candidates, own)
        if exclude_seen:
            row, item = seen_pairs(store, users, held.positions[rows])
            scores[send(row, device), send(item, device)] = -torch.inf
            scores.scatter_(1, target[:, None], own[:, None])
        full[at] = mean_rank(scores, own)
        if only is None:
            ids = best(scores, 10).flatten()
            recommended.index_add_(0, ids, torch.ones_like(ids))
    refuse_nan(undefined)
    return Ranks(*(ranks.cpu().numpy() for ranks in (full, sampled, popsampled, recommended)))


def seen_pairs(store: Store, users: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """(row, item) of everything in the history of each row's user."""
    begins = np.asarray(store.offsets)[users]
    counts = ends - begins
    row = np.repeat(np.arange(len(users)), counts)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, store.items[np.repeat(begins, counts) + inside].astype(np.int64)


def model_scorer(model: Any) -> Scorer:
    """Scores of a model with `encode` and `score` (SASRec), in evaluation mode."""
    model.eval()
    with torch.no_grad():
        table = model.scoring_table.all()

    def scorer(histories: Histories, users: Ints) -> Tensor:
        return model.encode(histories, last=True).squeeze(1) @ table.T

    return scorer
