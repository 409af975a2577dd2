"""LSQ beside the paper: equations 1 to 5, the gradient scale, both starts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sasrec.models.taps import Place
from sasrec.quant.lsq import LSQ, BinaryLSQ, LearnedOffset, LearnedSign, LearnedStep, offset_start
from sasrec.quant.quantizer import Quantizer

Build = Callable[..., Quantizer]


def test_step_gradient_by_hand() -> None:
    """Equation 3 on a 2-bit signed grid {-2, -1, 0, 1} with s = 0.5."""
    v = torch.tensor([-1.3, -1.0, -0.6, 0.1, 0.2, 0.5, 0.9], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    out = LearnedStep.apply(v, step, -2, 1, 1.0)
    assert out.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.0, 0.5, 0.5]
    expected = [-2.0, -2.0, -1 + 1.2, 0 - 0.2, 0 - 0.4, 1.0, 1.0]
    for i, wanted in enumerate(expected):
        (gradient,) = torch.autograd.grad(out[i], step, retain_graph=True)
        assert float(gradient) == pytest.approx(wanted, abs=1e-6)
    (to_v,) = torch.autograd.grad(out.sum(), v)
    assert to_v.tolist() == [0, 0, 1, 1, 1, 0, 0]  # equation 5: 0 at the ends, too


@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_step_gradient_by_finite_differences(shape: tuple[int, ...]) -> None:
    """With the residual of the rounding held fixed, v_hat = s (v/s + residual) is smooth in s, and s Qp beyond the ends."""
    v = torch.randn(6, 40, dtype=torch.float64)
    step = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(v)
    (LearnedStep.apply(v, step, -4, 3, 1.0) * weights).sum().backward()
    scaled = v / step.detach()
    inside = (scaled > -4) & (scaled < 3)
    residual = scaled.round() - scaled

    def smooth(s: Tensor) -> Tensor:
        terms = torch.where(inside, v / s + residual, scaled.clamp(-4, 3)) * s * weights
        return terms.sum() if not shape else terms.sum(1, keepdim=True)

    small = 1e-6
    assert step.grad is not None
    numeric = (smooth(step.detach() + small) - smooth(step.detach() - small)) / (2 * small)
    torch.testing.assert_close(step.grad, numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "per_row", "elements"),
    [("activation", False, 24), ("weight", True, 24), ("table", True, 24), ("table", False, 8 * 24)],
)
def test_gradient_scale(build: Build, kind: str, per_row: bool, elements: int) -> None:
    """g = 1 / sqrt(N Qp): the gradient of the step is that of equation 3 times g. N: one token, one row, or the table."""
    values = torch.randn(8, 24)
    quantizer = build("lsq", 4, kind, values=values, per_row=per_row)
    assert isinstance(quantizer, LSQ)
    quantizer(values).sum().backward()
    step = quantizer.log_step.detach().exp().requires_grad_()
    LearnedStep.apply(values, step, -8, 7, 1.0).sum().backward()
    assert step.grad is not None and quantizer.log_step.grad is not None
    wanted = step.grad * step.detach() / (elements * 7) ** 0.5  # d/dlog s = s d/ds
    torch.testing.assert_close(quantizer.log_step.grad, wanted, rtol=1e-4, atol=1e-5)


def test_starts(build: Build) -> None:
    values = torch.randn(8, 64)
    paper = build("lsq", 4, "weight", values=values, start="paper").grid().scale
    torch.testing.assert_close(paper, 2 * values.abs().mean(1, keepdim=True) / 7**0.5)
    mse = build("lsq", 4, "weight", values=values).grid().scale
    torch.testing.assert_close(mse, build("ptq", 4, "weight", values=values).grid().scale)


def test_rate_is_relative_to_the_step(build: Build) -> None:
    """A step of Adam changes a large and a small step by the same share."""
    for size in (1e-4, 1e4):
        values = torch.randn(64) * size
        quantizer = build("lsq", 4, values=values)
        before = quantizer.grid().scale
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
        ((quantizer(values) / size) ** 2).mean().backward()
        optimizer.step()
        assert float(quantizer.grid().scale / before) == pytest.approx(0.99, rel=1e-3)


@pytest.mark.parametrize("zero", [1, torch.tensor(1.0)], ids=["number", "tensor"])
def test_offset_gradient_by_hand(zero: int | Tensor) -> None:
    """LSQ+ on {-2, -1, 0, 1} + zero point 1, s = 0.5, so beta = 0.5 and levels -0.5, 0, 0.5, 1: d/dbeta is 0 inside and 1 at
    the ends and beyond; d/ds is round((v - beta)/s) - (v - beta)/s inside, -Qn or Qp beyond."""
    v = torch.tensor([-1.3, -0.5, -0.1, 0.1, 0.6, 1.0, 1.9], requires_grad=True)
    step, beta = torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    out = LearnedOffset.apply(v, step, beta, zero, -2, 1, 1.0)  # a tensor on a GPU
    assert out.tolist() == [-0.5, -0.5, 0, 0, 0.5, 1, 1]
    wanted: dict[str, list[float]] = {
        "step": [-2, -2, -1 + 1.2, -1 + 0.8, 0 - 0.2, 1, 1],
        "beta": [1, 1, 0, 0, 0, 1, 1],
        "v": [0, 0, 1, 1, 1, 0, 0],
    }
    for i in range(len(v)):
        gradients = torch.autograd.grad(out[i], (step, beta, v), retain_graph=True)
        found = [float(gradients[0]), float(gradients[1]), float(gradients[2][i])]
        assert found == pytest.approx([wanted["step"][i], wanted["beta"][i], wanted["v"][i]], abs=1e-6)


# FMS Model Optimizer (foundation-model-stack, Apache-2.0), fms_mo/quant/quantizers.py, on V and weights of 1, 2, ..., 8; its
# LSQPlus_func with bits 2, s = 0.5, beta = 0.5, and (beta 0) as LSQ on a signed grid.
V = [-1.7, -1.05, -0.6, -0.2, 0.15, 0.45, 0.85, 1.6]
FMS: dict[float, tuple[list[float], float, float, list[int]]] = {
    0.5: ([-0.5, -0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0], -1.2, 14.0, [0, 0, 0, 4, 5, 6, 7, 0]),
    0.0: ([-1.0, -1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5], 10.3, 18.0, [0, 0, 3, 4, 5, 6, 0, 0]),
}


@pytest.mark.parametrize("offset", FMS)
def test_agrees_with_a_public_implementation(offset: float) -> None:
    v, weights = torch.tensor(V, requires_grad=True), torch.arange(1.0, 9.0)
    step, beta = torch.tensor(0.5, requires_grad=True), torch.tensor(offset, requires_grad=True)
    out = LearnedOffset.apply(v, step, beta, round(offset / 0.5), -2, 1, 1.0)
    values, to_step, to_beta, to_v = FMS[offset]
    torch.testing.assert_close(out.detach(), torch.tensor(values))
    found = torch.autograd.grad((out * weights).sum(), (step, beta, v))
    assert [float(found[0]), float(found[1])] == pytest.approx([to_step, to_beta], abs=1e-5)
    torch.testing.assert_close(found[2], torch.tensor([float(x) for x in to_v]))
    if not offset:
        plain = LearnedStep.apply(v, step, -2, 1, 1.0)
        found = torch.autograd.grad((plain * weights).sum(), (step, v))
        assert float(found[0]) == pytest.approx(to_step, abs=1e-5)


def test_offset_starts_and_moves(build: Build) -> None:
    """On a lopsided tensor it starts better than a grid about 0, learns, and stays whole steps; weights and unsigned
    activations have none."""
    values = torch.rand(4000) * 3 - 0.4
    plus, plain = build("lsq", 3, values=values, offset=True), build("lsq", 3, values=values)
    assert isinstance(plus, LSQ) and plus.offset is not None
    errors = [float((quantizer(values).detach() - values).square().mean()) for quantizer in (plus, plain)]
    assert errors[0] < 0.3 * errors[1]
    before = plus.offset.detach().clone()
    optimizer = torch.optim.Adam(plus.parameters(), lr=0.05)
    for _ in range(30):
        loss = (plus(values + 1) - values - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(plus.offset.detach() - before) > 0.5  # towards where the values went
    grid = plus.grid()
    assert (grid.levels == grid.levels.round()).all() and not grid.shift.any() and grid.has_zero
    for kind, signed in (("weight", True), ("activation", False)):
        x = values.reshape(8, 500) if kind == "weight" else values.clamp_min(0)
        other = build("lsq", 3, kind, values=x, signed=signed, offset=True)
        assert isinstance(other, LSQ) and other.offset is None


def test_the_zero_point_is_the_offset_in_steps_of_now(build: Build) -> None:
    """beta does not move with the step: at half the step it is twice as many of them; and 0 stays a level."""
    plus = build("lsq", 4, values=torch.rand(4000) - 0.4, offset=True)
    assert isinstance(plus, LSQ) and plus.offset is not None
    for offset, halvings, zero in (
        (1.0, 0, 1),
        (1.0, 1, 2),
        (-1.5, 2, -6),
        (1.0, 2, 4),
        (4.0, 1, 8),
        (9.0, 0, 8),
        (-9.0, 0, -7),
    ):
        with torch.no_grad():
            plus.offset.fill_(offset)
            plus.log_step.copy_(plus.unit.log() - halvings * torch.tensor(2.0).log())  # type: ignore[union-attr]
        levels = plus.grid().levels
        assert (int(levels[0]), int(levels[-1])) == (-8 + zero, 7 + zero)
        assert plus(torch.tensor([-1e3, 0.0, 1e3])).tolist() == plus.grid().quantize(torch.tensor([-1e3, 0.0, 1e3])).tolist()
        assert plus(torch.zeros(1)).item() == 0


def test_start_of_lsq_plus_weights(build: Build) -> None:
    values = torch.randn(8, 64) + 0.3
    scale = build("lsq", 4, "weight", values=values, start="paper", offset=True).grid().scale
    mean, deviation = values.mean(1, keepdim=True), values.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(scale, torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 8)


def test_gradient_scale_of_step_and_offset(build: Build) -> None:
    """LSQ+ has LSQ's g = 1 / sqrt(N Qp) on both, N the features of a token."""
    values = torch.randn(50, 8) + 0.4
    quantizer = build("lsq", 3, values=values.flatten(), offset=True)
    assert isinstance(quantizer, LSQ) and quantizer.offset is not None and quantizer.unit is not None
    quantizer(values).sum().backward()
    step = quantizer.log_step.detach().exp().requires_grad_()
    beta = (quantizer.offset.detach() * quantizer.unit).requires_grad_()
    LearnedOffset.apply(values, step, beta, quantizer._zero_point(), -4, 3, 1.0).sum().backward()
    assert step.grad is not None and beta.grad is not None and beta.grad != 0
    g = (8 * 3) ** -0.5
    torch.testing.assert_close(quantizer.log_step.grad, step.grad * step.detach() * g)
    torch.testing.assert_close(quantizer.offset.grad, beta.grad * quantizer.unit * g)


@pytest.mark.parametrize("per_row", [True, False])
def test_one_bit_learns_its_step(per_row: bool) -> None:
    """sign(w) s from mean|w|; d/ds is the sign of each weight, times g = 1 / sqrt(N), d/dw passes where |w| <= 1."""
    values = torch.tensor([[0.5, -0.1, 0.0, 1.5], [-0.4, -0.4, 0.2, -1.2]], requires_grad=True)
    quantizer = BinaryLSQ(Place("x", "table", True, 4, 2), 1, per_row)
    quantizer.initialize(values)
    mean = values.detach().abs().mean(1, keepdim=True) if per_row else values.detach().abs().mean()
    signs = torch.tensor([[1.0, -1, 1, 1], [-1, -1, 1, -1]])
    torch.testing.assert_close(quantizer(values), signs * mean)
    weights = torch.arange(1.0, 9.0).reshape(2, 4)
    (quantizer(values) * weights).sum().backward()
    assert values.grad is not None and quantizer.log_step.grad is not None
    assert values.grad.tolist() == [[1, 2, 3, 0], [5, 6, 7, 0]]
    to_step = (signs * weights).sum(1, keepdim=True) if per_row else (signs * weights).sum()
    torch.testing.assert_close(quantizer.log_step.grad, to_step * mean * (4 if per_row else 8) ** -0.5)
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: LearnedSign.apply(values.detach().double(), s, None, 1.0), step)
    ids = torch.tensor([[1, 0], [1, 1]])
    assert torch.equal(quantizer(values[ids], ids), quantizer(values)[ids])


def test_noise_of_stochastic_rounding_teaches_the_step_nothing(build: Build) -> None:
    """The gradient is equation 3 at the values that were rounded, v + (u - 1/2) s, gradient scale included: where u stands
    for a constant. Through s in them it would be the sum of the noise, without the scale."""
    values = torch.randn(8, 64)
    lsq = build("lsq", 4, "table", values=values)
    lsq.stochastic = True
    lsq.train().start_epoch(0, 1, seed=3)
    g = torch.randn_like(values)
    lsq(values).backward(g)
    step = lsq.grid().scale
    lsq.start_epoch(0, 1, seed=3)
    noise = lsq.noise(values)
    assert noise is not None
    scaled = values / step + noise - 0.5
    residual = torch.where((scaled > -8) & (scaled < 7), scaled.round() - scaled, scaled.clamp(-8, 7))
    wanted = (g * residual).sum(1, keepdim=True) * step / (64 * 7) ** 0.5
    found = lsq.get_parameter("log_step").grad
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_offset_is_searched_on_all_features() -> None:
    """Of 4,000 tokens of 50 features, every tenth value is of features 0, 10, 20, ...: these are above 0, the rest below."""
    values = -torch.rand(4000, 50) - 1
    values[:, ::10] = torch.rand(4000, 5)
    _, zero = offset_start(values.flatten(), -4, 3)
    assert int(zero) == -1  # levels from -5 to 2, as the values are from -2 to 1; on those above 0 alone 3


def test_the_offset_starts_from_ends_that_shrink_apart() -> None:
    """Of values from -1 to 1.5 with two outliers above, the best grid clips those and keeps the lower end: little is lost
    beyond the best of a fine scan of steps and zero points."""
    values = torch.cat([-torch.rand(2000), 1.5 * torch.rand(2000), torch.tensor([8.0, 9.0])])

    def error(step: Tensor, zero: int) -> float:
        return float(((values / step).round().clamp(-4 + zero, 3 + zero) * step - values).square().sum())

    step, zero = offset_start(values, -4, 3)
    steps = torch.linspace(0.01, 1.2, 200) * float(values.abs().max())
    assert error(step, int(zero)) < 1.15 * min(error(each, zero) for zero in range(-3, 5) for each in steps)
