"""The rating of the next item as a second task: its loss, what it learns, and that it leaves the rest as it was."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec.config import Loss, ModelParams, Side, TrainParams
from sasrec.errors import UserError
from sasrec.evaluation import blocks
from sasrec.models.facts import Facts
from sasrec.models.sasrec import SASRec
from sasrec.second_task import RatingTask
from sasrec.training import Trainer
from tests.conftest import SmallStore

CPU = torch.device("cpu")
FAST = TrainParams(epochs=4, batch_size=16, min_batches=1, lr=0.01, patience=10)


def tastes(by_item: bool = False) -> SmallStore:
    """40 users, every other one of whom gives 5 to everything, and the others 1; or 5 to even items and 1 to odd ones."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 21, 20).tolist() for _ in range(40)]
    high = np.array(sequences).ravel() % 2 == 0 if by_item else np.repeat(np.arange(40) % 2, 20) == 0
    return SmallStore(sequences, 20, ratings=np.where(high, 5, 1).astype(np.float32))


def trainer(store: SmallStore, weight: float, loss: Loss = "cross_entropy") -> Trainer:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=20, hidden=16, dropout=0.0), 20)
    return Trainer(model, store, dataclasses.replace(FAST, rating_weight=weight, loss=loss, negatives=8), 0, device=CPU)


def test_the_loss_is_the_squared_error_in_standard_deviations() -> None:
    store = SmallStore([[1, 2, 1, 2]], 2, ratings=np.array([1, 5, 3, 4], np.float32))
    task = RatingTask(store, 2)  # trained on the ratings 1 and 5: mean 3, deviation 2
    states, rows = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[0.5, 0.0], [1.0, 1.0]])
    # At the start the mean is predicted: of 5 that is 1 deviation off, of 3 none.
    assert task.loss(states, rows, np.array([1, 2])).item() == pytest.approx((1**2 + 0**2) / 2)
    with torch.no_grad():
        task.head.weight.copy_(torch.tensor([[1.0, 0, 0, 10, 0, 0.5]]))
        task.head.bias.fill_(0.25)
    # h1 + 10 e2 + h2 e2 / 2 + 1/4, with e in units of 1 / sqrt(2).
    first, second = 1 + 0 + 0 + 0.25, 0.5 + 10 * 2**0.5 - 0.5 * 2**0.5 + 0.25
    assert task(states, rows).tolist() == pytest.approx([first, second])
    wanted = ((first - 1) ** 2 + second**2) / 2
    assert task.loss(states, rows, np.array([1, 2])).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("by_item", "side", "low", "high"), [(True, (), 0.0, 0.1), (False, ("rating",), 0.0, 0.1), (False, (), 0.3, 9.0)]
)
def test_the_targets_rating_is_learned_from_the_item_and_from_past_ratings(
    by_item: bool, side: tuple[Side, ...], low: float, high: float
) -> None:
    """The mean squared error on held-out items; 1 is that of the mean."""
    store = tastes(by_item)
    params = ModelParams(max_len=20, hidden=16, dropout=0.0, side=side)
    torch.manual_seed(0)
    model = SASRec(params, 20, Facts.of_data(params, store, []))
    run = Trainer(model, store, dataclasses.replace(FAST, rating_weight=1.0), 0, device=CPU)
    for epoch in range(1, 16):
        run.epoch(epoch)
    assert run.second is not None
    ((order, histories),) = blocks(store, store.held("validation"), params.max_len, 512, model.event_inputs)
    places = store.held("validation").positions[order]
    states = model.eval().encode(histories, last=True)[:, 0]
    rows = model.scoring_table.lookup(torch.from_numpy(store.items[places].astype(np.int64)))
    assert low <= run.second.loss(states, rows, places).item() <= high


def test_a_weight_of_nothing_changes_no_bit_and_another_does() -> None:
    store = tastes()
    states = []
    for ratings, weight in ((None, 0.0), (store.ratings, 0.0), (store.ratings, 0.5)):
        run = trainer(dataclasses.replace(store, ratings=ratings), weight)
        run.run(None, "key", lambda line: None)
        states.append(run.model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())
    # The head is not part of the model.
    assert states[0].keys() == states[2].keys()


@pytest.mark.parametrize("loss", ["cross_entropy", "gbce"])
def test_a_killed_run_resumes_to_the_same_bits(loss: Loss, tmp_path: Path) -> None:
    store = tastes()
    whole = trainer(store, 0.5, loss)
    whole.run(None, "key", lambda line: None)

    class Killed(Exception):
        pass

    def die(line: str) -> None:
        if line.startswith("epoch 3:"):
            raise Killed

    with pytest.raises(Killed):
        trainer(store, 0.5, loss).run(tmp_path / "run.safetensors", "key", die)
    resumed = trainer(store, 0.5, loss)
    lines: list[str] = []
    resumed.run(tmp_path / "run.safetensors", "key", lines.append)
    assert lines[0] == "resuming after epoch 2"
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
    assert whole.second is not None and resumed.second is not None
    assert torch.equal(whole.second.head.weight, resumed.second.head.weight)


def test_without_ratings_it_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        trainer(dataclasses.replace(tastes(), ratings=None), 0.5)
    assert str(caught.value) == (
        "params.yaml: train.rating_weight is above 0, but the data has no ratings; name their column in "
        "dataset.columns.rating, or do without"
    )
