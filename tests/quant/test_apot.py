"""APoT beside the paper: level sets, projection, the gradient of alpha, weight normalisation."""

from collections.abc import Callable

import pytest
import torch

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


def test_weights_are_normalised_and_de_normalised(build: Build) -> None:
    """Q((W - mu) / sigma; alpha) sigma + mu; a shifted and stretched row is quantized alike."""
    w = torch.randn(8, 32)
    apot = build("apot", 4, "weight", values=w)
    assert isinstance(apot, APoT)
    mu, sigma = w.mean(1, keepdim=True), w.std(1, keepdim=True, correction=0)
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
