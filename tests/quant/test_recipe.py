"""What a recipe trains, from which start and for how long, and which checkpoint is what remains."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sasrec.checkpoint import load_model, save_model
from sasrec.config import QuantParams, TrainParams
from sasrec.distillation import Distillation
from sasrec.errors import UserError
from sasrec.models.dropout import Dropping
from sasrec.models.events import ids
from sasrec.models.registry import untrained
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import taps
from sasrec.next_item import NextItem
from sasrec.quant import attach
from sasrec.quant.adaround import AdaRound
from sasrec.quant.calibration import calibration
from sasrec.quant.layers import inputs_of
from sasrec.quant.recipe import Outcome, Run, quantize
from sasrec.training import Trainer
from sasrec.validation import Validation
from tests.conftest import ROOT, SmallStore
from tests.quant.conftest import CPU, QUANT, TRAIN, same, walks


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(walks(), QUANT, TRAIN, 0, CPU, tmp_path / "resume.safetensors", "key", lambda line: None)


def make(run: Run, model: SASRec, method: str = "lsq", options: Any = None, **quant: Any) -> Outcome:
    chosen = dataclasses.replace(run.quant, **quant)
    return quantize(dataclasses.replace(run, quant=chosen, key=f"{chosen} {options} {run.train}"), model, method, options)


class Stopped(Exception):
    """Where a training run would begin."""


def begun(
    monkeypatch: pytest.MonkeyPatch, run: Run, model: SASRec, method: str, options: Any = None, **quant: Any
) -> dict[str, Any]:
    """What the first trainer of the recipe is given."""
    given: dict[str, Any] = {}

    def begin(model: Any, store: Any, params: TrainParams, seed: int, **others: Any) -> None:
        given.update(others, model=model, params=params, seed=seed)
        raise Stopped

    monkeypatch.setattr("sasrec.quant.recipe.Trainer", begin)
    with pytest.raises(Stopped):
        make(run, model, method, options, **quant)
    return given


@pytest.mark.parametrize("method", ["control", "lsq"])
def test_fine_tuning_has_a_rate_a_length_and_a_schedule_of_its_own(
    run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    train = dataclasses.replace(TRAIN, epochs=40, warmup=0.2, patience=1, rating_weight=0.5, final_dropout=0.3)
    given = begun(monkeypatch, dataclasses.replace(run, train=train, seed=3), trained, method, epochs=6, lr=0.007)
    assert given["params"] == dataclasses.replace(
        train, epochs=6, lr=0.007, schedule="cosine", warmup=0.0, patience=7, rating_weight=0.0, final_dropout=None
    )
    assert given["seed"] == 3 and given["validate_start"]
    own = begun(monkeypatch, run, trained, method, bits=8, embedding_bits=2, lr=None)  # by the narrowest width
    assert own["params"].lr == 4e-3


@pytest.mark.parametrize(("loss", "sampled"), [("cross_entropy", None), ("bce", 5)])
@pytest.mark.parametrize("quant", [{}, {"init": "control"}, {"preset": "source"}], ids=str)
def test_the_teacher_is_the_model_that_was_given(
    run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch, loss: Any, sampled: int | None, quant: dict[str, Any]
) -> None:
    """In full precision, also of the control from which a method starts; its draws are renewed with every epoch."""
    train = dataclasses.replace(run.train, loss=loss, negatives=5)
    extras = begun(monkeypatch, dataclasses.replace(run, train=train), trained, "lsq", distill=0.25, **quant)["extras"]
    distill = extras.distill
    assert isinstance(distill, Distillation)
    assert same(distill.teacher, trained) and not attach.quantizers(distill.teacher) and not distill.teacher.training
    assert (distill.weight, distill.sampled) == (0.25, sampled)
    draws = []
    for epoch in (2, 3, 2):
        extras.on_epoch(epoch, 20 if quant.get("preset") else 4)
        draws.append(distill.generator.integers(1000, size=8).tolist())
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize(
    ("method", "options", "init", "count"), [("lsq", None, "control", 2), ("adaround", {"after": "lsq"}, "checkpoint", 1)]
)
def test_every_training_of_a_recipe_has_the_model_that_was_given_as_its_teacher(
    run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch, method: str, options: Any, init: str, count: int
) -> None:
    """The control that a method starts from, the method itself, and what AdaRound comes after."""
    teachers: list[torch.nn.Module] = []

    class Recorded(Distillation):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            teachers.append(self.teacher)

    monkeypatch.setattr("sasrec.quant.recipe.Distillation", Recorded)
    before = copy.deepcopy(trained)
    make(run, trained, method, options, init=init, distill=0.5, epochs=1)
    assert len(teachers) == count and all(same(teacher, before) for teacher in teachers)


def test_what_adaround_comes_after_is_trained_from_scratch_where_all_is(
    run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quant.preset: source`: for twenty epochs, as without AdaRound, and not from a control for `quant.epochs`."""
    given = begun(monkeypatch, run, trained, "adaround", {"after": "lsq"}, preset="source", epochs=1)
    alone = begun(monkeypatch, run, trained, "lsq", preset="source", epochs=1)
    assert given["params"] == alone["params"] and given["params"].epochs == 20
    assert same(given["model"], alone["model"]) and attach.quantizers(given["model"])


def test_what_does_not_train_is_the_same_from_scratch(run: Run, trained: SASRec) -> None:
    assert same(make(run, trained, "ptq", init="scratch").model, make(run, trained, "ptq").model)


@pytest.mark.parametrize(("method", "lr"), [("apot", 1000.0), ("lsq", 1e12), ("pact", 1e12)])
def test_a_training_that_diverges_says_so(run: Run, trained: SASRec, method: str, lr: float) -> None:
    with pytest.raises(UserError, match="training diverged"):
        make(run, trained, method, {"lr": lr}, epochs=2, bits=4)


@pytest.mark.parametrize(
    ("method", "options"), [("control", None), ("lsq", None), ("ptq", None), ("adaround", {"iterations": 20})]
)
def test_loss_and_ndcg_are_of_the_model_that_remains(run: Run, trained: SASRec, method: str, options: Any) -> None:
    outcome = make(run, trained, method, options, epochs=2)
    task = NextItem(outcome.model, run.train, run.store, CPU)
    loss, _, ndcg = Validation(outcome.model, run.store, run.train, run.seed, task)()
    assert (outcome.loss, outcome.ndcg) == (loss, ndcg)


def test_means_are_taken_out_before_widths_are_chosen(run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quant.centre`: what `quant.budget_kb` is judged on is the model that is quantized."""
    seen: list[float] = []

    def record(model: SASRec, store: Any, quant: QuantParams, histories: Any, *_: Any) -> QuantParams:
        with torch.no_grad():
            inputs = inputs_of(model, [name := "blocks.0.feed_forward.inner"], histories)[name]
        seen.append(float(inputs.mean(0).abs().max()))
        return quant

    monkeypatch.setattr("sasrec.quant.recipe.mixed", record)
    centred, plain = (make(run, trained, "ptq", centre=centre).model for centre in (True, False))
    assert seen[0] < 1e-5 < 0.01 < seen[1] and not same(centred, plain)


def test_calibration_is_on_the_first_training_batches_of_the_seed(trained: SASRec) -> None:
    """Without the two items of each user that are held out."""
    store = SmallStore([[*range(1 + user, 9 + user), 39, 40] for user in range(20)], 40)

    def batches(count: int, seed: int) -> list[Tensor]:
        return [ids(batch) for batch in calibration(store, trained, 4, count, seed, CPU)]

    assert [len(batch) for batch in batches(3, 0)] == [4, 4, 4]
    # Of a user's 8 training items the last is but a target.
    assert max(int(batch.max()) for batch in batches(99, 0)) == 26
    assert not torch.equal(torch.cat(batches(3, 0)), torch.cat(batches(3, 1)))
    assert torch.equal(torch.cat(batches(3, 0)), torch.cat(batches(3, 0)))


def test_only_the_last_phase_may_be_the_best_checkpoint(run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every epoch is worse than the one before, the first one of the last phase is what remains."""
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(Validation, "__call__", lambda self: (1.0, 0.5, next(falling) / 100))
    outcome = make(run, trained, bits=2, delay_epochs=1, progressive=(8,))
    assert outcome.best_epoch == 3 and outcome.ndcg == outcome.rows[3].validation_ndcg
    assert {quantizer.bits for quantizer in attach.quantizers(outcome.model).values()} == {2}


def test_patience_counts_from_the_last_phase(run: Run, trained: SASRec) -> None:
    """An epoch that may not win is no reason to stop: the quantizers would never come in."""
    hasty = dataclasses.replace(run, train=dataclasses.replace(run.train, patience=2))
    outcome = make(hasty, trained, init="scratch", delay_epochs=3)
    assert outcome.best_epoch == 4 and attach.quantizers(outcome.model)


def test_scales_follow_the_weights_in_the_first_quarter_of_a_training_from_scratch(
    run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 epochs: set at the start and anew before the second and the third, from the weights as they are then."""
    renewed: list[int] = []
    renew = attach.renew

    def recorded(model: SASRec, histories: Any) -> None:
        renew(model, histories)
        renewed.append(len(attach.quantizers(model)))
        fresh = copy.deepcopy(model)
        attach.calibrate(fresh, histories)
        table = model.item_table.weight.detach()
        for name, each in attach.quantizers(fresh).items():
            if each.place.kind == "activation":
                assert torch.equal(each.grid().scale, attach.quantizers(model)[name].grid().scale)
        again = copy.deepcopy(attach.quantizers(model)["item_table.weight"])
        again.initialize(table)
        assert torch.equal(again.grid(table).scale, attach.quantizers(model)["item_table.weight"].grid(table).scale)

    monkeypatch.setattr(attach, "renew", recorded)
    long = dataclasses.replace(run, train=dataclasses.replace(run.train, epochs=8))
    make(long, trained, "lsq", init="scratch")
    assert len(renewed) == 2 and all(renewed)
    make(long, trained, "lsq", epochs=8)
    assert len(renewed) == 2  # a trained model is calibrated once


@pytest.mark.parametrize(
    "quant",
    [
        {"delay_epochs": 2}, {"progressive": (8,), "bits": 3}, {"distill": 0.5}, {"dropout": 0.0}, {"init": "control"},
        {"init": "scratch"},
    ],
)  # fmt: skip
def test_a_killed_run_ends_with_the_same_bits(
    run: Run, trained: SASRec, quant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(dataclasses.replace(run, resume=run.resume.with_name("other.safetensors")), trained, **quant)
    epoch, calls = Trainer.epoch, [0]

    def killed(self: Trainer, number: int) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(Trainer, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        make(run, trained, **quant)
    monkeypatch.setattr(Trainer, "epoch", epoch)
    resumed = make(run, trained, **quant)
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_start_from_the_control_is_the_control(run: Run, trained: SASRec) -> None:
    control = make(run, trained, "control")
    assert same(make(run, trained, "ptq", init="control", centre=False).model, control.model)
    assert not same(make(run, trained, "ptq", centre=False).model, control.model)
    started = make(run, trained, "lsq", init="control", epochs=4)
    assert not same(started.model, control.model) and not same(started.model, trained)
    assert not list(run.resume.parent.glob("*control*"))


def test_dropout_of_its_own_for_whatever_trains(run: Run, trained: SASRec) -> None:
    """The control's, too; what does not train stays the model it was, and the model that was given is left as it is."""
    as_the_model = make(run, trained, "control", dropout=trained.params.dropout)
    assert same(as_the_model.model, make(run, trained, "control").model)
    for method in ("control", "lsq"):
        less = make(run, trained, method, dropout=0.0)
        assert not same(less.model, make(run, trained, method).model)
        rates = {module.rate for module in less.model.modules() if isinstance(module, Dropping)}
        assert less.model.params.dropout == 0 and rates == {0}
    assert make(run, trained, "ptq", dropout=0.0).model.params == trained.params
    assert make(run, trained, "lsq", init="scratch", dropout=0.0).model.params.dropout == 0
    assert trained.params.dropout == 0.1


def test_dropout_is_what_the_training_of_the_model_ended_with(run: Run, trained: SASRec) -> None:
    falling = dataclasses.replace(run, train=dataclasses.replace(run.train, final_dropout=0.0))
    for method in ("control", "lsq"):
        assert same(make(falling, trained, method).model, make(run, trained, method, dropout=0.0).model)
        assert same(make(falling, trained, method, dropout=0.05).model, make(run, trained, method, dropout=0.05).model)
        constant = make(run, trained, method, init="scratch", dropout=0.05)
        assert same(make(falling, trained, method, init="scratch", dropout=0.05).model, constant.model)
    scratch = make(falling, trained, "lsq", init="scratch")
    assert scratch.rows != make(run, trained, "lsq", init="scratch").rows  # there it falls again


def test_distillation_is_part_of_every_trained_method_and_the_control(run: Run, trained: SASRec) -> None:
    for method in ("control", "lsq"):
        plain, distilled = (make(run, trained, method, distill=share, lr=0.001).rows[-1] for share in (0.0, 0.9))
        assert plain.train_loss != distilled.train_loss


def test_options_of_what_runs_inside_a_method_are_checked_when_the_section_is_read() -> None:
    """Before anything is trained; the error names the key as it stands in the file."""
    with pytest.raises(UserError, match=r"'methods.adaround.after_options.strat'; did you mean .*after_options.start"):
        attach.load_method("adaround", {"after": "lsq", "after_options": {"strat": "paper"}})


@pytest.mark.parametrize(("method", "options"), [("adaround", {"after": "ste"}), ("pq", {"rest": "ste"})])
def test_the_code_of_what_runs_inside_a_method_is_loaded_with_it(method: str, options: dict[str, str]) -> None:
    """So that a resume file is not taken up by other code (`sasrec.checkpoint.fingerprint`)."""
    code = (
        "import sys, stages.quantize\nfrom sasrec.quant.attach import load_method\n"
        "assert 'sasrec.quant.ste' not in sys.modules\n"
        f"load_method({method!r}, {options!r})\nassert 'sasrec.quant.ste' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_adaround_as_the_last_step_keeps_the_trained_steps(run: Run, trained: SASRec) -> None:
    after = make(run, trained, "adaround", {"after": "lsq", "after_options": {"lr": 0.05}, "iterations": 20})
    lsq = make(run, trained, "lsq", {"lr": 0.05})
    assert same(after.model, lsq.model) and after.best_epoch == lsq.best_epoch
    # What is reported is of the rounded model.
    assert after.ndcg == Trainer(after.model, run.store, run.train, 0, device=CPU).validate()[2]
    rounded, learned = attach.freeze(after.model), attach.freeze(lsq.model)
    for name, quantizer in attach.quantizers(after.model).items():
        assert torch.equal(rounded[name].grid.scale, learned[name].grid.scale)
        is_rounded = quantizer.place.kind == "weight" or name == "item_table.weight"
        assert isinstance(quantizer, AdaRound) == is_rounded
    assert any(
        item.codes is not None and not torch.equal(item.codes, learned[name].codes)  # type: ignore[arg-type]
        for name, item in rounded.items()
    )


def widths(trained: SASRec, **quant: Any) -> dict[str, int]:
    return {name: attach.width(tap.place(name), dataclasses.replace(QUANT, **quant)) for name, tap in taps(trained).items()}


def test_presets(trained: SASRec) -> None:
    paper = widths(trained, bits=2, preset="paper", overrides={"blocks.0.output": 6})
    stream = {"embedding", "blocks.1.output", "final"}
    assert {name for name, bits in paper.items() if bits == 8} == {"item_table.weight", "position_table.weight", *stream}
    assert paper.pop("blocks.0.output") == 6 and set(paper.values()) == {2, 8}
    assert widths(trained, bits=2, preset="paper", embedding_bits=4)["item_table.weight"] == 4
    source = widths(trained, bits=8, preset="source")
    assert {name for name, bits in source.items() if bits == 8} == {"embedding", "blocks.0.output", "blocks.1.output", "final"}
    assert set(source.values()) == {8, 32}


def test_the_source_study_trains_untied_from_scratch(run: Run, trained: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sasrec.quant.schedule.SOURCE_EPOCHS", 2)
    outcomes = {method: make(run, trained, method, preset="source", bits=8) for method in ("control", "lsq", "ptq")}
    for outcome in outcomes.values():
        assert outcome.model.output_table is not None and not outcome.model.params.tied
    assert [len(outcome.rows) for outcome in outcomes.values()] == [3, 3, 1]
    # What is rounded after training is the model that was trained the same way.
    assert same(outcomes["ptq"].model, outcomes["control"].model)
    assert len(attach.quantizers(outcomes["lsq"].model)) == 4


def test_an_untied_model_is_saved_as_such_with_the_card_of_the_tied_one(run: Run, trained: SASRec, tmp_path: Path) -> None:
    save_model(tmp_path / "tied", trained, trained.state_dict(), {"z": 1})
    _, card = load_model(tmp_path / "tied")
    own = untrained(trained, tied=False)
    save_model(tmp_path / "own", own, own.state_dict(), card)
    again, card = load_model(tmp_path / "own")
    assert not again.params.tied and card["z"] == 1 and same(again, own)
