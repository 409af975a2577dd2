"""Training: what a run reaches, that it repeats to the bit, and that a killed one resumes to the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sasrec import evaluation, losses, metrics
from sasrec.annealing import dropout_rate, learning_rate
from sasrec.checkpoint import load_model, load_tensors, save_model, save_tensors
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.curves import write_curves
from sasrec.data.batches import Batch, Batching, epoch_batches
from sasrec.errors import UserError
from sasrec.guardian import Guardian
from sasrec.models.dropout import Dropping
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method, own_training, quantizers
from sasrec.quant.frozen import thaw
from sasrec.training import Extras, Progress, Trainer
from tests.conftest import SmallStore

CPU = torch.device("cpu")
SMALL = ModelParams(max_len=10, hidden=16, dropout=0.1)
FAST = TrainParams(
    loss="sampled_softmax", epochs=6, batch_size=16, lr=0.01, negatives=8, patience=10, schedule="constant", warmup=0.0
)


def fresh(params: ModelParams = SMALL, seed: int = 0) -> SASRec:
    torch.manual_seed(seed)
    return SASRec(params, 40)


def train(
    store: SmallStore, params: TrainParams, resume: Path | None = None, extras: Extras | None = None
) -> tuple[SASRec, Progress]:
    model = fresh()
    progress = Trainer(model, store, params, 0, device=CPU, extras=extras).run(resume, "key", lambda line: None)
    return model, progress


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "cross_entropy", "bpr"])
def test_every_loss_learns_the_chains(chains: SmallStore, loss: str) -> None:
    # gBCE first has to learn that nearly everything is negative.
    params = dataclasses.replace(FAST, loss=loss, epochs=60 if loss == "gbce" else 25)  # type: ignore[arg-type]
    _, progress = train(chains, params)
    assert progress.best_ndcg > 0.8
    assert progress.rows[-1].train_loss < progress.rows[0].train_loss  # type: ignore[operator]
    assert progress.rows[-1].train_accuracy > 0.95  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"schedule": "one_cycle"},
        {"clip_norm": 0.5},
        {"windows": "last"},
        {"batching": "shuffled"},
        {"batching": "bucketed"},
        {"negative_sampling": "popularity"},
        {"negatives_from": "all", "loss": "bce"},
        {"select_on": "sampled"},
        {"final_dropout": 0.0},
    ],
)
def test_options_train_too_and_change_the_run(chains: SmallStore, options: dict[str, Any]) -> None:
    base = dataclasses.replace(FAST, epochs=3, loss=options.get("loss", FAST.loss))
    plain, _ = train(chains, base)
    changed, progress = train(chains, dataclasses.replace(base, **options))
    assert progress.rows[-1].train_loss < progress.rows[0].train_loss  # type: ignore[operator]
    assert options.keys() == {"select_on"} or not same(plain, changed)


def test_popular_negatives_learn_the_chains_too(chains: SmallStore) -> None:
    _, progress = train(chains, dataclasses.replace(FAST, negative_sampling="popularity", epochs=25))
    assert progress.best_ndcg > 0.8


@pytest.mark.parametrize("options", [{}, {"batching": "bucketed"}, {"negative_sampling": "popularity"}])
def test_the_same_seed_gives_the_same_bits(chains: SmallStore, options: dict[str, Any]) -> None:
    params = dataclasses.replace(FAST, **options)
    assert same(train(chains, params)[0], train(chains, params)[0])


def test_an_epoch_counts_every_real_token_once_however_it_is_batched(chains: SmallStore) -> None:
    """A rate of nearly 0 leaves the model as it is: the loss of the epoch is then a mean over the same tokens."""
    means, counts = [], []
    ways: tuple[Batching, ...] = ("bucketed", "shuffled", "packed")
    for batching in ways:
        params = dataclasses.replace(FAST, loss="cross_entropy", batching=batching, lr=1e-12)
        trainer = Trainer(fresh(dataclasses.replace(SMALL, dropout=0.0)), chains, params, 0, device=CPU)
        batches = epoch_batches(chains, 10, 16, True, 0, 1, batching).batches
        counts.append(sum(trainer._loss(batch, np.random.default_rng(0))[1] for batch in batches))
        means.append(trainer.epoch(1)[1])
    # Each user's training part has one pair less than items.
    assert counts == [int((chains.train_ends - chains.offsets[:-1] - 1).sum())] * 3
    assert means == pytest.approx([means[0]] * 3, rel=1e-4)


def test_packing_changes_no_loss_and_no_gradient(chains: SmallStore) -> None:
    found = []
    ways: tuple[Batching, ...] = ("shuffled", "packed")
    for batching in ways:
        params = dataclasses.replace(FAST, loss="cross_entropy", batching=batching)
        trainer = Trainer(fresh(dataclasses.replace(SMALL, dropout=0.0)), chains, params, 0, device=CPU)
        batch = next(epoch_batches(chains, 10, 16, True, 0, 1, batching).batches)
        loss = trainer._loss(batch, np.random.default_rng(0))[0].loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainer.model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_products_of_bfloat16_are_for_the_training_step_alone(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = Trainer._loss

    def spy(self: Trainer, *arguments: Any) -> Any:
        asked.append(torch.get_float32_matmul_precision())
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_loss", spy)
    for precision, expected in (("bfloat16", "medium"), ("float32", "highest")):
        asked.clear()
        train(chains, dataclasses.replace(FAST, precision=precision, epochs=1))  # type: ignore[arg-type]
        assert set(asked) == {expected}
        assert torch.get_float32_matmul_precision() == "highest"


def test_padding_changes_no_loss(chains: SmallStore) -> None:
    params = dataclasses.replace(FAST, loss="cross_entropy")
    trainer = Trainer(fresh(dataclasses.replace(SMALL, dropout=0.0)), chains, params, 0, device=CPU)
    histories, targets = np.array([[0, 3, 4, 5], [7, 8, 9, 10]]), np.array([[0, 4, 5, 6], [8, 9, 10, 11]])
    batches = [
        Batch(np.pad(histories, ((0, 0), (n, 0))), np.pad(targets, ((0, 0), (n, 0))), np.tile([[0], [1]], (1, 4 + n)))
        for n in (0, 3)
    ]
    (one, count), (other, again) = (trainer._loss(batch, np.random.default_rng(0)) for batch in batches)
    assert count == again == 7
    torch.testing.assert_close(one.loss, other.loss)


def test_the_best_checkpoint_on_validation_is_what_remains(chains: SmallStore) -> None:
    model, progress = train(chains, dataclasses.replace(FAST, lr=0.05, epochs=12, patience=3))
    best = max(progress.rows, key=lambda row: row.validation_ndcg)
    assert progress.best_ndcg == best.validation_ndcg
    again = Trainer(model, chains, FAST, 0, device=CPU).validate()[2]
    assert again == pytest.approx(progress.best_ndcg, abs=1e-9)


def test_without_epochs_the_start_is_what_is_recorded(chains: SmallStore) -> None:
    model, progress = train(chains, dataclasses.replace(FAST, epochs=0))
    assert same(model, fresh().eval()) and [row.epoch for row in progress.rows] == [0]
    assert progress.best_ndcg == Trainer(fresh(), chains, FAST, 0, device=CPU).validate()[2]


def test_sampled_validation_scores_the_candidates_alone(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = train(chains, FAST)
    ranks = evaluation.rank(evaluation.model_scorer(model), chains, "validation", 10).sampled
    monkeypatch.delattr(evaluation, "rank")
    found = Trainer(model, chains, dataclasses.replace(FAST, select_on="sampled"), 0, device=CPU).validate()[2]
    assert found == pytest.approx(metrics.ndcg(ranks.astype(float), 10).mean(), abs=1e-9)


def test_early_stopping_waits_for_patience_validations(chains: SmallStore) -> None:
    _, progress = train(chains, dataclasses.replace(FAST, lr=1e-12, patience=2, epochs=50))
    assert progress.epoch <= 4
    assert progress.since_best == 2


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("method", [None, "lsq", "ste"])
def test_a_killed_run_resumes_to_the_same_bits(chains: SmallStore, tmp_path: Path, after: int, method: str | None) -> None:
    def start() -> tuple[SASRec, Trainer]:
        model, extras = fresh(), None
        if method:
            module, options = load_method(method, {})
            attach(model, QuantParams(bits=4), module, options)
            calibrate(model, [torch.randint(1, 41, (8, 10), generator=torch.Generator().manual_seed(0))])
            extras = own_training(model, 0)
        return model, Trainer(model, chains, FAST, 0, device=CPU, extras=extras, validate_start=True)

    whole, trainer = start()
    expected = trainer.run(None, "key", lambda line: None)

    def die(line: str) -> None:
        if line.startswith(f"epoch {after + 1}:"):
            raise Killed

    resume = tmp_path / "run.safetensors"
    _, trainer = start()
    with pytest.raises(Killed):
        trainer.run(resume, "key", die)
    resumed, trainer = start()
    lines: list[str] = []
    progress = trainer.run(resume, "key", lines.append)
    assert lines[0] == f"resuming after epoch {after}"
    assert same(whole, resumed)
    assert progress == expected
    # Another run does not take it up.
    _, trainer = start()
    lines.clear()
    trainer.run(resume, "another key", lines.append)
    assert not any(line.startswith("resuming") for line in lines)


def test_a_diverging_run_is_an_error_with_advice(chains: SmallStore) -> None:
    model = fresh()
    with torch.no_grad():
        model.item_table.weight[5] = torch.nan
    with pytest.raises(UserError, match=r"train\.lr"):
        Trainer(model, chains, FAST, 0, device=CPU).run(log=lambda line: None)


def test_an_orphan_stops(chains: SmallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guardian, "gone", lambda self: True)
    with pytest.raises(UserError, match="is gone"):
        train(chains, FAST)


def test_schedules() -> None:
    constant = TrainParams(lr=2.0, schedule="constant", warmup=0.5)
    assert [learning_rate(constant, p) for p in (0, 0.25, 0.5, 1)] == [0, 1, 2, 2]
    cosine = TrainParams(lr=2.0, schedule="cosine", warmup=0.2)
    assert [round(learning_rate(cosine, p), 9) for p in (0, 0.1, 0.2, 0.6, 1)] == [0, 1, 2, 1, 0]
    one = TrainParams(lr=1.0, schedule="one_cycle", warmup=0.0)
    assert learning_rate(one, 0) == pytest.approx(1 / 25)
    assert learning_rate(one, 0.3) == pytest.approx(1)
    assert learning_rate(one, 1) == pytest.approx(1e-4)


def test_dropout_falls_in_equal_steps_to_its_last_rate(chains: SmallStore) -> None:
    falling = TrainParams(epochs=5, final_dropout=0.1)
    assert [round(dropout_rate(falling, 0.5, epoch), 9) for epoch in (1, 2, 3, 4, 5)] == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert dropout_rate(TrainParams(epochs=1, final_dropout=0.1), 0.5, 1) == 0.5
    assert dropout_rate(TrainParams(epochs=5), 0.5, 4) == 0.5

    model = fresh(dataclasses.replace(SMALL, dropout=0.5))
    seen: list[set[float]] = []

    def note(epoch: int, epochs: int) -> None:
        seen.append({part.rate for part in model.modules() if isinstance(part, Dropping)})

    params = dataclasses.replace(FAST, epochs=3, final_dropout=0.0)
    Trainer(model, chains, params, 0, device=CPU, extras=Extras(on_epoch=note)).run(log=lambda line: None)
    assert seen == [{0.5}, {0.25}, {0.0}]


def test_falling_dropout_resumes_where_it_was(chains: SmallStore, tmp_path: Path) -> None:
    params = dataclasses.replace(FAST, final_dropout=0.0)
    whole, expected = train(chains, params)
    resume = tmp_path / "resume"

    def killed(epoch: int, epochs: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(chains, params, resume, Extras(on_epoch=killed))
    resumed, progress = train(chains, params, resume)
    assert progress == expected
    assert same(whole, resumed)


def test_the_quantizers_group_has_its_own_rate_and_no_decay(chains: SmallStore) -> None:
    own = torch.nn.Parameter(torch.ones(3))
    model = fresh()
    model.register_parameter("own", own)
    params = dataclasses.replace(FAST, weight_decay=0.1, schedule="cosine")
    trainer = Trainer(model, chains, params, 0, device=CPU, extras=Extras({0.5: [own]}))
    weights, quantizers = trainer.optimizer.param_groups
    assert quantizers["params"] == [own]
    assert quantizers["weight_decay"] == 0
    assert all(p is not own for p in weights["params"])
    trainer._set_rates(learning_rate(params, 0.5))
    assert quantizers["lr"] == pytest.approx(0.25)


def test_checkpoints_round_trip_and_repeat_to_the_byte(tmp_path: Path) -> None:
    model = fresh()
    for name in ("a", "b"):
        save_model(tmp_path / name, model, model.state_dict(), {"z": 1, "a": [2]})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded, card = load_model(tmp_path / "a")
    assert same(model, loaded)
    assert loaded.params == model.params
    assert card["z"] == 1
    assert list((tmp_path / "a").glob(".*")) == []


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(5)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_tensors(path)


def test_curves_are_csv_without_seconds(chains: SmallStore, tmp_path: Path) -> None:
    _, progress = train(chains, dataclasses.replace(FAST, epochs=2))
    write_curves(tmp_path / "c.csv", progress.rows)
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[0] == "epoch,lr,train_loss,validation_loss,train_accuracy,validation_accuracy,validation_ndcg"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]


def test_the_control_has_no_quantizers_at_any_width() -> None:
    model = fresh()
    module, options = load_method("control", {})
    attach(model, QuantParams(embedding_bits=1), module, options)
    assert not quantizers(model)


@pytest.mark.parametrize("method", ["ste", "pact", "dorefa", "apot", "lsq"])
def test_the_recorded_validation_is_that_of_what_is_frozen(chains: SmallStore, method: str) -> None:
    """With one scale for a whole table statistics are buffered; the best epoch is judged with fresh ones."""
    model = fresh()
    module, options = load_method(method, {})
    attach(model, QuantParams(bits=3, table="per_tensor"), module, options)
    calibrate(model, [torch.randint(1, 41, (8, 10), generator=torch.Generator().manual_seed(0))])
    trainer = Trainer(model, chains, FAST, 0, device=CPU, extras=own_training(model, 0), validate_start=True)
    progress = trainer.run(None, "key", lambda line: None)
    shipped = fresh()
    shipped.load_state_dict({name: t for name, t in model.state_dict().items() if ".quantizer." not in name})
    thaw(shipped, freeze(model))
    assert Trainer(shipped, chains, FAST, 0, device=CPU).validate()[2] == pytest.approx(progress.best_ndcg, abs=1e-9)


@pytest.mark.parametrize("weighting", ["position", "batch"])
def test_what_a_position_weighs(weighting: str, monkeypatch: pytest.MonkeyPatch, chains: SmallStore) -> None:
    """The sum of what is derived over an epoch: with `position` the mean over its positions times the number of batches,
    whatever the lengths of the batches; with `batch` the sum of the batches' own means."""
    params = TrainParams(weighting=weighting, batch_size=8, epochs=1, lr=1e-12, warmup=0.0)  # type: ignore[arg-type]
    model = SASRec(ModelParams(max_len=6, hidden=8, dropout=0.0), chains.items_count)
    trainer = Trainer(model, chains, params, 0, device=torch.device("cpu"))
    means: list[tuple[float, int]] = []
    derived: list[float] = []
    inner = trainer._loss

    def spied(batch: Batch, rng: np.random.Generator) -> tuple[losses.Result, int]:
        result, n = inner(batch, rng)
        means.append((result.loss.item(), n))
        return result, n

    monkeypatch.setattr(trainer, "_loss", spied)
    backward = torch.Tensor.backward

    def noted(loss: torch.Tensor) -> None:
        derived.append(loss.item())
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    trainer.epoch(1)
    positions = sum(n for _, n in means)
    assert len({n for _, n in means}) > 1
    if weighting == "batch":
        assert derived == [mean for mean, _ in means]
    else:
        assert sum(derived) == pytest.approx(len(means) * sum(mean * n for mean, n in means) / positions, rel=1e-5)
