"""More details of the methods that decide what is learned, and that a wrong version would get past the other tests with."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams, QuantParams
from sasrec.data.batches import epoch_batches
from sasrec.deploy.form import Factors
from sasrec.deploy.simulation import Agreement, integer_product
from sasrec.deploy.storage import Storage
from sasrec.distillation import Distillation
from sasrec.models.cafe import CAFE
from sasrec.models.events import ids
from sasrec.models.registry import untrained
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Place
from sasrec.quant import attach, pq, ptq
from sasrec.quant.adaround import AdaRound, Options, reconstruct, take_over
from sasrec.quant.calibration import calibration
from sasrec.quant.centring import centre
from sasrec.quant.dorefa import quantize_gradient
from sasrec.quant.features import PerFeature
from sasrec.quant.frozen import FrozenTensor
from sasrec.quant.grid import Grid
from sasrec.quant.layers import STATES, inputs_of
from sasrec.quant.lsq import BinaryLSQ, offset_start
from sasrec.quant.pact import PACT, LearnedClip
from sasrec.quant.quantizer import Quantizer, mse_scale
from sasrec.quant.recipe import Run, quantize
from sasrec.quant.schedule import Schedule, phases
from sasrec.quant.sensitivity import Cost, Validation, front, measure
from tests.quant.conftest import CPU, QUANT, TRAIN, same, walks

Build = Callable[..., Quantizer]
HISTORIES = [torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])]


def of_stream(method: str, bits: int, values: Tensor, **options: Any) -> PerFeature:
    module, chosen = attach.load_method(method, options)
    quantizer = PerFeature(module.build(Place("x", "activation", True, values.shape[1], stream=True), bits, False, chosen))
    quantizer.initialize(values)
    return quantizer


# Starts


def test_a_scale_is_the_best_for_the_levels_that_it_gives() -> None:
    """s = sum x q / sum q^2, to which no search in steps of 2 % comes as near."""
    x = torch.randn(200, 16)
    scale = mse_scale(x, -2, 1, True)
    levels = (x / scale).round().clamp(-2, 1)
    best = (x * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
    assert float(((scale / best - 1).abs() < 1e-5).float().mean()) > 0.9


def later(number: int) -> Tensor:
    """(400,) in 0..1: draws on which both faults that the next two tests are about show."""
    generator = torch.Generator().manual_seed(number)
    torch.randn(400, generator=generator)
    return torch.rand(400, generator=generator)


def squared_error(values: Tensor, step: Tensor, low: int, high: int) -> float:
    return float(((values / step).round().clamp(low, high) * step - values).square().sum())


def test_the_offset_starts_at_the_best_zero_point() -> None:
    """Against every other one, each with the best step for it."""
    values = later(0) * 3 - 0.4
    step, zero = offset_start(values, -4, 3)
    ends = [(zero - 4, zero + 3) for zero in range(-2, 5)]
    least = min(squared_error(values, mse_scale(values, low, high, False), low, high) for low, high in ends)
    assert squared_error(values, step, int(zero) - 4, int(zero) + 3) < 1.02 * least


def test_an_offset_starts_no_worse_than_none() -> None:
    """Of values as far under 0 as over it a pair of ends that was tried may say 1, with a step that is not the best for 0."""
    values = later(0) * 2 - 1
    step, zero = offset_start(values, -8, 7)
    plain = squared_error(values, mse_scale(values, -8, 7, False), -8, 7)
    assert squared_error(values, step, int(zero) - 8, int(zero) + 7) <= plain * (1 + 1e-6)


# PACT


def test_what_lies_at_an_end_of_the_clip_is_clipped_whatever_alpha_is() -> None:
    """d/dalpha is 1 at alpha, which alpha / Qp times Qp may miss by its last bit, and low / high at the other end."""
    for alpha in torch.rand(100) + 0.5:
        leaf = alpha.clone().requires_grad_()
        x = torch.stack([alpha, alpha / 7 * -8]).requires_grad_()
        (LearnedClip.apply(x, leaf, -8, 7) * torch.tensor([1.0, 10.0])).sum().backward()
        assert leaf.grad is not None and float(leaf.grad) == pytest.approx(1 - 10 * 8 / 7)
        assert x.grad is not None and x.grad.tolist() == [0, 0]


# DoReFa


def test_the_gradient_goes_back_through_the_clip_before_it_is_quantized(build: Build) -> None:
    """Algorithm 1 of DoReFa: clipped values pass nothing on, and do not count in the largest magnitude either."""
    quantizer = build("dorefa", 4, values=torch.linspace(-1, 1, 100), gradient_bits=2).train()
    x, towards = torch.full((2, 1, 4), 0.1), torch.rand(2, 1, 4) * 0.1
    x[0, 0, 0], towards[0, 0, 0] = 9.0, 5.0
    quantizer.start_epoch(0, 1, 3)
    (found,) = torch.autograd.grad(quantizer(leaf := x.requires_grad_()), leaf, towards)
    quantizer.start_epoch(0, 1, 3)
    torch.testing.assert_close(found, quantize_gradient(towards * (x < 1), 2, quantizer.generator))


def test_gradients_are_quantized_in_training_alone(build: Build) -> None:
    quantizer = build("dorefa", 4, values=torch.linspace(-1, 1, 100), gradient_bits=2).eval()
    x, towards = torch.full((2, 1, 4), 0.1, requires_grad=True), torch.rand(2, 1, 4)
    assert torch.equal(torch.autograd.grad(quantizer(x), x, towards)[0], towards)


# AdaRound


def test_a_table_of_one_bit_keeps_its_learned_signs_and_scales(quantized: Callable[..., SASRec]) -> None:
    live = quantized("lsq", 8, embedding_bits=1)
    before = live.item_table.all().detach().clone()
    take_over(live)
    found = attach.quantizers(live)
    assert isinstance(found["item_table.weight"], BinaryLSQ) and torch.equal(live.item_table.all(), before)
    assert isinstance(found["blocks.0.attention.query.weight"], AdaRound)


def test_each_scoring_table_learns_on_its_part_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CaFe the items' on the first half, the intents' on the second."""
    model = CAFE(ModelParams(max_len=8, hidden=16, kind="cafe"), torch.tensor([0, *(i % 3 + 1 for i in range(60))])).eval()
    histories = [torch.randint(1, 61, (4, 6))]
    with torch.no_grad():
        states = inputs_of(model, [], histories)[STATES]
    attach.attach(model, QuantParams(bits=8), *attach.load_method("adaround", None))
    attach.calibrate(model, histories)
    found: dict[int, tuple[Tensor, int]] = {}

    def noted(weight: Tensor, bias: Any, quantizer: Any, full: Tensor, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        now = inputs_of(model, [], histories)[STATES].detach()
        begin = next((i for i in (0, 16) if torch.equal(inputs, now[:, i : i + 16])), -1)
        found[weight.data_ptr()] = full, begin
        return torch.zeros_like(weight)

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", noted)
    reconstruct(model, histories, Options(), seed=0)
    for part in model.scoring_parts:
        full, begin = found[part.table.weight.data_ptr()]
        assert begin == part.columns.start and torch.equal(full, states[:, part.columns])


def test_every_layer_learns_on_all_batches(quantized: Callable[..., SASRec], monkeypatch: pytest.MonkeyPatch) -> None:
    live, batches = quantized("adaround", 4), [torch.randint(1, 61, (4, 6)) for _ in range(3)]
    sizes: set[tuple[int, int]] = set()

    def noted(weight: Tensor, bias: Any, quantizer: Any, full: Tensor, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        sizes.add((len(full), len(inputs)))
        return torch.zeros_like(weight)

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", noted)
    reconstruct(live, batches, Options(), seed=0)
    assert sizes == {(72, 72)}


# What is taken from data


@pytest.mark.parametrize("work", ["calibrate", "centre", "correct", "measure"])
def test_several_batches_are_as_one_of_all(trained: SASRec, work: str) -> None:
    histories = torch.randint(1, 41, (8, 6))
    histories[0, :3] = 0
    validation = Validation(walks(), trained.params.max_len, CPU, users=5)
    found: list[Any] = []
    for batches in ([histories], [histories[:4], histories[4:]]):
        model = copy.deepcopy(trained)
        if work == "centre":
            centre(model, batches)
        elif work == "measure":
            found.append([cost.rise for cost in measure(model, validation, QUANT, batches, (2,), ("activation",))[1]])
            continue
        else:
            attach.attach(model, QUANT, *attach.load_method("ptq", {"range": "minmax"}))
            attach.calibrate(model, [histories] if work == "correct" else batches)
            if work == "correct":
                ptq.correct_biases(model, batches)
        found.append(list(model.state_dict().values()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# Stochastic rounding


def test_chance_is_drawn_for_every_number_alone(build: Build) -> None:
    """Rows that are rounded by the same draws have errors that do not cancel in their sum."""
    values = torch.randn(50, 16)
    quantizer = build("ste", 4, "table", values=values)
    quantizer.stochastic = True
    noise = quantizer.train().noise(values)
    assert noise is not None and len(noise.unique()) > 0.99 * values.numel()


def test_what_draws_behind_units_of_features_draws() -> None:
    """Steps that draw cannot be captured."""
    values = torch.randn(50, 3)
    assert attach.draw([of_stream("dorefa", 4, values, gradient_bits=2)])
    assert not attach.draw([of_stream("dorefa", 4, values)])


def test_what_is_drawn_to_set_scales_moves_no_other_draw(build: Build) -> None:
    """A run with quantizers sees the negatives and the dropout of the control."""
    before = torch.get_rng_state()
    samples = []
    for _ in range(2):
        recorder = attach.Recorder()
        recorder(torch.arange(60_000.0))
        samples.append(recorder.sample())
    assert torch.equal(*samples)
    build("lsq", 3, values=torch.linspace(-1, 2, 30_000), offset=True)
    assert torch.equal(torch.get_rng_state(), before)


# When


def test_epochs_that_phases_do_not_divide_are_shared_evenly() -> None:
    quant = replace(QUANT, progressive=(8, 4), bits=2)
    assert [phase.start for phase in phases(quant, 5)] == [0, 1, 3]
    assert [phase.start for phase in phases(replace(quant, delay_epochs=1), 9)] == [0, 1, 3, 6]


def test_a_killed_run_is_loaded_into_the_quantizers_that_it_was_saved_with(trained: SASRec) -> None:
    """After the last epoch of a phase those of the next are not there yet."""
    quant, model = replace(QUANT, bits=2, progressive=(8,)), copy.deepcopy(trained)
    extras, found = Schedule(model, quant, *attach.load_method("lsq", None), HISTORIES, 4).extras(0), []
    for done in range(5):
        extras.on_resume(done)
        found.append(attach.quantizers(model)["final"].bits)
    assert found == [8, 8, 8, 2, 2]


def test_the_decay_is_of_the_clips_that_compute_now(trained: SASRec) -> None:
    quant, model = replace(QUANT, bits=2, progressive=(8,)), copy.deepcopy(trained)
    schedule = Schedule(model, quant, *attach.load_method("pact", {"decay": 1.0}), HISTORIES, 4)
    extras = schedule.extras(0)
    for epoch, number in ((0, 0), (2, 1)):
        extras.on_epoch(epoch, 4)
        clips = [each.method for each in schedule.built[number].values() if isinstance(each.method, PACT)]
        penalty = extras.penalty()
        assert clips and penalty is not None
        torch.testing.assert_close(penalty, torch.stack([(2 * clip.log_alpha).exp() for clip in clips]).sum())


@pytest.mark.parametrize(
    ("quant", "epochs", "settling"), [({"init": "scratch"}, 6, 2), ({"init": "scratch"}, 3, 1), ({"init": "checkpoint"}, 6, 0)]
)
def test_scales_settle_in_a_quarter_of_the_epochs_rounded_up(
    trained: SASRec, quant: dict[str, Any], epochs: int, settling: int
) -> None:
    method, options = attach.load_method("ste", None)
    assert Schedule(copy.deepcopy(trained), replace(QUANT, **quant), method, options, HISTORIES, epochs).settling == settling


def test_draws_of_a_later_phase_count_from_the_start(trained: SASRec) -> None:
    quant, model = replace(QUANT, delay_epochs=1, table_rounding="stochastic"), copy.deepcopy(trained)
    extras = Schedule(model, quant, *attach.load_method("ste", None), HISTORIES, 4).extras(0)
    assert not attach.quantizers(model) and extras.draws


def test_calibration_is_on_an_epoch_that_no_training_has(trained: SASRec) -> None:
    """Training begins with epoch 1."""
    store, size = walks(), 4
    found = [ids(batch) for batch in calibration(store, trained, size, 3, 5, CPU)]
    drawn = {}
    for epoch in (0, 1):
        batches = epoch_batches(store, trained.params.max_len, size, False, 5, epoch, "shuffled").batches
        drawn[epoch] = [torch.from_numpy(batch.histories) for batch, _ in zip(batches, range(3), strict=False)]
    assert all(map(torch.equal, found, drawn[0])) and not all(map(torch.equal, found, drawn[1]))


def test_a_shared_scale_of_one_bit_is_saved(quantized: Callable[..., SASRec]) -> None:
    """A resumed run computes with the statistics of the last refresh, not with those it was built from."""
    live = quantized("ste", 8, embedding_bits=1, table="per_tensor")
    saved = {name: 2 * tensor if name.endswith("shared_scale") else tensor for name, tensor in live.state_dict().items()}
    table = live.item_table.all().detach()
    live.load_state_dict(saved)
    assert torch.equal(live.item_table.all(), 2 * table)


@pytest.mark.parametrize(("quant", "count"), [({"init": "scratch"}, 0), ({"preset": "source"}, 0), ({}, 1)])
def test_what_begins_untrained_is_not_centred(
    trained: SASRec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: dict[str, Any], count: int
) -> None:
    """Its means are those of chance."""
    seen: list[Any] = []
    monkeypatch.setattr("sasrec.quant.recipe.centre", lambda *given: seen.append(given))
    monkeypatch.setattr("sasrec.quant.recipe.Trainer", lambda *_, **__: None)
    run = Run(walks(), replace(QUANT, centre=True, **quant), TRAIN, 0, CPU, tmp_path / "resume", "key", lambda line: None)
    with pytest.raises(AttributeError):  # nothing is trained
        quantize(run, trained, "ste", None)
    assert len(seen) == count


def test_a_run_draws_everything_from_its_seed(trained: SASRec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[str, int] = {}
    begun: list[Any] = []

    def noted(plain: Any, place: int) -> Any:
        def call(*given: Any) -> Any:
            seeds[plain.__qualname__] = given[place]
            return plain(*given)

        return call

    monkeypatch.setattr("sasrec.quant.recipe.calibration", noted(calibration, 4))
    monkeypatch.setattr("sasrec.quant.recipe.Distillation", noted(Distillation, 4))
    monkeypatch.setattr(Schedule, "extras", noted(Schedule.extras, 1))
    monkeypatch.setattr(pq, "prepare", noted(pq.prepare, 2))
    monkeypatch.setattr(ptq, "reconstruct", noted(ptq.reconstruct, 3))
    run = Run(walks(), replace(QUANT, distill=0.5), TRAIN, 7, CPU, tmp_path / "resume", "key", lambda line: None)
    quantize(run, trained, "ptq", {"bias_correction": True})
    monkeypatch.setattr("sasrec.quant.recipe.Trainer", lambda model, *_, **__: begun.append(model))
    for own, method, options in (
        (run, "pq", {"splits": 4, "centroids": 8}),
        (replace(run, quant=replace(QUANT, init="scratch")), "ste", None),
    ):
        with pytest.raises(AttributeError):  # nothing is trained
            quantize(own, trained, method, options)
    assert seeds == dict.fromkeys(("calibration", "Distillation", "Schedule.extras", "prepare", "reconstruct"), 7)
    torch.manual_seed(7)
    assert same(begun[-1], untrained(trained))


# Widths


def test_of_two_widths_that_lose_the_same_the_narrower_is_kept() -> None:
    """A tensor that gains by being rounded counts as one that loses nothing."""
    costs = [Cost("a", "weight", bits, 10 * bits, rise) for bits, rise in ((2, 0.1), (4, -0.2), (8, 0.0))]
    assert front(costs) == [(20, 0.1, {"a": 2}), (40, 0.0, {"a": 4})]


# Distillation


def test_items_drawn_for_the_teacher_are_those_of_the_seed_and_the_epoch(trained: SASRec) -> None:
    draws = []
    for seed, epoch in ((0, 1), (1, 1), (0, 2), (0, 1)):
        taught = Distillation(trained, trained, 0.5, 5, seed)
        taught.start_epoch(epoch)
        draws.append(taught.generator.integers(10**9, size=4).tolist())
    assert draws[0] == draws[3] and len({tuple(draw) for draw in draws}) == 3


# Shipping


def test_products_are_of_the_integers_that_values_stand_for() -> None:
    """(k s) / s is not always k in floating point."""
    for _ in range(20):
        scale, levels = torch.rand(()) + 0.01, torch.randint(-128, 128, (4, 64)).float()
        weight = Factors(torch.randint(-7, 8, (5, 64)).float(), torch.rand(5, 1), None)
        wanted = (levels @ weight.integers.T) * (scale * weight.scale.flatten())
        assert torch.equal(integer_product(levels * scale, scale, weight), wanted)


def test_an_agreement_is_of_all_users_that_were_added_and_of_items_alone() -> None:
    """The largest differences are those of any batch; the padding's score, in column 0, is nothing to recommend."""
    grid = Grid.uniform(4, -8, 7, torch.tensor(0.5))
    apart = iter((3, 1))
    scores = torch.arange(12.0).expand(2, 12).clone()
    other = scores.clone()
    other[:, 0] = 99.0
    swapped = other.clone()
    swapped[0, [5, 6]] = swapped[0, [6, 5]]
    found = iter((other, swapped))

    def encode(*_: Any) -> Any:
        codes = torch.full((2, 1, 4), 128, dtype=torch.uint8)
        codes[1, 0, 2] += next(apart)
        return codes.numpy()

    artefact = SimpleNamespace(encode=encode, scores_of=lambda states: next(found).numpy())
    simulation = SimpleNamespace(
        frozen={"final": FrozenTensor(grid, None)}, encode=lambda part: torch.zeros(2, 1, 4), scores=lambda states: scores
    )
    agreement: Any = Agreement(simulation, artefact)  # type: ignore[arg-type]
    for _ in range(2):
        agreement.exported(torch.ones(2, 3, dtype=torch.long))
        agreement.simulated(torch.ones(2, 3, dtype=torch.long))
    assert (agreement.steps, agreement.difference) == (3, 1.5)
    assert agreement.summary() == {
        "users": 4, "steps": 3, "difference": 1.5, "same_elements": 14 / 16, "same_top10": 3 / 4,
    }  # fmt: skip


@pytest.mark.parametrize(("shift", "count"), [(0.0, 4), (0.5, 8)])
def test_shifts_of_rows_are_stored_beside_their_scales(shift: float, count: int) -> None:
    storage = Storage()
    storage.describe("x", "weight", (4, 8), Grid.uniform(4, -7, 7, torch.ones(4, 1), torch.full((4, 1), shift)), "int8")
    assert storage.tensors["x"]["scales"]["count"] == count
