"""A scale per feature for what blocks pass on to each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Place, taps
from sasrec.quant import attach
from sasrec.quant.features import PerFeature
from sasrec.quant.quantizer import Quantizer
from sasrec.quant.ste import STE

STREAM = {"embedding", "blocks.0.output", "blocks.1.output"}
METHODS = ["ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround"]


def wrapped(method: str, bits: int, values: Tensor, **options: Any) -> PerFeature:
    module, chosen = attach.load_method(method, options)
    inner = module.build(Place("x", "activation", True, values.shape[1], stream=True), bits, False, chosen)
    quantizer = PerFeature(inner)
    quantizer.initialize(values)
    return quantizer


def test_one_wide_feature_does_not_coarsen_the_others() -> None:
    """Features of sizes 1 and 100 have 4 levels each; with one scale the narrow one would be 0 everywhere."""
    values = torch.tensor([[1.0, 100.0], [-1.0, -100.0]])
    quantizer = wrapped("ptq", 2, values, range="minmax")
    assert quantizer.unit.tolist() == [1.0, 100.0]
    assert quantizer.grid().scale.tolist() == [1.0, 100.0]
    found = quantizer.eval()(torch.tensor([[0.6, 60.0], [-1.6, -160.0], [0.4, 300.0]]))
    assert found.tolist() == [[1.0, 100.0], [-2.0, -200.0], [0.0, 100.0]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_trained_is_what_ships(method: str, bits: int) -> None:
    """In evaluation to the bit; in training but for values half-way between two levels."""
    values = torch.randn(500, 6) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0])
    quantizer = wrapped(method, bits, values)
    x = values[:50].view(5, 10, 6)
    grid = quantizer.grid()
    assert grid.scale.shape == (6,)
    assert torch.equal(quantizer.eval()(x), grid.quantize(x))
    assert torch.equal(quantizer(x), grid.decode(grid.encode(x)))
    quantizer.start_epoch(1, 1, 0)  # ste observes no more
    near = (quantizer.train()(x) - grid.quantize(x)).abs() <= 1e-5 * x.abs()
    assert float(near.float().mean()) > 0.99
    again = quantizer.eval()(grid.quantize(x))
    torch.testing.assert_close(again, grid.quantize(x))


def test_the_gradient_is_that_of_the_method_in_units() -> None:
    """y = u q(x / u): d/dx is q's at x / u; what q learns gets the gradient of all features times their units."""
    unit = torch.tensor([1.0, 10.0])
    values = torch.randn(200, 2) * unit
    quantizer = wrapped("lsq", 4, values).train()
    x, towards = values[:20].clone().requires_grad_(), torch.randn(20, 2)
    (quantizer(x) * towards).sum().backward()
    plain = quantizer.inner
    (step,) = plain.parameters()
    learned, step.grad = step.grad, None
    scaled = (x.detach() / quantizer.unit).requires_grad_()
    (plain(scaled) * towards * quantizer.unit).sum().backward()
    assert x.grad is not None and scaled.grad is not None and learned is not None and step.grad is not None
    torch.testing.assert_close(x.grad, scaled.grad / quantizer.unit)
    torch.testing.assert_close(learned, step.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_fewer_passes_are_the_same(method: str, bits: int) -> None:
    """`by_feature` of a method against what it stands for: values, gradients, and what is gathered in training. Units are
    powers of two, with which nothing is rounded on the way."""
    values = torch.randn(200, 3) * torch.tensor([0.5, 2.0, 16.0])
    results = []
    for plain in (False, True):
        quantizer = wrapped(method, bits, values).train()
        quantizer.unit.copy_(torch.tensor([0.5, 2.0, 16.0]))
        inner = quantizer.inner
        x = (values[:40] * 1.5).requires_grad_()
        found = Quantizer.by_feature(inner, x, quantizer.unit, None) if plain else quantizer(x)
        towards = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(found, (x, *inner.parameters()), towards)
        results.append([found, *gradients, *inner.state_dict().values()])
    assert len(results[0]) == len(results[1])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("method", METHODS)
def test_the_stream_alone_has_a_scale_per_feature(quantized: Callable[..., SASRec], method: str) -> None:
    frozen = attach.freeze(quantized(method, 4))
    assert {name for name, item in frozen.items() if item.grid.scale.shape == (16,)} == STREAM
    frozen = attach.freeze(quantized(method, 4, stream="per_tensor"))
    assert not [name for name, item in frozen.items() if item.codes is None and item.grid.scale.dim()]


def test_units_are_the_sizes_of_real_tokens_features(
    model: SASRec, histories: Tensor, quantized: Callable[..., SASRec]
) -> None:
    with torch.no_grad():
        x = model.encode(histories)  # before quantizers are there
    seen: list[Tensor] = []
    hook = taps(model)["blocks.1.output"].register_forward_hook(lambda tap, given, out: seen.append(given[0]))
    with torch.no_grad():
        assert torch.equal(model.encode(histories), x)
    hook.remove()
    real = seen[0][histories != 0]
    quantizer = attach.quantizers(quantized("ptq", 8, {"range": "minmax"}))["blocks.1.output"]
    assert isinstance(quantizer, PerFeature)
    # The two ends that are added as tokens of zeros are a part in some forty of a feature's squares at most.
    torch.testing.assert_close(quantizer.unit, real.square().mean(0).sqrt(), rtol=0.1, atol=0)
    # Nothing of what was seen is clipped, and half a step is the largest error, feature by feature.
    assert bool(((quantizer.eval()(real) - real).abs() <= quantizer.grid().scale * 0.5001).all())


def test_features_of_zeros_have_a_unit() -> None:
    zeros = wrapped("lsq", 4, torch.zeros(10, 3))
    assert zeros.unit.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(zeros.eval()(torch.zeros(2, 3)), torch.zeros(2, 3))
    some = wrapped("lsq", 4, torch.tensor([[1024.0, 0.0], [-1024.0, 0.0]]))
    assert some.unit.tolist() == [1024.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_computes_the_same(method: str) -> None:
    values = torch.randn(100, 4) * torch.tensor([1.0, 2.0, 5.0, 0.1])
    first, other = wrapped(method, 3, values), wrapped(method, 3, torch.ones(5, 4))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(values), other.eval()(values))


def test_what_it_holds_is_told_of_epochs_and_asked_for_its_penalty(quantized: Callable[..., SASRec]) -> None:
    ste = quantized("ste", 4)
    attach.own_training(ste, 0).on_epoch(3, 4)
    held = attach.quantizers(ste)["embedding"]
    assert isinstance(held, PerFeature) and isinstance(held.inner, STE)
    assert not held.inner.observing
    pact = quantized("pact", 4, {"decay": 1.0})
    penalty = attach.own_training(pact, 0).penalty()
    assert penalty is not None
    alphas = [parameter for name, parameter in pact.named_parameters() if name.endswith("log_alpha")]
    assert len(alphas) == len([name for name, tap in taps(pact).items() if tap.kind == "activation"])
    torch.testing.assert_close(penalty, torch.stack([alpha.exp().square() for alpha in alphas]).sum())


def test_the_sample_has_the_end_that_reaches_furthest() -> None:
    """Of 4,000 tokens 3,125 x 8 values are drawn; the ends of all are there whatever is drawn."""
    x = torch.randn(1, 4000, 8)
    x[0, 1234, 5] = 50.0
    x[0, 77, 2] = -60.0
    recorder = attach.Recorder(8)
    recorder(x)
    sample = recorder.sample()
    assert sample.shape == (3125 + 2, 8)
    assert sample[-2].tolist() == [0, 0, -60, 0, 0, 0, 0, 0]
    assert sample[-1].tolist() == [0, 0, 0, 0, 0, 50, 0, 0]
    flat = attach.Recorder()
    flat(x)
    assert flat.sample().shape == (25_000 + 2,)
    assert flat.sample()[-2:].tolist() == [-60, 50]


def method_of(quantizer: Quantizer) -> str:
    return type(quantizer.method).__name__


def test_method_names_the_quantizer_that_learns() -> None:
    quantizer = wrapped("lsq", 4, torch.randn(10, 2))
    assert method_of(quantizer) == "LSQ" == method_of(quantizer.inner)


def test_padding_has_no_part_in_what_the_method_watches() -> None:
    """Running ranges of `ste` are those of real tokens, whatever stands in the others."""
    values, mask = torch.randn(200, 3), torch.tensor([[False, True, True, True]])
    ranges = []
    for padding in (0.0, 100.0):
        x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
        x[~mask] = padding
        quantizer = wrapped("ste", 4, values).train()
        before = quantizer.grid().scale
        quantizer(x, mask=mask)
        assert not torch.equal(quantizer.grid().scale, before)
        ranges.append(quantizer.grid().scale)
    assert torch.equal(*ranges)


def test_gradients_of_the_stream_are_quantized_too_but_at_padding() -> None:
    """`methods.dorefa.gradient_bits`, of values well inside their grid."""
    quantizer = wrapped("dorefa", 8, torch.randn(200, 3), gradient_bits=2).train()
    quantizer.start_epoch(0, 1, 0)
    x, gradient = torch.randn(2, 4, 3).mul(0.1).requires_grad_(), torch.randn(2, 4, 3)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, 0] = False
    quantizer(x, mask=mask).backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, 0], gradient[:, 0])
    assert not torch.allclose(x.grad[:, 1:], gradient[:, 1:])
