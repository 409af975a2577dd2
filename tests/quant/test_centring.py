"""Means that go into biases before a model is quantized."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.models.sasrec import Block, SASRec
from sasrec.quant import attach
from sasrec.quant.centring import centre
from sasrec.quant.layers import inputs_of
from tests.quant.conftest import ITEMS, PARAMS


def random_model(params: ModelParams) -> SASRec:
    """Every parameter at random: biases and the gains of norms, too."""
    torch.manual_seed(1)
    model = SASRec(params, ITEMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.item_table.weight[0] = 0
    return model


@pytest.mark.parametrize("block", ["pre_norm", "post_norm", "original"])
def test_the_model_computes_the_same_about_other_means(
    block: Literal["pre_norm", "post_norm", "original"], histories: Tensor
) -> None:
    model = random_model(replace(PARAMS, block=block)).eval()
    real = histories != 0
    with torch.no_grad():
        before = model.encode(histories)[real]
    centre(model, [histories])
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model.encode(histories)[real], before, rtol=1e-4, atol=1e-4)
    with attach.recording(model) as recorders, torch.no_grad():
        model.encode(histories)
    means = {name: recorder.parts[0].view(-1, PARAMS.hidden).mean(0) for name, recorder in recorders.items() if recorder.parts}
    centred = ["attention.key"] + ["queries", "feed_forward.input"] * (block == "pre_norm")
    for name in (f"blocks.{i}.{own}" for i in range(2) for own in centred):
        torch.testing.assert_close(means[name], torch.zeros(PARAMS.hidden), rtol=0, atol=1e-4)


def test_readers_take_what_the_norm_gives_up(histories: Tensor) -> None:
    model = random_model(PARAMS)
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        mean = inputs_of(model.eval(), ["blocks.0.feed_forward.inner"], [histories])["blocks.0.feed_forward.inner"].mean(0)
    norm, inner = block.feed_forward_norm, block.feed_forward.inner
    was, bias = norm.bias.clone(), inner.bias.clone()
    centre(model.train(), [histories])
    assert model.training
    torch.testing.assert_close(norm.bias, was - mean)
    torch.testing.assert_close(inner.bias, bias + inner.weight @ mean)
    assert torch.equal(block.attention.key.bias, torch.zeros(PARAMS.hidden))


def test_padding_has_no_part_in_the_means(histories: Tensor) -> None:
    found = []
    for batch in (histories, torch.nn.functional.pad(histories, (2, 0))):
        model = random_model(PARAMS)
        centre(model, [batch])
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


def test_means_are_taken_without_dropout_and_the_mode_stays() -> None:
    histories, found = torch.randint(1, ITEMS + 1, (8, 6)), []
    for training in (True, False):
        model = random_model(replace(PARAMS, dropout=0.5)).train(training)
        centre(model, [histories])
        assert model.training == training
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
