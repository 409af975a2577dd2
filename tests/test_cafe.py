"""CaFe against cases worked out by hand: intents, local heads, states, joint scores, losses and their negatives."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sasrec import objective
from sasrec.checkpoint import load_model, save_model
from sasrec.config import ModelParams, TrainParams
from sasrec.data.batches import NegativeSampler, epoch_batches
from sasrec.errors import UserError
from sasrec.models import registry
from sasrec.models.attention import Attention
from sasrec.models.cafe import CAFE
from sasrec.models.intents import COMMON, UNKNOWN, intent_names, item_intents
from sasrec.models.locality import Locality
from sasrec.training import Trainer
from tests.conftest import SmallStore

ITEMS = 30
SMALL = {"kind": "cafe", "max_len": 8, "hidden": 12, "heads": 2, "local_heads": 1, "dropout": 0.3}


def build(**options: Any) -> CAFE:
    """30 items of 4 intents, with weights away from the special values of the start."""
    torch.manual_seed(0)
    intents = torch.tensor([0, *(1 + i % 4 for i in range(ITEMS))])
    model = CAFE(ModelParams(**{**SMALL, **options}), intents)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for table in (*(part.table for part in model.scoring_parts), model.coarse.item_table, model.fine.item_table):
            table.weight[0] = 0
    return model.eval()


def histories() -> Tensor:
    made = torch.randint(1, ITEMS + 1, (6, 8), generator=torch.Generator().manual_seed(1))
    made[0, :3] = 0
    return made


# The intent of an item


def test_the_rarest_common_category_is_the_intent() -> None:
    """Drama has 12 items, Film-Noir 10, Odd 1; the order in which a file lists them does not count."""
    catalogue = [("Drama", "Film-Noir")] * 5 + [("Film-Noir", "Drama")] * 5 + [("Odd", "Drama"), ("Drama",), ()]
    names = intent_names(catalogue)
    assert names == ["Film-Noir"] * 10 + ["Drama", "Drama", UNKNOWN]
    assert item_intents(catalogue).tolist() == [0] + [3] * 10 + [2, 2, 1]  # "(unknown)" < "Drama" < "Film-Noir"


def test_ties_go_by_the_alphabet_and_rare_ones_to_the_most_common() -> None:
    assert intent_names([("b", "a")] * COMMON) == ["a"] * COMMON
    assert intent_names([("x", "y"), ("y",), ("x", "z", "y")]) == ["y", "y", "y"]
    assert intent_names([("q",), ("p", "q")]) == ["q", "q"]


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), min_size=1, max_size=40), st.randoms())
def test_an_intent_is_one_of_the_items_own_whatever_the_order(catalogue: list[list[str]], random: Any) -> None:
    names = intent_names(catalogue)
    assert all(name in own if own else name == UNKNOWN for name, own in zip(names, catalogue, strict=True))
    assert names == intent_names([random.sample(own, len(own)) for own in catalogue])


def test_data_without_categories_is_refused() -> None:
    with pytest.raises(UserError, match="this data has none: name their column in dataset.columns.category"):
        registry.of_data(ModelParams(kind="cafe"), 2, [(), ()])
    assert isinstance(registry.of_data(ModelParams(kind="cafe"), 2, [("a",), ()]), CAFE)


# Local heads


def test_local_heads_weigh_as_the_papers_formula() -> None:
    """softmax(q k / sqrt(d) + u (v_i + v_j + r_ij) + c), r by distance: what is the same for all keys of a query cancels."""
    torch.manual_seed(0)
    length, size, heads = 5, 3, 2
    locality = Locality(ModelParams(max_len=length, hidden=heads * size, heads=heads, local_heads=1))
    u, r, c = torch.randn(size), torch.randn(length, size), 0.7
    with torch.no_grad():
        locality.content[0], locality.distance[0] = u, r @ u
    values, products = torch.randn(heads, length, size), torch.randn(heads, length, length)
    found = products + locality(values, length)
    assert torch.equal(found[0], products[0])  # the first head is global
    for i in range(length):
        paper = torch.stack([products[1, i, j] + u @ (values[1, i] + values[1, j] + r[i - j]) + c for j in range(i + 1)])
        torch.testing.assert_close(found[1, i, : i + 1].softmax(0), paper.softmax(0))


def test_local_weights_by_hand() -> None:
    """u = 2, values 1, 3, -1, and b = 0, -1, -5 for what is 0, 1, 2 places back."""
    locality = Locality(ModelParams(max_len=3, hidden=1, heads=1, local_heads=1))
    with torch.no_grad():
        locality.content[0], locality.distance[0] = torch.tensor([2.0]), torch.tensor([0.0, -1.0, -5.0])
    values = torch.tensor([[[1.0], [3.0], [-1.0]]])
    assert locality(values, 3)[0].tril().tolist() == [[2, 0, 0], [2 - 1, 6, 0], [2 - 5, 6 - 1, -2]]
    assert locality(values, 1).tolist() == [[[2 - 5, 6 - 1, -2]]]


def test_beyond_the_window_a_local_head_sees_nothing() -> None:
    """Both blocks look back at most one place, so that an item four places back is out of reach for the fine encoder."""
    model = build(local_heads=2, local_window=2)
    batch = histories()[1:]
    other = batch.clone()
    other[:, 0] = other[:, 0] % ITEMS + 1
    same, changed = model.fine.encode(batch), model.fine.encode(other)
    assert torch.equal(same[:, 3:], changed[:, 3:])
    assert not torch.equal(same[:, 2], changed[:, 2])
    free = build(local_heads=2)
    assert not torch.equal(free.fine.encode(batch)[:, -1], free.fine.encode(other)[:, -1])


def test_what_local_heads_learn_gets_the_gradient_of_plain_operators() -> None:
    model = build(dropout=0.0)
    attention = model.fine.blocks[0].attention
    assert isinstance(attention, Attention)
    locality = attention.locality
    assert locality is not None
    x = torch.randn(2, 5, 12)
    bias = torch.full((5, 5), -1e9).triu(1)[None]

    def gradients(out: Tensor) -> list[Tensor]:
        wanted = [locality.content, locality.distance, attention.value.weight, attention.key.weight]
        return list(torch.autograd.grad(out.sin().sum(), wanted))

    fast = gradients(attention(x, x, bias, None, None))
    query, key, value = (attention._split(part(x)) for part in (attention.query, attention.key, attention.value))
    scores = query @ key.transpose(1, 2) / math.sqrt(6) + bias + locality(value, 5)
    plain = gradients(attention._join(scores.softmax(-1) @ value))
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_local_heads_and_their_window_are_checked() -> None:
    with pytest.raises(ValueError, match="local_heads must be between 0 and 1, not 2"):
        ModelParams(local_heads=2)
    with pytest.raises(ValueError, match="local_window is set, but no head is local"):
        ModelParams(local_window=3)


# States and scores


def test_states_are_the_sum_of_both_and_the_coarse_one() -> None:
    """Equation 7: the state that items are scored with is f + m; m of the sequence of intents."""
    model, batch = build(), histories()
    m = model.coarse.encode(torch.where(batch > 0, 1 + (batch - 1) % 4, 0))
    f = model.fine.encode(batch)
    torch.testing.assert_close(model.encode(batch), torch.cat([f + m, m], -1))


def test_the_score_is_the_sum_of_item_and_intent_part_by_hand() -> None:
    """e_1 = (1, 2), e_2 = (0, 1), both of intent 1 with g = (3, -1); f = (1, 0), m = (2, 1).
    (f + m) e_1 + m g = 3 + 2 + 5 = 10 and (f + m) e_2 + m g = 1 + 5 = 6."""
    model = CAFE(ModelParams(kind="cafe", hidden=2), torch.tensor([0, 1, 1]))
    with torch.no_grad():
        model.fine.item_table.weight[1:] = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        model.coarse.item_table.weight[1:] = torch.tensor([[3.0, -1.0]])
    state = torch.tensor([[1.0 + 2, 0 + 1, 2, 1]])
    assert model.score(state).tolist() == [[0, 10, 6]]
    assert model.score(state, torch.tensor([[2, 1, 2]])).tolist() == [[6, 10, 6]]


def test_it_ranks_as_the_joint_probability() -> None:
    """Equation 10, P(c) P(v), here with a softmax over all of its kind each."""
    model = build()
    state = model.encode(histories(), last=True)[:, 0]
    log_items = (state[:, :12] @ model.fine.item_table.weight[1:].T).log_softmax(1)
    log_intents = (state[:, 12:] @ model.coarse.item_table.weight[1:].T).log_softmax(1)
    joint = log_items + log_intents[:, [i % 4 for i in range(ITEMS)]]
    scores = model.score(state)[:, 1:]
    torch.testing.assert_close(scores.log_softmax(1), joint.log_softmax(1))
    assert torch.equal(scores.argsort(1), joint.argsort(1))


@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_of_the_scores_add_up_to_the_joint_table(tied: bool) -> None:
    model = build(tied=tied)
    states, table = torch.randn(3, 24), model.scoring_table
    total = torch.zeros(3, ITEMS + 1)
    for part in model.scoring_parts:
        assert model.get_parameter(part.name) is part.table.weight
        own = states[:, part.columns] @ part.table.all().T
        total += own if part.index is None else own[:, part.index.long()]
    torch.testing.assert_close(total, states @ table.all().T)
    some = torch.tensor([[3, 0], [7, 30]])
    assert torch.equal(table.lookup(some), table.all()[some])
    assert not table.all()[0].any()


@pytest.mark.parametrize("options", [{}, {"block": "original", "position": "left"}, {"local_heads": 2, "local_window": 3}])
def test_no_future_no_padding_no_neighbours_and_the_last_state_alone(options: dict[str, Any]) -> None:
    model, batch = build(**options), histories()
    states = model.encode(batch)
    changed = batch.clone()
    changed[:, 5:] = changed[:, 5:] % ITEMS + 1
    before = batch[:, :5] != 0  # padding sees nothing, and is looked at by nothing
    torch.testing.assert_close(model.encode(changed)[:, :5][before], states[:, :5][before], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode(batch[:1, 3:]), states[:1, 3:], atol=2e-6, rtol=0)
    torch.testing.assert_close(model.encode(batch, last=True), states[:, -1:], atol=2e-6, rtol=0)
    # Two histories in one row: the padded one's 5 items, then 3 of another.
    packed = torch.cat([batch[0, 3:], batch[1, :3]])[None]
    windows = torch.tensor([[2] * 5 + [1] * 3])
    packed_states = model.encode(packed, windows=windows)[0]
    torch.testing.assert_close(packed_states[:5], states[0, 3:], atol=2e-6, rtol=0)
    torch.testing.assert_close(packed_states[5:], model.encode(batch[1:2, :3])[0], atol=2e-6, rtol=0)


def test_parameters_are_those_of_two_sasrecs() -> None:
    """Hidden 64, length 50, 1,349 items of 19 intents, with attention output: as many as the authors' code has."""
    intents = torch.tensor([0, *(1 + i % 19 for i in range(1349))])
    model = CAFE(ModelParams(kind="cafe", block="original", attention_output=True), intents)
    assert sum(p.numel() for p in model.parameters()) == 195_200
    local = CAFE(ModelParams(kind="cafe", block="original", attention_output=True, local_heads=1), intents)
    # 64 numbers and one for each of 50 distances, in two blocks.
    assert sum(p.numel() for p in local.parameters()) == 195_200 + 2 * (64 + 50)


# Losses and their negatives


def test_intents_softmax_by_hand() -> None:
    """Scores of two intents: m g = 0 and ln 3, so that P = 1/4 and 3/4."""
    model, made = tiny("cross_entropy")
    loss = made.of_intents(torch.tensor([[math.log(3.0)], [math.log(3.0)]]), torch.tensor([1, 2]), np.array([0, 0]), rng())
    assert loss.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)


@pytest.mark.parametrize("loss", ["bce", "gbce", "bpr"])
def test_intents_against_one_negative_by_hand(loss: str) -> None:
    """User 0 trains on intent 1 alone, so that the negative is 2, of score 3; the positive has 0."""
    model, made = tiny(loss)
    found = made.of_intents(torch.tensor([[3.0]]), torch.tensor([1]), np.array([0]), rng()).item()
    softplus = math.log1p(math.exp(3))
    assert found == pytest.approx(softplus if loss == "bpr" else math.log(2) + softplus)


def test_users_of_all_intents_do_not_push_the_target_away() -> None:
    """User 1 trains on both: the draw is 1 or 2; where it is the target's own, only the positive counts."""
    model, made = tiny("bce")
    both = {math.log(2), math.log(2) + math.log1p(math.exp(3))}
    seeds = range(20)
    found = {made.of_intents(torch.tensor([[3.0]]), torch.tensor([1]), np.array([1]), rng(seed)).item() for seed in seeds}
    assert sorted(found) == pytest.approx(sorted(both))


def test_negative_intents_are_not_in_the_training_history() -> None:
    store = SmallStore([[1, 2, 3, 1, 2, 3], [4, 5, 4, 9, 9]], 9)
    intents = np.array([0, 1, 1, 2, 3, 3, 4, 4, 5, 5], np.int32)
    intent_store = objective.IntentStore(store, intents)
    made = NegativeSampler(intent_store, unseen=True)
    users = np.repeat([0, 1], 500)
    drawn = made.draw(users, (1000, 1), rng())[:, 0]
    assert set(drawn[:500]) == {3, 4, 5}  # trains on items 1, 2, 3, 1
    assert set(drawn[500:]) == {1, 2, 4, 5}  # on 4, 5, 4: intents of held-out items may be drawn


def test_the_loss_is_the_items_plus_the_weighted_intents() -> None:
    model = build()
    store = SmallStore([[int(i) for i in row] for row in torch.randint(1, ITEMS + 1, (5, 7))], ITEMS)
    states, targets = torch.randn(6, 24), torch.tensor([1, 7, 30, 4, 4, 12])
    of = objective.Positions(states, targets, torch.randint(1, ITEMS + 1, (6, 1)))
    intents = F.cross_entropy(states[:, 12:] @ model.coarse.item_table.weight[1:].T, (targets - 1) % 4)
    joint = F.cross_entropy(model.score(states)[:, 1:], targets - 1)
    items = F.cross_entropy(states[:, :12] @ model.fine.item_table.weight[1:].T, targets - 1)
    for kind, own in (("joint", joint), ("items", items)):
        for weight in (0.0, 1.0, 0.25):
            params = TrainParams(item_loss=kind, intent_weight=weight)  # type: ignore[arg-type]
            result = objective.of(model, params, store)(of, np.arange(6) % 5, rng())
            torch.testing.assert_close(result.loss, own + weight * intents)


@pytest.mark.parametrize("item_loss", ["joint", "items"])
@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "cross_entropy", "bpr"])
def test_every_loss_reaches_every_parameter(loss: str, item_loss: str) -> None:
    model = build().train()
    rows = torch.randint(1, ITEMS + 1, (20, 9), generator=torch.Generator().manual_seed(0))
    store = SmallStore([row.tolist() for row in rows], ITEMS)
    params = TrainParams(loss=loss, item_loss=item_loss, negatives=4, min_batches=1, epochs=1)  # type: ignore[arg-type]
    trainer = Trainer(model, store, params, 0, device=torch.device("cpu"))
    batch = next(epoch_batches(store, 8, 20, True, 0, 0).batches)
    result, _ = trainer._loss(batch, rng())
    result.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert bool(result.loss.isfinite())


def test_it_learns_the_chains_and_comes_back_from_a_checkpoint(chains: SmallStore, tmp_path: Path) -> None:
    torch.manual_seed(0)
    categories = [(f"tens {i // 10}",) for i in range(40)]
    model = registry.of_data(ModelParams(kind="cafe", max_len=10, hidden=16, local_heads=1, dropout=0.1), 40, categories)
    params = TrainParams(epochs=15, batch_size=16, lr=0.01, schedule="constant", warmup=0.0)
    progress = Trainer(model, chains, params, 0, device=torch.device("cpu")).run(log=lambda line: None)
    assert progress.best_ndcg > 0.8
    save_model(tmp_path, model, model.state_dict(), {})
    again, _ = load_model(tmp_path)
    batch = torch.tensor([[0, 3, 4, 5]])
    assert isinstance(again, CAFE)
    assert torch.equal(again.eval().encode(batch), model.encode(batch))
    assert again.intents.tolist() == [0, *(1 + i // 10 for i in range(40))]
    fresh = registry.untrained(again, tied=False)
    assert isinstance(fresh, CAFE)
    assert fresh.params == dataclasses.replace(again.params, tied=False)
    assert torch.equal(fresh.intents, again.intents)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tiny(loss: str) -> tuple[CAFE, objective.IntentObjective]:
    """Two items, each an intent of its own, of embeddings g_1 = 0 and g_2 = 1; user 0 trains on 1 alone, user 1 on both."""
    model = CAFE(ModelParams(kind="cafe", hidden=1), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        model.coarse.item_table.weight[:, 0] = torch.tensor([0.0, 0.0, 1.0])
    store = SmallStore([[1, 1, 1, 2], [1, 2, 1, 2]], 2)
    made = objective.of(model, TrainParams(loss=loss), store)  # type: ignore[arg-type]
    assert isinstance(made, objective.IntentObjective)
    return model, made
