import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sasrec import losses
from sasrec.config import ModelParams, TrainParams
from sasrec.data.batches import NegativeSampler
from sasrec.models.sasrec import SASRec
from tests.conftest import SmallStore


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


def log_sum(*terms: float) -> float:
    return math.log(sum(math.exp(term) for term in terms))


# Of one position: s+ and a list of s-, as the papers write them.
FORMULAS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[float, list[float]], float]]] = {
    # Kang and McAuley, section III-E; its one negative, and the mean over several.
    "bce": (losses.bce, lambda p, n: -math.log(sigmoid(p)) - sum(math.log(1 - sigmoid(s)) for s in n) / len(n)),
    "bpr": (losses.bpr, lambda p, n: -sum(math.log(sigmoid(p - s)) for s in n) / len(n)),
    "gbce": (
        lambda p, n: losses.gbce(p, n, 0.3),
        lambda p, n: -(0.3 * math.log(sigmoid(p)) + sum(math.log(1 - sigmoid(s)) for s in n)) / (len(n) + 1),
    ),
    "sampled_softmax": (losses.sampled_softmax, lambda p, n: log_sum(p, *n) - p),
    # Items with the shares 1/2, 1/8 and 1/50 of the training data are expected 3/2, 3/8 and 3/50 times in three draws.
    "sampled_softmax, logQ": (
        lambda p, n: losses.sampled_softmax(p, n, torch.tensor([1.5, 0.375, 0.06], dtype=torch.float64).log()),
        lambda p, n: math.log(math.exp(p) + math.exp(n[0]) / 1.5 + math.exp(n[1]) / 0.375 + math.exp(n[2]) / 0.06) - p,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_and_gradients_are_those_of_the_formula(name: str) -> None:
    """The mean over positions, and its gradient by central differences of the formula."""
    computed, formula = FORMULAS[name]
    scores = [[0.5, -1.0, 0.2, 1.3], [-0.7, 0.4, 0.0, -2.0]]  # the target's first
    x = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    value = computed(x[:, 0], x[:, 1:])
    assert value.item() == pytest.approx(sum(formula(row[0], row[1:]) for row in scores) / 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, x)
    step = 1e-5
    for i, row in enumerate(scores):
        for j in range(len(row)):
            up, down = ([s + sign * step * (k == j) for k, s in enumerate(row)] for sign in (1, -1))
            expected = (formula(up[0], up[1:]) - formula(down[0], down[1:])) / (2 * step) / len(scores)
            assert gradient[i, j].item() == pytest.approx(expected, abs=1e-9)


def test_many_popular_negatives_with_their_correction_become_the_full_softmax() -> None:
    """Loss and gradient; not so without the correction, with one alike for all items, or with one of the target too."""
    items, drawn_count = 30, 200_000
    # Two items a user: all of them are training items. Item 30 occurs 30 times as often as item 1.
    store = SmallStore([[i, i] for i in range(1, items + 1) for _ in range(i)], items)
    sampler = NegativeSampler(store, False, by_popularity=True)
    negatives = sampler.draw_shared(drawn_count, np.random.default_rng(0))
    log_expected = sampler.log_expected(negatives)
    assert log_expected is not None
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, items + 1))
    states.requires_grad_()
    targets = torch.tensor([1, 4, 15, 29, 30])
    drawn = torch.from_numpy(negatives)

    def score(of: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        assert ids is not None
        return of @ table[ids].T if ids.dim() == 1 else (table[ids] * of[:, None]).sum(-1)

    full = torch.nn.functional.cross_entropy(states @ table[1:].T, targets - 1)
    (wanted,) = torch.autograd.grad(full, states)

    def error(loss: torch.Tensor) -> tuple[float, float]:
        """Of the loss, and of its gradient relative to the gradient of the full softmax."""
        (gradient,) = torch.autograd.grad(loss, states)
        return abs(loss.item() - full.item()), ((gradient - wanted).norm() / wanted.norm()).item()

    def sampled(correction: torch.Tensor | None) -> torch.Tensor:
        params = TrainParams(loss="sampled_softmax", negative_sampling="popularity", negatives=drawn_count)
        return losses.compute(params, items, score, lambda: table, states, targets, drawn, None, correction).loss

    assert max(error(sampled(torch.from_numpy(log_expected)))) < 0.01
    assert error(sampled(None))[0] > 5
    assert error(sampled(None))[1] > 0.05
    assert min(error(sampled(torch.tensor(math.log(drawn_count / items))))) > 0.05
    positive = (states * table[targets]).sum(-1)
    negative = (states @ table[drawn].T).masked_fill(drawn == targets[:, None], -torch.inf)
    of_targets = torch.from_numpy(np.log(drawn_count * 2 * targets.numpy() / len(store.items)))
    assert error(losses.sampled_softmax(positive - of_targets, negative, torch.from_numpy(log_expected)))[0] > 5


def test_a_target_that_is_never_drawn_has_a_finite_loss() -> None:
    store = SmallStore([[1, 2], [2, 1], [1, 2, 3, 3]], 4)  # 3 is held out, 4 does not occur
    sampler = NegativeSampler(store, False, by_popularity=True)
    negatives = sampler.draw_shared(6, np.random.default_rng(0))
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=4, hidden=8, dropout=0.0), 4)
    params, log_expected = (
        TrainParams(loss="sampled_softmax", negative_sampling="popularity"),
        torch.from_numpy(sampler.log_expected(negatives)),
    )
    states, targets = torch.randn(2, 8), torch.tensor([3, 4])
    args = (params, 4, model.score, model.scoring_table.all, states, targets, torch.from_numpy(negatives), None, log_expected)
    result = losses.compute(*args)
    result.loss.backward()
    assert result.loss.isfinite()
    assert bool(model.item_table.weight.grad.isfinite().all())  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_chunked_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3_000)
    states, table = torch.randn(400, 2, requires_grad=True), torch.randn(1_000, 2, requires_grad=True)
    targets = torch.randint(1, 1_000, (400,))
    with Largest() as plain:
        torch.nn.functional.cross_entropy(states @ table.T, targets).backward()
    with Largest() as chunked:
        losses.ChunkedCrossEntropy.apply(states, table, targets).backward()
    assert plain.elements == 400_000
    assert chunked.elements <= 3_000


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
    states, targets, places = model.encode(histories), torch.randint(1, 21, (30,)), torch.arange(30)
    shape = {"batch": (3,), "sequence": (5, 3)}.get(losses.negatives_per(params), (30, 3))
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
        places if states.dim() == 3 else None,
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
    one = losses.compute(
        shared, 20, model.score, model.scoring_table.all, states, targets, negatives, real.flatten().nonzero()[:, 0]
    )
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
