"""Lazy Adam: the rule against a formula, what stays untouched, and whole runs with sparse tables."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.errors import UserError
from sasrec.lazy_adam import LazyAdam, clip_norm
from sasrec.mapping import from_mapping
from sasrec.models.cafe import CAFE
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Table
from sasrec.quant.attach import attach, calibrate, load_method, own_training
from sasrec.training import Extras, Progress, Trainer
from tests.conftest import SmallStore

SPARSE = TrainParams(
    loss="sampled_softmax", negatives=4, epochs=4, batch_size=16, lr=0.01, schedule="constant", warmup=0.0,
    table_optimizer="sparse", precision="float32",
)  # fmt: skip
SMALL = ModelParams(max_len=10, hidden=16, dropout=0.1)


def lazy(table: nn.Parameter, **options: Any) -> LazyAdam:
    chosen: dict[str, Any] = {"weight_decay": 0.0, "decoupled": False} | options
    return LazyAdam([table], 0.1, (0.9, 0.98), **chosen)


def look_up(table: nn.Parameter, ids: list[int], gradient: torch.Tensor) -> None:
    table.grad = None
    F.embedding(torch.tensor(ids), table, sparse=True).backward(gradient)


def test_a_row_is_stepped_as_the_formula_says_and_the_others_stay_to_the_bit() -> None:
    """Row 2 is looked up twice in the first step, not at all in the second, and once in the third."""
    table = nn.Parameter(torch.arange(8.0).view(4, 2))
    before = table.detach().clone()
    optimizer = lazy(table)
    look_up(table, [2, 0, 2], torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, -1.0]]))
    optimizer.step()
    look_up(table, [1], torch.ones(1, 2))
    optimizer.step()
    kept = {name: optimizer.state[table][name][2].clone() for name in ("exp_avg", "exp_avg_sq")}
    look_up(table, [2], torch.tensor([[0.5, 0.5]]))
    optimizer.step()

    value, first, second = before[2].double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, gradient in ((1, torch.tensor([4.0, 1.0])), (3, torch.tensor([0.5, 0.5]))):
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * gradient**2
        value -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-8)
    torch.testing.assert_close(table[2].double(), value, rtol=1e-6, atol=1e-6)
    # In the step that did not look it up its moments did not decay.
    torch.testing.assert_close(kept["exp_avg"], torch.tensor([0.4, 0.1]))
    torch.testing.assert_close(kept["exp_avg_sq"], torch.tensor([0.32, 0.02]))
    assert torch.equal(table[3], before[3])
    assert not optimizer.state[table]["exp_avg"][3].any()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}])
def test_a_table_of_which_every_row_is_looked_up_is_trained_as_by_adam(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sparse, dense = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    decay = options.get("weight_decay", 0.0)
    kind = torch.optim.AdamW if options.get("decoupled") else torch.optim.Adam
    one, other = lazy(sparse, **options), kind([dense], lr=0.1, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    for _ in range(10):
        ids = [*np.random.default_rng(0).permutation(5), 3, 3]
        gradient = torch.randn(7, 3)
        look_up(sparse, ids, gradient)
        dense.grad = torch.zeros(5, 3).index_add_(0, torch.tensor(ids), gradient)
        one.step()
        other.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)


def test_weight_decay_reaches_looked_up_rows_only() -> None:
    table = nn.Parameter(torch.ones(2, 1))
    look_up(table, [0], torch.zeros(1, 1))
    lazy(table, weight_decay=0.5, decoupled=True).step()
    torch.testing.assert_close(table, nn.Parameter(torch.tensor([[1 - 0.1 * 0.5], [1.0]])))


def test_a_use_of_the_whole_table_is_an_error() -> None:
    table = nn.Parameter(torch.ones(2, 1))
    table.sum().backward()
    with pytest.raises(TypeError, match="something besides look-ups"):
        lazy(table).step()


def test_norms_are_those_of_dense_gradients() -> None:
    """Two look-ups of a row count as their sum."""
    sparse, dense, weight = (nn.Parameter(torch.zeros(4, 2)) for _ in range(3))
    ids, gradient = [1, 1, 3], torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    look_up(sparse, ids, gradient)
    dense.grad = torch.zeros(4, 2).index_add_(0, torch.tensor(ids), gradient)
    weight.grad = torch.full((4, 2), 2.0)
    expected = weight.grad.clone()
    clip_norm([sparse, weight], 1.0)
    clipped = weight.grad.clone()
    weight.grad = expected
    torch.nn.utils.clip_grad_norm_([dense, weight], 1.0)
    assert torch.equal(clipped, weight.grad)
    assert sparse.grad is not None
    assert torch.equal(sparse.grad.to_dense(), dense.grad)


def test_sparse_look_ups_have_the_gradient_of_dense_ones() -> None:
    """The padding gets none."""
    table = Table(6, 3, padding=True)
    ids, gradient = torch.tensor([[1, 0], [5, 1]]), torch.randn(2, 2, 3)
    found: list[torch.Tensor] = []
    for sparse in (False, True):
        table.sparse, table.weight.grad = sparse, None
        table.lookup(ids).backward(gradient)
        assert table.weight.grad is not None
        found.append(table.weight.grad)
    torch.testing.assert_close(found[1].to_dense(), found[0])
    assert found[1].coalesce().indices().tolist() == [[1, 5]]


def train(
    store: SmallStore, params: TrainParams, model: nn.Module, resume: Path | None = None, extras: Extras | None = None
) -> Progress:
    return Trainer(model, store, params, 0, device=torch.device("cpu"), extras=extras).run(resume, "key", lambda line: None)


def fresh(**options: Any) -> SASRec:
    torch.manual_seed(0)
    return SASRec(dataclasses.replace(SMALL, **options), 40)


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "bpr"])
def test_sparse_tables_learn_the_chains(chains: SmallStore, loss: str) -> None:
    params = dataclasses.replace(SPARSE, loss=loss, epochs=60 if loss == "gbce" else 25)  # type: ignore[arg-type]
    assert train(chains, params, fresh()).best_ndcg > 0.8


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"optimizer": "adamw", "weight_decay": 0.1}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_looks_up_every_row_is_that_of_dense_tables(
    chains: SmallStore, monkeypatch: pytest.MonkeyPatch, tied: bool, options: dict[str, Any]
) -> None:
    """A batch of 40 walks sees all items as inputs; the negatives here are all of them."""
    monkeypatch.setattr("sasrec.data.batches.NegativeSampler.draw_shared", lambda *_: np.arange(1, 41))
    params = dataclasses.replace(SPARSE, batch_size=60, min_batches=1, **options)
    found = []
    for table_optimizer in ("dense", "sparse"):
        model = fresh(tied=tied, max_len=30)
        train(chains, dataclasses.replace(params, table_optimizer=table_optimizer), model)
        found.append(model.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-4, msg=name)


def test_items_that_no_step_looks_up_keep_their_bits(chains: SmallStore) -> None:
    """Items 41 to 60 are in no history, and the negatives are drawn by popularity."""
    store = SmallStore(chains.sequences, 60)
    torch.manual_seed(0)
    model = SASRec(SMALL, 60)
    before = model.item_table.weight.detach().clone()
    train(store, dataclasses.replace(SPARSE, negative_sampling="popularity"), model)
    assert torch.equal(model.item_table.weight[41:], before[41:])
    assert not (model.item_table.weight[1:41] == before[1:41]).any()
    assert not model.item_table.weight[0].any()


@pytest.mark.parametrize("method", [None, "lsq", "apot", "dorefa"])
def test_a_killed_run_resumes_to_the_same_bits(chains: SmallStore, tmp_path: Path, method: str | None) -> None:
    def run(epochs: int, resume: Path | None) -> SASRec:
        model, extras = fresh(tied=False), None
        if method:
            module, options = load_method(method, None)
            attach(model, QuantParams(), module, options)
            calibrate(model, [torch.randint(1, 41, (8, 10), generator=torch.Generator().manual_seed(0))])
            extras = own_training(model, 0)
        train(chains, dataclasses.replace(SPARSE, epochs=epochs, patience=100), model, resume, extras)
        return model

    class Killed(Exception):
        pass

    whole, path = run(4, None), tmp_path / "resume.safetensors"
    original, epochs = Trainer.epoch, []

    def dies(self: Trainer, epoch: int) -> Any:
        epochs.append(epoch)
        if epoch == 3 and len(epochs) == 3:
            raise Killed
        return original(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "epoch", dies)
        with pytest.raises(Killed):
            run(4, path)
        resumed = run(4, path)
    assert epochs == [1, 2, 3, 3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("rows", ["per_row", "per_tensor"])
@pytest.mark.parametrize("method", ["ste", "lsq", "pact", "dorefa", "apot"])
def test_quantized_rows_are_those_of_dense_tables(method: str, rows: str) -> None:
    """More look-ups than rows: the whole table is quantized there, and the rows alone here, to the same bits."""
    table = nn.Module()
    table.table = Table(10, 8, padding=True, scoring=True)
    module, options = load_method(method, None)
    attach(table, QuantParams(table=rows), module, options)  # type: ignore[arg-type]
    ids, found = torch.arange(30) % 10, []
    for sparse in (False, True):
        table.table.sparse = sparse
        found.append(table.table.lookup(ids))
    assert torch.equal(*found)
    found[1].sum().backward()
    gradient = table.table.weight.grad
    assert gradient is not None and gradient.is_sparse


@pytest.mark.parametrize("item_loss", ["joint", "items"])
def test_of_cafe_the_tables_of_items_are_sparse(chains: SmallStore, item_loss: str) -> None:
    torch.manual_seed(0)
    model = CAFE(SMALL, torch.cat([torch.zeros(1), torch.arange(40) % 4 + 1]).int())
    progress = train(chains, dataclasses.replace(SPARSE, item_loss=item_loss), model)  # type: ignore[arg-type]
    assert model.fine.item_table.sparse
    assert not model.coarse.item_table.sparse
    assert progress.rows[-1].train_loss < progress.rows[0].train_loss  # type: ignore[operator]


def test_cross_entropy_with_sparse_tables_is_refused() -> None:
    with pytest.raises(UserError, match="sparse, but loss: cross_entropy .* set table_optimizer: dense"):
        from_mapping(TrainParams, {"table_optimizer": "sparse", "loss": "cross_entropy"}, "train")
