"""What a student learns from its teacher's scores besides the task."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sasrec.distillation import Distillation, SoftCrossEntropy
from sasrec.losses import Result
from sasrec.models.sasrec import SASRec
from sasrec.training import Extras, Trainer
from tests.quant.conftest import CPU, TRAIN, walks


def test_the_divergence_and_its_gradients() -> None:
    states, table = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    wanted, wanted_table = torch.randn(7, 3), torch.randn(11, 3)
    own = SoftCrossEntropy.apply(states, table, wanted, wanted_table, 1)
    plain = F.kl_div(
        (states @ table[1:].T).log_softmax(-1),
        (wanted @ wanted_table[1:].T).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(
        torch.autograd.grad(own, (states, table)), torch.autograd.grad(plain, (states, table)), rtol=1e-4, atol=1e-6
    )
    with torch.no_grad():
        assert float(SoftCrossEntropy.apply(states, table, states, table, 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("loss", "sampled"), [("cross_entropy", None), ("bce", 8)])
def test_distillation_keeps_the_student_near_the_teacher(trained: SASRec, loss: Any, sampled: int | None) -> None:
    """With the teacher's scores alone as the target, they move less than with none of it, the draws being the same."""
    histories = torch.tensor([[1, 2, 3], [8, 9, 10]])

    def distance(share: float) -> float:
        model = SASRec(trained.params, trained.items)
        model.load_state_dict(trained.state_dict())
        distill = Distillation(trained, model, share, sampled, 0)
        distill.start_epoch(0)
        params = dataclasses.replace(TRAIN, loss=loss, negatives=8)
        trainer = Trainer(model, walks(), params, 0, device=CPU, extras=Extras(distill=distill))
        for epoch in (1, 2, 3):
            trainer.epoch(epoch)
        model.eval()
        with torch.no_grad():
            own, wanted = (m.score(m.encode(histories))[..., 1:].log_softmax(-1) for m in (model, trained.eval()))
        return float((wanted.exp() * (wanted - own)).sum(-1).mean())

    assert distance(1.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize("sampled", [None, 5])
def test_of_a_student_that_is_its_teacher_only_the_tasks_share_of_the_loss_is_left(
    trained: SASRec, sampled: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1 - weight) of it, in packed rows, too, where two histories lie side by side; the items it is measured on are the
    targets and the draw."""
    model = copy.deepcopy(trained).eval()
    histories, windows = torch.tensor([[1, 2, 3, 9, 8, 7]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    targets, looked_up = np.array([11, 12, 13, 14, 15, 16]), set[int]()
    states, lookup = model.encode(histories, windows=windows), model.item_table.lookup
    distill = Distillation(model, model, 0.25, sampled, 0)

    def record(rows: Tensor) -> Tensor:
        looked_up.update(rows.tolist())
        return lookup(rows)

    monkeypatch.setattr(model.item_table, "lookup", record)
    result = distill(Result(torch.tensor(2.0), torch.tensor(0.5)), states, histories, windows, torch.arange(6), targets)
    assert float(result.loss.detach()) == pytest.approx(1.5, abs=1e-5)
    if sampled:
        assert set(targets.tolist()) < looked_up
