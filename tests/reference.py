"""A plain SASRec training epoch, as public ports write it, to measure this project's speed against in the same run.

Every sequence is padded to the full length, one negative per position is drawn in a Python loop, attention is dense, dropout
and the optimizer are the library's defaults. Nothing in the project uses it.

    python -m tests.reference [MOVIELENS_FILE]    # 'user item' lines; prints seconds per epoch of both, interleaved
"""

import random
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainSASRec(nn.Module):
    """Hidden `hidden`, `blocks` blocks of one head, norms before each sub-layer."""

    def __init__(self, items: int, hidden: int, length: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, hidden, padding_idx=0)
        self.position = nn.Embedding(length, hidden)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.ModuleList(nn.MultiheadAttention(hidden, 1, dropout, batch_first=True) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, eps=1e-8) for _ in range(2 * blocks + 1))

    def forward(self, histories: Tensor) -> Tensor:
        length = histories.shape[1]
        real = (histories != 0).unsqueeze(-1)
        x = self.item(histories) * self.item.embedding_dim**0.5 + self.position(torch.arange(length))
        x = self.dropout(x) * real
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i, attention in enumerate(self.attention):
            query = self.norms[2 * i](x)
            x = x + attention(query, query, query, attn_mask=future, need_weights=False)[0]
            hidden = self.dropout(F.relu(self.inner[i](self.norms[2 * i + 1](x))))
            x = (x + self.dropout(self.outer[i](hidden))) * real
        return self.norms[-1](x)


def epoch(model: PlainSASRec, optimizer: torch.optim.Optimizer, sequences: list[list[int]], items: int, length: int) -> None:
    """One pass over the users in batches of 128, their last `length` items, binary cross-entropy."""
    order = list(range(len(sequences)))
    random.shuffle(order)
    for at in range(0, len(order), 128):
        users = order[at : at + 128]
        histories = np.zeros((len(users), length), np.int64)
        positives, negatives = np.zeros_like(histories), np.zeros_like(histories)
        for row, user in enumerate(users):
            sequence = sequences[user]
            seen = set(sequence)
            following, place = sequence[-1], length - 1
            for item in reversed(sequence[:-1]):
                histories[row, place], positives[row, place] = item, following
                negative = random.randint(1, items)
                while negative in seen:
                    negative = random.randint(1, items)
                negatives[row, place] = negative
                following, place = item, place - 1
                if place < 0:
                    break
        states = model(torch.from_numpy(histories))
        positive = (states * model.item(torch.from_numpy(positives))).sum(-1)
        negative_scores = (states * model.item(torch.from_numpy(negatives))).sum(-1)
        real = torch.from_numpy(positives != 0)
        loss = (F.softplus(-positive[real]) + F.softplus(negative_scores[real])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def compare(store: object, threads: int = 1, length: int = 50, hidden: int = 50, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of an epoch at dropout 0.2: of this file's loop, and of sasrec.training, taken in turn."""
    from sasrec.config import ModelParams, TrainParams
    from sasrec.models.sasrec import SASRec
    from sasrec.training import Trainer

    torch.set_num_threads(threads)
    items = store.items_count  # type: ignore[attr-defined]
    plain = PlainSASRec(items, hidden, length, 2, 0.2)
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, betas=(0.9, 0.98))
    starts, ends = store.offsets[:-1], store.train_ends  # type: ignore[attr-defined]
    sequences = [store.items[a:b].tolist() for a, b in zip(starts, ends, strict=True) if b - a > 1]  # type: ignore[attr-defined]
    ours = SASRec(ModelParams(max_len=length, hidden=hidden), items)
    params = TrainParams(loss="bce", negatives=1, windows="last")
    trainer = Trainer(ours, store, params, 0, device=torch.device("cpu"))
    theirs, own = [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        epoch(plain, optimizer, sequences, items, length)
        middle = time.perf_counter()
        trainer.epoch(number + 1)
        theirs.append(middle - began)
        own.append(time.perf_counter() - middle)
    return statistics.median(theirs[1:]), statistics.median(own[1:])


def main() -> None:
    from pathlib import Path

    from sasrec.data.sequences import Sequences

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data/prepared")
    theirs, own = compare(Sequences.load(folder))
    print(f"plain loop {theirs:.2f} s an epoch, this project {own:.2f} s: ratio {own / theirs:.3f}")


if __name__ == "__main__":
    main()
