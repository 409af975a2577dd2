"""When the quantizers of a training run come in, and what an epoch is to them."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sasrec.errors import UserError
from sasrec.models.sasrec import SASRec
from sasrec.quant import attach
from sasrec.quant.quantizer import Quantizer, mse_scale
from sasrec.quant.schedule import Phase, Schedule, phases
from sasrec.training import Trainer
from tests.quant.conftest import CPU, QUANT, TRAIN, same, walks


def test_phases() -> None:
    quant = dataclasses.replace(QUANT, delay_epochs=2, progressive=(8, 4), bits=2)
    assert phases(quant, 8) == [Phase(0, 32), Phase(2, 8), Phase(4, 4), Phase(6, 1)]
    assert phases(QUANT, 4) == [Phase(0, 1)]
    with pytest.raises(UserError, match="4 epochs are too few for quant.delay_epochs: 2 and 3 width"):
        phases(quant, 4)


def test_the_delay_is_the_controls_training_to_the_bit(trained: SASRec) -> None:
    """The same batches, negatives and dropout; then every quantizer starts from the weights of that moment, with the
    parameters that the optimizer has known from the start."""
    models = {}
    for method in ("control", "lsq"):
        models[method] = model = SASRec(trained.params, trained.items)
        model.load_state_dict(trained.state_dict())
        module, options = attach.load_method(method, None)
        quant = dataclasses.replace(QUANT, delay_epochs=2)
        schedule = Schedule(model, quant, module, options, [torch.tensor([[0, 1, 2, 3]])], 4)
        trainer = Trainer(model, walks(), TRAIN, 0, device=CPU, extras=schedule.extras(0))
        for epoch in (1, 2):
            trainer.epoch(epoch)
        assert not attach.quantizers(model)
    assert same(models["control"], models["lsq"]) and not same(models["control"], trained)
    schedule.extras(0).on_epoch(2, 4)
    table = attach.quantizers(model)["item_table.weight"]
    torch.testing.assert_close(table.grid().scale, mse_scale(model.item_table.weight, -8, 7, True))
    before = table.grid().scale.clone()
    trainer.epoch(3)
    assert not torch.equal(table.grid().scale, before)


def test_a_phase_counts_its_own_epochs_and_is_calibrated_when_it_begins(
    trained: SASRec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a share of the epochs, as that after which STE's ranges stand still, is one of the phase."""
    seen: list[tuple[int, int, int, int]] = []
    plain = Quantizer.start_epoch

    def record(self: Quantizer, epoch: int, epochs: int, seed: int, before: int = 0) -> None:
        seen.append((self.bits, epoch, epochs, seed))
        plain(self, epoch, epochs, seed, before)

    monkeypatch.setattr(Quantizer, "start_epoch", record)
    model = SASRec(trained.params, trained.items)
    model.load_state_dict(trained.state_dict())
    module, options = attach.load_method("ste", None)
    histories = [torch.tensor([[0, 1, 2, 3]])]
    quant = dataclasses.replace(QUANT, delay_epochs=1, progressive=(8,))
    extras = Schedule(model, quant, module, options, histories, 5).extras(7)
    found = []
    for epoch in range(5):
        seen.clear()
        extras.on_epoch(epoch, 5)
        found.append(sorted(set(seen)))
        with torch.no_grad():
            model.item_table.weight.mul_(1.5)  # as training would
        if epoch in (1, 3):
            now = attach.quantizers(model)["embedding"].grid().scale.clone()
            with torch.no_grad():
                model.item_table.weight.div_(1.5)
            attach.calibrate(model, histories)
            torch.testing.assert_close(attach.quantizers(model)["embedding"].grid().scale, now)
    assert found == [[], [(8, 0, 2, 7)], [(8, 1, 2, 7)], [(4, 0, 2, 7)], [(4, 1, 2, 7)]]


@pytest.mark.parametrize(
    ("method", "options"), [("lsq", {}), ("pq", {"splits": 4, "centroids": 8}), ("dorefa", {"gradient_bits": 4})]
)
def test_no_two_epochs_of_a_run_share_noise(trained: SASRec, method: str, options: dict[str, Any]) -> None:
    """Nor do those of two phases, each of which counts its own from 0: a quantizer that has the same place in both would draw
    the same numbers again."""
    quant = dataclasses.replace(QUANT, bits=2, progressive=(8,), delay_epochs=1, table_rounding="stochastic")
    schedule = Schedule(copy.deepcopy(trained), quant, *attach.load_method(method, options), [torch.tensor([[1, 2, 3]])], 5)
    on_epoch = schedule.extras(0).on_epoch
    seeds: list[tuple[str, int]] = []
    for epoch in range(5):
        on_epoch(epoch, 5)
        for name, quantizer in attach.quantizers(schedule.model).items():
            if quantizer.method.draws:
                drawing: Any = getattr(quantizer.method, "book", quantizer.method)
                seeds.append((name, drawing.generator.initial_seed()))
    assert len(seeds) == len(set(seeds)) == 4 * len({name for name, _ in seeds}) > 0


def test_the_optimizer_knows_what_every_phase_learns(trained: SASRec) -> None:
    quant = dataclasses.replace(QUANT, bits=2, progressive=(8,))
    model = copy.deepcopy(trained)
    schedule = Schedule(model, quant, *attach.load_method("lsq", None), [torch.tensor([[1, 2, 3]])], 4)
    given = {id(parameter) for parameters in schedule.extras(0).parameters.values() for parameter in parameters}
    own = [{id(p) for quantizer in built.values() for p in quantizer.parameters()} for built in schedule.built]
    assert len(own) == 2 and all(own) and given == own[0] | own[1]
