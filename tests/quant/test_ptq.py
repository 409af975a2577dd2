"""Bias correction, on a model small enough to check layer by layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sasrec.models.dropout import set_dropout
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Linear
from sasrec.quant import attach, ptq
from sasrec.quant.layers import inputs_of
from sasrec.quant.quantizer import Quantizer, percentile_scale


def outputs(model: SASRec, histories: Tensor, quantized: bool) -> dict[str, Tensor]:
    """Mean output of each linear layer over the real tokens, (outputs,)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    with torch.no_grad():
        inputs = inputs_of(model, list(layers), [histories])
        return {
            name: F.linear(inputs[name], layer.weight_tap(layer.weight) if quantized else layer.weight, layer.bias).mean(0)
            for name, layer in layers.items()
        }


@pytest.mark.parametrize("bits", [2, 4])
def test_bias_correction_takes_the_mean_error_of_every_layer_away(
    quantized: Callable[..., SASRec], model: SASRec, histories: Tensor, bits: int
) -> None:
    wanted = outputs(model, histories, quantized=False)
    assert len(wanted) == 12
    live = quantized("ptq", bits)
    before = outputs(live, histories, quantized=True)
    assert min(float((before[name] - wanted[name]).abs().max()) for name in wanted) > 1e-3
    ptq.reconstruct(live, [histories], ptq.Options(), seed=0)
    assert all(torch.equal(before[name], mean) for name, mean in outputs(live, histories, quantized=True).items())
    set_dropout(live, 0.5)  # which the means are taken without
    ptq.reconstruct(live.train(), [histories], ptq.Options(bias_correction=True), seed=0)
    assert live.training
    after = outputs(live.eval(), histories, quantized=True)
    for name in wanted:  # of each on the inputs that it gets from the layers corrected before it
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_layers_in_full_precision_are_corrected_for_their_inputs(
    quantized: Callable[..., SASRec], model: SASRec, histories: Tensor
) -> None:
    wanted = outputs(model, histories, quantized=False)
    last = "blocks.1.feed_forward.outer"
    live = quantized("ptq", 2, overrides={f"{last}.weight": 32})
    assert f"{last}.weight" not in attach.quantizers(live)
    ptq.correct_biases(live, [histories])
    torch.testing.assert_close(outputs(live, histories, quantized=True)[last], wanted[last], rtol=1e-3, atol=1e-4)


def test_the_percentile_is_that_of_the_option(build: Callable[..., Quantizer]) -> None:
    values = torch.randn(1000)
    scales = [float(build("ptq", 4, values=values, range="percentile", percentile=p).grid().scale) for p in (90.0, 99.0, 100.0)]
    torch.testing.assert_close(scales, [float(values.abs().sort().values[rank - 1]) / 7 for rank in (900, 990, 1000)])


def test_of_what_cannot_be_negative_the_percentile_counts_no_negative_values() -> None:
    assert float(percentile_scale(torch.tensor([-9.0, 1, 2, 3]), 0, 3, False, 100)) == 1
