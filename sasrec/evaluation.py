"""Ranks of every held-out item, under all three protocols, for anything that scores items.

The history of a target is everything of its user before it; at test that includes what validation held out. Full ranking
is against all items that the user has not seen in that history, sampled ranking against stored candidates; the target
itself is always among them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from sasrec.models.events import ids as item_ids
from sasrec.models.transfer import send

# Scores held at once, in elements; bounds the memory of ranking whatever the catalogue.
BLOCK_ELEMENTS = 8_000_000
# The same of scores that are products of states and a table, which can be had for some items at a time. On a CPU few enough
# that the passes over them find them in the cache: with as many as above they take longer than the products.
FACTORED_ELEMENTS = {"cpu": 1_000_000, "cuda": 32_000_000}
# Users who are ranked at once: more take no less time and more memory, but on a GPU, to which each kernel has to be said (not
# measured there).
USERS, GPU_USERS = 256, 1024
# Of these, on a CPU, how many histories are encoded at once, and how many of their positions: with all 256 histories of 200 at
# once, evaluation takes a fifth longer.
PART, PART_POSITIONS = 128, 6400


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
# (the first of some items, scores (batch, n) of these), one part of the catalogue after the other.
ScoreBlocks = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Factored:
    """A scorer whose scores are products: states (batch, features) of histories and users, and a table (items + 1, features).
    `rank` never holds the scores of all items where they are many."""

    states: Callable[[Any, Ints], Tensor]
    table: Tensor

    def __call__(self, histories: Histories, users: Ints) -> Tensor:
        return self.states(histories, users) @ self.table.T

    def blocks(self, histories: Histories, users: Ints) -> "_Products":
        """Can be gone through again."""
        states = self.states(histories, users)
        width = max(1, FACTORED_ELEMENTS.get(states.device.type, BLOCK_ELEMENTS) // max(len(states), 1))
        return _Products(states, self.table, width)

    def own(self, blocks: "_Products", target: Tensor) -> Tensor:
        """The scores of the targets (batch,), most probably to the bit as in `blocks`."""
        return (blocks.states @ self.table[target].T).diagonal()


@dataclass(frozen=True)
class _Products:
    states: Tensor
    table: Tensor
    width: int

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for begin in range(0, len(self.table), self.width):
            yield begin, self.states @ self.table[begin : begin + self.width].T


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


def users_at_once(device: torch.device | str) -> int:
    """How many users to rank at once on `device`."""
    return USERS if torch.device(device).type == "cpu" else GPU_USERS


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
    higher, equal = compared(scores, target)
    return 1 + higher + (equal - 1) / 2


def compared(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the scores (batch, n) are higher than the target's (batch,), and how many equal."""
    # As float32, in which counts are exact up to 16 million, because adding up booleans takes six times as long.
    counted = torch.empty_like(scores, dtype=torch.float32)
    higher = torch.gt(scores, target[:, None], out=counted).sum(1)
    return higher, torch.eq(scores, target[:, None], out=counted).sum(1)


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
    if scores.device.type != "cpu":  # all rows, because a GPU would have to be waited for to know which need it
        return in_order(scores, lowest_best(scores, scores.topk(k).values[:, -1:], k))
    # topk takes any of those that tie, in any order. One more than k tells which rows have ties at the edge, and which have
    # any; most have none.
    values, ids = scores.topk(min(k + 1, scores.shape[1]))
    equal = values[:, 1:] == values[:, :-1]
    least, ids = values[:, k - 1 : k], ids[:, :k]
    crowded = equal[:, k - 1 :].any(1).nonzero().squeeze(1)
    if len(crowded):
        ids[crowded] = lowest_best(scores[crowded], least[crowded], k)
    tied = equal.any(1).nonzero().squeeze(1)
    if len(tied):
        ids[tied] = in_order(scores[tied], ids[tied].sort(dim=1).values)
    return ids


def lowest_best(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """Ids of the k best columns, (batch, k), ascending, where least (batch, 1) is the k-th best score."""
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


@dataclass(frozen=True)
class Asked:
    """Of a batch of users. target: (batch,). row, item: (pairs,), what is no candidate of the full ranking; the target always
    is one. drawn: the candidates of other rankings, (batch, n) each, 0 = none. k: how many of the best."""

    target: Tensor
    row: Ints
    item: Ints
    drawn: Sequence[Tensor]
    k: int


@dataclass
class Answer:
    """own: (batch,) the targets' scores; higher, equal: (batch,) how many candidates have such a score, the target with them;
    drawn: the scores of the drawn candidates; best: (batch, k) ids, and whether each is a candidate at all, which may be
    fewer; undefined: () each, whether a score of a block is not a number."""

    own: Tensor
    higher: Tensor
    equal: Tensor
    drawn: list[Tensor]
    best: tuple[Tensor, Tensor]
    undefined: list[Tensor]


def answer(blocks: ScoreBlocks, asked: Asked, own: Tensor | None) -> Answer:
    """In one pass over the blocks, which are overwritten. own: the targets' scores that others are compared with; None: those
    in the blocks, of which there is then one alone."""
    target = asked.target
    higher, equal = torch.zeros((2, len(target)), device=target.device)
    found: Tensor | None = None
    values: Tensor | None = None
    ids, drawn, undefined = target, list[Tensor](), list[Tensor]()
    for begin, scores in blocks:
        width = scores.shape[1]
        if begin == 0:
            scores[:, 0] = -torch.inf
        highest = scores.amax(1)  # not a number where one of them is not
        undefined.append(highest.isnan().any())
        if scores.device.type == "cpu":  # else at the end of all, which no copy waits for
            refuse_nan(undefined)
        if found is None:
            found = scores.new_empty(len(target))
            drawn = [scores.new_full(candidates.shape, -torch.inf) for candidates in asked.drawn]
        for i, candidates in enumerate(asked.drawn):
            drawn[i] = _taken(scores, candidates - begin, drawn[i])
        place = (target - begin)[:, None]
        found = _taken(scores, place, found[:, None]).squeeze(1)
        own_items = (asked.item >= begin) & (asked.item < begin + width)
        if own_items.any():
            row, item = (send(part[own_items], scores.device) for part in (asked.row, asked.item))
            scores[row, item - begin] = -torch.inf
            inside = place.clamp(0, width - 1)
            scores.scatter_(1, inside, torch.where(place == inside, found[:, None], scores.gather(1, inside)))
        above, tied = compared(scores, found if own is None else own)
        higher, equal = higher + above, equal + tied
        if asked.k:
            values, ids = _better(values, ids, scores, highest, begin, asked.k)
    assert found is not None
    candidates = torch.ones_like(ids, dtype=torch.bool) if values is None else values > -torch.inf
    return Answer(found, higher, equal, drawn, (ids, candidates), undefined)


def _taken(scores: Tensor, places: Tensor, other: Tensor) -> Tensor:
    """scores (batch, n) at places (batch, m) where these are inside, else what `other` (batch, m) has."""
    inside = places.clamp(0, scores.shape[1] - 1)
    return torch.where(places == inside, scores.gather(1, inside), other)


def _better(values: Tensor | None, ids: Tensor, scores: Tensor, highest: Tensor, begin: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what is best so far and of the scores (batch, n) of items begin, begin + 1, ...: scores and ids, each
    (batch, k). highest: (batch,) no score is higher."""
    if values is None:
        new = best(scores, k)
        return scores.gather(1, new), new + begin
    # A tie goes to what is there, which has the lower id.
    whole = values.shape[1] < k or scores.device.type != "cpu"  # which rows are better, a GPU would have to be waited for
    rows = slice(None) if whole else (highest > values[:, -1]).nonzero().squeeze(1)
    if isinstance(rows, Tensor) and not len(rows):
        return values, ids
    some = scores[rows]
    new = best(some, k)
    both = torch.cat([values[rows], some.gather(1, new)], 1)
    order = best(both, k)
    merged = both.gather(1, order), torch.cat([ids[rows], new + begin], 1).gather(1, order)
    if not isinstance(rows, Tensor):
        return merged
    values[rows], ids[rows] = merged
    return values, ids


@torch.no_grad()
def rank(
    scorer: Scorer,
    store: Store,
    part: Part,
    max_len: int,
    *,
    exclude_seen: bool = True,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    only: Literal["full"] | None = None,
    asked: Sequence[str] = (),
) -> Ranks:
    """Rank the held-out item of every evaluated user.

    max_len: how much of the history the scorer is given. batch_size: users at once; None: what suits the device. asked: what
    the scorer is given of each event beside the item (`events.NAMES`). only: leave the rest out; its ranks are nan, and
    nothing is recommended. Raises UserError where a score is not a number.
    """
    held = store.held(part)
    targets = np.asarray(store.items)[held.positions].astype(np.int64)
    # One copy to the host at the end, and nothing before that has to be waited for.
    full, sampled, popsampled = torch.full((3, len(targets)), torch.nan, device=device)
    undefined: list[Tensor] = []
    recommended = torch.zeros(store.items_count + 1, dtype=torch.int64, device=device)
    size = users_at_once(device) if batch_size is None else batch_size
    size = size if isinstance(scorer, Factored) else min(size, BLOCK_ELEMENTS // (store.items_count + 1))
    both = ((sampled, held.negatives), (popsampled, held.popular_negatives))
    for rows, histories in blocks(store, held, max_len, max(1, size), asked):
        users, at = held.users[rows], send(rows, device)
        lists = [(ranks, negatives) for ranks, negatives in both if only is None and negatives is not None]
        drawn = [send(negatives[rows].astype(np.int64), device) for _, negatives in lists]
        seen = seen_pairs(store, users, held.positions[rows]) if exclude_seen else (np.zeros(0, np.int64),) * 2
        given = Asked(send(targets[rows], device), *seen, drawn, 10 if only is None else 0)
        found = _answer_of(scorer, on(histories, device), users, given)
        undefined += found.undefined
        full[at] = 1 + found.higher + (found.equal - 1) / 2
        for (ranks, _), candidates, scores in zip(lists, drawn, found.drawn, strict=True):
            ranks[at] = candidate_rank(scores, candidates, found.own)
        if only is None:
            ids, candidates = (part.flatten() for part in found.best)
            recommended.index_add_(0, ids, candidates.long())
    refuse_nan(undefined)
    return Ranks(*(ranks.cpu().numpy() for ranks in (full, sampled, popsampled, recommended)))


def _answer_of(scorer: Scorer, histories: Histories, users: Ints, asked: Asked) -> Answer:
    if not isinstance(scorer, Factored):
        return answer([(0, scorer(histories, users))], asked, None)
    parts = scorer.blocks(histories, users)
    if parts.width >= len(scorer.table):
        return answer(parts, asked, None)
    own = scorer.own(parts, asked.target)
    found = answer(parts, asked, own)
    # A sum that ran in another order would make the target higher or lower than itself; the next time it is the right one.
    return found if torch.equal(found.own, own) else answer(parts, asked, found.own)


def seen_pairs(store: Store, users: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """(row, item) of everything in the history of each row's user."""
    begins = np.asarray(store.offsets)[users]
    counts = ends - begins
    row = np.repeat(np.arange(len(users)), counts)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, store.items[np.repeat(begins, counts) + inside].astype(np.int64)


def last_states(model: Any, histories: Histories) -> Tensor:
    """The state after each of the histories (batch, length), (batch, hidden); on a CPU some histories at a time."""
    items = item_ids(histories)
    users, length = items.shape
    size = users if items.device.type != "cpu" else min(PART, PART_POSITIONS // max(1, length))
    return torch.cat([model.encode(part, last=True).squeeze(1) for part in histories.split(max(1, size))])


def model_scorer(model: Any) -> Factored:
    """Scores of a model with `encode` and `score` (SASRec), in evaluation mode."""
    model.eval()
    with torch.no_grad():
        table = model.scoring_table.all()
    return Factored(lambda histories, users: last_states(model, histories), table)
