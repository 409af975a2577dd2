"""What training steps as CUDA graphs rest on, without a GPU: filled batches, and which steps are captured."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from sasrec.captured import GRAIN, CapturedSteps, Static, filled, nothing_freed
from sasrec.config import TrainParams
from sasrec.data.batches import epoch_batches
from sasrec.training import Trainer
from tests.test_device import CPU, TRAIN, of_method, of_model, walks


class Uncaptured(CapturedSteps):
    """Runs every step as it stands, on any device, with the filled batches that graphs are given."""

    def __init__(self, work: Any) -> None:
        self.work, self.shapes = work, set[tuple[int, ...]]()

    def keep_while(self, state: Any) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is."""

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def __call__(self, batch: Any, log_expected: Any) -> None:
        self.shapes.add(batch.targets.shape)
        parts = (batch.histories, batch.targets, batch.negatives, batch.windows, log_expected)
        whole = torch.empty(0, dtype=torch.int64)
        self.work(Static(whole, *(None if part is None else torch.from_numpy(part) for part in parts)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "train"),
    [
        *(({}, {"loss": loss, "batching": batching}) for loss in ("cross_entropy", "bce", "gbce", "sampled_softmax", "bpr")
          for batching in ("packed", "shuffled")),
        ({"block": "original", "position": "left", "heads": 2}, {"loss": "bce", "batching": "bucketed"}),
        ({"position": "left"}, {"loss": "gbce", "shared_negatives": False, "weighting": "batch"}),
        ({}, {"loss": "sampled_softmax", "negative_sampling": "popularity"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["none", "lsq", "ste"])
def test_what_fills_a_batch_up_does_not_count(model: dict[str, Any], train: dict[str, Any], method: str) -> None:
    """Two epochs on filled batches come to the losses and the weights of those on batches as they are."""
    found = []
    for fills in (False, True):
        store = walks()
        own = of_model(store, dropout=0.0, **model)
        extras = of_method(store, own, method, {}, bits=8) if method != "none" else None
        params = TrainParams(**TRAIN | {"precision": "float32"} | train)
        trainer = Trainer(own, store, params, 0, device=CPU, extras=extras)
        if fills:
            trainer.captured = Uncaptured(trainer._work)
            trainer.average, trainer.total = torch.zeros(()), torch.zeros(2)
        rows = [(*trainer.epoch(epoch), *trainer.validate()) for epoch in (1, 2)]
        found.append((np.array(rows), [parameter.detach() for parameter in own.parameters()]))
        if fills:
            assert all(rows % GRAIN == 0 and length == 8 for rows, length in trainer.captured.shapes)  # type: ignore[union-attr]
    np.testing.assert_allclose(found[0][0][:, (1, 3)], found[1][0][:, (1, 3)], rtol=2e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


def test_a_batch_is_filled_up_on_the_left_and_below() -> None:
    batch = next(epoch_batches(walks(), 20, 3, True, 0, 1, "shuffled").batches)
    rows, length = batch.targets.shape
    of_each = np.arange(2, 2 + np.count_nonzero(batch.targets))[:, None]
    grown = filled(batch, of_each, "each", 20)
    assert grown.histories.shape == grown.targets.shape == (16, 16 if length <= 16 else 20)
    assert (grown.histories[:rows, -length:] == batch.histories).all() and grown.histories.sum() == batch.histories.sum()
    assert (grown.targets[:rows, -length:] == batch.targets).all() and grown.targets.sum() == batch.targets.sum()
    assert (grown.negatives[grown.targets.ravel() > 0] == of_each).all()
    assert (grown.negatives[grown.targets.ravel() == 0] == 1).all()
    assert filled(batch, np.full((rows, 4), 7), "sequence", 20).negatives.shape == (16, 4)
    assert filled(batch, np.arange(5), "batch", 20).negatives.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("model", "train", "captured"),
    [
        ({}, {}, True),
        ({"heads": 2, "local_heads": 1}, {"loss": "gbce"}, True),
        ({"side": ("rating",)}, {}, False),
        ({}, {"rating_weight": 0.5}, False),
        ({"kind": "cafe"}, {}, False),
        ({}, {"loss": "bce", "table_optimizer": "sparse"}, False),
    ],
)
def test_which_steps_can_be_captured(model: dict[str, Any], train: dict[str, Any], captured: bool) -> None:
    store = walks()
    assert Trainer(of_model(store, **model), store, TrainParams(**TRAIN | train), 0, device=CPU)._can_be_captured() is captured


@pytest.mark.parametrize(
    ("method", "options", "quant", "captured"),
    [
        ("lsq", {}, {}, True),
        ("dorefa", {}, {}, True),
        ("dorefa", {"gradient_bits": 6}, {}, False),
        ("ste", {}, {"table_rounding": "stochastic"}, False),
    ],
)
def test_steps_with_draws_of_quantizers_are_not_captured(
    method: str, options: dict[str, Any], quant: dict[str, Any], captured: bool
) -> None:
    store = walks()
    model = of_model(store)
    trainer = Trainer(
        model, store, TrainParams(**TRAIN), 0, device=CPU, extras=of_method(store, model, method, options, **quant)
    )
    assert trainer._can_be_captured() is captured


class Freed:
    """Garbage that only a collection finds, as the graphs of an earlier training may be, and that notes when it is freed."""

    def __init__(self, noted: list[str]) -> None:
        self.noted, self.itself = noted, self

    def __del__(self) -> None:
        self.noted.append("freed")


@pytest.mark.parametrize("guarded", [True, False])
def test_nothing_is_collected_while_a_step_is_captured(guarded: bool) -> None:
    noted: list[str] = []
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with nothing_freed() if guarded else nullcontext():
            Freed(noted)
            kept = [[i] for i in range(10_000)]
            assert noted == ([] if guarded else ["freed"])
        assert gc.isenabled()
        del kept
        gc.collect()
        assert noted == ["freed"]
    finally:
        gc.set_threshold(*before)
