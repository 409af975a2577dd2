"""What rounding costs, tensor by tensor, and the widths that are chosen from it."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.deploy.artefact import Item, export
from sasrec.errors import UserError
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import taps
from sasrec.quant import attach
from sasrec.quant.budgets import assignments
from sasrec.quant.frozen import tensors
from sasrec.quant.sensitivity import (
    WIDTHS,
    Cost,
    Validation,
    front,
    joint_rise,
    measure,
    mixed,
    of_own_file,
    size_of,
    smallest_within,
    stored_bytes,
)  # fmt: skip
from sasrec.training import Trainer
from tests.conftest import SmallStore

QUANT = QuantParams(bits=8, calibration_batches=1)
HISTORIES = [torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])]


@pytest.fixture(scope="module")
def store() -> SmallStore:
    return SmallStore([[(start * 7 + i) % 40 + 1 for i in range(5 + start % 15)] for start in range(50)], 40)


@pytest.fixture(scope="module")
def trained(store: SmallStore) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=10, hidden=16, dropout=0.1), 40)
    train = TrainParams(loss="cross_entropy", epochs=4, batch_size=16, lr=0.01, schedule="constant", warmup=0.0)
    Trainer(model, store, train, 0, device=torch.device("cpu")).run(log=lambda line: None)
    return model


@pytest.fixture(scope="module")
def validation(store: SmallStore) -> Validation:
    return Validation(store, 10, torch.device("cpu"))


def test_loss_is_the_cross_entropy_of_the_held_out_items(store: SmallStore, trained: SASRec, validation: Validation) -> None:
    losses = []
    for user in store.held("validation").users:
        sequence = store.items[store.offsets[user] : store.offsets[user + 1]].tolist()
        with torch.no_grad():
            scores = trained.score(trained.encode(torch.tensor([sequence[:-2][-10:]]), last=True)[:, 0])
        losses.append(float(F.cross_entropy(scores[:, 1:], torch.tensor([sequence[-2] - 1]))))
    assert validation.loss(trained) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_each_tensor_is_rounded_alone(trained: SASRec, validation: Validation) -> None:
    full, costs = measure(trained, validation, QUANT, HISTORIES, (2, 4))
    assert full == pytest.approx(validation.loss(trained)) and not attach.quantizers(trained)
    named = {(cost.tensor, cost.bits): cost for cost in costs}
    assert len(named) == len(costs) == 2 * len({cost.tensor for cost in costs})
    for tensor in ("item_table.weight", "blocks.1.feed_forward.inner.weight", "final"):
        overrides = dict.fromkeys({cost.tensor for cost in costs}, 32) | {tensor: 2}
        module, options = attach.load_method("ptq", None)
        attach.attach(trained, dataclasses.replace(QUANT, overrides=overrides), module, options)
        attach.calibrate(trained, HISTORIES)
        assert list(attach.quantizers(trained)) == [tensor]
        assert named[tensor, 2].rise == pytest.approx(validation.loss(trained) - full, abs=1e-5)
        attach.place(trained, {})
    assert named["item_table.weight", 2].bytes == 41 * 16 * 2 // 8 + 41 * 2
    assert named["position_table.weight", 2].bytes == 10 * 16 * 2 // 8 + 10 * 4
    assert named["final", 2].bytes == 0
    assert named["item_table.weight", 2].rise > named["item_table.weight", 4].rise


COSTS = [
    Cost("a", "weight", 2, 10, 0.5), Cost("a", "weight", 8, 40, 0.0),
    Cost("b", "weight", 2, 100, 0.1), Cost("b", "weight", 8, 400, 0.02),
]  # fmt: skip


def test_front_by_hand() -> None:
    assert front(COSTS) == [
        (110, 0.6, {"a": 2, "b": 2}),
        (140, 0.1, {"a": 8, "b": 2}),
        (440, pytest.approx(0.02), {"a": 8, "b": 8}),
    ]
    # A tensor that gains by being rounded is not paid for with another's loss.
    assert front([Cost("a", "weight", 2, 10, -1.0), Cost("b", "weight", 2, 10, 0.3)]) == [(20, 0.3, {"a": 2, "b": 2})]


def test_sizes() -> None:
    assert stored_bytes(3, 5, 3, True) == 6 + 12  # 45 bits
    assert stored_bytes(3, 5, 3, True, large=True) == 6 + 6
    assert stored_bytes(3, 5, 3, False) == stored_bytes(3, 5, 3, False, large=True) == 6 + 4
    assert stored_bytes(0, 64, 4, False) == 0
    assert stored_bytes(3, 5, 3, True, shifted=True) == 6 + 24 and stored_bytes(3, 5, 3, False, shifted=True) == 6 + 8


def bytes_of(quant: QuantParams, model: SASRec) -> int:
    weights = {name: tensor for name, tensor in model.named_parameters() if name in quant.overrides}
    return sum(
        stored_bytes(len(w), w.shape[1], quant.overrides[name], True, name == "item_table.weight")
        for name, w in weights.items()
    )


@pytest.mark.parametrize("budget", [1.8, 2.5, 3.0])
def test_budget(store: SmallStore, trained: SASRec, budget: float) -> None:
    quant = mixed(trained, store, dataclasses.replace(QUANT, budget_kb=budget), HISTORIES, lambda line: None)
    assert 0.8 * 1000 * budget < bytes_of(quant, trained) <= 1000 * budget
    assert len(set(quant.overrides.values())) > 1 and not attach.quantizers(trained)


@pytest.mark.parametrize("method", ["ptq", "lsq", "dorefa", "pact", "apot", "adaround"])
@pytest.mark.parametrize("weights", ["per_row", "per_tensor"])
def test_a_budget_holds_for_what_is_exported(
    store: SmallStore, trained: SASRec, tmp_path: Path, method: str, weights: Literal["per_row", "per_tensor"]
) -> None:
    """Weights by apot have a shift beside each scale."""
    module, options = attach.load_method(method, None)
    quant = dataclasses.replace(QUANT, budget_kb=2.5, weights=weights)
    quant = mixed(trained, store, quant, HISTORIES, lambda line: None, attach.shifted(module))
    own, live = of_own_file(trained), taps(trained)
    expected = sum(
        size_of(tap, quant.overrides.get(name, 8), quant, tap in own, attach.shifted(module)) for name, tap in live.items()
    )
    attach.attach(trained, quant, module, options)
    attach.calibrate(trained, HISTORIES)
    frozen = attach.freeze(trained)
    attach.place(trained, {})
    items = [Item(str(item)) for item in range(trained.item_table.weight.shape[0] - 1)]
    written = export(tmp_path / "model", trained, frozen, items, {})
    assert written.embedding_bytes + written.weight_bytes == expected <= 2500


def test_drop(store: SmallStore, trained: SASRec, validation: Validation) -> None:
    """The whole model is measured, not the sum of its parts, and a looser limit never gives a larger model."""
    sizes = []
    module, options = attach.load_method("ptq", None)
    for limit in (0.05, 0.2, 1.0):
        quant = mixed(trained, store, dataclasses.replace(QUANT, max_drop=limit), HISTORIES, lambda line: None)
        sizes.append(bytes_of(quant, trained))
        full = validation.loss(trained)
        attach.attach(trained, quant, module, options)
        attach.calibrate(trained, HISTORIES)
        assert validation.loss(trained) - full <= limit + 1e-6
        attach.place(trained, {})
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize(("limit", "chosen"), [(9.0, 0), (0.7, 0), (0.65, 1), (0.3, 4), (0.25, 5), (0.1, 6), (0.05, 6)])
def test_the_smallest_within_a_limit_by_hand(
    trained: SASRec, validation: Validation, limit: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rises = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    found = [(10 * i, 0.0, {"a": i}) for i in range(7)]
    monkeypatch.setattr("sasrec.quant.sensitivity.joint_rise", lambda *given: 2.0 + rises[given[3]["a"]])
    best, rise = smallest_within(trained, QUANT, HISTORIES, found, validation, 2.0, limit + 1e-6)
    assert best == found[chosen] and rise == pytest.approx(rises[chosen])


def test_a_budget_is_in_thousands_of_bytes(store: SmallStore, trained: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sasrec.quant.sensitivity.check", lambda *_: None)  # of the model, whose costs these are not
    monkeypatch.setattr("sasrec.quant.sensitivity.measure", lambda *_: (2.0, COSTS))
    monkeypatch.setattr("sasrec.quant.sensitivity.joint_rise", lambda *_: 2.1)
    for budget, size in ((0.11, 110), (0.1399, 110), (0.14, 140), (0.4399, 140), (0.44, 440), (9.0, 440)):
        logged: list[str] = []
        quant = mixed(trained, store, dataclasses.replace(QUANT, budget_kb=budget), HISTORIES, logged.append)
        assert quant.overrides == next(widths for own, _, widths in front(COSTS) if own == size)
        assert "+0.1000" in logged[0]


def test_what_cannot_be_had(store: SmallStore, trained: SASRec) -> None:
    def ask(**quant: Any) -> QuantParams:
        return mixed(trained, store, dataclasses.replace(QUANT, **quant), HISTORIES, lambda line: None)

    with pytest.raises(UserError, match=r"quant.budget_kb: 0.1 kB do not hold .* the least is \d"):
        ask(budget_kb=0.1)
    with pytest.raises(UserError, match="quant.max_drop: no assignment stays within 0; .* rises by"):
        ask(max_drop=0.0, activation_bits=2)
    kept = ask(budget_kb=2.5, overrides={"item_table.weight": 8})
    assert kept.overrides["item_table.weight"] == 8 and kept.budget_kb == 2.5
    assert ask() == QUANT


def test_mixed_widths_stand_beside_uniform_ones(trained: SASRec, validation: Validation) -> None:
    full, costs = measure(trained, validation, QUANT, HISTORIES, WIDTHS, ("table", "weight"))
    rows = assignments(trained, validation, QUANT, HISTORIES, full, costs, match=(3,))
    uniform = {row.bits: row for row in rows if row.name == "uniform"}
    assert list(uniform) == sorted(WIDTHS, reverse=True)
    names = {cost.tensor for cost in costs}
    for bits, row in uniform.items():
        assert row.widths == dict.fromkeys(names, bits)
        assert row.bytes == sum(cost.bytes for cost in costs if cost.bits == bits)
        # Measured, not added up: all are rounded at once, and the activations to 8 bits.
        module, options = attach.load_method("ptq", None)
        attach.attach(trained, dataclasses.replace(QUANT, overrides=row.widths), module, options)
        attach.calibrate(trained, HISTORIES)
        assert row.rise == pytest.approx(validation.loss(trained) - full, abs=1e-6)
        attach.place(trained, {})
    mixed_rows = [row for row in rows if row.name == "budget"]
    assert mixed_rows and all(row.bytes <= uniform[row.bits].bytes for row in mixed_rows)
    assert all(len(set(row.widths.values())) > 1 for row in mixed_rows)
    (same,) = (row for row in rows if row.name == "same loss")
    assert same.bits == 3 and same.rise <= uniform[3].rise and same.bytes < uniform[8].bytes
    for row in (*mixed_rows, same):  # measured, too
        assert row.rise == pytest.approx(joint_rise(trained, QUANT, HISTORIES, row.widths, validation) - full, abs=1e-6)
    assert not attach.quantizers(trained)


def test_costs_do_not_depend_on_dropout(trained: SASRec, validation: Validation) -> None:
    """A model as it is loaded, in training mode, gives what one in evaluation mode gives, and stays in its mode."""
    found = [measure(trained.train(mode), validation, QUANT, HISTORIES, (2,), ("activation",)) for mode in (True, False, True)]
    assert found[0] == found[1] == found[2]
    assert trained.training


@pytest.mark.parametrize(("bits", "size"), [(1, 82 + 82), (5, 410 + 82), (8, 656 + 82), (32, 4 * 656)])
def test_a_width_that_is_given_is_part_of_what_a_budget_holds(bits: int, size: int, store: SmallStore, trained: SASRec) -> None:
    """Any width, and full precision, not those alone that are chosen from. 41 x 16 entries."""
    quant = dataclasses.replace(QUANT, overrides={"item_table.weight": bits})
    others = [tensors(trained)[name] for name, tap in taps(trained).items() if tap.kind != "activation"]
    least = size + sum(stored_bytes(len(w), w.shape[1], 2, True) for w in others if len(w) != 41)
    with pytest.raises(UserError, match=rf"the least is {least / 1000:.1f} kB"):
        mixed(trained, store, dataclasses.replace(quant, budget_kb=(least - 1) / 1000), HISTORIES, lambda line: None)
    found = mixed(trained, store, dataclasses.replace(quant, budget_kb=least / 1000), HISTORIES, lambda line: None)
    assert found.overrides.pop("item_table.weight") == bits and set(found.overrides.values()) == {2}


def test_bytes_are_those_of_the_exported_model(store: SmallStore, trained: SASRec, tmp_path: Path) -> None:
    logged: list[str] = []
    quant = mixed(trained, store, dataclasses.replace(QUANT, budget_kb=2.5), HISTORIES, logged.append)
    model = copy.deepcopy(trained)
    attach.attach(model, quant, *attach.load_method("ptq", None))
    attach.calibrate(model, HISTORIES)
    frozen = attach.freeze(model)
    attach.place(model, {})
    sizes = export(tmp_path, model, frozen, [Item(str(i)) for i in range(40)], {})
    assert f", {(sizes.embedding_bytes + sizes.weight_bytes) / 1000:.1f} kB," in logged[0]
    _, costs = measure(trained, Validation(store, 10, torch.device("cpu")), quant, HISTORIES, (), given=quant.overrides)
    by_kind = {kind: sum(cost.bytes for cost in costs if cost.kind == kind) for kind in ("table", "weight")}
    assert by_kind == {"table": sizes.embedding_bytes, "weight": sizes.weight_bytes}


def test_widths_of_activations_that_are_given_count_in_what_is_measured(trained: SASRec, validation: Validation) -> None:
    plain = joint_rise(trained, QUANT, HISTORIES, {}, validation)
    assert joint_rise(trained, dataclasses.replace(QUANT, overrides={"final": 2}), HISTORIES, {}, validation) > plain


def test_the_users_of_the_loss_are_spread_over_all(store: SmallStore) -> None:
    held = store.held("validation")
    chosen = Validation(store, 10, torch.device("cpu"), users=5)
    expected = [int(store.items[held.positions[i]]) for i in (0, 12, 24, 37, 49)]
    assert sorted(torch.cat([targets for _, targets in chosen.batches]).tolist()) == sorted(expected)


def test_the_loss_does_not_depend_on_the_parts_it_is_taken_in(
    trained: SASRec, validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validation.loss(trained)
    monkeypatch.setattr("sasrec.quant.sensitivity.CHUNK_ELEMENTS", 40 * 7)  # 50 users by 7, and one alone
    assert validation.loss(trained) == pytest.approx(whole, rel=1e-6)


def test_where_rounding_loses_nothing_there_is_no_smaller_model_that_loses_no_more(
    trained: SASRec, validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quant.max_drop` is not below 0, so that a uniform model that gains cannot be its limit."""
    costs = [Cost("a", "weight", bits, 10 * bits, 1.0 / bits) for bits in WIDTHS]
    monkeypatch.setattr("sasrec.quant.budgets.joint_rise", lambda *_: 1.9)
    rows = assignments(trained, validation, QUANT, HISTORIES, 2.0, costs)
    assert [row.name for row in rows] == ["uniform"] * len(WIDTHS)
