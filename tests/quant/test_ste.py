"""STE: what its ranges follow, and when they stop."""

from collections.abc import Callable

import pytest
import torch

from sasrec.quant.quantizer import Quantizer, max_scale, mse_scale
from sasrec.quant.ste import STE

Build = Callable[..., Quantizer]


def test_starts_where_ptq_ends(build: Build) -> None:
    values = torch.randn(8, 64)
    for kind, x in (("weight", values), ("table", values), ("activation", values.flatten())):
        for bits in (2, 4, 8):
            ste, ptq = build("ste", bits, kind, values=x), build("ptq", bits, kind, values=x)
            torch.testing.assert_close(ste.eval()(x), ptq(x))


def test_moving_average_of_the_largest_magnitude(build: Build) -> None:
    x = torch.tensor([[[-1.0, 0.5], [2.0, -2.5], [100.0, 100.0]]])  # (batch, length, features); the last token is padding
    mask = torch.tensor([[True, True, False]])
    ste = build("ste", 3, values=torch.tensor([-4.0, 3.0]), range="minmax", momentum=0.75)
    assert isinstance(ste, STE) and ste.widest is not None
    assert float(ste.widest) == 1  # -4 / -4 or 3 / 3
    ste(x, mask=mask)
    # The batch: 2 / 3 beats -2.5 / -4; a quarter of the way from 1 to it.
    assert float(ste.widest) == pytest.approx(0.75 + 0.25 * 2 / 3)
    before = float(ste.widest)
    ste(-4 * x, mask=mask)  # here 10 / 3 beats -8 / -4, and
    ste(x * torch.tensor([1.0, 8.0]), mask=mask)  # -20 / -4 beats 4 / 3
    assert float(ste.widest) == pytest.approx(0.75 * (0.75 * before + 0.25 * 10 / 3) + 0.25 * 20 / 4)


@pytest.mark.parametrize("unsigned", [False, True])
def test_ranges_move_in_training_alone_and_stop(build: Build, unsigned: bool) -> None:
    x = torch.rand(4, 5, 8)
    ste = build("ste", 4, values=x.flatten(), signed=not unsigned, freeze_after=0.5)
    ste.eval()(3 * x)
    before = ste.grid().scale.clone()
    ste.start_epoch(0, 4, seed=0)
    ste(3 * x)
    assert torch.equal(ste.grid().scale, before)
    ste.train()(3 * x)
    moved = ste.grid().scale.clone()
    assert moved > before
    ste.start_epoch(2, 4, seed=0)
    ste(3 * x)
    assert torch.equal(ste.grid().scale, moved)


def test_weights_take_the_range_of_now(build: Build) -> None:
    values = torch.randn(8, 64)
    ste = build("ste", 4, "weight", values=values, range="minmax")
    torch.testing.assert_close(ste.grid(3 * values).scale, max_scale(3 * values, -8, 7, True))
    share = mse_scale(values, -8, 7, True) / max_scale(values, -8, 7, True)
    torch.testing.assert_close(
        build("ste", 4, "weight", values=values).grid(3 * values).scale, 3 * share * max_scale(values, -8, 7, True)
    )


def test_a_whole_table_waits_for_the_refresh(build: Build) -> None:
    values = torch.randn(8, 16)
    ste = build("ste", 4, "table", values=values, per_row=False)
    before = ste.grid(values).scale
    assert torch.equal(ste.grid(2 * values).scale, before)
    ste.refresh(2 * values)
    torch.testing.assert_close(ste.grid(2 * values).scale, 2 * before)


def test_the_largest_weight_of_a_row_can_move(build: Build) -> None:
    """It lies at the end of a min-max grid: a gradient of 0 there would hold it, and with it the range, for ever."""
    values = torch.randn(8, 64).requires_grad_()
    ste = build("ste", 4, "weight", values=values, range="minmax")
    ste(values).sum().backward()
    assert values.grad is not None and (values.grad == 1).all()
