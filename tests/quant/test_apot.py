"""APoT beside the paper: level sets, projection, the gradient of alpha, weight normalisation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sasrec.quant.apot import APoT, ReparameterizedClip, levels, magnitudes, project
from sasrec.quant.grid import nearest_table
from sasrec.quant.quantizer import Quantizer

Build = Callable[..., Quantizer]

# Magnitudes of signed weights, alpha = 1, worked out by hand from section 2.2 with k = 2.
SIGNED: dict[int, list[float]] = {
    2: [0, 1],
    3: [0, 1 / 4, 1 / 2, 1],
    4: [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1],
    # {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, over 3/2
    5: [i / 48 for i in (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)],
}
# Widths with many levels: how many magnitudes, the first eight, the last four, in units of the smallest term.
LONG = {
    # unsigned 8 bits: i = 0..3, exponents i, i + 4, i + 8: the unit is 2^-11, the largest 1 + 1/2 + 1/4 + 1/8
    (8, False): (256, [0, 1, 2, 3, 4, 5, 6, 7], [3600, 3616, 3712, 3840]),
    # signed 8 bits: three terms of two bits, exponents (0, 3, 7), (1, 4, 8), (2, 5, 9), and {0, 2^-6}
    (8, True): (128, [0, 1, 2, 3, 4, 5, 6, 7], [848, 896, 900, 904]),
}


@pytest.mark.parametrize("bits", SIGNED)
def test_signed_levels(bits: int) -> None:
    found = levels(bits, signed=True)
    assert [level / found[-1] for level in found] == pytest.approx([-x for x in SIGNED[bits][:0:-1]] + SIGNED[bits])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unsigned_levels_have_a_bit_more(bits: int) -> None:
    found = levels(bits, signed=False)
    assert [level / found[-1] for level in found] == pytest.approx(SIGNED[bits + 1])


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_level_sets(case: tuple[int, bool]) -> None:
    count, first, last = LONG[case]
    magnitude = [level for level in levels(*case) if level >= 0]
    assert (len(magnitude), magnitude[:8]) == (count, first)
    assert magnitude[-1] == last[-1]
    assert {f"{level:b}".count("1") for level in magnitude} <= {0, 1, 2, 3, 4}  # sums of at most four powers of two


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_ascend_without_repeats(bits: int) -> None:
    found = magnitudes(bits)
    assert len(found) == 2**bits and found[0] == 0
    assert all(a < b for a, b in zip(found, found[1:], strict=False))


def test_what_is_not_a_number_is_some_level() -> None:
    """So that a training that diverges ends with its loss, not with an index."""
    own = torch.tensor(levels(4, True), dtype=torch.float32)
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    found = project(wild, own[nearest_table(own)], -10, 10)
    assert found[0] in own and found[1:].tolist() == [10, -10, 10]


def test_projection_is_to_the_nearest_level() -> None:
    own = torch.tensor(levels(4, True), dtype=torch.float32)
    table = own[nearest_table(own)]
    v = torch.cat([torch.linspace(-14, 14, 20_001), own, (own[1:] + own[:-1]) / 2])
    found = project(v, table, -10, 10)
    assert torch.equal((found - v).abs(), (own - v[:, None]).abs().amin(1))


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_alpha_gradient(shape: tuple[int, ...]) -> None:
    """sign(x) beyond alpha, q - x / alpha inside, in units of alpha."""
    own = torch.tensor(levels(3, True), dtype=torch.float32)  # +-{0, 1, 2, 4}
    alpha = torch.full(shape, 2.0, requires_grad=True)
    x = torch.tensor([[-3.0, -0.9, 0.2], [0.8, 2.0, 5.0]], requires_grad=True)
    out = ReparameterizedClip.apply(x, alpha, torch.ones(shape), None, own[nearest_table(own)], -4, 4)
    assert out.tolist() == [[-2, -1, 0], [1, 2, 2]]
    wanted = [[-1, -0.5 + 0.45, 0 - 0.1], [0.5 - 0.4, 0, 1]]
    for i in range(2):
        for j in range(3):
            (gradient,) = torch.autograd.grad(out[i, j], alpha, retain_graph=True)
            assert float(gradient.sum()) == pytest.approx(wanted[i][j], abs=1e-6)
    (to_x,) = torch.autograd.grad(out.sum(), x)
    assert to_x.tolist() == [[0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_what_is_clipped_on_either_side_of_an_activation_says_wider(build: Build, bits: int) -> None:
    """Section 2.3, sign(x) beyond the clip: -1 below -alpha, however far, and 1 above alpha."""
    apot = build("apot", bits, values=torch.randn(2000))
    assert isinstance(apot, APoT)
    alpha = apot.log_alpha.detach().exp()
    x = alpha * torch.tensor([-5.0, -1.3, 1.3, 5.0])
    torch.testing.assert_close(apot(x), alpha * torch.tensor([-1.0, -1, 1, 1]))
    for value, sign in zip(x, (-1, -1, 1, 1), strict=True):
        (to_log,) = torch.autograd.grad(apot(value[None]).sum(), apot.log_alpha)
        assert float(to_log / alpha) == pytest.approx(sign, abs=1e-5)


@pytest.mark.parametrize("per_row", [True, False])
def test_weights_are_normalised_and_de_normalised(build: Build, per_row: bool) -> None:
    """Q((W - mu) / sigma; alpha) sigma + mu; a shifted and stretched row, or tensor, is quantized alike."""
    w = torch.randn(8, 32) + 0.5
    apot = build("apot", 4, "weight", values=w, per_row=per_row)
    assert isinstance(apot, APoT)
    dims = 1 if per_row else (0, 1)
    mu, sigma = w.mean(dims, keepdim=True), w.std(dims, keepdim=True, correction=0)
    alpha = apot.log_alpha.detach().exp()
    normalised = ((w - mu) / sigma / alpha).clamp(-1, 1)[..., None]
    own = torch.tensor(levels(4, True)) / 10
    q = own[(normalised - own).abs().argmin(-1)]
    torch.testing.assert_close(apot(w), alpha * q * sigma + mu)
    torch.testing.assert_close(apot(3 * w + 5), 3 * apot(w) + 5, rtol=1e-4, atol=1e-4)


def test_alpha_gradient_reaches_the_parameter_in_units_of_sigma(build: Build) -> None:
    w = torch.randn(8, 32) * 7
    apot = build("apot", 4, "weight", values=w)
    assert isinstance(apot, APoT)
    g = torch.randn_like(w)
    apot(w).backward(g)
    alpha = apot.log_alpha.detach().exp()
    mu, sigma = w.mean(1, keepdim=True), w.std(1, keepdim=True, correction=0)
    normalised = (w - mu) / sigma
    q = (apot(w).detach() - mu) / sigma / alpha
    beyond = normalised.abs() > alpha * (1 + 1e-6)
    wanted = (g * sigma * torch.where(beyond, normalised.sign(), q - normalised / alpha)).sum(1, keepdim=True) * alpha
    assert apot.log_alpha.grad is not None
    torch.testing.assert_close(apot.log_alpha.grad, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_row", [True, False])
def test_zero_rows_of_a_table_stay_zero(build: Build, per_row: bool) -> None:
    w = torch.randn(8, 32) + 1
    w[0] = 0
    assert (build("apot", 4, "table", values=w, per_row=per_row)(w)[0] == 0).all()


# The authors' code (github.com/yhhhli/APoT_Quantization, CIFAR10/models/quant_layer.py): weight_quantization on V with alpha
# 1.25, and act_quantization on U with alpha 1.5, both under weights of 1, 2, ..., 8: values and d/dalpha. (d/dv of weights
# is not compared: their code passes it on beyond the clip, which the paper's equation does not.)
V = [-1.7, -1.05, -0.6, -0.2, 0.15, 0.45, 0.85, 1.6]
U = [0.03, 0.3, 0.55, 0.9, 1.2, 1.6, 3.0, 0.7]
AUTHORS: dict[tuple[int, bool], tuple[list[float], float]] = {
    (3, True): ([-1.25, -1.25, -0.625, -0.3125, 0.0, 0.3125, 0.625, 1.25], 3.74),
    (4, True): ([-1.25, -1.0, -0.5, -0.25, 0.125, 0.5, 0.75, 1.25], 6.74),
    (5, True): ([-1.25, -0.9375, -0.625, -0.208333, 0.15625, 0.46875, 0.859375, 1.25], 7.26083),
    (2, False): ([0.0, 0.375, 0.375, 0.75, 1.5, 1.5, 1.5, 0.75], 13.59667),
    (3, False): ([0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.5, 0.6], 12.54667),
    (4, False): ([0.03125, 0.28125, 0.5625, 1.0, 1.125, 1.5, 1.5, 0.75], 13.28417),
}


@pytest.mark.parametrize("case", AUTHORS, ids=str)
def test_agrees_with_the_authors_code(case: tuple[int, bool]) -> None:
    bits, signed = case
    own = torch.tensor(levels(bits, signed), dtype=torch.float32)
    x = torch.tensor(V if signed else U, requires_grad=True)
    alpha = torch.tensor(1.25 if signed else 1.5, requires_grad=True)
    table = own[nearest_table(own)]
    out = ReparameterizedClip.apply(x, alpha, torch.ones(()), None, table, int(own[0]), int(own[-1]))
    values, wanted = AUTHORS[case]
    torch.testing.assert_close(out.detach(), torch.tensor(values), rtol=0, atol=1e-5)
    to_alpha, to_x = torch.autograd.grad((out * torch.arange(1.0, 9.0)).sum(), (alpha, x))
    assert float(to_alpha) == pytest.approx(wanted, abs=1e-4)
    if not signed:
        assert to_x.tolist() == [1, 2, 3, 4, 5, 0, 0, 8]


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_an_activation_starts_at_the_best_scale_of_its_own_levels(build: Build, bits: int) -> None:
    """Not at that of a uniform grid, which loses 7 % more at 5 bits."""
    values = torch.randn(4000)
    grid = build("apot", bits, values=values).grid()

    def error(scale: Tensor) -> float:
        return float((replace(grid, scale=scale).quantize(values) - values).square().mean())

    assert error(grid.scale) < 1.02 * min(error(grid.scale * share) for share in torch.linspace(0.3, 3, 200))


def test_the_unit_of_a_table_is_its_root_mean_square(build: Build) -> None:
    """A table is not moved by its mean, so that this is part of its size."""
    values = torch.randn(8, 32) + 2
    quantizer = build("apot", 4, "table", values=values, per_row=False)
    torch.testing.assert_close(quantizer.get_buffer("sigma"), values.square().mean().sqrt())
