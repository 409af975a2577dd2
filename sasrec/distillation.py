"""Knowledge distillation: the quantized model learns the scores of the full-precision one besides the true next items
(Hinton et al. 2015, arXiv 1503.02531; for quantized students Mishra and Marr, ICLR 2018, arXiv 1711.05852)."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasrec.data.batches import Ints
from sasrec.losses import CHUNK_ELEMENTS, Result
from sasrec.models.events import Histories
from sasrec.models.transfer import send


class SoftCrossEntropy(torch.autograd.Function):
    """Mean over tokens of KL(softmax of the teacher's scores || softmax of the student's), over the same rows of both
    tables. Gradients are worked out with the loss, a chunk of tokens at a time, so that no (tokens, rows) scores are kept.

    states, wanted: (tokens, hidden) of student and teacher, which need not be as wide as each other; table, wanted_table:
    (rows, hidden). first: rows before it are left out (1 where row 0 is padding).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, wanted: Tensor, wanted_table: Tensor, first: int) -> Tensor:
        to_states, to_table = torch.zeros_like(states), torch.zeros_like(table)
        loss = states.new_zeros(())
        step = max(1, CHUNK_ELEMENTS // len(table))
        for begin in range(0, len(states), step):
            part = states[begin : begin + step]
            log_student, log_teacher = part @ table.T, wanted[begin : begin + step] @ wanted_table.T
            log_student[:, :first] = log_teacher[:, :first] = -1e9
            log_student, log_teacher = log_student.log_softmax(-1), log_teacher.log_softmax(-1)
            teacher = log_teacher.exp()
            loss += (teacher * (log_teacher - log_student)).sum()
            # d/dscores: softmax of the student's less that of the teacher's.
            to_scores = log_student.exp_().sub_(teacher)
            to_states[begin : begin + step] = to_scores @ table
            to_table.addmm_(to_scores.T, part)
        ctx.save_for_backward(to_states, to_table)
        ctx.tokens = len(states)
        return loss / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        to_states, to_table = ctx.saved_tensors
        factor = gradients[0] / ctx.tokens
        return to_states * factor, to_table * factor, None, None, None


class Distillation:
    """A training loss of (1 - weight) times the task's and `weight` times the divergence from the teacher's scores.

    Over all items where the task's loss is, too; else over the batch's targets and `sampled` items of an own draw.
    """

    def __init__(self, teacher: Any, student: Any, weight: float, sampled: int | None, seed: int) -> None:
        """teacher: copied as it is now. sampled: None for all items."""
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.table = self.teacher.scoring_table.all().detach()
        self.student, self.weight, self.sampled = student, weight, sampled
        self.seed = seed
        self.generator = np.random.default_rng([seed, 0, 4])

    def start_epoch(self, epoch: int) -> None:
        """Seed the draw anew, so that a run can resume; it is its own, so that a run without it sees the same negatives."""
        self.generator = np.random.default_rng([self.seed, epoch, 4])

    def __call__(
        self, result: Result, states: Tensor, histories: Histories, windows: Tensor | None, places: Tensor, targets: Ints
    ) -> Result:
        """states: (batch, length, hidden) of the student; histories, windows: (batch, length), as `SASRec.encode` takes them;
        places: (tokens,), where in (batch * length) the real positions are, and targets: (tokens,) their ids, on the host."""
        with torch.no_grad():
            wanted = self.teacher.encode(histories, windows=windows).flatten(0, 1)[places]
        own = states.flatten(0, 1)[places]
        if self.sampled is None:
            soft = SoftCrossEntropy.apply(own, self.student.scoring_table.all(), wanted, self.table, 1)
        else:
            drawn = self.generator.integers(1, len(self.table), self.sampled)
            items = send(np.unique(np.concatenate([targets, drawn])), places.device)
            rows = self.student.scoring_table.lookup(items)
            soft = SoftCrossEntropy.apply(own, rows, wanted, self.table[items], 0)
        return replace(result, loss=(1 - self.weight) * result.loss + self.weight * soft)
