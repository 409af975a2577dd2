"""Details of a training run: what is drawn when, in which mode, at which rate, and what is kept of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec import evaluation, losses, metrics, validation
from sasrec.config import TrainParams
from sasrec.curves import Row
from sasrec.data.batches import Batch
from sasrec.models.events import Histories
from sasrec.next_item import NextItem
from sasrec.training import Extras, Progress, Trainer
from tests.conftest import SmallStore
from tests.test_training import CPU, FAST, fresh, same


def trainer_of(store: SmallStore, seed: int = 0, extras: Extras | None = None, **options: Any) -> Trainer:
    return Trainer(fresh(), store, replace(FAST, **options), seed, device=CPU, extras=extras)


def row(epoch: int, ndcg: float) -> Row:
    return Row(epoch, 0.1, 1.0, 1.0, 0.5, 0.5, ndcg)


class Stop(Exception):
    pass


def test_every_epoch_and_every_seed_has_draws_of_its_own(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dropout, of the batches and of the negatives."""

    def drawn(seed: int, epoch: int) -> tuple[int, list[list[int]], list[int]]:
        trainer = trainer_of(chains, seed)
        found = []

        def first(batch: Batch, rng: np.random.Generator) -> Any:
            negatives = trainer.task.negatives_of(batch, rng)
            found.append((torch.initial_seed(), batch.histories.tolist(), negatives.tolist()))
            raise Stop

        monkeypatch.setattr(trainer, "_loss", first)
        with pytest.raises(Stop):
            trainer.epoch(epoch)
        return found[0]

    one = drawn(0, 1)
    assert drawn(0, 1) == one
    for other in (drawn(0, 2), drawn(1, 1)):
        assert all(own != its for own, its in zip(one, other, strict=True))


def test_the_rate_follows_the_steps_of_all_epochs(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up that takes all of three epochs rises by the same in each step, from nothing."""
    trainer = trainer_of(chains, epochs=3, warmup=1.0, lr=2.0, windows="last")
    rates: list[float] = []
    monkeypatch.setattr(trainer, "_step", lambda forward, average: torch.zeros(2))
    monkeypatch.setattr(trainer, "_set_rates", rates.append)
    last = [trainer.epoch(epoch)[0] for epoch in (1, 2, 3)]
    steps = 3 * trainer.steps
    assert rates == pytest.approx([2.0 * step / steps for step in range(steps)])
    assert last == rates[trainer.steps - 1 :: trainer.steps]


def test_steps_train_and_validations_do_not(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(chains, epochs=2)
    modes: list[tuple[str, bool]] = []
    original = evaluation.last_states

    def step(forward: Callable[..., Any], average: float) -> Tensor:
        modes.append(("step", trainer.model.training))
        return torch.zeros(2)

    def states(model: Any, histories: Histories) -> Tensor:
        modes.append(("validation", model.training))
        return original(model, histories)

    monkeypatch.setattr(trainer, "_step", step)
    monkeypatch.setattr(evaluation, "last_states", states)
    trainer.run(log=lambda line: None)
    assert set(modes) == {("step", True), ("validation", False)}
    trainer.model.train()
    evaluation.model_scorer(trainer.model)
    assert not trainer.model.training


def test_the_first_of_the_best_is_kept_and_the_patience_begins_anew(chains: SmallStore) -> None:
    trainer, progress = trainer_of(chains), Progress()
    counted = []
    for epoch, ndcg in enumerate((0.1, 0.05, 0.05, 0.2, 0.2, 0.1), 1):
        trainer._note(progress, row(epoch, ndcg), None)
        counted.append((progress.best_epoch, progress.since_best))
    assert counted == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2)]
    assert progress.best_ndcg == 0.2


def test_the_last_epoch_is_validated_whatever_the_interval(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(chains, epochs=3, evaluate_every=2)
    monkeypatch.setattr(trainer, "_step", lambda forward, average: torch.zeros(2))
    progress = trainer.run(log=lambda line: None)
    assert [row.epoch for row in progress.rows] == [2, 3]


def test_a_resumed_run_knows_the_best_of_before(chains: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was best before it was killed is not reached again."""
    best = fresh(seed=5).state_dict()
    before = Progress(2, best_epoch=1, best_ndcg=2.0, since_best=1, rows=[row(1, 2.0), row(2, 0.5)])
    trainer_of(chains)._save(tmp_path / "run", "key", before, best)
    trainer = trainer_of(chains, epochs=3)
    monkeypatch.setattr(trainer, "_step", lambda forward, average: torch.zeros(2))
    progress = trainer.run(tmp_path / "run", "key", lambda line: None)
    assert (progress.epoch, progress.best_epoch, progress.since_best) == (3, 1, 2)
    assert same(trainer.model, fresh(seed=5))


def test_norms_are_clipped_without_the_quantizers(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = fresh(), torch.nn.Parameter(torch.zeros(2))
    model.register_parameter("own", own)
    trainer = Trainer(model, chains, replace(FAST, clip_norm=1.0), 0, device=CPU, extras=Extras({0.5: [own]}))
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    trainer.descend(100 * own.sum() + 100 * model.item_table.weight.sum())
    assert own.grad is not None and own.grad.tolist() == [100, 100]
    assert model.item_table.weight.grad is not None and model.item_table.weight.grad.norm().item() == pytest.approx(1)


def test_the_moments_are_those_of_the_authors(chains: SmallStore) -> None:
    """Adam with a second decay of 0.98, for dense and for sparse tables."""
    optimizers = trainer_of(chains, table_optimizer="sparse").optimizers
    assert sorted(optimizers) == ["optimizer", "tables"]
    assert {group["betas"] for each in optimizers.values() for group in each.param_groups} == {(0.9, 0.98)}


def test_checkpoints_are_chosen_by_the_ranks_that_are_reported(chains: SmallStore) -> None:
    trainer = trainer_of(chains)
    found = {}
    for exclude in (True, False):
        ranks = evaluation.rank(evaluation.model_scorer(trainer.model), chains, "validation", 10, exclude_seen=exclude)
        found[exclude] = float(metrics.ndcg(ranks.full.astype(float), 10).mean())
    assert found[True] != found[False]
    assert trainer.validate()[2] == pytest.approx(found[True], abs=1e-9)


def test_the_validation_loss_is_the_mean_over_users_however_many_at_once(
    chains: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy, which draws nothing, by hand from the states of single users."""
    trainer = trainer_of(chains, loss="cross_entropy")
    model, held, single = trainer.model.eval(), chains.held("validation"), []
    for user, end in zip(held.users, held.positions, strict=True):
        history = torch.from_numpy(chains.items[max(chains.offsets[user], end - 10) : end].astype(np.int64))
        logits = model.score(model.encode(history[None], last=True)[0, 0])[1:]
        target = torch.tensor(int(chains.items[end]) - 1)
        single.append(torch.nn.functional.cross_entropy(logits, target).item())
    for users in (7, 512):
        monkeypatch.setattr(validation, "USERS", users)
        assert trainer.validate()[0] == pytest.approx(np.mean(single), rel=1e-5)


def test_gbce_by_hand_where_a_shared_negative_is_a_target() -> None:
    """Twenty items, three negatives of which two are the first position's own target: these do not count there."""
    params = TrainParams(loss="gbce", negatives=3, gbce_t=0.6, shared_negatives=True)
    generator = torch.Generator().manual_seed(0)
    table, states = torch.randn(21, 4, generator=generator), torch.randn(1, 2, 4, generator=generator)

    def score(of: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        rows = table[ids]
        return of @ rows.transpose(1, 2) if ids.dim() < of.dim() else (rows * of[:, None]).sum(-1)

    negatives, targets = torch.tensor([[4, 9, 4]]), torch.tensor([4, 7])
    found = losses.compute(params, 20, score, lambda: table, states, targets, negatives, torch.arange(2)).loss
    alpha = 3 / 19
    beta = alpha * (0.6 * (1 - 1 / alpha) + 1 / alpha)
    terms = torch.nn.functional.softplus
    scores = states[0] @ table.T
    first = beta * terms(-scores[0, 4]) + terms(scores[0, 9])
    second = beta * terms(-scores[1, 7]) + 2 * terms(scores[1, 4]) + terms(scores[1, 9])
    assert found.item() == pytest.approx(float(first + second) / 4 / 2, rel=1e-6)


def test_popular_negatives_are_corrected_for_in_training(chains: SmallStore) -> None:
    params = replace(FAST, negative_sampling="popularity")
    model = fresh().eval()
    task = NextItem(model, params, chains, CPU)
    states, targets, negatives = torch.randn(3, 16), np.array([1, 2, 3]), np.array([4, 4, 9, 30])
    expected = task.sampler.log_expected(negatives)
    assert expected is not None and len(set(expected.tolist())) > 1
    found = task.loss(states, targets, np.zeros(3, np.int64), negatives, np.random.default_rng(0)).loss
    logits = model.score(states)
    positive = logits[torch.arange(3), torch.from_numpy(targets)]
    by_hand = losses.sampled_softmax(positive, logits[:, torch.from_numpy(negatives)], torch.from_numpy(expected))
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)
