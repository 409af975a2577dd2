"""Details of the methods that decide what is learned, and that a wrong version would get past the other tests with."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec import distillation
from sasrec.config import QuantParams
from sasrec.distillation import Distillation, SoftCrossEntropy
from sasrec.losses import Result
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Place, taps
from sasrec.quant import attach, pq
from sasrec.quant.adaround import Options, learn_rounding, reconstruct
from sasrec.quant.quantizer import mse_scale
from sasrec.quant.schedule import narrowed


def made(
    method: str, bits: int, kind: Any, values: Tensor, *, signed: bool = True, per_row: bool = True, **options: Any
) -> Any:
    """As `build` of the fixtures, but of one bit, too."""
    module, chosen = attach.load_method(method, options)
    rows = values.shape[0] if kind != "activation" else 0
    place = Place("x", kind, signed, values.shape[-1] if values.dim() > 1 else 8, rows, True)
    quantizer = attach.build_one(place, bits, per_row, module, chosen)
    assert quantizer is not None
    quantizer.initialize(values)
    return quantizer


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# LSQ, APoT


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradient_scale_of_unsigned_steps_has_their_largest_level(bits: int) -> None:
    """LSQ, section 2.2: g = 1 / sqrt(N Qp), and Qp of unsigned values is 2^b - 1."""
    quantizer = made("lsq", bits, "activation", torch.rand(192), signed=False)
    assert quantizer.gradient_scale == pytest.approx((8 * (2**bits - 1)) ** -0.5)


@pytest.mark.parametrize(("method", "bits"), [("lsq", 4), ("lsq", 1), ("apot", 4)])
@pytest.mark.parametrize("per_row", [True, False])
def test_looked_up_rows_teach_what_the_whole_table_does(method: str, bits: int, per_row: bool) -> None:
    values = torch.randn(9, 16)
    quantizer = made(method, bits, "table", values, per_row=per_row)
    (own,) = quantizer.parameters()
    ids, towards = torch.tensor([[3, 5], [3, 0]]), torch.randn(2, 2, 16)
    (whole,) = torch.autograd.grad((quantizer(values)[ids] * towards).sum(), own)
    (rows,) = torch.autograd.grad((quantizer(values[ids], ids) * towards).sum(), own)
    assert whole.any()
    torch.testing.assert_close(rows, whole)


def test_the_sign_that_was_drawn_teaches_the_step() -> None:
    values, towards = torch.randn(8, 16) * 0.3, torch.randn(8, 16)
    quantizer = made("lsq", 1, "table", values)
    quantizer.stochastic = True
    quantizer.train().start_epoch(0, 1, 0)
    out = quantizer(values)
    out.backward(towards)
    assert not torch.equal(out.detach().sign(), values.sign())
    torch.testing.assert_close(quantizer.log_step.grad, (towards * out.detach()).sum(1, keepdim=True) * 16**-0.5)


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_the_border_of_a_sign_passes_the_gradient(method: str) -> None:
    weights = torch.tensor([[1.0, -1.0, 1.0001]], requires_grad=True)
    quantizer = made(method, 1, "table", weights.detach())
    assert torch.autograd.grad(quantizer(weights).sum(), weights)[0].tolist() == [[1, 1, 0]]


def test_rows_of_a_table_are_normalised_by_their_root_mean_square() -> None:
    """APoT takes the mean off weights, but not off a table, whose rows it would shift."""
    values = torch.randn(8, 32) + 2
    deviation = made("apot", 4, "table", values)._moments(values)[1]
    torch.testing.assert_close(deviation, values.square().mean(1, keepdim=True).sqrt())


# Stochastic rounding


@pytest.mark.parametrize(
    ("method", "options", "bits"),
    [
        ("ste", {}, 1),
        ("lsq", {}, 1),
        ("ste", {}, 4),
        ("lsq", {}, 4),
        ("pact", {"weights": "sawb"}, 4),
        ("dorefa", {"grid": "paper"}, 4),
        ("dorefa", {"grid": "zero"}, 4),
        ("apot", {}, 4),
    ],
)
def test_noise_has_no_mean(method: str, options: dict[str, Any], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise that goes evenly from 0 to 1 in place of chance, the mean is the value, but for one part."""
    values = torch.randn(6, 16)
    quantizer = made(method, bits, "table", values, **options)
    quantizer.stochastic = True
    quantizer.train()
    parts, total = 200, torch.zeros_like(values)
    for i in range(parts):
        monkeypatch.setattr(quantizer, "noise", lambda x, u=(i + 0.5) / parts: torch.full_like(x, u))
        total += quantizer(values).detach()
    grid = quantizer.grid(values)
    levels = grid.levels * grid.scale + grid.shift
    value = (values / quantizer.unit).tanh() * quantizer.unit if method == "dorefa" else values
    clipped = value.clamp(levels.amin(1, keepdim=True), levels.amax(1, keepdim=True))
    gap = (levels[:, 1:] - levels[:, :-1]).amax(1, keepdim=True)
    assert ((total / parts - clipped).abs() <= gap * 1.01 / parts).all()


def test_gradient_noise_of_dorefa_is_that_of_the_seed() -> None:
    draws = []
    for number in (0, 1, 0):
        quantizer = made("dorefa", 8, "activation", torch.linspace(-2, 2, 100), gradient_bits=3).train()
        quantizer.start_epoch(0, 3, seed=number)
        x = torch.full((4, 6, 8), 0.1, requires_grad=True)
        quantizer(x).backward(torch.linspace(-1, 1, 192).view(4, 6, 8))
        draws.append(x.grad)
    assert draws[0] is not None and draws[1] is not None and draws[2] is not None
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


# Widths and scales


def test_narrower_phases_leave_wider_tensors_as_they_are(model: SASRec) -> None:
    quant = QuantParams(bits=2, embedding_bits=8, overrides={"final": 32}, progressive=(4,))
    found = narrowed(model, quant, 4)
    widths = {name: attach.width(tap.place(name), found) for name, tap in taps(model).items()}
    assert widths["item_table.weight"] == 8 and widths["final"] == 32 and set(widths.values()) == {4, 8, 32}


def test_scales_of_rows_do_not_depend_on_where_a_large_table_is_cut() -> None:
    values = torch.randn(3000, 100) * torch.logspace(-2, 2, 3000)[:, None]
    whole = mse_scale(values, -8, 7, True)
    for row in (0, 1500, 2700):
        torch.testing.assert_close(whole[row], mse_scale(values[row : row + 1], -8, 7, True)[0])


def test_one_outlier_does_not_set_the_scale() -> None:
    values = torch.cat([torch.randn(500_000), torch.tensor([60.0])])

    def error(scale: Tensor) -> float:
        return float(((values / scale).round().clamp(-1, 1) * scale - values).square().mean())

    assert error(mse_scale(values, -1, 1, False)) < 1.01 * min(error(torch.tensor(0.02 * i)) for i in range(25, 150))


# Product quantization


def test_the_first_centroids_are_drawn_by_squared_distances() -> None:
    """k-means++."""
    rows = torch.cat([torch.zeros(1000, 1), torch.tensor([[100.0], [200.0]])]).double()
    for number in range(20):
        assert sorted(pq.spread(rows, 3, seed(number)).flatten().tolist()) == [0, 100, 200]
    rows = torch.tensor([0.0, 1.0, 10.0]).double().repeat_interleave(50)[:, None]
    pairs = [pq.spread(rows, 2, seed(number)).flatten().tolist() for number in range(400)]
    after_zero = [second for first, second in pairs if first == 0]
    assert after_zero.count(1.0) / len(after_zero) < 0.04  # 1 to 100 by squares, 1 to 10 by distances


def test_pq_is_given_the_seed() -> None:
    assert pq.prepare(pq.Options(), None, 7).seed == 7


def test_noise_that_parts_equal_components_is_far_below_their_range() -> None:
    assert pq.NOISE <= 1e-4


# Distillation


def test_parts_of_the_positions_have_their_own_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    states, table, wanted, wanted_table = torch.randn(7, 5), torch.randn(11, 5), torch.randn(7, 3), torch.randn(11, 3)
    found = []
    for elements in (10**6, 2 * 11):
        monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", elements)
        own, rows = states.clone().requires_grad_(), table.clone().requires_grad_()
        loss = SoftCrossEntropy.apply(own, rows, wanted, wanted_table, 1)
        found.append([loss.detach(), *torch.autograd.grad(loss, (own, rows))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("sampled", [None, 5])
def test_the_teacher_teaches_the_table(model: SASRec, sampled: int | None) -> None:
    taught = Distillation(copy.deepcopy(model), model, 1.0, sampled, 0)
    with torch.no_grad():
        model.item_table.weight[1:].mul_(1.3)
    histories, zero = torch.tensor([[1, 2, 3, 9, 8, 7]]), torch.tensor(0.0)
    states = model.encode(histories).detach()  # so that the table learns by the scores alone
    result = taught(Result(zero, zero), states, histories, None, torch.arange(6), np.arange(11, 17))
    (gradient,) = torch.autograd.grad(result.loss, model.item_table.weight)
    assert gradient[11:17].any(1).all() and not gradient[0].any()


def test_every_item_but_padding_is_drawn_for_the_teacher(model: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    taught, seen, lookup = Distillation(model, model, 1.0, 2000, 0), set(), model.item_table.lookup

    def noted(ids: Tensor) -> Tensor:
        seen.update(ids.tolist())
        return lookup(ids)

    histories, zero = torch.tensor([[1, 2, 3]]), torch.tensor(0.0)
    states = model.encode(histories)
    monkeypatch.setattr(model.item_table, "lookup", noted)
    taught(Result(zero, zero), states, histories, None, torch.arange(3), np.array([1, 2, 3]))
    assert seen == set(range(1, 61))


# AdaRound


def test_rounding_is_learned_with_the_samples_and_the_seed_that_are_asked_for(
    quantized: Callable[..., SASRec], histories: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, sizes, draws = quantized("adaround", 4), [], []

    def noted(
        weight: Tensor, bias: Any, quantizer: Any, full: Any, inputs: Tensor, options: Any, generator: torch.Generator, **_: Any
    ) -> Tensor:
        sizes.append(len(inputs))
        draws.append(int(torch.randint(10**9, (), generator=generator)))
        return torch.zeros_like(weight)

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", noted)
    for number in (0, 1):
        reconstruct(live, [histories], Options(samples=11), seed=number)
    half = len(draws) // 2
    assert half and draws[:half] != draws[half:]
    assert max(sizes) < int((histories != 0).sum()) / 2


def test_each_iteration_draws_so_many_positions_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, asked, plain = torch.randn(16, 24), torch.randn(600, 24), [], torch.randint

    def noted(*arguments: Any, **options: Any) -> Tensor:
        asked.append(plain(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(torch, "randint", noted)
    options = Options(iterations=50, positions=7)
    learn_rounding(weight, None, made("adaround", 4, "weight", weight), inputs, inputs, options, seed(0))
    assert len(asked) == 50 and all(len(each) == 7 for each in asked) and max(int(each.max()) for each in asked) > 500


def test_the_error_of_a_table_itself_is_in_a_unit_of_its_own() -> None:
    """So that inputs a thousand times as large change nothing."""
    weight, inputs = torch.randn(16, 24), torch.randn(600, 6) @ torch.randn(6, 24)
    quantizer = made("adaround", 4, "weight", weight)
    found = [
        learn_rounding(
            weight, None, quantizer, factor * inputs, factor * inputs, Options(iterations=100), seed(0), looked_up=True
        )
        >= 0.5
        for factor in (1.0, 1024.0)
    ]
    assert torch.equal(*found)
