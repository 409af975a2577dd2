"""Quantizers on a model: what they are calibrated on, and when their statistics are renewed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sasrec.config import QuantParams
from sasrec.models.dropout import set_dropout
from sasrec.models.sasrec import SASRec
from sasrec.quant import attach
from sasrec.quant.quantizer import max_scale


def test_calibration_is_on_the_full_precision_model_without_dropout(model: SASRec, histories: Tensor) -> None:
    with torch.no_grad():
        wanted = model.encode(histories)[histories != 0]
    set_dropout(model.train(), 0.5)
    module, options = attach.load_method("ptq", {"range": "minmax"})
    attach.attach(model, QuantParams(bits=2), module, options)
    attach.calibrate(model, [histories])
    assert model.training
    torch.testing.assert_close(attach.quantizers(model)["final"].grid().scale, max_scale(wanted, -2, 1, False))


def test_calibration_ignores_padding(model: SASRec, histories: Tensor) -> None:
    """Every tap records the same values with more padding; zeros of hidden keys are not counted."""
    recorded = []
    for batch in (histories, torch.nn.functional.pad(histories, (2, 0))):
        with attach.recording(model) as recorders, torch.no_grad():
            model.encode(batch)
        recorded.append({name: recorder.sample() for name, recorder in recorders.items() if recorder.parts})
    assert len(recorded[0]) == 20
    for name, values in recorded[0].items():
        more = recorded[1][name]
        torch.testing.assert_close(values[values != 0].sort().values, more[more != 0].sort().values, rtol=0, atol=1e-5)


def test_statistics_are_renewed_in_training_and_before_freezing(quantized: Callable[..., SASRec]) -> None:
    live = quantized("ste", 4, {"range": "minmax"}, table="per_tensor", weights="per_tensor")
    names = ("item_table.weight", "blocks.0.attention.query.weight")
    refresh = attach.own_training(live, 0).refresh

    def scales(factor: float) -> list[Tensor]:
        with torch.no_grad():
            for name in names:
                live.get_parameter(name).mul_(factor)
        return [max_scale(live.get_parameter(name), -8, 7, False) for name in names]

    wanted = scales(0.5)
    refresh()
    for name, scale in zip(names, wanted, strict=True):
        torch.testing.assert_close(attach.quantizers(live)[name].grid(live.get_parameter(name)).scale, scale)
    wanted = scales(0.5)
    frozen = attach.freeze(live)
    for name, scale in zip(names, wanted, strict=True):
        torch.testing.assert_close(frozen[name].grid.scale, scale)


@pytest.mark.parametrize("weights", ["per_row", "per_tensor"])
@pytest.mark.parametrize("table", ["per_row", "per_tensor"])
def test_rows_are_asked_for_weights_and_tables_apart(quantized: Callable[..., SASRec], weights: str, table: str) -> None:
    found = attach.freeze(quantized("ptq", 4, weights=weights, table=table))
    by_row = {name: item.grid.scale.dim() == 2 for name, item in found.items() if item.codes is not None}
    assert by_row == {name: (table if "table" in name else weights) == "per_row" for name in by_row}


def test_of_what_holds_the_weights_the_scale_alone_is_set_anew(model: SASRec) -> None:
    """The centroids of pq are trained in the place of the table; k-means would throw that away. Their grid follows them."""
    module, options = attach.load_method("pq", {"splits": 4, "centroids": 8})
    attach.attach(model, QuantParams(bits=4), module, options)
    attach.calibrate(model, [torch.randint(1, model.items + 1, (4, 6))])
    quantizer = attach.quantizers(model)["item_table.weight"]
    held = quantizer.weights()
    assert held
    scale = quantizer.grid().scale
    with torch.no_grad():
        held[0].mul_(10)
    kept = held[0].detach().clone()
    attach.renew(model, [torch.randint(1, model.items + 1, (4, 6))])
    assert torch.equal(held[0], kept)
    torch.testing.assert_close(quantizer.grid().scale, 10 * scale)


def test_a_recorder_keeps_values_from_all_of_a_batch() -> None:
    """Of 60,000 values, of which the last sixth is 1, not the first ones."""
    recorder = attach.Recorder()
    recorder((torch.arange(60_000) >= 50_000).float())
    assert float(recorder.sample().mean()) == pytest.approx(1 / 6, abs=0.02)
