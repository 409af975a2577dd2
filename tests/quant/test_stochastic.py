"""Stochastic rounding of tables (`quant.table_rounding`)."""

import pytest
import torch

from sasrec.config import QuantParams
from sasrec.models.sasrec import SASRec
from sasrec.quant import attach
from sasrec.quant.quantizer import Quantizer


def test_tables_round_by_chance_in_training_alone(model: SASRec) -> None:
    module, options = attach.load_method("lsq", None)
    attach.attach(model, QuantParams(bits=2, table_rounding="stochastic"), module, options)
    quantizer = attach.quantizers(model)["item_table.weight"]
    assert {name for name, each in attach.quantizers(model).items() if each.stochastic} == {
        "item_table.weight",
        "position_table.weight",
    }
    table = model.item_table.weight.detach()
    before = torch.get_rng_state()
    draws = []
    for epoch in range(400):
        quantizer.start_epoch(epoch, 400, seed=0)
        draws.append(quantizer.train()(table).detach())
    assert torch.equal(torch.get_rng_state(), before)
    grid = quantizer.grid(table)
    inside = ((table / grid.scale) > grid.levels[0]) & ((table / grid.scale) < grid.levels[-1])
    mean = torch.stack(draws).mean(0)
    torch.testing.assert_close((mean / grid.scale)[inside], (table / grid.scale)[inside], rtol=0, atol=0.15)
    assert ((draws[0] / grid.scale - table / grid.scale).abs()[inside] < 1 + 1e-5).all()
    assert torch.equal(quantizer.eval()(table), grid.quantize(table))
    quantizer.start_epoch(3, 400, seed=0)
    assert torch.equal(quantizer.train()(table), draws[3])  # a resumed run draws the same
    positions = attach.quantizers(model)["position_table.weight"]
    for each, seed in ((quantizer, 1), (positions, 0)):  # another seed and another table do not
        each.train().start_epoch(3, 400, seed)
        noise = each.noise(table)
        quantizer.start_epoch(3, 400, 0)
        assert noise is not None and not torch.equal(noise, quantizer.noise(table))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ste", "lsq", "pact", "dorefa", "apot"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_chance_takes_the_two_levels_around(method: str, bits: int, model: SASRec) -> None:
    """In every method: the level above or below, and on average the value (of tanh for those that go through it)."""
    module, options = attach.load_method(method, None)
    attach.attach(model, QuantParams(bits=2, embedding_bits=bits, table_rounding="stochastic"), module, options)
    quantizer: Quantizer = attach.quantizers(model)["item_table.weight"]
    table = model.item_table.weight.detach()[1:4]
    ids = torch.arange(1, 4)
    quantizer.train().start_epoch(0, 1, 0)
    draws = torch.stack([quantizer(table, ids).detach() for _ in range(300)])
    quantizer.start_epoch(0, 1, 0)
    assert torch.equal(quantizer(table, ids), draws[0])  # a resumed run draws the same
    allowed = quantizer.grid(model.item_table.weight.detach())
    levels = allowed.levels * allowed.scale[ids]
    assert (draws[..., None] - levels[:, None]).abs().amin(-1).max() < 1e-6
    counts = torch.tensor([[len(draws[:, i, j].unique()) for j in range(table.shape[1])] for i in range(3)])
    assert counts.max() == 2
    value = table
    if method in ("pact", "dorefa") and bits > 1:
        unit = quantizer.get_buffer("unit")
        value = (table / unit).tanh() * unit
    clipped = value.clamp(levels.amin(1, keepdim=True), levels.amax(1, keepdim=True))
    gap = (levels[:, 1:] - levels[:, :-1]).amax()
    assert (draws.mean(0) - clipped).abs().max() < 0.15 * gap
