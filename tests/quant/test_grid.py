"""Properties of every grid, and the search for scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasrec.quant.apot import levels
from sasrec.quant.grid import Grid, half_parts
from sasrec.quant.lsq import LearnedOffset, LearnedStep
from sasrec.quant.pact import LearnedClip
from sasrec.quant.quantizer import RoundThrough, integer_range, max_scale, mse_scale, percentile_scale, row_sum

scales = st.floats(2**-20, 2**20, width=32)
numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    bits = draw(st.integers(2, 8))
    signed, additive, shifted = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    scale = torch.tensor(draw(scales))
    shift = torch.tensor(draw(st.floats(-3, 3, width=32)) if shifted else 0.0) * scale
    if additive:
        return Grid(bits, torch.tensor(levels(bits, signed), dtype=torch.float32), scale, shift)
    return Grid.uniform(bits, *integer_range(bits, signed, draw(st.booleans())), scale, shift)


@settings(max_examples=200)
@given(grids(), numbers)
def test_codes_are_those_of_the_nearest_values(grid: Grid, values: list[float]) -> None:
    x = torch.tensor(values)
    codes = grid.encode(x)
    assert codes.dtype == torch.uint8 and int(codes.max()) < len(grid.levels) <= 2**grid.bits
    quantized = grid.quantize(x)
    assert torch.equal(quantized, grid.decode(codes))
    every = grid.levels.double() * grid.scale.double() + grid.shift.double()
    error = (x.double() - quantized.double()).abs()
    best = (x.double()[:, None] - every).abs().amin(1)
    rounding = 1e-6 * (x.double().abs() + grid.shift.double().abs() + grid.scale.double() * grid.levels.abs().max())
    assert (error <= best + rounding).all()


@settings(max_examples=200)
@given(grids())
def test_every_value_is_kept(grid: Grid) -> None:
    codes = torch.arange(len(grid.levels)).to(torch.uint8)
    values = grid.decode(codes)
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.quantize(values), values)


def test_half_way_all_take_the_even_level() -> None:
    """What trains and what ships: on steps that are powers of two values lie half-way exactly."""
    x = (torch.arange(-11.0, 11.0) + 0.5) / 4
    step, alpha = torch.tensor(0.25), torch.tensor(7 / 4)
    grid = Grid.uniform(4, -8, 7, step)
    wanted = torch.tensor([min(7, max(-8, 2 * round(float(v * 4) / 2))) for v in x]) / 4
    found = {
        "through": RoundThrough.apply(x, step, -8, 7),
        "step": LearnedStep.apply(x, step, -8, 7, 1.0),
        "offset": LearnedOffset.apply(x, step, torch.tensor(0.0), 0, -8, 7, 1.0),
        "clip": LearnedClip.apply(x, alpha, -8, 7),
        "grid": grid.quantize(x),
        "codes": grid.decode(grid.encode(x)),
    }
    for name, values in found.items():
        assert torch.equal(values, wanted), name


@pytest.mark.parametrize("name", ["through", "step", "clip"])
def test_one_scale_and_a_scale_a_row_let_the_same_through(name: str) -> None:
    """What is kept for the gradient is not the same: x itself, or x in steps."""
    torch.manual_seed(0)
    x = torch.randn(20, 40)
    towards = torch.randn_like(x)

    def found(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, given = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = {
            "through": lambda: RoundThrough.apply(value, given, -8, 7),
            "step": lambda: LearnedStep.apply(value, given, -8, 7, 1.0),
            "clip": lambda: LearnedClip.apply(value, given * 7, -8, 7),
        }[name]()
        (out * towards).sum().backward()
        of_scale = torch.zeros(()) if given.grad is None else given.grad.sum()
        return out.detach(), value.grad, of_scale  # type: ignore[return-value]

    one, rows = found(torch.tensor(0.2)), found(torch.full((20, 1), 0.2))
    assert torch.equal(one[0], rows[0]) and torch.equal(one[1], rows[1])
    assert 0 < (one[1] == 0).float().mean() < 0.5  # some are clipped
    torch.testing.assert_close(one[2], rows[2])


def test_half_scales_keep_11_bits_of_small_scales_and_of_shifts() -> None:
    """A power of two beside them: float16 itself has 11 bits down to 6e-5 alone."""
    scale, shift = (1e-7 * torch.rand(50, 1) + 1e-7 for _ in range(2))
    half = Grid(2, torch.tensor([-1.0, 0.0, 1.0]), scale, shift).with_half_scales()
    for exact, found in ((scale, half.scale), (shift, half.shift)):
        torch.testing.assert_close(found, exact, rtol=2**-11, atol=0)
        parts, unit = half_parts(found)
        assert torch.equal(parts.float() * unit, found) and not torch.equal(found, exact)


def test_rows_have_their_own_scale_and_shift() -> None:
    grid = Grid(2, torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([[1.0], [10.0]]), torch.tensor([[0.0], [0.5]]))
    x = torch.tensor([[-5.0, 0.4, 1.6], [-5.0, 4.0, 29.0]])
    assert grid.encode(x).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert grid.quantize(x).tolist() == [[-1, 0, 3], [-9.5, 0.5, 30.5]]
    ids = torch.tensor([1, 0, 1])
    assert torch.equal(grid.quantize(x[ids], ids), grid.quantize(x)[ids])
    assert not grid.is_uniform and not grid.has_zero


@settings(max_examples=60)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40), st.integers(2, 8), st.booleans())
def test_mse_scale_is_never_worse_than_min_max(values: list[float], bits: int, signed: bool) -> None:
    x = torch.tensor(values) if signed else torch.tensor(values).abs()
    low, high = integer_range(bits, signed)

    def error(scale: Tensor) -> float:
        return float(((x / scale).round().clamp(low, high) * scale - x).double().square().sum())

    assert error(mse_scale(x, low, high, False)) <= error(max_scale(x, low, high, False)) * (1 + 1e-5)


# Steps of the best uniform quantizers of a unit Gaussian with 2^b levels, zero among them, found by a fine search here.
@pytest.mark.parametrize(("bits", "low", "high"), [(2, -1, 1), (4, -7, 7), (8, -127, 127)])
def test_mse_scale_finds_the_best_step(bits: int, low: int, high: int) -> None:
    x = torch.randn(20_000)

    def error(scale: Tensor) -> Tensor:
        return ((x / scale).round().clamp(low, high) * scale - x).square().mean()

    fine = min(float(error(torch.tensor(4.5 * i / 400 / high))) for i in range(80, 400))
    assert float(error(mse_scale(x, low, high, False))) < fine * 1.01


def test_min_max_and_percentile() -> None:
    x = torch.tensor([[-4.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 7.0]])
    assert max_scale(x, -4, 3, True).tolist() == [[1.0], [pytest.approx(7 / 3)]]  # -4 / -4 and 3 / 3; 7 / 3
    assert float(max_scale(x, -4, 3, False)) == pytest.approx(7 / 3)
    assert percentile_scale(x, -4, 3, True, 75).flatten().tolist() == [1.0, pytest.approx(1e-12)]
    assert float(percentile_scale(x, 0, 7, False, 100)) == 1.0
    hundred = torch.arange(1.0, 101)
    assert percentile_scale(hundred, -1, 1, False, 55).item() == 55  # and not 56: 0.55 * 100 is a little more in floats
    assert percentile_scale(x[:1], -4, 3, True, 60).item() == 1.0  # 2.4 of 4 magnitudes, rounded up: 1, 2, 3 are not clipped


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 64, 67])
def test_row_sum(n: int) -> None:
    x = torch.randn(40, n)
    torch.testing.assert_close(row_sum(x), x.sum(1, keepdim=True))
    assert torch.equal(row_sum(x)[7:8], row_sum(x[7:8]))
