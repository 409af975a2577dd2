"""A GPU is never waited for while an epoch runs, found out without one; and with one, that it computes what the CPU does.

torch can make fake tensors of a device that is not there: they have shapes, types and a device, but no values. What needs a
value then fails: a number or a shape that depends on the data, which are what a GPU has to be waited for, and so do factors on
two devices. Fake `cuda` needs a build of torch for CUDA; `lazy`, a device type that every build knows, does as well.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sasrec import evaluation
from sasrec.captured import CapturedSteps
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.data.batches import epoch_batches
from sasrec.distillation import Distillation
from sasrec.models.cafe import CAFE
from sasrec.models.events import Events
from sasrec.models.facts import Facts
from sasrec.models.sasrec import SASRec
from sasrec.models.transfer import send
from sasrec.process import set_up
from sasrec.quant.attach import attach, calibrate, load_method, own_training
from sasrec.quant.calibration import calibration
from sasrec.quant.lsq import LearnedOffset
from sasrec.quant.quantizer import Quantizer
from sasrec.training import Extras, Trainer
from tests.conftest import SmallStore

CPU, AWAY = torch.device("cpu"), torch.device("lazy")
SMALL: dict[str, Any] = {"max_len": 8, "hidden": 8, "blocks": 1, "dropout": 0.2}
TRAIN: dict[str, Any] = {"batch_size": 8, "min_batches": 1, "negatives": 4, "epochs": 2, "clip_norm": 1.0}
ITEMS = 20


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Copies that a fake tensor lets pass, but a GPU is waited for: to the host, and from it where nothing says otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            before, after = args[0].device.type, (kwargs.get("device") or args[0].device).type
            if before != after and (after == "cpu" or not kwargs.get("non_blocking")):
                raise Waited(f"a copy from {before} to {after}")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default) and any(
            index is not None and index.device.type != args[0].device.type for index in args[1]
        ):
            raise Waited("an index that is on the host")
        return func(*args, **kwargs)


WAITING = (Waited, DataDependentOutputException, DynamicOutputShapeException)


@contextmanager
def away(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The trainer's tensors on a device that is not there. The one wait that an epoch is allowed, for its mean loss, and the
    steps are noted in the list."""
    noted: list[str] = []
    modules = [trainer.model, *([trainer.second] if trainer.second is not None else [])]
    if trainer.extras.distill is not None:
        modules.append(trainer.extras.distill.teacher)  # type: ignore[attr-defined]
    new: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=AWAY)
            new[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return new[id(tensor)]

    def mean(self: FakeTensor) -> list[float]:
        noted.append("mean")
        return [0.0] * self.numel()

    descend = trainer.descend

    def step(loss: Tensor) -> None:
        descend(loss)
        noted.append("step")

    monkeypatch.setattr(FakeTensor, "tolist", mean)
    monkeypatch.setattr(trainer, "descend", step)
    # There is no generator for this device, and no fused kernel, of which a fake tensor wants to know the shapes alone.
    monkeypatch.setattr(Quantizer, "seed_generator", lambda *_: None)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None, raising=False)
    with FakeTensorMode():
        for module in (part for whole in modules for part in whole.modules()):
            for kind in (module._parameters, module._buffers):
                kind.update({name: moved(tensor) for name, tensor in kind.items() if tensor is not None})
        if trainer.extras.distill is not None:
            trainer.extras.distill.table = moved(trainer.extras.distill.table)  # type: ignore[attr-defined]
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                group["params"] = [moved(parameter) for parameter in group["params"]]
        trainer.weights = [moved(parameter) for parameter in trainer.weights]
        trainer.device = trainer.task.device = AWAY
        with NoWaiting():
            yield noted


def walks() -> SmallStore:
    """Histories of several lengths, the shortest with one pair to train on, with ratings and times."""
    rng = np.random.default_rng(0)
    store = SmallStore([rng.integers(1, ITEMS + 1, n).tolist() for n in (4, 5, 9, 14, 22, 7, 7, 7, 12, 4, 4, 6)], ITEMS)
    store.ratings = rng.integers(1, 6, len(store.items)).astype(np.float32)
    store.timestamps = np.arange(len(store.items), dtype=np.int64) * 3600
    return store


def of_model(store: SmallStore, device: torch.device = CPU, **options: Any) -> Any:
    torch.manual_seed(0)
    params = ModelParams(**SMALL | options)
    if params.kind == "cafe":
        return CAFE(params, torch.tensor([0, *(1 + i % 4 for i in range(ITEMS))])).to(device)
    return SASRec(params, ITEMS, Facts.of_data(params, store, [("a", "b")[: 1 + i % 2] for i in range(ITEMS)])).to(device)


def of_method(store: SmallStore, model: Any, method: str, options: dict[str, Any], **quant: Any) -> Extras:
    module, chosen = load_method(method, options)
    attach(model, QuantParams(**{"bits": 4} | quant), module, chosen)
    device = next(model.parameters()).device
    calibrate(model, calibration(store, model, 8, 2, 0, device))
    return own_training(model, 0)


def expect_no_wait(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    params = trainer.params
    drawn = epoch_batches(trainer.store, 8, params.batch_size, params.windows == "all", 0, 1, params.batching)
    with away(trainer, monkeypatch) as noted:
        trainer.epoch(1)
    assert noted == ["step"] * drawn.count + ["mean"]
    assert drawn.count > 1


@pytest.mark.parametrize("batching", ["packed", "shuffled", "bucketed"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "gbce", "sampled_softmax"])
def test_an_epoch_waits_at_its_end_alone(loss: Any, batching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = walks()
    trainer = Trainer(of_model(store), store, TrainParams(**TRAIN, loss=loss, batching=batching), 0, device=CPU)
    expect_no_wait(trainer, monkeypatch)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"block": "original", "position": "left", "heads": 2, "tied": False}, {"batching": "shuffled"}),
        ({"heads": 2, "local_heads": 1, "local_window": 3, "attention_output": True}, {"optimizer": "adamw"}),
        ({"side": ("rating", "category", "recency"), "time_bias": True}, {"rating_weight": 0.5}),
        ({"side": ("rating", "recency")}, {"batching": "bucketed"}),
        ({}, {"loss": "sampled_softmax", "negative_sampling": "popularity"}),
        ({}, {"loss": "bpr"}),
        ({"kind": "cafe", "heads": 2, "local_heads": 1}, {}),
        ({"kind": "cafe", "heads": 2, "local_heads": 1}, {"loss": "gbce", "item_loss": "items", "batching": "shuffled"}),
    ],
)
def test_options_of_models_and_training_do_not_wait(
    model: dict[str, Any], train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = walks()
    expect_no_wait(Trainer(of_model(store, **model), store, TrainParams(**TRAIN | train), 0, device=CPU), monkeypatch)


@pytest.mark.parametrize(
    ("method", "options", "quant"),
    [
        *((method, {}, {}) for method in ("control", "ste", "lsq", "pact", "dorefa", "apot")),
        ("lsq", {"offset": True}, {}),
        ("lsq", {}, {"embedding_bits": 1}),
        ("pact", {"weights": "sawb"}, {}),
        ("dorefa", {"gradient_bits": 6}, {"table": "per_tensor"}),
        ("ste", {}, {"table": "per_tensor", "table_rounding": "stochastic"}),
        ("apot", {}, {"bits": 3, "table": "per_tensor", "weights": "per_tensor", "table_rounding": "stochastic"}),
    ],
)
def test_training_with_quantizers_does_not_wait(
    method: str, options: dict[str, Any], quant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = walks()
    model = of_model(store)
    extras = of_method(store, model, method, options, **quant)
    # Such steps of a quantizer's own as the renewal of statistics are part of an epoch.
    expect_no_wait(Trainer(model, store, TrainParams(**TRAIN), 0, device=CPU, extras=extras), monkeypatch)


@pytest.mark.parametrize(("loss", "sampled"), [("cross_entropy", None), ("bce", 8)])
def test_distillation_does_not_wait(loss: Any, sampled: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = walks()
    model = of_model(store)
    extras = Extras(distill=Distillation(of_model(store), model, 0.5, sampled, 0))
    expect_no_wait(Trainer(model, store, TrainParams(**TRAIN, loss=loss), 0, device=CPU, extras=extras), monkeypatch)


def test_sparse_tables_are_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients have as many rows as a step looked up. As in the documentation: change it when this fails."""
    store = walks()
    trainer = Trainer(of_model(store), store, TrainParams(**TRAIN, loss="bce", table_optimizer="sparse"), 0, device=CPU)
    with away(trainer, monkeypatch), pytest.raises(WAITING):
        trainer.epoch(1)


class Reached(Exception):
    pass


def test_ranking_and_validation_wait_when_all_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    store = walks()

    def reached(undefined: Any) -> None:
        raise Reached(len(undefined))

    monkeypatch.setattr(evaluation, "refuse_nan", reached)
    for select_on in ("full", "sampled"):
        trainer = Trainer(of_model(store), store, TrainParams(**TRAIN, select_on=select_on), 0, device=CPU)
        with away(trainer, monkeypatch) as noted, pytest.raises(Reached):
            trainer.validate()
        assert noted == ["mean"]
    blocks = len(list(evaluation.blocks(store, store.held("test"), 8, 4)))
    trainer = Trainer(of_model(store), store, TrainParams(**TRAIN), 0, device=CPU)
    with away(trainer, monkeypatch), pytest.raises(Reached, match=f"^{blocks}$"):
        evaluation.rank(evaluation.model_scorer(trainer.model), store, "test", 8, batch_size=4, device=AWAY)
    assert blocks > 1


def planted(what: str, x: Tensor) -> Tensor:
    """x, after something that a GPU has to be waited for."""
    if what == "item":
        x.sum().item()
    elif what == "bool":
        assert bool((x == x).all())
    elif what == "mask":
        assert x[x > 0].dim() == 1
    elif what == "to the host":
        x.cpu()
    elif what == "from the host":
        torch.zeros(3).to(x.device)
    else:
        x[np.zeros(1, np.int64)]
    return x


@pytest.mark.parametrize("what", ["item", "bool", "mask", "to the host", "from the host", "index of the host"])
def test_a_step_that_waits_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = walks()
    model = of_model(store)
    trainer = Trainer(model, store, TrainParams(**TRAIN), 0, device=CPU)
    model.final_norm.register_forward_hook(lambda module, inputs, x: planted(what, x))
    with away(trainer, monkeypatch) as noted, pytest.raises(WAITING):
        trainer.epoch(1)
    assert noted == []


def test_what_is_sent_to_the_cpu_is_not_copied() -> None:
    array = np.arange(4)
    assert send(array, CPU).data_ptr() == array.ctypes.data
    times = torch.zeros(2, 3, dtype=torch.float64)
    assert Events(torch.zeros(2, 3, dtype=torch.int64), times=times).to("cpu").times is times


def test_an_offset_of_whole_steps_is_the_same_as_a_number_and_as_a_tensor() -> None:
    found = []
    for zero in (3, torch.tensor(3.0)):
        v = torch.linspace(-3, 3, 61).requires_grad_()
        step, beta = torch.tensor(0.3, requires_grad=True), torch.tensor(0.9, requires_grad=True)
        out = LearnedOffset.apply(v, step, beta, zero, -4, 3, 0.5)
        (out * torch.arange(61)).sum().backward()
        found.append([out.detach(), v.grad, step.grad, beta.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_the_best_are_the_same_by_the_way_of_the_gpu(rows: list[list[int]], k: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    least = scores.topk(k).values[:, -1:]
    found = evaluation.in_order(scores, evaluation.lowest_best(scores, least, k))
    assert found.tolist() == evaluation.best(scores, k).tolist()


# With a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here to compare with the CPU")
GPU = torch.device("cuda")


@pytest.fixture
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    set_up(1, "cuda")
    yield
    torch.use_deterministic_algorithms(before)


def trained(device: torch.device, method: str, dropout: float, **train: Any) -> tuple[Any, Trainer, list[tuple[float, ...]]]:
    store = walks()
    model = of_model(store, device, dropout=dropout)
    extras = of_method(store, model, method, {}, bits=8) if method != "none" else None
    trainer = Trainer(model, store, TrainParams(**TRAIN | {"precision": "float32"} | train), 0, device=device, extras=extras)
    rows: list[tuple[float, ...]] = [(*trainer.epoch(epoch), *trainer.validate()) for epoch in (1, 2)]
    return model, trainer, rows


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "gbce", "sampled_softmax", "bpr"])
@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_gpu_computes_what_the_cpu_does(loss: str, batching: str) -> None:
    """Losses and accuracies of two epochs, states, and ranks, with the same draws (without dropout, which has others)."""
    (one, _, rows), (other, _, others) = (trained(d, "none", 0.0, loss=loss, batching=batching) for d in (CPU, GPU))
    np.testing.assert_allclose(np.array(rows)[:, (1, 3)], np.array(others)[:, (1, 3)], rtol=1e-4)
    histories = torch.from_numpy(np.random.default_rng(0).integers(1, ITEMS + 1, (5, 8)))
    histories[:, :2] = 0
    with torch.no_grad():
        states, again = one.eval().encode(histories), other.eval().encode(histories.to(GPU)).cpu()
    torch.testing.assert_close(states[:, 2:], again[:, 2:], rtol=1e-3, atol=1e-4)
    # The same weights on both, so that only the order of sums may tell ranks apart.
    other.load_state_dict(one.state_dict())
    ranks = [evaluation.rank(evaluation.model_scorer(m), walks(), "test", 8, device=d) for m, d in ((one, CPU), (other, GPU))]
    for name in ("full", "sampled", "popsampled", "recommended"):
        assert np.array_equal(*(getattr(r, name) for r in ranks)), name


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("method", ["ste", "lsq", "pact", "dorefa", "apot"])
def test_a_gpu_trains_with_quantizers_as_the_cpu_does(method: str) -> None:
    (_, _, rows), (_, _, others) = (trained(device, method, 0.0) for device in (CPU, GPU))
    np.testing.assert_allclose(np.array(rows)[:, 1], np.array(others)[:, 1], rtol=5e-3)


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("method", ["none", "ste", "lsq", "pact", "dorefa", "apot"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(method: str) -> None:
    (one, _, rows), (other, _, others) = (trained(GPU, method, 0.2) for _ in range(2))
    assert rows == others
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("method", ["none", "ste", "lsq", "pact", "dorefa", "apot"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "gbce", "sampled_softmax"])
def test_graphs_change_no_bit(loss: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs, whose dropout falls, with steps as graphs and as they stand."""
    train = {"loss": loss, "final_dropout": 0.1}
    one, trainer, rows = trained(GPU, method, 0.2, **train)
    assert trainer.captured is not None
    assert trainer.captured.graphs
    monkeypatch.setattr(CapturedSteps, "ready", property(lambda self: False, lambda self, ready: None), raising=False)
    other, trainer, others = trained(GPU, method, 0.2, **train)
    assert trainer.captured is not None
    assert not trainer.captured.graphs
    assert rows == others
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
def test_a_training_gives_its_graphs_back() -> None:
    store = walks()
    trainer = Trainer(of_model(store, GPU), store, TrainParams(**TRAIN), 0, device=GPU)
    trainer.run(log=lambda line: None)
    assert trainer.captured is not None
    assert not trainer.captured.graphs


@needs_gpu
@pytest.mark.usefixtures("_deterministic")
def test_an_epoch_on_a_gpu_synchronises_at_its_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUDA's own word: torch raises an error where a step would wait."""
    _, trainer, _ = trained(GPU, "lsq", 0.2)
    descend = trainer.descend

    def guarded(loss: Tensor) -> None:
        descend(loss)
        torch.cuda.set_sync_debug_mode("error")  # from the end of the first step on

    monkeypatch.setattr(trainer, "descend", guarded)
    mean = torch.Tensor.tolist

    def allowed(self: Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return mean(self)

    monkeypatch.setattr(torch.Tensor, "tolist", allowed)
    try:
        trainer.epoch(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
