"""PACT beside the paper: equations 1 to 3, the L2 term, and the weights by SAWB."""

from collections.abc import Callable

import pytest
import torch

from sasrec.errors import UserError
from sasrec.models.taps import Place
from sasrec.quant.pact import PACT, SAWB, LearnedClip, Options
from sasrec.quant.quantizer import Quantizer, mse_scale

Build = Callable[..., Quantizer]


@pytest.mark.parametrize("unsigned", [True, False])
def test_alpha_gradient(unsigned: bool) -> None:
    """d/dalpha: 0 inside, sign(x) at alpha and beyond. Rounding leaves no residual, unlike LSQ."""
    low, high = (0, 7) if unsigned else (-7, 7)
    x = torch.tensor([-9.0, -2.0, -1.9, -0.3, 0.0, 0.7, 1.9, 2.0, 9.0], requires_grad=True)
    alpha = torch.tensor(2.0, requires_grad=True)
    out = LearnedClip.apply(x, alpha, low, high)
    to_alpha = [float(torch.autograd.grad(out[i], alpha, retain_graph=True)[0]) for i in range(len(x))]
    (to_x,) = torch.autograd.grad(out.sum(), x)
    if unsigned:
        assert to_alpha == [0, 0, 0, 0, 0, 0, 0, 1, 1]
        assert to_x.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
        assert out[:4].tolist() == [0, 0, 0, 0]
    else:
        assert to_alpha == [-1, -1, 0, 0, 0, 0, 0, 1, 1]
        assert to_x.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
        assert float(out[0].detach()) == -2
    steps = (out.detach() * high / 2).tolist()  # equation 2: multiples of alpha / high
    assert steps == pytest.approx([round(step) for step in steps], abs=1e-5)


# FMS Model Optimizer (foundation-model-stack, Apache-2.0), fms_mo/quant/quantizers.py, PACT_STE on these values with alpha
# 1.5 and weights of 1, 2, ..., 7. (At alpha itself, where the paper is silent, it passes the gradient on, and this does not.)
FMS = {2: [0.0, 0.5, 0.5, 1.0, 1.5, 1.5, 1.5], 4: [0.0, 0.3, 0.6, 0.9, 1.4, 1.5, 1.5]}


@pytest.mark.parametrize("bits", FMS)
def test_agrees_with_a_public_implementation(bits: int) -> None:
    x = torch.tensor([0.05, 0.3, 0.55, 0.9, 1.4, 1.6, 3.0], requires_grad=True)
    alpha = torch.tensor(1.5, requires_grad=True)
    out = LearnedClip.apply(x, alpha, 0, 2**bits - 1)
    torch.testing.assert_close(out.detach(), torch.tensor(FMS[bits]))
    to_alpha, to_x = torch.autograd.grad((out * torch.arange(1.0, 8.0)).sum(), (alpha, x))
    assert float(to_alpha) == pytest.approx(6 + 7)
    assert to_x.tolist() == [1, 2, 3, 4, 5, 0, 0]


def test_a_signed_clip_is_two_sided(build: Build) -> None:
    """[-alpha 2^(b-1) / (2^(b-1) - 1), alpha], and alpha learns from both ends."""
    pact = build("pact", 4, values=torch.randn(4000))
    alpha = float(pact.grid().scale) * 7
    assert pact(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([-alpha * 8 / 7, alpha])
    (parameter,) = pact.parameters()
    for x, slope in ((-50.0, -8 / 7), (50.0, 1.0)):
        (gradient,) = torch.autograd.grad(pact(torch.tensor([x])).sum(), parameter)
        assert float(gradient) == pytest.approx(slope * alpha)  # d/dlog alpha


def test_penalty_is_on_alpha_alone(build: Build) -> None:
    values = torch.randn(4000)
    pact = build("pact", 4, values=values, decay=0.25)
    alpha = float(pact.grid().scale) * 7
    assert alpha == pytest.approx(7 * float(mse_scale(values, -8, 7, False)))
    penalty = pact.joint_penalty([pact])
    assert penalty is not None and float(penalty.detach()) == pytest.approx(0.25 * alpha**2)
    penalty.backward()
    (parameter,) = pact.parameters()
    assert parameter.grad is not None and float(parameter.grad) == pytest.approx(2 * 0.25 * alpha**2)  # d/dlog alpha
    weight = build("pact", 4, "weight", values=values.reshape(40, 100))
    assert weight.joint_penalty([weight]) is None
    assert not list(build("pact", 4, "weight", values=values.reshape(40, 100)).parameters())


def test_penalties_of_many_are_one_sum() -> None:
    """Each alpha with the decay of its own width."""
    places = [Place(f"x{i}", "activation", True, 8) for i in range(3)]
    quantizers = [PACT(place, bits, Options()) for place, bits in zip(places, (2, 4, 8), strict=True)]
    with torch.no_grad():
        for i, quantizer in enumerate(quantizers):
            quantizer.log_alpha.fill_(float(i))
    joint = PACT.joint_penalty(quantizers)
    alphas = [float(torch.tensor(float(i)).exp()) for i in range(3)]
    assert float(joint.detach()) == pytest.approx(1e-2 * alphas[0] ** 2 + 1e-4 * (alphas[1] ** 2 + alphas[2] ** 2))
    joint.backward()
    for quantizer, alpha, decay in zip(quantizers, alphas, (1e-2, 1e-4, 1e-4), strict=True):
        assert quantizer.log_alpha.grad is not None
        assert float(quantizer.log_alpha.grad) == pytest.approx(2 * decay * alpha**2)


@pytest.mark.parametrize(("bits", "decay"), [(2, 1e-2), (3, 6e-4), (4, 1e-4), (8, 1e-4)])
def test_fewer_bits_decay_more(build: Build, bits: int, decay: float) -> None:
    pact = build("pact", bits, values=torch.randn(4000))
    alpha, penalty = float(pact.grid().scale) * pact.high, pact.joint_penalty([pact])
    assert penalty is not None and float(penalty.detach()) == pytest.approx(decay * alpha**2)


def test_decay_pulls_a_clip_that_clips_nothing_in(build: Build) -> None:
    values = torch.rand(400) - 0.5
    pact = build("pact", 4, values=values)
    (parameter,) = pact.parameters()
    with torch.no_grad():
        parameter.fill_(2.0)
    penalty = pact.joint_penalty([pact])
    assert penalty is not None
    (pact(values).square().mean() + penalty).backward()
    assert parameter.grad is not None and parameter.grad > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sawb_is_the_best_clip_of_a_gaussian(build: Build, bits: int) -> None:
    """Without looking at more than two moments it comes near to the least squared error."""
    values = torch.randn(32, 256)
    sawb = build("pact", bits, "weight", values=values, weights="sawb")
    clip = float(sawb.grid(values).scale.mean()) * sawb.high
    c1, c2 = SAWB[bits]
    torch.testing.assert_close(clip, c1 - c2 * 0.7979, rtol=0.05, atol=0)
    best = mse_scale(values, sawb.low, sawb.high, False)
    error = (sawb(values) - values).square().mean()
    least = ((values / best).round().clamp(sawb.low, sawb.high) * best - values).square().mean()
    assert error < 1.25 * least


@pytest.mark.parametrize("per_row", [True, False])
def test_sawb_is_of_the_second_moment_and_the_mean_magnitude(build: Build, per_row: bool) -> None:
    """clip = (c1 - c2 mean|w| / rms) rms, neither of them about the mean; the ratio is the mean over the rows."""
    values = torch.randn(32, 256) * torch.logspace(-1, 1, 32)[:, None] + torch.linspace(-1, 1, 32)[:, None]
    sawb = build("pact", 2, "weight", values=values, weights="sawb", per_row=per_row)
    x = values if per_row else values.reshape(1, -1)
    rms = x.square().mean(1, keepdim=True).sqrt()
    c1, c2 = 2.6, 1.71
    clip = (c1 - c2 * (x.abs().mean(1, keepdim=True) / rms).mean()) * rms
    torch.testing.assert_close(sawb.grid(values).scale, clip if per_row else clip[0, 0])


def test_sawb_has_no_other_widths(build: Build) -> None:
    with pytest.raises(UserError, match="2, 4 and 8 bits"):
        build("pact", 3, "weight", values=torch.randn(4, 8), weights="sawb")
    build("pact", 3, values=torch.randn(100), weights="sawb")  # activations are not its matter


def test_sawb_has_the_published_coefficients() -> None:
    """The fit for symmetric grids of 3, 15 and 255 levels, by their numbers: an error does not tell a percent."""
    assert SAWB == {2: (2.6, 1.71), 4: (12.035, 12.03), 8: (31.76, 35.04)}


def test_rows_of_zeros_do_not_count_in_the_shape_of_sawb(build: Build) -> None:
    values = torch.randn(32, 64)
    values[:8] = 0
    whole = build("pact", 4, "table", values=values, weights="sawb").grid(values).scale
    rest = build("pact", 4, "table", values=values[8:], weights="sawb").grid(values[8:]).scale
    torch.testing.assert_close(whole[8:], rest)


def test_a_decay_of_zero_is_no_decay(build: Build) -> None:
    pact = build("pact", 4, values=torch.randn(100), decay=0.0)
    penalty = pact.joint_penalty([pact])
    assert penalty is not None and float(penalty.detach()) == 0
