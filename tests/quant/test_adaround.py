"""AdaRound beside the paper: equations 21 to 25, and that it does what it is for."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sasrec.models.dropout import set_dropout
from sasrec.models.events import ids
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Linear, Place, Table
from sasrec.quant import attach
from sasrec.quant.adaround import (
    RECTIFIED,
    AdaRound,
    Options,
    enough,
    exponent,
    learn_rounding,
    reconstruct,
    rectified_sigmoid,
    regularization,
    starting_point,
)
from sasrec.quant.layers import STATES, inputs_of
from sasrec.quant.quantizer import Quantizer

OPTIONS = Options(iterations=300)


def test_starts_at_the_fraction() -> None:
    fraction = torch.rand(1000)
    torch.testing.assert_close(rectified_sigmoid(starting_point(fraction)), fraction)
    assert rectified_sigmoid(torch.tensor([-4.0, 0.0, 4.0])).tolist() == [0, 0.5, 1]


def test_regulariser() -> None:
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert float(regularization(h, 2.0)) == pytest.approx(0.75 + 1)
    assert float(regularization(h, 20.0)) == pytest.approx(2, abs=1e-5)


def test_annealing() -> None:
    """A warm start of a fifth without regulariser, then 20 to 2 by half a cosine."""
    assert exponent(0.0) is None and exponent(0.19) is None
    assert [exponent(0.2), exponent(0.6), exponent(1.0)] == pytest.approx([20, 11, 2])


# BRECQ (github.com/yhhhli/BRECQ, quant/adaptive_rounding.py and the round loss of quant/layer_recon.py): V at which weights of
# step 0.25 start; h, the loss at beta and its gradient to V, and what is rounded to {-4, ..., 3} steps, softly and hard.
WEIGHTS = [-0.83, -0.31, -0.12, 0.02, 0.17, 0.26, 0.49, 0.95]
STARTS = [0.61904, 0.92799, 0.06669, -1.7346, 0.61904, -2.02438, 2.02438, 1.09861]
CHOICES = [-3.0, -1.5, -0.4, 0.0, 0.3, 0.9, 2.0, 4.0]
SOFT = [0.0, 0.118911, 0.381575, 0.5, 0.589331, 0.753139, 0.956957, 1.0]
ROUND_LOSS: dict[float, tuple[float, list[float]]] = {
    20.0: (5.83039, [0, 0.04111, 0, 0, 0, -2e-05, -0.91116, 0]),
    8.0: (5.39512, [0, 0.42787, 0.00019, 0, -3e-05, -0.03364, -1.07349, 0]),
    2.0: (4.23951, [0, 0.54565, 0.27315, 0, -0.20964, -0.49939, -0.46058, 0]),
}
HARD = [-1.0, -0.5, -0.25, 0.25, 0.25, 0.5, 0.5, 0.75]


def test_agrees_with_a_public_implementation() -> None:
    scaled = torch.tensor(WEIGHTS) / 0.25
    torch.testing.assert_close(starting_point(scaled - scaled.floor()), torch.tensor(STARTS), rtol=1e-4, atol=1e-4)
    v = torch.tensor(CHOICES, requires_grad=True)
    h = rectified_sigmoid(v)
    torch.testing.assert_close(h.detach(), torch.tensor(SOFT), rtol=0, atol=1e-5)
    for beta, (loss, to_v) in ROUND_LOSS.items():
        found = regularization(h, beta)
        assert float(found.detach()) == pytest.approx(loss, abs=1e-4)
        (gradient,) = torch.autograd.grad(found, v, retain_graph=True)
        torch.testing.assert_close(gradient, torch.tensor([float(x) for x in to_v]), rtol=0, atol=2e-5)
    quantizer = AdaRound(Place("x", "weight", True, 8, 1), 3, False)
    quantizer.scale.fill_(0.25)
    quantizer.choose(torch.tensor([WEIGHTS]), h[None] >= 0.5)
    assert quantizer(torch.tensor([WEIGHTS])).tolist() == [HARD]


def layer(bits: int = 4) -> tuple[AdaRound, Tensor, Tensor]:
    """A layer of 16 x 24 and correlated inputs, with which rounding to the nearest is far from the best."""
    weight = torch.randn(16, 24)
    inputs = torch.randn(600, 6) @ torch.randn(6, 24)
    quantizer = AdaRound(Place("x", "weight", True, 24, 16), bits, True)
    quantizer.initialize(weight)
    return quantizer, weight, inputs


def learned(quantizer: AdaRound, weight: Tensor, inputs: Tensor, options: Options = OPTIONS) -> Tensor:
    return learn_rounding(weight, None, quantizer, inputs, inputs, options, torch.Generator().manual_seed(0))


def test_annealing_ends_at_hard_choices() -> None:
    """Without the regulariser h stays between; with it nearly every h has become 0 or 1 when rounding is made hard."""
    h = learned(*layer())
    assert float(((h > 0.05) & (h < 0.95)).float().mean()) < 0.02
    free = learned(*layer(), Options(iterations=300, regularizer=0.0))
    assert float(((free > 0.05) & (free < 0.95)).float().mean()) > 0.2


def test_regulariser_follows_the_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def record(h: Tensor, beta: float) -> Tensor:
        seen.append(beta)
        return regularization(h, beta)

    monkeypatch.setattr("sasrec.quant.adaround.regularization", record)
    learned(*layer(), Options(iterations=10))
    assert seen == [exponent(i / 10) for i in range(2, 10)]


def test_starts_with_the_weights_as_they_are() -> None:
    quantizer, weight, inputs = layer()
    scaled = weight / quantizer.scale
    torch.testing.assert_close(learned(quantizer, weight, inputs, Options(iterations=1, lr=1e-9)), scaled - scaled.floor())


def test_what_is_wanted_is_the_full_precision_layers_output() -> None:
    """0.4 goes up where the layer gets half of what it should: 0.5 x 1 is nearer to 1 x 0.4 than 0 is; alone it goes down."""
    weight, full = torch.tensor([[0.4]]), torch.ones(8, 1)
    quantizer = AdaRound(Place("x", "weight", True, 1, 1), 4, False)
    quantizer.scale.fill_(1.0)
    for inputs, up in ((0.5 * full, True), (full, False)):
        h = learn_rounding(weight, None, quantizer, full, inputs, OPTIONS, torch.Generator().manual_seed(0))
        assert bool(h >= 0.5) == up


def test_rounding_of_a_looked_up_table_counts_its_own_error() -> None:
    quantizer, weight, inputs = layer()
    scaled = weight / quantizer.scale
    own = []
    for looked_up in (True, False):
        generator = torch.Generator().manual_seed(0)
        h = learn_rounding(weight, None, quantizer, inputs, inputs, OPTIONS, generator, looked_up=looked_up)
        own.append(float((((scaled.floor() + h).clamp(-8, 7) - scaled) ** 2).sum()))
    assert own[0] < own[1]


def test_the_first_real_tokens_of_each_batch() -> None:
    """The same share of each batch, rounded up."""
    batches = [torch.ones(8, 5, dtype=torch.long), torch.ones(4, 5, dtype=torch.long)]
    batches[0][4:, :] = 0  # 20 real tokens of 40, and 20
    assert [len(batch) for batch in enough(batches, 20)] == [4, 2]
    assert [len(batch) for batch in enough(batches, 21)] == [5, 3]
    assert all(torch.equal(ids(some), batch) for some, batch in zip(enough(batches, 100), batches, strict=True))


def test_rounds_up_or_down_and_no_further() -> None:
    quantizer, weight, inputs = layer()
    quantizer.choose(weight, learned(quantizer, weight, inputs) >= 0.5)
    rounded = (quantizer(weight) / quantizer.scale).round()
    inside = (weight / quantizer.scale > -8) & (weight / quantizer.scale < 7)
    assert ((rounded - weight / quantizer.scale).abs()[inside] < 1).all()
    assert rounded.min() >= -8 and rounded.max() <= 7
    assert not torch.equal(rounded, (weight / quantizer.scale).round())


def test_loss_is_after_the_activation_function() -> None:
    """Outputs under 0 are cut off by the ReLU: what they get wrong must not cost anything."""
    quantizer, weight, inputs = layer(bits=2)
    bias = torch.zeros(16)
    bias[:8] = -1e4  # never active
    generator = torch.Generator().manual_seed(0)
    h = learn_rounding(weight, bias, quantizer, inputs, inputs, OPTIONS, generator, rectified=True)
    start = rectified_sigmoid(starting_point(weight / quantizer.scale - (weight / quantizer.scale).floor()))
    # Only the regulariser acts on them, and it pushes each to its nearer side.
    assert ((h[:8] >= 0.5) == (start[:8] >= 0.5)).float().mean() > 0.98
    assert ((h[8:] >= 0.5) == (start[8:] >= 0.5)).float().mean() < 0.95


def errors(model: SASRec, histories: list[Tensor]) -> dict[str, float]:
    """Squared output error of each layer against the full-precision layer, after its activation function."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    with torch.no_grad():
        with attach.recording(model, kinds=()):
            full = inputs_of(model, names, histories)
        found = inputs_of(model, names, histories)
        result = {}
        for name in full:
            module = model.scoring_table if name == STATES else model.get_submodule(name)
            assert isinstance(module, Linear | Table)
            bias = module.bias if isinstance(module, Linear) else None
            activation = torch.relu if name.endswith(RECTIFIED) else torch.nn.Identity()
            wanted = activation(F.linear(full[name], module.weight, bias))
            got = activation(F.linear(found[name], module.weight_tap(module.weight), bias))
            result[name] = float((got - wanted).square().mean())
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_beats_nearest_rounding_on_every_layer_and_the_scoring_table(
    quantized: Callable[..., SASRec], model: SASRec, tied: bool
) -> None:
    batches = [torch.randint(1, 61, (64, 8)) for _ in range(2)]
    batches[0][:20, :3] = 0
    if not tied:
        table = copy.deepcopy(model.item_table)
        model.item_table.weight_tap.scoring = False
        with torch.no_grad():
            table.weight.copy_(table.weight.roll(1, 1))
        model.output_table = table
    live = quantized("adaround", 4)
    nearest = errors(live, batches)
    scoring = live.scoring_table.weight_tap.quantizer
    assert isinstance(scoring, AdaRound)
    codes = scoring.chosen.clone()
    attach.calibrate(live, batches)
    reconstruct(live, batches, OPTIONS, seed=0)
    after = errors(live, batches)
    assert len(after) == 13
    assert {name: after[name] / nearest[name] for name in after if after[name] >= nearest[name]} == {}
    assert not torch.equal(scoring.chosen, codes)
    if not tied:  # a table that is only looked up is rounded to the nearest
        looked_up = live.item_table.weight_tap.quantizer
        assert isinstance(looked_up, Quantizer)
        assert torch.equal(live.item_table.all(), looked_up.grid().quantize(live.item_table.weight))
    assert not live.training


def test_same_seed_same_codes(quantized: Callable[..., SASRec], histories: Tensor) -> None:
    live = quantized("adaround", 4)
    twin = copy.deepcopy(live)
    for each in (live, twin):
        reconstruct(each, [histories], Options(iterations=20), seed=3)
    a, b = attach.freeze(live), attach.freeze(twin)
    codes = {name: (item.codes, b[name].codes) for name, item in a.items() if item.codes is not None}
    assert len(codes) == 14
    assert all(other is not None and torch.equal(own, other) for own, other in codes.values())


def test_layers_left_in_full_precision_are_left_alone(quantized: Callable[..., SASRec], histories: Tensor) -> None:
    name = "blocks.0.attention.query.weight"
    live = quantized("adaround", 4, overrides={name: 32, "item_table.weight": 1})
    reconstruct(live, [histories], Options(iterations=5), seed=0)
    assert name not in attach.freeze(live)


@pytest.mark.parametrize("tied", [True, False])
def test_order_is_that_of_the_forward_pass(
    quantized: Callable[..., SASRec], model: SASRec, histories: Tensor, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """A tied table first, because it is looked up before anything else runs; a table of its own for scoring last."""
    if not tied:
        model.output_table = copy.deepcopy(model.item_table)
        model.item_table.weight_tap.scoring = False
    live = quantized("adaround", 4)
    seen: list[str] = []

    def record(weight: Tensor, *arguments: object, **options: object) -> Tensor:
        seen.extend(name for name, parameter in live.named_parameters() if parameter.data_ptr() == weight.data_ptr())
        return torch.zeros_like(weight)

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", record)
    reconstruct(live, [histories], Options(), seed=0)
    attention = [f"attention.{part}" for part in ("query", "key", "value", "output")]
    layers = [*attention, "feed_forward.inner", "feed_forward.outer"]
    linears = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]
    assert seen == (["item_table.weight", *linears] if tied else [*linears, "output_table.weight"])


def test_each_layer_learns_on_what_the_layers_before_it_give(
    quantized: Callable[..., SASRec], model: SASRec, histories: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its target is the full-precision layer on full-precision inputs; its own inputs are those of the model as rounded so far,
    in which the layers before it already have other codes than the nearest."""
    live = quantized("adaround", 3)
    names = [name for name, module in live.named_modules() if isinstance(module, Linear)]
    by_weight = {live.get_submodule(name).weight.data_ptr(): name for name in names}  # type: ignore[operator]
    with torch.no_grad(), attach.recording(live, kinds=()):
        full_precision = inputs_of(live, names, [histories])
    with torch.no_grad():
        nearest = inputs_of(live, names, [histories])
    moved: list[str] = []

    def record(
        weight: Tensor,
        bias: Tensor | None,
        quantizer: AdaRound,
        full: Tensor,
        inputs: Tensor,
        *_: object,
        rectified: bool,
        looked_up: bool,
    ) -> Tensor:
        name = by_weight.get(weight.data_ptr())
        assert looked_up == (name is None) and rectified == bool(name and name.endswith("feed_forward.inner"))
        if name is not None:
            assert bias is not None and torch.equal(bias, live.get_parameter(f"{name}.bias"))
        if name is not None:
            with torch.no_grad():
                now = inputs_of(live, [name], [histories])[name]
            assert torch.equal(full, full_precision[name]) and torch.equal(inputs, now)
            assert not torch.equal(inputs, full)
            moved.extend([name] if not torch.equal(inputs, nearest[name]) else [])
        return (torch.arange(weight.numel()) % 2).view_as(weight).float()  # anything but the nearest

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", record)
    set_dropout(live, 0.5)  # which nothing is learned with
    reconstruct(live.train(), [histories], Options(), seed=0)
    assert moved == names and live.training


def test_what_is_learned_is_clipped_as_what_ships() -> None:
    """With 2 bits 5 becomes 1: what is missing of the sum can only come from the two small weights, which both go up."""
    quantizer = AdaRound(Place("x", "weight", True, 3, 1), 2, False)
    quantizer.scale.fill_(1.0)
    inputs = torch.randn(600, 1) @ torch.ones(1, 3)
    assert (learned(quantizer, torch.tensor([[5.0, 0.5, 0.4]]), inputs)[0, 1:] >= 0.5).all()


def test_without_inputs_a_looked_up_table_is_rounded_to_the_nearest() -> None:
    """Its own error is a sum over its numbers, each of which is least there."""
    quantizer, weight, inputs = layer()
    scaled = weight / quantizer.scale
    generator = torch.Generator().manual_seed(0)
    h = learn_rounding(weight, None, quantizer, 0 * inputs, 0 * inputs, OPTIONS, generator, looked_up=True)
    inside = (scaled > -8) & (scaled < 7)
    assert torch.equal((h >= 0.5)[inside], (scaled - scaled.floor() >= 0.5)[inside])


def test_a_table_of_its_own_is_learned_on_the_states_of_the_quantized_model(
    quantized: Callable[..., SASRec], model: SASRec, histories: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.output_table = copy.deepcopy(model.item_table)
    model.item_table.weight_tap.scoring = False
    live = quantized("adaround", 3)
    with torch.no_grad(), attach.recording(live, kinds=()):
        wanted = inputs_of(live, [], [histories])[STATES]
    given: list[Tensor] = []

    def record(
        weight: Tensor, bias: object, quantizer: object, full: Tensor, inputs: Tensor, *_: object, **__: object
    ) -> Tensor:
        if weight.data_ptr() == model.output_table.weight.data_ptr():  # type: ignore[union-attr]
            given.extend([full, inputs, inputs_of(live, [], [histories])[STATES].detach()])
        return torch.zeros_like(weight)

    monkeypatch.setattr("sasrec.quant.adaround.learn_rounding", record)
    reconstruct(live, [histories], Options(), seed=0)
    full, inputs, now = given
    assert torch.equal(full, wanted) and torch.equal(inputs, now) and not torch.equal(inputs, full)
