"""DoReFa beside the paper: weights (section 2.3), activations (2.4), gradients (2.5)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sasrec.models.sasrec import SASRec
from sasrec.quant import dorefa
from sasrec.quant.dorefa import quantize_gradient
from sasrec.quant.quantizer import Quantizer

Build = Callable[..., Quantizer]


def quantize_k(r: Tensor, bits: int) -> Tensor:
    """Equation of section 2.2: round((2^k - 1) r) / (2^k - 1)."""
    return ((2**bits - 1) * r).round() / (2**bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_weights_by_the_paper(build: Build, bits: int, per_row: bool) -> None:
    """2 q(tanh W / (2 max|tanh W|) + 1/2) - 1, times the largest or the factor of least squared error."""
    w = torch.randn(8, 16)
    m = w.tanh().abs().amax(1, keepdim=True) if per_row else w.tanh().abs().max()
    n = 2 ** (bits - 1) - 1
    bracket = {
        "paper": 2 * quantize_k(w.tanh() / (2 * m) + 0.5, bits) - 1,
        "zero": (n * w.tanh() / m).round() / n,
    }
    for grid, levels in bracket.items():
        quantizer = build("dorefa", bits, "table", values=w, per_row=per_row, grid=grid, tanh="paper")
        torch.testing.assert_close(quantizer(w), m * levels)
    auto = build("dorefa", bits, "table", values=w, per_row=per_row, tanh="paper")
    torch.testing.assert_close(auto(w), m * bracket["paper" if bits < 4 else "zero"])


@pytest.mark.parametrize("method", ["dorefa", "pact"])
@pytest.mark.parametrize("kind", ["weight", "table"])
@pytest.mark.parametrize("per_row", [True, False])
def test_large_weights_are_taken_in_units_in_which_tanh_hardly_bends_them(
    build: Build, method: str, kind: str, per_row: bool
) -> None:
    """The paper's quantizer of W / unit, times the unit: the power of two that brings the largest to 1/8 to 1/4."""
    w = torch.randn(8, 16).clamp(-2.5, 2.5)
    w[3, 5] = 2.93
    m = (w / 16).tanh().abs()
    m = m.amax(1, keepdim=True) if per_row else m.max()
    quantizer = build(method, 4, kind, values=w, per_row=per_row)
    wanted = 16 * m * (7 * (w / 16).tanh() / m).round() / 7
    torch.testing.assert_close(quantizer(w), wanted)
    torch.testing.assert_close(quantizer.grid(w).decode(quantizer.codes(w)), wanted)
    leaf, g = w.clone().requires_grad_(), torch.randn_like(w)
    quantizer(leaf).backward(g)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, g * (1 - (w / 16).tanh() ** 2))
    # The unit stands still while the weights move, and rows that are looked up have it, too.
    quantizer.refresh(3 * w)
    assert float(dict(quantizer.named_buffers())["unit"]) == 16
    # At 8 bits nothing is lost but the rounding and 2 % at the largest; as they are, tanh takes two thirds of that one.
    close = build(method, 8, kind, values=w, per_row=per_row)(w)
    assert float(close[3, 5]) == pytest.approx(2.93, rel=0.02)
    bent = build(method, 8, kind, values=w, per_row=per_row, tanh="paper")(w)
    assert float(bent[3, 5]) == pytest.approx(0.994, abs=1e-3)


def test_small_weights_are_quantized_as_in_the_paper_either_way(build: Build) -> None:
    """Those of a network from scratch: the unit is 1, and the bits are the same."""
    w = torch.randn(8, 16).clamp(-3, 3) / 12
    for bits in (2, 4, 8):
        assert torch.equal(
            build("dorefa", bits, "weight", values=w)(w), build("dorefa", bits, "weight", values=w, tanh="paper")(w)
        )
    zero = torch.zeros(8, 16)
    assert torch.equal(build("dorefa", 4, "weight", values=zero)(zero), zero)


# tensorpack, examples/DoReFa-Net/dorefa.py, the function fw, on this tensor; by its formula, the numbers rounded to 5 digits.
FIXED = torch.tensor([[-1.2, -0.7, -0.25, -0.05], [0.1, 0.4, 0.9, 1.5]])
TENSORPACK = {
    2: [[-1.0, -1.0, -0.33333, -0.33333], [0.33333, 0.33333, 1.0, 1.0]],
    3: [[-1.0, -0.71429, -0.14286, -0.14286], [0.14286, 0.42857, 0.71429, 1.0]],
    4: [[-0.86667, -0.73333, -0.33333, -0.06667], [0.06667, 0.46667, 0.73333, 1.0]],
}


@pytest.mark.parametrize("bits", TENSORPACK)
def test_levels_agree_with_a_public_implementation(build: Build, bits: int) -> None:
    paper = build("dorefa", bits, "table", values=FIXED, per_row=False, grid="paper", tanh="paper")
    m = FIXED.tanh().abs().max()
    torch.testing.assert_close(paper(FIXED) / m, torch.tensor(TENSORPACK[bits]), rtol=0, atol=1e-5)


def test_scale_is_a_constant_for_the_gradient(build: Build) -> None:
    """g (1 - tanh^2), the largest weight included, through which the scale would get a gradient of its own."""
    w = torch.randn(8, 16, requires_grad=True)
    g = torch.randn(8, 16)
    for bits in (2, 4):
        w.grad = None
        build("dorefa", bits, "weight", values=w, tanh="paper")(w).backward(g)
        assert w.grad is not None
        torch.testing.assert_close(w.grad, g * (1 - w.detach().tanh() ** 2))


def test_a_trained_tensor_survives(build: Build) -> None:
    """The factor m: at 8 bits small weights come out as they were, not stretched to -1..1."""
    w = torch.randn(8, 16) * 0.05
    torch.testing.assert_close(build("dorefa", 8, "weight", values=w)(w), w, rtol=0, atol=2e-3)


def test_activations_are_clipped_where_calibration_said(build: Build) -> None:
    dorefa = build("dorefa", 4, values=torch.linspace(-1, 1, 1000))
    clip = float(dorefa.grid().scale) * 7
    assert clip == pytest.approx(1, abs=0.1)
    assert dorefa(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([-clip * 8 / 7, clip])
    assert not list(dorefa.parameters())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_formula(bits: int) -> None:
    dr = torch.randn(5, 3, 4)
    dr[4] = 0
    m = dr.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    wanted = 2 * m * (quantize_k(dr / (2 * m) + 0.5, bits) - 0.5)
    torch.testing.assert_close(quantize_gradient(dr, bits, None)[:4], wanted[:4])
    assert (quantize_gradient(dr, bits, None)[4] == 0).all()


def test_the_largest_gradient_is_that_of_each_history_of_a_row() -> None:
    """Two side by side, padding before them, as if each had a row of its own."""
    dr = torch.randn(2, 6, 4) * torch.tensor([0.0, 1, 1, 100, 100, 100])[:, None]
    samples = torch.tensor([[0, 2, 2, 1, 1, 1]]).expand(2, -1)
    found = quantize_gradient(dr, 3, None, samples)
    torch.testing.assert_close(found[:, 1:3], quantize_gradient(dr[:, 1:3], 3, None))
    torch.testing.assert_close(found[:, 3:], quantize_gradient(dr[:, 3:], 3, None))
    one = quantize_gradient(dr, 3, None, torch.ones_like(samples))
    assert torch.equal(one, quantize_gradient(dr, 3, None)) and not torch.equal(one[:, 1:3], found[:, 1:3])


def test_no_history_is_taught_otherwise_by_what_is_packed_beside_it(
    quantized: Callable[..., SASRec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a history whose neighbour's loss weighs 100 times as much, each item gets the gradient it gets alone; noise, which
    depends on the place in the batch, left out."""
    monkeypatch.setattr(dorefa, "quantize_gradient", lambda dr, bits, _, *of: quantize_gradient(dr, bits, None, *of))
    model = quantized("dorefa", 8, {"gradient_bits": 3}).train()
    histories, windows = torch.tensor([[3, 9, 12, 7, 5, 8, 2]]), torch.tensor([[2, 2, 2, 1, 1, 1, 1]])
    towards = torch.randn(1, 7, 16)
    towards[:, 3:] *= 100

    def gradient(part: slice, windows: Tensor | None) -> Tensor:
        loss = (model.encode(histories[:, part], windows=windows) * towards[:, part]).sum()
        return torch.autograd.grad(loss, model.item_table.weight)[0][histories[0, :3]]

    torch.testing.assert_close(gradient(slice(None), windows), gradient(slice(3), None))


def test_gradient_noise_makes_it_unbiased() -> None:
    """The mean of many draws is the gradient; each draw lies on the 2^k - 1 steps of its sample."""
    dr = torch.tensor([[0.3, -1.0, 0.01], [0.02, 0.05, -0.1]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([quantize_gradient(dr, 3, generator) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), dr, rtol=0, atol=0.01)
    m = dr.abs().amax(1, keepdim=True)
    steps = (draws / (2 * m) + 0.5) * 7
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert len(draws[:, 0, 0].unique()) == 2


def test_noise_has_its_own_generator(build: Build) -> None:
    x = torch.randn(4, 6, 8)
    mask = torch.ones(4, 6, dtype=torch.bool).index_fill_(1, torch.tensor([0]), False)
    weights = torch.randn_like(x)
    dorefa = build("dorefa", 8, values=x.flatten(), gradient_bits=3)

    def gradient(epoch: int) -> Tensor:
        dorefa.start_epoch(epoch, 3, seed=5)
        leaf = x.clone().requires_grad_()
        before = torch.get_rng_state()
        dorefa(leaf, mask=mask).backward(weights)
        assert torch.equal(torch.get_rng_state(), before)  # a control run draws the same negatives and dropout
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(0), gradient(0))
    assert not torch.equal(gradient(0), gradient(1))
    inside = x.abs() < 0.9 * x.abs().max() * 0.9
    assert torch.equal(gradient(0)[:, 0][inside[:, 0]], weights[:, 0][inside[:, 0]])  # padding: as it was
    assert not torch.equal(gradient(0)[:, 1], weights[:, 1])


@pytest.mark.parametrize("bits", [2, 4])
def test_noise_spans_one_step_so_that_no_value_is_biased(bits: int) -> None:
    """N is uniform in +-1/2 of a step of the 2^k - 1: with any other width values between levels come out wrong in the mean,
    by up to 0.083 at 2 bits where it is a step of 2^k."""
    gradient, generator = torch.linspace(-1, 1, 101)[None], torch.Generator().manual_seed(0)
    found = quantize_gradient(gradient.expand(20_000, -1), bits, generator).mean(0)
    assert float((found - gradient[0]).abs().max()) < 0.02


@pytest.mark.parametrize("top", [1.5, 1.9, 2.2, 2.8, 3.7])
def test_the_unit_brings_the_largest_weight_to_an_eighth_to_a_quarter(build: Build, top: float) -> None:
    unit = float(build("dorefa", 4, "weight", values=torch.linspace(-top, top, 16).reshape(2, 8)).get_buffer("unit"))
    assert 1 / 8 < top / unit <= 1 / 4
