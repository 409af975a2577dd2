"""SASRec the way most public code has it: what the benchmark times beside this project. Small and plain on purpose.

Every history is padded to `max_len`; Python loops over users make the batches and draw a negative per position by rejection
against a set; attention is written out over dense (length, length) matrices; dropout is `F.dropout` and the optimizer torch's
Adam as it comes; evaluation runs the whole padded network in batches and draws its candidates anew. The network is that of
`sasrec.models.sasrec`: a test copies the weights and finds the same states, losses and ranks.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasrec.bench.plain_data import Data
from sasrec.config import ModelParams, TrainParams
from sasrec.errors import UserError

Window = tuple[int, list[int], list[int]]  # user, inputs, targets

# Of the sections model and train, what it can take; everything else has to have its default.
OPTIONS = ("max_len", "hidden", "blocks", "ffn_dim", "dropout", "block", "final_norm", "init")
LOSSES = ("bce", "cross_entropy")


def refuse(model: ModelParams, train: TrainParams) -> None:
    """Raise UserError where the plain code has no such network or loss."""
    for field in fields(ModelParams):
        value = getattr(model, field.name)
        if field.name not in OPTIONS and value != field.default:
            raise UserError(
                f"params.yaml: model.{field.name} is {value}, which the plain reference does not have; "
                f"set it to {field.default}, or give --setting a shape of its own (s, p, large)"
            )
    if train.loss not in LOSSES or (train.loss == "bce" and (train.negatives != 1 or train.negatives_from != "unseen")):
        raise UserError(
            f"params.yaml: the plain reference has train.loss: cross_entropy, and bce with train.negatives: 1 and "
            f"negatives_from: unseen, but not {train.loss} as set there; give --setting a shape of its own (s, p, large)"
        )


class Block(nn.Module):
    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        hidden, inner = params.hidden, params.ffn_dim or params.hidden
        self.kind, self.rate = params.block, params.dropout
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-8)
        self.query, self.key, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden, eps=1e-8)
        self.inner, self.outer = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def attention(self, queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
        """hidden: (batch, length, length), True where a query may not look."""
        scores = self.query(queries) @ self.key(keys).transpose(1, 2) / queries.shape[-1] ** 0.5
        weights = torch.softmax(scores.masked_fill(hidden, -1e9), -1)
        return F.dropout(weights, self.rate, self.training) @ self.value(keys)

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(torch.relu(self.inner(x)), self.rate, self.training)
        return F.dropout(self.outer(inner), self.rate, self.training)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.kind == "original":
            queries = self.attention_norm(x)
            x = self.feed_forward_norm(queries + self.attention(queries, x, hidden))
            return x + self.feed_forward(x)
        if self.kind == "pre_norm":
            normed = self.attention_norm(x)
            x = x + self.attention(normed, normed, hidden)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x, x, hidden))
        return self.feed_forward_norm(x + self.feed_forward(x))


class PlainSASRec(nn.Module):
    def __init__(self, params: ModelParams, items: int) -> None:
        super().__init__()
        self.params, self.items = params, items
        self.item_table = nn.Embedding(items + 1, params.hidden, padding_idx=0)
        self.position_table = nn.Embedding(params.max_len, params.hidden)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.blocks))
        self.final_norm = nn.LayerNorm(params.hidden, eps=1e-8) if params.final_norm else nn.Identity()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            self.item_table.weight[0] = 0

    def forward(self, histories: Tensor) -> Tensor:
        """histories: (batch, max_len) item ids, 0 = padding on the left. Returns states (batch, max_len, hidden)."""
        length = histories.shape[1]
        x = self.item_table(histories) * self.params.hidden**0.5 + self.position_table(torch.arange(length))
        x = F.dropout(x, self.params.dropout, self.training)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = future | (histories == 0)[:, None]
        for block in self.blocks:
            x = block(x, hidden)
        return self.final_norm(x)


def padded(sequence: Sequence[int], length: int) -> np.ndarray:
    row = np.zeros(length, np.int64)
    if len(sequence):
        row[-len(sequence) :] = sequence
    return row


class PlainTraining:
    """Trains a PlainSASRec by the epoch."""

    def __init__(self, model: PlainSASRec, data: Data, train: TrainParams, batch_size: int, seed: int = 0) -> None:
        self.model, self.data, self.train, self.batch_size = model, data, train, batch_size
        self.random = random.Random(seed)
        self.seen = [set(sequence) for sequence in data.training()]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=train.lr, betas=(0.9, 0.98))

    def windows(self) -> list[Window]:
        """The last `max_len` pairs of each user, or with `windows: all` also those before them."""
        length, found = self.model.params.max_len, []
        for user, sequence in enumerate(self.data.training()):
            end = len(sequence)
            while end > 1:
                begin = max(end - 1 - length, 0)
                found.append((user, sequence[begin : end - 1], sequence[begin + 1 : end]))
                end = begin + 1 if self.train.windows == "all" else 0
        return found

    def negative(self, user: int) -> int:
        item = self.random.randint(1, self.data.items)
        while item in self.seen[user]:
            item = self.random.randint(1, self.data.items)
        return item

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(inputs, targets, negatives), each (batch, max_len) with 0 on the left."""
        windows, length = self.windows(), self.model.params.max_len
        self.random.shuffle(windows)
        for begin in range(0, len(windows), self.batch_size):
            inputs, targets, negatives = [], [], []
            for user, own_inputs, own_targets in windows[begin : begin + self.batch_size]:
                inputs.append(padded(own_inputs, length))
                targets.append(padded(own_targets, length))
                sampled = [self.negative(user) for _ in own_targets] if self.train.loss == "bce" else []
                negatives.append(padded(sampled, length))
            yield tuple(torch.from_numpy(np.stack(rows)) for rows in (inputs, targets, negatives))  # type: ignore[misc]

    def loss(self, inputs: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        states, real = self.model(inputs), targets > 0
        if self.train.loss == "cross_entropy":
            logits = states[real] @ self.model.item_table.weight[1:].T
            return F.cross_entropy(logits, targets[real] - 1)
        positive = (states * self.model.item_table(targets)).sum(-1)[real]
        negative = (states * self.model.item_table(negatives)).sum(-1)[real]
        ones, zeros = torch.ones_like(positive), torch.zeros_like(negative)
        of_positive = F.binary_cross_entropy_with_logits(positive, ones)
        return of_positive + F.binary_cross_entropy_with_logits(negative, zeros)

    def epoch(self) -> tuple[float, int]:
        """The mean loss over batches, and how many there are."""
        self.model.train()
        losses = []
        for inputs, targets, negatives in self.batches():
            loss = self.loss(inputs, targets, negatives)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses)), len(losses)


@torch.no_grad()
def last_states(model: PlainSASRec, histories: Sequence[Sequence[int]]) -> Tensor:
    length = model.params.max_len
    inputs = torch.from_numpy(np.stack([padded(history[-length:], length) for history in histories]))
    return model(inputs)[:, -1]


@torch.no_grad()
def full_ranks(model: PlainSASRec, data: Data, held: int = 1, batch_size: int = 128) -> np.ndarray:
    """Rank of each user's item `held` from the end among all items that are not in the history before it."""
    model.eval()
    sequences = [sequence for sequence in data.sequences if len(sequence) >= 3]
    ranks = []
    for begin in range(0, len(sequences), batch_size):
        part = sequences[begin : begin + batch_size]
        scores = last_states(model, [sequence[:-held] for sequence in part]) @ model.item_table.weight.T
        for row, sequence in zip(scores, part, strict=True):
            target = row[sequence[-held]].item()
            row[[0, *sequence[:-held]]] = -torch.inf
            row[sequence[-held]] = target
            ranks.append(mean_rank(row, target))
    return np.array(ranks)


@torch.no_grad()
def sampled_ranks(
    model: PlainSASRec, data: Data, candidates: Sequence[Sequence[int]] | None = None, count: int = 100, batch_size: int = 128
) -> np.ndarray:
    """Rank of each user's last item among `count` items that the user never had, or among given candidates of each user."""
    model.eval()
    rng = random.Random(0)
    sequences = [sequence for sequence in data.sequences if len(sequence) >= 3]
    ranks = []
    for begin in range(0, len(sequences), batch_size):
        part = sequences[begin : begin + batch_size]
        states = last_states(model, [sequence[:-1] for sequence in part])
        for number, (state, sequence) in enumerate(zip(states, part, strict=True), begin):
            if candidates is None:
                seen, items = set(sequence), [sequence[-1]]
                wanted = 1 + min(count, data.items - len(seen))
                while len(items) < wanted:
                    item = rng.randint(1, data.items)
                    if item not in seen:
                        seen.add(item)
                        items.append(item)
            else:
                items = [sequence[-1], *candidates[number]]
            scores = model.item_table.weight[items] @ state
            ranks.append(mean_rank(scores, scores[0].item()))
    return np.array(ranks)


def mean_rank(scores: Tensor, target: float) -> float:
    higher, equal = (scores > target).sum().item(), (scores == target).sum().item()
    return 1 + higher + (equal - 1) / 2
