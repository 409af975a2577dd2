import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sasrec import losses
from sasrec.config import ModelParams, TrainParams
from sasrec.models.sasrec import SASRec


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bce_of_one_position() -> None:
    value = losses.bce(torch.tensor([0.5]), torch.tensor([[-1.0]]))
    assert value.item() == pytest.approx(-math.log(sigmoid(0.5)) - math.log(1 - sigmoid(-1.0)))


def test_bpr_of_one_position_with_two_negatives() -> None:
    value = losses.bpr(torch.tensor([0.5]), torch.tensor([[-1.0, 2.0]]))
    assert value.item() == pytest.approx((-math.log(sigmoid(1.5)) - math.log(sigmoid(-1.5))) / 2)


def test_gbce_beta_runs_from_one_to_the_sampling_rate() -> None:
    # t = 0 is plain binary cross-entropy, t = 1 gives beta = alpha (section 5.2 of the paper).
    assert losses.gbce_beta(101, 20, 0.0) == pytest.approx(1.0)
    assert losses.gbce_beta(101, 20, 1.0) == pytest.approx(0.2)
    assert losses.gbce_beta(101, 20, 0.75) == pytest.approx(0.2 * (0.75 * (1 - 5) + 5))


def test_gbce_raises_the_probability_of_the_positive_to_beta() -> None:
    value = losses.gbce(torch.tensor([0.5]), torch.tensor([[-1.0, 0.2]]), 0.3)
    expected = -(math.log(sigmoid(0.5) ** 0.3) + math.log(1 - sigmoid(-1.0)) + math.log(1 - sigmoid(0.2))) / 3
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_sampled_softmax_over_every_item_is_the_cross_entropy() -> None:
    scores = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 6, 2])
    positive = scores.gather(1, target[:, None]).squeeze(1)
    negative = scores.masked_fill(torch.nn.functional.one_hot(target, 7).bool(), -torch.inf)
    expected = torch.nn.functional.cross_entropy(scores, target)
    assert losses.sampled_softmax(positive, negative).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 50, 10_000])
def test_chunked_cross_entropy_has_the_loss_and_the_gradients_of_the_plain_one(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 12, (9,), generator=generator)
    logits = states @ table.T
    logits = torch.cat([torch.full_like(logits[:, :1], -torch.inf), logits[:, 1:]], 1)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    wanted = torch.autograd.grad(expected, (states, table))
    value = losses.ChunkedCrossEntropy.apply(states, table, targets)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(2 * value, (states, table)), wanted, strict=True):
        torch.testing.assert_close(mine, 2 * theirs)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20))
def test_pairwise_accuracy_counts_ties_half(pairs: list[tuple[int, int]]) -> None:
    positive, negative = torch.tensor(pairs, dtype=torch.float32).T
    expected = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert losses.pairwise_accuracy(positive, negative).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "cross_entropy", "bpr"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_loss_reaches_every_weight_of_the_model(loss: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=6, hidden=8, dropout=0.0, tied=tied), 20)
    params = TrainParams(loss=loss, negatives=3)  # type: ignore[arg-type]
    histories = torch.randint(1, 21, (5, 6))
    states, targets, real = model.encode(histories), torch.randint(1, 21, (30,)), torch.ones(5, 6, dtype=torch.bool)
    shape = {"batch": (3,), "sequence": (5, 3)}.get(losses.needs_negatives(params), (30, 3))
    if len(shape) == 1 or shape[0] == 30:
        states = states.flatten(0, 1)
    result = losses.compute(
        params,
        20,
        model.score,
        model.scoring_table.all,
        states,
        targets,
        torch.randint(1, 21, shape),
        real if states.dim() == 3 else None,
    )
    result.loss.backward()
    # A bias of the keys shifts all scores of a query alike, which no softmax sees.
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert {name for name, _ in model.named_parameters() if "key.bias" not in name} <= reached
    assert 0 <= result.accuracy.item() <= 1


def test_negatives_of_a_sequence_are_those_of_each_of_its_positions() -> None:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=4, hidden=8, dropout=0.0), 20).eval()
    shared = TrainParams(loss="gbce", negatives=6, shared_negatives=True)
    each = TrainParams(loss="gbce", negatives=6, shared_negatives=False)
    states, negatives = torch.randn(2, 4, 8), torch.randint(1, 10, (2, 6))
    real = torch.tensor([[False, True, True, True], [True, True, True, True]])
    targets = torch.randint(11, 21, (7,))
    one = losses.compute(shared, 20, model.score, model.scoring_table.all, states, targets, negatives, real)
    rows = negatives.repeat_interleave(torch.tensor([3, 4]), 0)
    other = losses.compute(each, 20, model.score, model.scoring_table.all, states[real], targets, rows)
    torch.testing.assert_close(one.loss, other.loss)
    assert one.accuracy == other.accuracy


def test_a_shared_negative_that_is_the_target_is_left_out() -> None:
    states = torch.tensor([[1.0], [1.0]])
    table = torch.tensor([[0.0], [1.0], [2.0]])

    def score(of: torch.Tensor, items: torch.Tensor | None) -> torch.Tensor:
        assert items is not None
        return of @ table[items].T if items.dim() == 1 else (table[items] * of[:, None]).sum(-1)

    params = TrainParams(loss="sampled_softmax", negatives=2)
    result = losses.compute(params, 2, score, lambda: table, states, torch.tensor([1, 2]), torch.tensor([1, 2]))
    # Position 0: target 1 (score 1) against 2 (score 2); position 1 the other way round.
    expected = (math.log(math.e + math.e**2) - 1 + math.log(math.e + math.e**2) - 2) / 2
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
