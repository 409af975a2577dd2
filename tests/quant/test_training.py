"""What a real optimizer does to the quantizers: the Trainer's, on a model with all of them in place."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Linear
from sasrec.quant import attach
from sasrec.quant.schedule import Schedule
from sasrec.quant.together import weights_together
from sasrec.training import Trainer
from tests.conftest import SmallStore

HISTORIES = [torch.tensor([[0, 0, 1, 2, 3, 4], [8, 9, 10, 11, 12, 13], [30, 31, 32, 33, 34, 35]])]
TRAIN = TrainParams(loss="cross_entropy", epochs=2, batch_size=16, min_batches=4, lr=0.01, schedule="constant", warmup=0.0)

# The trained methods, with the parameters that their papers learn; PACT without its L2 term, which would move any alpha.
LEARNED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("ste", {}, set()),
    ("lsq", {"lr": 0.01}, {"log_step"}),
    ("lsq", {"lr": 0.01, "offset": True}, {"log_step", "offset"}),
    ("pact", {"lr": 0.01, "decay": 0.0}, {"log_alpha"}),
    ("dorefa", {}, set()),
    ("apot", {"lr": 0.01}, {"log_alpha"}),
]
methods = pytest.mark.parametrize(
    ("method", "options", "learned"),
    LEARNED,
    ids=[f"{name}{'+' * bool(options.get('offset'))}" for name, options, _ in LEARNED],
)


def trainer_of(method: str, options: dict[str, Any], quant: QuantParams, ffn_dim: int | None = None) -> tuple[SASRec, Trainer]:
    """A model of random but sizable weights with everything quantized, and what trains it."""
    torch.manual_seed(3)
    params = ModelParams(max_len=6, hidden=16, blocks=2, heads=2, ffn_dim=ffn_dim, dropout=0.0, attention_output=True)
    model = SASRec(params, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    rng = np.random.default_rng(0)
    store = SmallStore([rng.integers(1, 41, 12).tolist() for _ in range(40)], 40)
    module, chosen = attach.load_method(method, options)
    schedule = Schedule(model, quant, module, chosen, HISTORIES, TRAIN.epochs)
    return model, Trainer(model, store, TRAIN, 0, device=torch.device("cpu"), extras=schedule.extras(0))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of the quantizers in place."""
    found = {}
    for name, quantizer in attach.quantizers(model).items():
        found.update({f"{name}/{own}": parameter for own, parameter in quantizer.named_parameters()})
    return found


@methods
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_learned_is_in_the_optimizer_and_moves(
    method: str, options: dict[str, Any], learned: set[str], bits: int
) -> None:
    model, trainer = trainer_of(method, options, QuantParams(bits=bits))
    if method == "pact":
        # Its alpha learns from what it clips alone, and what attention makes has no tails: its weights end at 1, its averages
        # within the values. So these alphas start at half of what calibration gives, and clip something.
        for name, alpha in own_parameters(model).items():
            if name.endswith(("attention.weights/log_alpha", "attention.context/log_alpha")):
                alpha.data.sub_(np.log(2))
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert {name.rsplit("/", 1)[1].removeprefix("inner.") for name in before} == learned
    trainer.epoch(1)
    groups = trainer.optimizer.param_groups
    after = own_parameters(model)
    assert after.keys() == before.keys()
    # Those of the quantizers that compute now, each once, and in the group of its own rate.
    assert sorted(map(id, after.values())) == (sorted(map(id, groups[1]["params"])) if learned else [])
    assert all(group["weight_decay"] == 0 and group["lr"] == options["lr"] for group in groups[1:])
    still = [name for name, parameter in after.items() if torch.equal(parameter, before[name])]
    assert not still
    # And so does every weight behind its rounding.
    assert not [name for name, value in weights.items() if torch.equal(model.get_parameter(name), value)]


def test_the_decay_of_clips_is_part_of_the_loss() -> None:
    """With so much of it that what else alpha learns from does not matter, every clip shrinks."""
    model, trainer = trainer_of("pact", {"lr": 0.01, "decay": 100.0}, QuantParams(bits=4))
    alphas = own_parameters(model)
    before = {name: float(alpha.detach()) for name, alpha in alphas.items()}
    penalty = trainer.extras.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(100 * sum(np.exp(2 * alpha) for alpha in before.values()), rel=1e-4)
    trainer.epoch(1)
    assert before and not [name for name, alpha in alphas.items() if float(alpha.detach()) >= before[name]]


@methods
@pytest.mark.parametrize("tables", [2, 1])
def test_a_later_width_is_learned_by_the_same_optimizer(
    method: str, options: dict[str, Any], learned: set[str], tables: int
) -> None:
    """Quantizers of a later phase are initialized when it begins; what they learn with is what the optimizer has known."""
    model, trainer = trainer_of(method, options, QuantParams(bits=2, embedding_bits=tables, progressive=(4,)))
    trainer.epoch(1)
    trainer.extras.on_epoch(1, TRAIN.epochs)  # the second phase begins
    assert {quantizer.bits for quantizer in attach.quantizers(model).values()} == {2, tables}
    start = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    trainer.epoch(2)
    known = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    moved = own_parameters(model)
    assert {id(parameter) for parameter in moved.values()} <= known
    assert not [name for name, parameter in moved.items() if torch.equal(parameter, start[name])]


@methods
def test_one_bit_tables_learn(method: str, options: dict[str, Any], learned: set[str]) -> None:
    """Signs and scales of rows follow the loss, beside an encoder of 8 bits."""
    model, trainer = trainer_of(method, options, QuantParams(bits=8, embedding_bits=1))
    table = model.item_table
    before = table.all().detach().clone()
    trainer.epoch(1)
    after = table.all().detach()
    assert not torch.equal(after.abs(), before.abs())  # scales
    assert not torch.equal(after.sign(), before.sign())
    assert {len(row.abs().unique()) for row in after} == {1}


def test_without_a_rate_each_width_has_its_own() -> None:
    """In the optimizer, not in a table alone: 2-bit tables, 4-bit weights, 8-bit activations."""
    _, trainer = trainer_of("lsq", {}, QuantParams(bits=8, weight_bits=4, embedding_bits=2))
    trainer.epoch(1)
    weights, *own = trainer.optimizer.param_groups
    assert weights["lr"] == TRAIN.lr
    assert {round(group["lr"], 9): {parameter.numel() for parameter in group["params"]} for group in own} == {
        0.01: {41, 6}, 0.003: {16}, 0.001: {1},
    }  # fmt: skip


def test_rates_of_both_groups_follow_the_schedule() -> None:
    """A method's own rate is relative to the weights' along the whole schedule."""
    params = dataclasses.replace(TRAIN, schedule="cosine", epochs=2)
    _, trainer = trainer_of("lsq", {"lr": 0.05}, QuantParams(bits=4))
    trainer.params = params
    trainer.epoch(2)
    weights, own = (group["lr"] for group in trainer.optimizer.param_groups)
    assert 0 < weights < params.lr and own / weights == pytest.approx(0.05 / params.lr)


@methods
@pytest.mark.parametrize("ffn_dim", [16, 24])
def test_weights_that_are_quantized_together_are_the_same(
    method: str, options: dict[str, Any], learned: set[str], ffn_dim: int
) -> None:
    """Weights to the bit, and gradients of all that is trained. 24: those of as many inputs but more rows are with the others,
    and those of more inputs by themselves."""
    model, _ = trainer_of(method, options, QuantParams(bits=4, overrides={"blocks.0.attention.key.weight": 2}), ffn_dim)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    towards = [torch.randn_like(layer.weight) for layer in layers]
    trained = [*(layer.weight for layer in layers), *own_parameters(model).values()]

    def quantized() -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        values = [layer.weight_tap(layer.weight) for layer in layers]
        total = torch.stack([(own * to).sum() for own, to in zip(values, towards, strict=True)]).sum()
        return values, list(torch.autograd.grad(total, trained, allow_unused=True))

    apart, wanted = quantized()
    with weights_together(layers):
        assert sum(layer.weight_tap.given is None for layer in layers) == 1  # the one of another width
        together, found = quantized()
    assert all(map(torch.equal, apart, together))
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one)
    # Afterwards they follow the weights again.
    with torch.no_grad():
        layers[0].weight.mul_(2)
    assert not torch.equal(layers[0].weight_tap(layers[0].weight), apart[0])


@methods
def test_a_step_quantizes_weights_of_one_shape_at_once(method: str, options: dict[str, Any], learned: set[str]) -> None:
    model, trainer = trainer_of(method, options, QuantParams(bits=4))
    calls: list[int] = []
    steps: list[int] = []
    for quantizer in attach.quantizers(model).values():
        if quantizer.place.kind == "weight":
            quantizer.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.epoch(1)
    # Two blocks of six matrices of 16 rows.
    assert len(steps) > 1 and calls == [12 * 16] * len(steps)


def test_weights_with_one_scale_each_are_quantized_apart() -> None:
    model, _ = trainer_of("lsq", {"lr": 0.01}, QuantParams(bits=4, weights="per_tensor"))
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    with weights_together(layers):
        assert all(layer.weight_tap.given is None for layer in layers)


@methods
def test_a_step_quantizes_the_whole_table_once(method: str, options: dict[str, Any], learned: set[str]) -> None:
    """Though it looks rows up, and scores with all of them."""
    model, trainer = trainer_of(method, options, QuantParams(bits=4))
    whole: list[int] = []
    steps: list[int] = []
    model.item_table.weight_tap.register_forward_hook(lambda tap, given, out: whole.append(1) if len(given) == 1 else None)
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.epoch(1)
    assert 1 < len(steps) == len(whole)


@methods
def test_a_table_that_is_quantized_once_has_the_same_gradients(method: str, options: dict[str, Any], learned: set[str]) -> None:
    model, _ = trainer_of(method, options, QuantParams(bits=4))
    table = model.item_table
    ids = torch.randint(0, 41, (2, 60))
    towards = torch.randn(2, 60, 16)

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        uses = (
            (table.lookup(ids[0]) * towards[0]).sum() + (table.lookup(ids[1]) * towards[1]).sum() + table.all().square().sum()
        )
        return uses, list(torch.autograd.grad(uses, list(table.parameters())))

    apart, wanted = gradients()
    with table.quantized_once():
        together, found = gradients()
    assert torch.equal(apart, together)
    torch.testing.assert_close(found, wanted)
    # Afterwards it follows the weights again.
    before = table.all().detach().clone()
    with torch.no_grad():
        table.weight.mul_(2)
    assert not torch.equal(table.all(), before)
