"""A quantizer of any method from one line, a small model to put them on, and one that was trained, with its data."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Place
from sasrec.quant import attach
from sasrec.quant.quantizer import Quantizer
from sasrec.training import Trainer
from tests.conftest import SmallStore


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """One thread: these tensors are so small that a second one only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _build(
    method: str,
    bits: int,
    kind: Any = "activation",
    *,
    values: Tensor,
    signed: bool = True,
    per_row: bool = True,
    scoring: bool = True,
    **options: Any,
) -> Quantizer:
    module, chosen = attach.load_method(method, options)
    features = values.shape[-1] if values.dim() > 1 else 8
    place = Place("x", kind, signed, features, values.shape[0] if kind != "activation" else 0, scoring)
    quantizer = module.build(place, bits, per_row, chosen)
    assert isinstance(quantizer, Quantizer)
    quantizer.initialize(values)
    return quantizer


@pytest.fixture
def build() -> Callable[..., Quantizer]:
    """build(method, bits, kind, values=..., signed=..., per_row=..., **options) -> an initialized quantizer."""
    return _build


PARAMS = ModelParams(max_len=8, hidden=16, blocks=2, heads=2, dropout=0.0, attention_output=True, init="xavier")
ITEMS = 60


@pytest.fixture
def model() -> SASRec:
    """A SASRec whose weights are large enough for its layers to matter. 8 x 6 look-ups are fewer than its rows."""
    torch.manual_seed(1)
    model = SASRec(PARAMS, ITEMS)
    with torch.no_grad():
        model.item_table.weight[1:] *= 10
    return model.eval()


@pytest.fixture
def histories() -> Tensor:
    """(8, 6): two rows of them padded on the left, by one and by three."""
    histories = torch.randint(1, ITEMS + 1, (8, 6), generator=torch.Generator().manual_seed(2))
    histories[0, :3] = 0
    histories[1, :1] = 0
    return histories


@pytest.fixture
def quantized(model: SASRec, histories: Tensor) -> Callable[..., SASRec]:
    """quantized(method, bits, options, **quant section) -> the model with calibrated quantizers everywhere."""

    def make(method: str, bits: int, options: dict[str, Any] | None = None, **quant: Any) -> SASRec:
        module, chosen = attach.load_method(method, options or {})
        attach.attach(model, QuantParams(bits=bits, **quant), module, chosen)
        attach.calibrate(model, [histories])
        return model

    return make


CPU = torch.device("cpu")
TRAIN = TrainParams(loss="cross_entropy", epochs=4, batch_size=16, lr=0.01, schedule="constant", warmup=0.0)
QUANT = QuantParams(bits=4, epochs=4, lr=0.003, calibration_batches=1)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".quantizer." not in name}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def walks() -> SmallStore:
    """Users who each walk through 40 items in order, but for every fourth step, which leads anywhere: there is always something
    left to learn."""
    rng = np.random.default_rng(0)
    steps = [[(start * 7 + i) % 40 + 1 for i in range(5 + start % 15)] for start in range(50)]
    return SmallStore([[item if rng.random() < 0.75 else int(rng.integers(1, 41)) for item in walk] for walk in steps], 40)


@pytest.fixture(scope="module")
def trained() -> SASRec:
    """A model after two epochs on `walks`."""
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=10, hidden=16, dropout=0.1), 40)
    Trainer(model, walks(), dataclasses.replace(TRAIN, epochs=2), 0, device=CPU).run(log=lambda line: None)
    return model
