"""Product quantization of the item table: k-means, the centroids' gradient, what stays and what moves, and what is refused."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.errors import UserError
from sasrec.models.cafe import CAFE
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import Place, taps
from sasrec.quant import attach, pq
from sasrec.quant.conventions import convention, is_quantized
from sasrec.quant.frozen import Product, from_tensors, thaw, to_tensors
from sasrec.quant.grid import Grid
from sasrec.quant.lsq import LSQ, BinaryLSQ
from sasrec.quant.pq import PQ, Options, Prepared, kmeans, means, nearest, right_vectors, spread, svd_numbers
from sasrec.quant.quantizer import BinaryQuantizer
from sasrec.quant.recipe import Run, quantize
from sasrec.quant.schedule import Schedule
from sasrec.training import Trainer
from tests.conftest import SmallStore

SMALL: dict[str, Any] = {"splits": 4, "centroids": 8}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(values: Tensor, bits: int = 8, prepared: Prepared | None = None, **options: Any) -> PQ:
    """Of an item table with these values, initialized."""
    place = Place("item_table.weight", "table", True, values.shape[1], len(values), True)
    built = pq.build(place, bits, True, prepared or Options(**options))
    assert isinstance(built, PQ)
    built.initialize(values)
    return built


# k-means


def test_two_clusters_exactly() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]], dtype=torch.float64)
    centroids, numbers = kmeans(rows, 2, 10, seeded())
    low, high = int(numbers[0]), int(numbers[2])
    assert numbers.tolist() == [low, low, high, high] and low != high
    assert centroids[low].tolist() == [0, 1] and centroids[high].tolist() == [10, 2]


def test_means_and_the_nearest() -> None:
    rows = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
    found, sizes = means(rows, torch.tensor([2, 2, 0]), 3)
    assert found.tolist() == [[8], [0], [2]] and sizes.tolist() == [1, 0, 2]
    numbers, distances = nearest(rows, torch.tensor([[2.0], [4.0], [2.0]], dtype=torch.float64))
    assert numbers.tolist() == [0, 0, 1] and distances.tolist() == [1, 1, 16]  # the first of equals


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_every_row_has_its_nearest_centroid_and_no_error_is_above_the_starts(n: int, width: int, count: int, seed: int) -> None:
    """With fewer distinct rows than centroids, too: those then leave no error."""
    rows = torch.randint(0, 4, (n + count, width), generator=seeded(seed)).double()
    centroids, numbers = kmeans(rows, count, 20, seeded(seed))
    distances = torch.cdist(rows, centroids)
    assert centroids.isfinite().all() and centroids.shape == (count, width)
    torch.testing.assert_close(distances.gather(1, numbers[:, None])[:, 0], distances.min(1).values)
    error, start = ((rows - made).square().sum() for made in (centroids[numbers], _start(rows, count, seed)))
    assert error <= start + 1e-9
    if len(rows.unique(dim=0)) <= count:
        assert error == 0


def _start(rows: Tensor, count: int, seed: int) -> Tensor:
    chosen = spread(rows, count, seeded(seed))
    return chosen[nearest(rows, chosen)[0]]


def test_an_empty_centroid_goes_to_the_row_farthest_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0], [12.0]], dtype=torch.float64)
    monkeypatch.setattr(pq, "spread", lambda *_: torch.tensor([[0.0], [1000.0]], dtype=torch.float64))
    centroids, numbers = kmeans(rows, 2, 10, seeded())
    assert centroids.tolist() == [[0.5], [11]] and numbers.tolist() == [0, 0, 1, 1]


def test_the_seed_decides() -> None:
    rows = torch.randn(200, 3, generator=seeded()).double()
    first, again, other = (kmeans(rows, 20, 30, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


# The table


TINY = torch.tensor(
    [[0.0, 0, 0, 0], [1, 1, 0, -1], [1, 1, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, -1]],
)  # padding, and four items of two different halves each


def test_a_table_of_few_different_parts_is_kept() -> None:
    made = quantizer(TINY, splits=2, centroids=2)
    torch.testing.assert_close(made(TINY), TINY, rtol=0, atol=1e-6)
    left, right = (made.index[1:] - made.first).T.tolist()
    assert left[0] == left[1] != left[2] == left[3]
    assert right[0] == right[3] != right[1] == right[2]


def test_the_error_falls_with_more_splits_and_with_more_centroids() -> None:
    values = torch.randn(201, 16, generator=seeded())
    values[0] = 0

    def error(splits: int, centroids: int) -> float:
        made = quantizer(values, splits=splits, centroids=centroids)
        return float((made(values) - values).detach().square().sum())

    by_splits = [error(splits, 16) for splits in (1, 2, 4, 8, 16)]
    by_centroids = [error(4, centroids) for centroids in (2, 8, 32, 128)]
    assert by_splits == sorted(by_splits, reverse=True) and by_centroids == sorted(by_centroids, reverse=True)
    assert by_splits[-1] < 0.02 * by_splits[0]


def test_padding_is_zeros_and_looked_up_rows_are_those_of_the_table() -> None:
    values = torch.randn(41, 16, generator=seeded())
    made = quantizer(values, **SMALL)
    whole = made(values)
    assert not whole[0].any() and whole[1:].any(1).all()
    ids = torch.tensor([[0, 3], [40, 3]])
    assert torch.equal(made(values[ids], ids), whole[ids])
    assert made(values.bfloat16()).dtype == torch.bfloat16


def test_the_gradient_of_a_centroid_is_the_sum_over_the_items_that_share_it() -> None:
    values = torch.randn(41, 16, generator=seeded())
    made = quantizer(values, **SMALL)
    assert isinstance(made.book, LSQ)
    with torch.no_grad():
        made.book.log_step.add_(1)  # so that nothing is clipped, where LSQ passes no gradient
    ids = torch.randint(0, 41, (30,), generator=seeded(1)).index_fill(0, torch.tensor([4, 9]), 0)  # some twice, and padding
    weights = torch.randn(30, 16, generator=seeded(2))
    (made(values[ids], ids) * weights).sum().backward()
    expected = torch.zeros(4 * 8, 4)
    for item, weight in zip(ids.tolist(), weights, strict=True):
        for split in range(4):
            if item:
                expected[int(made.index[item, split])] += weight[4 * split : 4 * split + 4]
    assert made.centroids.grad is not None
    torch.testing.assert_close(made.centroids.grad, expected)


@pytest.mark.parametrize("rest", ["lsq", "ste", "none"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_is_frozen_is_what_was_live(rest: str, bits: int) -> None:
    values = torch.randn(41, 16, generator=seeded())
    made = quantizer(values, bits, rest=rest, **SMALL)
    with torch.no_grad():
        made.centroids.add_(0.1 * torch.randn(made.centroids.shape, generator=seeded(1)))  # as training would
    made.refresh(values)
    grid, product = made.grid(), made.product()
    said = convention("pq", bits, "table", {"rest": rest})
    assert grid.scale.dim() == 0 and (len(grid.levels), grid.has_zero) == (said.levels, said.zero)
    assert product.book.shape == (4, 8, 4) and product.numbers.shape == (40, 4)
    assert torch.equal(grid.decode(made.codes(values)), made.eval()(values))
    twin = copy.deepcopy(made)
    other = quantizer(torch.ones_like(values), bits, rest=rest, **SMALL)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(values), made(values)) and torch.equal(twin(values), made(values))


def test_the_codes_of_a_product() -> None:
    grid = Grid.uniform(2, -2, 1, torch.tensor(0.5))
    book = torch.tensor([[[0, 3], [1, 1]], [[2, 0], [3, 3]]], dtype=torch.uint8)
    product = Product(book, torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8))
    assert product.codes(grid).tolist() == [[2, 2, 2, 2], [1, 1, 2, 0], [0, 3, 3, 3]]
    assert grid.decode(product.codes(grid)).tolist() == [[0, 0, 0, 0], [-0.5, -0.5, 0, -1], [-1, 0.5, 0.5, 0.5]]


def test_the_range_of_the_centroids_is_that_of_the_last_refresh() -> None:
    values = torch.randn(41, 16, generator=seeded())
    made = quantizer(values, 4, rest="ste", **SMALL)
    before = made.grid().scale.clone()
    with torch.no_grad():
        made.centroids.mul_(2)
    made.refresh(values)
    torch.testing.assert_close(made.grid().scale, 2 * before)


def test_the_seed_decides_where_each_split_starts() -> None:
    half = torch.randn(41, 8, generator=seeded())
    values = torch.cat([half, half], 1)
    first, again, other = (
        quantizer(values, prepared=Prepared(Options(splits=2, centroids=8, iterations=1), seed)).centroids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:8], first[8:])


def test_rounding_by_chance_is_that_of_the_centroids() -> None:
    values = torch.randn(41, 16, generator=seeded())
    made = quantizer(values, 2, **SMALL)
    still = made(values)
    made.stochastic = True
    made.train().start_epoch(0, 1, 0)
    assert not torch.equal(made(values), still)
    assert torch.equal(made.eval()(values), still)


# A model


@pytest.fixture
def live(model: SASRec, histories: Tensor) -> SASRec:
    attach.attach(model, QuantParams(bits=8), pq, Options(**SMALL))
    attach.calibrate(model, [histories])
    return model


def test_a_model_frozen_and_read_back_computes_as_the_live_one(live: SASRec, histories: Tensor) -> None:
    saved, bits = to_tensors(attach.freeze(live))
    assert {"item_table.weight/book", "item_table.weight/numbers"} <= saved.keys()
    assert "item_table.weight/codes" not in saved and "position_table.weight/codes" in saved
    plain = SASRec(live.params, live.items).eval()
    plain.load_state_dict({name: tensor for name, tensor in live.state_dict().items() if ".quantizer." not in name})
    frozen = from_tensors(saved, bits)
    thaw(plain, frozen)
    with torch.no_grad():
        states = live.encode(histories)
        # Scales of the position table's rows are rounded to 16 bits.
        torch.testing.assert_close(states, plain.encode(histories), rtol=0, atol=0.05)
        assert torch.equal(live.item_table.all(), plain.item_table.all())
    assert frozen["item_table.weight"].product is not None


@pytest.mark.parametrize("rest", ["lsq", "ste", "none"])
def test_the_other_tensors_are_of_the_rest(model: SASRec, rest: str) -> None:
    attach.attach(model, QuantParams(bits=4), pq, Options(rest=rest, **SMALL))  # type: ignore[arg-type]
    found = attach.quantizers(model)
    assert isinstance(found.pop("item_table.weight"), PQ)
    assert {type(each.method).__name__ for each in found.values()} == ({rest.upper()} if rest != "none" else set())
    assert found.keys() == (taps(model).keys() - {"item_table.weight"} if rest != "none" else set())
    options = {"rest": rest}
    assert is_quantized("pq", "table", options) and is_quantized("pq", "weight", options) == (rest != "none")


def test_of_cafe_the_items_are_compressed_and_the_intents_are_not() -> None:
    model = CAFE(ModelParams(max_len=8, hidden=16, kind="cafe"), torch.tensor([0, *(i % 3 + 1 for i in range(60))]))
    attach.attach(model, QuantParams(), pq, Options(**SMALL))
    found = attach.quantizers(model)
    assert [name for name, each in found.items() if isinstance(each, PQ)] == ["fine.item_table.weight"]
    assert isinstance(found["coarse.item_table.weight"], LSQ)


# Training

CPU = torch.device("cpu")
TRAIN = TrainParams(loss="cross_entropy", epochs=3, batch_size=16, lr=0.01, schedule="constant", warmup=0.0)
QUANT = QuantParams(bits=8, epochs=3, lr=0.003, calibration_batches=1)


@pytest.fixture
def run(chains: SmallStore, tmp_path: Path) -> Run:
    return Run(chains, QUANT, TRAIN, 0, CPU, tmp_path / "resume.safetensors", "key", lambda line: None)


def untrained() -> SASRec:
    torch.manual_seed(0)
    return SASRec(ModelParams(max_len=10, hidden=16, dropout=0.1), 40)


@pytest.mark.parametrize("delay", [0, 1])
def test_centroids_are_trained_as_weights_and_numbers_stay(chains: SmallStore, delay: int) -> None:
    model = untrained()
    start = model.item_table.weight.detach().clone()
    quant = dataclasses.replace(QUANT, delay_epochs=delay)
    schedule = Schedule(model, quant, pq, Options(**SMALL), [torch.tensor([[0, 1, 2, 3]])], 3)
    made = schedule.built[-1]["item_table.weight"]
    trainer = Trainer(model, chains, TRAIN, 0, device=CPU, extras=schedule.extras(0))
    weights, own = (trainer.optimizer.param_groups[i]["params"] for i in (0, 1))
    assert isinstance(made, PQ) and sum(p is made.centroids for p in weights) == 1
    assert not any(p is made.centroids for p in own) and any(p is made.book.log_step for p in own)
    for epoch in range(1, delay + 1):
        trainer.epoch(epoch)
    assert torch.equal(model.item_table.weight, start) == (not delay)
    table = model.item_table.weight.detach().clone()
    trainer.extras.on_epoch(delay, 3)
    before, index = made.centroids.detach().clone(), made.index.clone()
    trainer.epoch(delay + 1)
    assert torch.equal(made.index, index) and torch.equal(model.item_table.weight, table)
    used = torch.zeros(len(before), dtype=torch.bool)
    used[index[1:].long().flatten()] = True
    moved = (made.centroids != before).any(1)
    assert moved[used].all()
    assert not model.item_table.all()[0].any()


def test_steps_of_looked_up_rows_train_centroids_too(chains: SmallStore) -> None:
    model = untrained()
    schedule = Schedule(model, QUANT, pq, Options(**SMALL), [torch.tensor([[0, 1, 2, 3]])], 3)
    made, table = schedule.built[0]["item_table.weight"], model.item_table.weight.detach().clone()
    assert isinstance(made, PQ)
    before = made.centroids.detach().clone()
    train = dataclasses.replace(TRAIN, loss="sampled_softmax", negatives=8, table_optimizer="sparse")
    Trainer(model, chains, train, 0, device=CPU, extras=schedule.extras(0)).epoch(1)
    assert (made.centroids != before)[made.index[1:].long().flatten()].all()
    assert torch.equal(model.item_table.weight, table)


def test_training_mends_what_compression_costs_and_a_killed_run_ends_with_the_same_bits(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained()
    Trainer(model, run.store, TRAIN, 0, device=CPU).run(log=lambda line: None)
    options = {"splits": 2, "centroids": 4}
    whole = quantize(dataclasses.replace(run, resume=run.resume.with_name("other")), model, "pq", options)
    assert whole.best_epoch and whole.ndcg > whole.rows[0].validation_ndcg
    epoch = Trainer.epoch

    def killed(self: Trainer, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(Trainer, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(run, model, "pq", options)
    monkeypatch.setattr(Trainer, "epoch", epoch)
    resumed = quantize(run, model, "pq", options)
    first, second = (outcome.model.state_dict() for outcome in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Codes from the interactions


# Three users of items 1 to 4, two of items 5 to 8; the last two items of each user are held out.
BLOCKS = [[1, 2, 3, 4, 5, 6], [4, 3, 2, 1, 5, 5], [2, 1, 4, 3, 7, 8], [5, 6, 7, 8, 1, 1], [8, 7, 6, 5, 1, 2]]


def test_numbers_are_quantiles_of_the_components_of_the_training_part() -> None:
    """The first component is the larger block's: its four items are on one side of the middle."""
    numbers = svd_numbers(SmallStore(BLOCKS, 8), 1, 2, seed=0)
    assert numbers.shape == (8, 1)
    assert len(set(numbers[:4, 0].tolist())) == 1 and len(set(numbers[4:, 0].tolist())) == 1
    assert numbers[0, 0] != numbers[4, 0]
    other = SmallStore([[*walk[:4], 3, 3] for walk in BLOCKS], 8)
    assert torch.equal(svd_numbers(other, 1, 2, seed=0), numbers)


def test_right_vectors_are_those_of_a_whole_svd() -> None:
    matrix = np.random.default_rng(0).random((30, 20)) * np.logspace(0, -2, 20)
    found = right_vectors(sparse.csr_matrix(matrix), 4, np.random.default_rng(1))
    expected = np.linalg.svd(matrix)[2][:4]
    np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, atol=1e-6)  # up to their signs


def test_every_quantile_has_as_many_items_and_the_seed_settles_equal_ones() -> None:
    store = SmallStore(BLOCKS, 8)
    first, again, other = (svd_numbers(store, 3, 4, seed) for seed in (1, 1, 2))
    assert [torch.bincount(split).tolist() for split in first.T] == [[2, 2, 2, 2]] * 3
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_centroids_of_assigned_numbers_are_the_means_of_the_trained_parts() -> None:
    values = torch.randn(9, 4, generator=seeded())
    options = Options(splits=1, centroids=2, codes="svd", lr=0.5)
    prepared = pq.prepare(options, SmallStore(BLOCKS, 8), 0)
    made = quantizer(values, prepared=prepared)
    torch.testing.assert_close(made.centroids[made.index[1, 0]], values[1:5].mean(0))
    torch.testing.assert_close(made.centroids[made.index[5, 0]], values[5:].mean(0))
    assert prepared.lr == 0.5
    with pytest.raises(UserError, match="methods.pq.codes: svd takes the training interactions"):
        quantizer(values, splits=1, centroids=2, codes="svd")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"splits": 3},
            r"methods.pq.splits: 3 does not divide the 16 features of item_table.weight; set one of 1, 2, 4, 8, 16",
        ),
        ({"centroids": 64}, r"methods.pq.centroids: 64 centroids a split are more than the 60 items"),
        ({"centroids": 300}, r"methods.pq: centroids must be between 2 and 256|methods.pq.centroids"),
        ({"rest": "pact"}, r"methods.pq.rest"),
        ({"splitz": 3}, r"methods.pq.splitz.*methods.pq.splits"),
    ],
)
def test_bad_options_are_refused_by_name(run: Run, model: SASRec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(run, model, "pq", options)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"embedding_bits": 1}, "centroids of item_table.weight take 2 to 8 bits, not 1"),
        ({"budget_kb": 10.0}, "quant.budget_kb"),
        ({"max_drop": 0.1}, "quant.max_drop"),
        ({"progressive": (8,), "bits": 4}, "quant.progressive"),
        ({"preset": "source"}, "no item table to compress"),
        ({"overrides": {"item_table.weight": 32}}, "no item table to compress"),
    ],
)
def test_a_recipe_that_does_not_suit_is_refused(run: Run, model: SASRec, quant: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(dataclasses.replace(run, quant=dataclasses.replace(QUANT, **quant)), model, "pq", SMALL)


def test_more_splits_than_the_interactions_have_components_are_refused() -> None:
    with pytest.raises(UserError, match="methods.pq.splits: an SVD of 5 users and 8 items has fewer than 6 components"):
        svd_numbers(SmallStore(BLOCKS, 8), 6, 2, 0)


def test_a_position_table_of_one_bit_is_as_in_what_quantizes_the_rest(model: SASRec) -> None:
    """LSQ learns the scale, and nothing leaves it in full precision."""
    quant = QuantParams(bits=8, overrides={"position_table.weight": 1})
    kinds: dict[Any, type] = {"lsq": BinaryLSQ, "ste": BinaryQuantizer, "none": type(None)}
    for rest, kind in kinds.items():
        options = Options(rest=rest, **SMALL)
        for own in (options, Prepared(options)):
            built = attach.build(model, quant, pq, own)
            assert type(built.get("position_table.weight")) is kind


def test_numbers_are_those_of_the_centroids_that_are_returned() -> None:
    """Also where the last iteration still moved them."""
    rows = torch.randn(500, 4, dtype=torch.float64)
    centroids, numbers = kmeans(rows, 16, 1, seeded())
    assert torch.equal(numbers, nearest(rows, centroids)[0])
