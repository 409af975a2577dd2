"""The loss, pairwise accuracy and NDCG@10 of a model on the validation items, by which checkpoints are chosen."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec import evaluation, metrics
from sasrec.config import TrainParams
from sasrec.data.batches import Ints
from sasrec.models.events import Histories, asked_by, on
from sasrec.models.transfer import send
from sasrec.next_item import NextItem

# Histories whose loss, and targets whose sampled ranks, are worked out together.
USERS = 512


class Validation:
    """Of one model while it is trained."""

    def __init__(self, model: Any, store: Any, params: TrainParams, seed: int, task: NextItem) -> None:
        """params, seed, task: those of the training."""
        self.model, self.store, self.params, self.seed, self.task = model, store, params, seed, task
        self.held = store.held("validation")
        self.targets: Ints = np.asarray(store.items)[self.held.positions].astype(np.int64)

    @torch.no_grad()
    def __call__(self) -> tuple[float, float, float]:
        """Loss, pairwise accuracy and NDCG@10 of the model as it is; the negatives are the same at every call."""
        self.model.eval()
        rng = np.random.default_rng([self.seed, 3])
        total = torch.zeros(2, device=self.task.device)
        states = torch.empty(0)
        for rows, histories in evaluation.blocks(self.store, self.held, self.model.params.max_len, USERS, asked_by(self.model)):
            state = evaluation.last_states(self.model, on(histories, self.task.device))
            states = states if len(states) else state.new_empty(len(self.targets), state.shape[-1])
            states[send(rows, self.task.device)] = state
            users = self.held.users[rows]
            result = self.task.loss(state, self.targets[rows], users, self.task.negatives(users, rng), rng)
            total += torch.stack([result.loss, result.accuracy]) * len(rows)
        loss, accuracy = (total / max(len(self.targets), 1)).tolist()
        ranks = self._full_ranks(states) if self.params.select_on == "full" else self._sampled_ranks(states)
        return loss, accuracy, float(metrics.ndcg(ranks.astype(np.float64), 10).mean()) if len(ranks) else 0.0

    def _full_ranks(self, states: Tensor) -> NDArray[np.float32]:
        """Ranks of the targets among all items; states: (targets, hidden)."""

        def looked_up(histories: Histories, users: Ints) -> Tensor:
            return states[send(np.searchsorted(self.held.users, users), self.task.device)]

        scorer = evaluation.Factored(looked_up, self.model.scoring_table.all())
        max_len = self.model.params.max_len
        return evaluation.rank(scorer, self.store, "validation", max_len, device=self.task.device, only="full").full

    def _sampled_ranks(self, states: Tensor) -> NDArray[np.float32]:
        """Ranks of the targets among their candidates, of which alone scores are computed. The sums behind a score may run in
        another order than in `evaluation.rank`, so that a rank may differ from its own where two scores agree to the last
        digits."""
        table = self.model.scoring_table.all()
        ranks: list[Tensor] = []
        undefined: list[Tensor] = []
        for begin in range(0, len(self.targets), USERS):
            rows = slice(begin, begin + USERS)
            candidates = send(
                np.column_stack([self.held.negatives[rows], self.targets[rows]]), self.task.device
            )  # (batch, n + 1)
            scores = (table[candidates] @ states[rows, :, None]).squeeze(2)
            undefined.append(scores.isnan().any())
            ranks.append(evaluation.candidate_rank(scores[:, :-1], candidates[:, :-1], scores[:, -1]))
        evaluation.refuse_nan(undefined)
        return torch.cat(ranks).cpu().numpy() if ranks else np.zeros(0, np.float32)
