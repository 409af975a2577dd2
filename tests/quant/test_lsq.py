"""LSQ beside the paper: equations 1 to 5, the gradient scale, both starts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sasrec.quant.lsq import LSQ, LearnedStep
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
