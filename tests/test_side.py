"""What is known of past events: what it adds to a model, that nothing of the target or the future enters, what is refused."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sasrec import evaluation
from sasrec.checkpoint import load_model, save_model
from sasrec.config import ModelParams, Side, TrainParams
from sasrec.data.batches import epoch_batches
from sasrec.errors import UserError
from sasrec.models import registry
from sasrec.models.events import Events, gather, known
from sasrec.models.facts import Facts
from sasrec.models.sasrec import SASRec
from sasrec.models.side import BLANK, TIME_BUCKETS, blank, recency, time_bucket, time_gaps
from sasrec.models.taps import taps
from sasrec.training import Trainer
from tests.conftest import SmallStore

CPU = torch.device("cpu")
ALL: tuple[Side, ...] = ("rating", "category", "recency")
NAN = float("nan")
# Of 30 items, every third without a category; item 1 has a, item 2 a and b, and so on.
CATEGORIES = [("a",), ("b", "a"), ()] * 10


def store_of(**changes: Any) -> SmallStore:
    """12 users of 30 items, with ratings 1..5 and times some of which are shared by neighbours."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 31, n).tolist() for n in rng.integers(4, 14, 12)]
    count = sum(map(len, sequences))
    gaps = rng.choice([0, 1, 50, 4_000, 300_000], count)
    times = 10**9 + np.cumsum(gaps)
    return SmallStore(
        sequences,
        30,
        **{"ratings": rng.integers(1, 6, count).astype(np.float32), "timestamps": times, **changes},
    )


def build(seed: int = 0, **options: Any) -> SASRec:
    torch.manual_seed(seed)
    params = ModelParams(**{"max_len": 8, "hidden": 12, "dropout": 0.3, "side": ALL, "time_bias": True, **options})
    model = SASRec(params, 30, Facts.of_data(params, store_of(), CATEGORIES))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the special values of the start
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item_table.weight[0] = 0
    return model.eval()


def some_events(rows: int = 4, length: int = 8) -> Events:
    torch.manual_seed(1)
    times = 10**9 + (10 ** (torch.rand(rows, length) * 6)).floor().double().cumsum(1)
    return Events(torch.randint(1, 31, (rows, length)), torch.randint(1, 6, (rows, length)).float(), times)


def test_times_are_told_apart_by_powers_of_two() -> None:
    seconds = [0, 1, 2, 3, 6, 7, 86_400, 2**31 - 2, 2**31 - 1, 2**45, -5, NAN]
    assert time_bucket(torch.tensor(seconds, dtype=torch.float64)).tolist() == [1, 2, 2, 3, 3, 4, 17, 31, 32, 32, 1, 0]


@given(st.integers(0, 2**31 - 2))
def test_a_bucket_is_one_and_the_whole_part_of_the_logarithm(seconds: int) -> None:
    found = time_bucket(torch.tensor([seconds], dtype=torch.float64)).item()
    assert found == (seconds + 1).bit_length() <= TIME_BUCKETS


def test_recency_is_the_time_from_the_event_before_and_unknown_for_the_first_of_an_input() -> None:
    times = torch.tensor([[NAN, 100, 100, 107, NAN, 200]], dtype=torch.float64)
    assert recency(times, None).tolist() == [[0, 0, 1, 4, 0, 0]]
    assert recency(times[:, 1:4], None).tolist() == [[0, 1, 4]]
    # Two histories side by side: the second begins at the fourth place.
    assert recency(times, torch.tensor([[0, 2, 2, 1, 1, 1]])).tolist() == [[0, 0, 1, 0, 0, 0]]


def test_gaps_are_from_each_key_to_each_query() -> None:
    gaps = time_gaps(torch.tensor([[NAN, 100, 101, 107]], dtype=torch.float64))[0]
    assert gaps.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 1, 1], [0, 4, 3, 1]]


def test_bins_of_ratings_and_ids_of_categories_worked_by_hand() -> None:
    params = ModelParams(side=("rating", "category"))
    # Users of 3 train on their first item alone: ratings 1, 2, 5; a half star of the held-out part makes no bin.
    store = SmallStore([[1, 2, 3], [3, 2, 1], [2, 1, 3]], 3, ratings=np.array([1, 4.5, 4, 2, 4, 4, 5, 4, 4], np.float32))
    facts = Facts.of_data(params, store, [("b",), (), ("a", "b", "b")])
    assert facts.rating_edges.tolist() == [1.5, 3.5]
    # 1 is unknown, a is 2, b is 3; 0 is nothing. Row 0 is padding.
    assert facts.item_categories.tolist() == [[1, 0], [3, 0], [1, 0], [2, 3]]
    assert facts.categories == 2
    model = SASRec(dataclasses.replace(params, max_len=8, hidden=4), 3, facts)
    assert model.side is not None
    ratings = torch.tensor([[NAN, 1.0, 1.5, 1.6, 3.5, 3.6, 99.0, -9.0]])
    assert model.side.rating_bins(Events(torch.ones(1, 8).long(), ratings)).tolist() == [[0, 1, 1, 2, 2, 3, 3, 1]]


def test_many_distinct_ratings_get_twenty_bins_of_like_counts() -> None:
    values = np.random.default_rng(0).lognormal(size=900).astype(np.float32)
    store = SmallStore([[1] * 900], 1, ratings=values)
    edges = Facts.of_data(ModelParams(side=("rating",)), store, []).rating_edges.numpy()
    assert len(edges) == 19
    counts = np.bincount(np.searchsorted(edges, values))
    assert len(counts) == 20 and counts.min() >= 43 and counts.max() <= 47


def test_the_input_is_the_sum_of_what_is_known() -> None:
    """Item, position, rating, the mean of the categories, and recency, each looked up by hand."""
    model = build(embedding_norm=False)
    assert model.side is not None and model.position_table is not None
    seen: list[Tensor] = []
    model.embedding_tap.register_forward_hook(lambda module, inputs, output: seen.append(output))
    times = torch.tensor([[50.0, 50.0, 53.0]], dtype=torch.float64)
    model.encode(Events(torch.tensor([[1, 2, 3]]), torch.tensor([[4.0, NAN, 1.0]]), times))
    ratings, categories, recent = (
        table.weight for table in (model.side.rating_table, model.side.category_table, model.side.recency_table) if table
    )
    expected = (
        model.item_table.weight[[1, 2, 3]] * 12**0.5
        + model.position_table.weight[-3:]
        + ratings[[4, 0, 1]]  # ratings 1..5 are rows 1..5
        + torch.stack([categories[1], (categories[1] + categories[2]) / 2, categories[0]])
        + recent[[0, 1, 3]]
    )
    torch.testing.assert_close(seen[0][0], expected)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_time_bias_is_added_to_the_scores_of_attention(heads: int) -> None:
    model = build(side=(), blocks=1, heads=heads, final_norm=False, block="post_norm")
    events = some_events(2)
    block: Any = model.blocks[0]
    attention, seen = block.attention, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output)))
    model.encode(events)
    x, found = seen[0]
    split = [part(x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (attention.query, attention.key, attention.value)]
    scores = split[0] @ split[1].transpose(2, 3) / (12 / heads) ** 0.5
    assert events.times is not None
    for query in range(8):
        for key in range(query + 1):
            bucket = (events.times[:, query] - events.times[:, key] + 1).log2().floor().long() + 1
            scores[:, :, query, key] += block.time_bias.weight[bucket]
    weights = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ split[2]).transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", ["original", "pre_norm", "post_norm"])
def test_future_events_change_no_past_position(block: str) -> None:
    model, events = build(block=block, heads=2), some_events()
    assert events.ratings is not None and events.times is not None
    before = model.encode(events)
    for change in ("items", "ratings", "times"):
        changed = copy.deepcopy(events)
        part = getattr(changed, change)
        part[:, 5:] = {"items": 31 - part[:, 5:], "ratings": 6 - part[:, 5:], "times": part[:, 5:] + 10**7}[change]
        after = model.encode(changed)
        assert torch.equal(before[:, :5], after[:, :5]), change
        assert not torch.equal(before[:, 5:], after[:, 5:]), change


@pytest.mark.parametrize("part", ["validation", "test"])
def test_nothing_of_the_target_is_seen(part: Any) -> None:
    """Its rating, its time and its categories may be anything: the states of its history stay."""
    store, other = store_of(), store_of()
    model = build(max_len=6)
    held = store.held(part)
    assert other.ratings is not None and other.timestamps is not None
    other.ratings[held.positions] = 6 - other.ratings[held.positions]
    other.timestamps[held.positions] += 10**6

    def states(of: SmallStore) -> list[Tensor]:
        return [model.encode(histories) for _, histories in evaluation.blocks(of, of.held(part), 6, 5, model.event_inputs)]

    assert all(torch.equal(a, b) for a, b in zip(states(store), states(other), strict=True))
    # Those of an event before it do count.
    other.ratings[held.positions - 1] = 6 - other.ratings[held.positions - 1]
    assert not all(torch.equal(a, b) for a, b in zip(states(store), states(other), strict=True))


@pytest.mark.parametrize("way", ["packed", "shuffled", "bucketed"])
@pytest.mark.parametrize("second", [False, True])
def test_training_sees_nothing_of_the_last_target_nor_of_what_is_held_out(way: Any, second: bool) -> None:
    """To the bit. The second task is asked for the rating of the last target, so that there it counts, as it should."""

    def training(store: SmallStore) -> list[float]:
        params = TrainParams(rating_weight=float(second), min_batches=1, negatives=4)
        trainer = Trainer(build(), store, params, 0, device=CPU)
        if trainer.second is not None:
            trainer.second.mean, trainer.second.deviation = 3.0, 1.0  # of the training part, the last target's among it
            torch.nn.init.constant_(trainer.second.head.weight, 0.1)
        batches = epoch_batches(store, 8, 6, True, 0, 1, way).batches
        found = [trainer._loss(batch, np.random.default_rng(0))[0] for batch in batches]
        return [float(part.detach()) for result in found for part in (result.loss, result.second) if part is not None]

    def changed(places: Any) -> SmallStore:
        other = store_of()
        assert other.ratings is not None and other.timestamps is not None
        other.ratings[places] = 6.5 - other.ratings[places]
        other.timestamps[places] += 10**6
        return other

    store = store_of()
    held = np.concatenate([store.held(part).positions for part in ("validation", "test")])
    last = store.train_ends - 1
    assert training(changed(held)) == training(store)
    assert (training(changed(last)) == training(store)) == (not second)
    assert training(changed(last - 1)) != training(store)


@pytest.mark.parametrize("way", ["packed", "shuffled", "bucketed"])
def test_every_way_of_batching_gives_each_position_the_same_state(way: Any) -> None:
    """Windows side by side do not see each other's ratings and times, nor does anyone the padding: each alone, unpadded."""
    store, model = store_of(), build(heads=2)
    for batch in epoch_batches(store, 8, 6, True, 0, 1, way).batches:
        windows = None if batch.windows is None else torch.from_numpy(batch.windows)
        assert batch.places is not None
        events = gather(store, batch.histories, batch.places, model.event_inputs)
        found = model.encode(events, windows=windows)
        numbers = (batch.histories > 0).astype(int) if batch.windows is None else batch.windows
        for row, number in {(r, n) for r, n in zip(*np.nonzero(numbers), strict=True) for n in [numbers[r, n]]}:
            own = np.flatnonzero(numbers[row] == number)
            alone = gather(store, batch.histories[row : row + 1, own], batch.places[row : row + 1, own], model.event_inputs)
            torch.testing.assert_close(found[row, own], model.encode(alone)[0], atol=1e-5, rtol=1e-4)


def test_the_last_position_alone_is_the_last_of_all() -> None:
    for blocks in (1, 2):
        model, events = build(blocks=blocks, heads=2), some_events()
        torch.testing.assert_close(model.encode(events, last=True), model.encode(events)[:, -1:], atol=1e-6, rtol=0)


def test_what_is_not_given_is_unknown() -> None:
    model, events = build(), some_events()
    nothing = torch.full(events.items.shape, NAN)
    unknown = model.encode(Events(events.items, nothing, nothing.double()))
    assert torch.equal(unknown, model.encode(events.items))
    assert not torch.equal(unknown, model.encode(events))
    # One event whose rating is not known has row 0 of the table, and changes no state before it.
    one = copy.deepcopy(events)
    assert one.ratings is not None
    one.ratings[:, 4] = NAN
    assert torch.equal(model.encode(one)[:, :4], model.encode(events)[:, :4])


def test_some_windows_of_training_are_blank_so_that_unknown_is_learned() -> None:
    events = some_events(rows=2000)
    windows = torch.tensor([2, 2, 2, 2, 2, 1, 1, 1]).expand(2000, -1)
    torch.manual_seed(0)
    blanked = blank(events, windows)
    assert blanked.ratings is not None and blanked.times is not None
    assert torch.equal(blanked.ratings.isnan(), blanked.times.isnan())
    hidden = blanked.ratings.isnan()
    assert (hidden[:, :5] == hidden[:, :1]).all() and (hidden[:, 5:] == hidden[:, 5:6]).all()
    assert (hidden[:, 0] != hidden[:, 5]).any()
    assert hidden.float().mean().item() == pytest.approx(BLANK, abs=0.015)
    model = build().train()
    assert model.side is not None and model.side.rating_table is not None
    model.encode(some_events(rows=64)).square().sum().backward()
    gradient = model.side.rating_table.weight.grad
    assert gradient is not None and bool(gradient[0].any())


def test_times_of_the_store_are_read_in_seconds() -> None:
    store = store_of(timestamps=np.arange(12 * 14) * 1500 + 10**12, stats={"times": "comparable", "time_unit": "ms"})
    assert known(store, np.array([[-1, 0, 1, 2]]), "times").tolist()[0][1:] == [10**9, 10**9 + 1, 10**9 + 3]
    assert np.isnan(known(store, np.array([[-1]]), "times")).all()
    found = known(store, np.array([[-1, 3]]), "ratings")
    assert np.isnan(found[0, 0]) and found[0, 1] == store.ratings[3]  # type: ignore[index]
    assert found.dtype == np.float32


def trained(store: SmallStore, params: ModelParams) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(params, 30)
    train = TrainParams(epochs=2, batch_size=4, min_batches=1, lr=0.01)
    Trainer(model, store, train, 0, device=CPU).run(None, "key", lambda line: None)
    return model


def test_without_side_information_ratings_and_times_change_no_bit() -> None:
    params = ModelParams(max_len=8, hidden=12)
    assert params.side == () and not params.time_bias and TrainParams().rating_weight == 0
    plain, beside = trained(store_of(ratings=None, timestamps=None), params), trained(store_of(), params)
    assert plain.event_inputs == ()
    state = beside.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert not any("side" in name or "time" in name for name in state)


def test_the_rest_of_a_model_starts_as_without_side_information() -> None:
    for init in ("normal", "xavier"):
        params = ModelParams(max_len=8, hidden=12, tied=False, init=init)
        torch.manual_seed(0)
        plain = SASRec(params, 30).state_dict()
        torch.manual_seed(0)
        more = dataclasses.replace(params, side=ALL, time_bias=True)
        other = SASRec(more, 30, Facts.of_data(more, store_of(), CATEGORIES)).state_dict()
        assert plain.keys() < other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


def test_side_tables_have_taps_and_the_time_bias_has_none() -> None:
    """33 numbers a head that are added to sums in float32, as the biases of linear layers are."""
    model = build(heads=2)
    places = {name: tap.place(name) for name, tap in taps(model).items()}
    tables = {name: (place.rows, place.features, place.scoring) for name, place in places.items() if name.startswith("side.")}
    assert tables == {
        "side.rating_table.weight": (6, 12, False),
        "side.category_table.weight": (3, 12, False),
        "side.recency_table.weight": (33, 12, False),
    }
    assert not any("time_bias" in name for name in places)
    assert [tuple(p.shape) for name, p in model.named_parameters() if "time_bias" in name] == [(33, 2)] * 2


def test_a_checkpoint_remembers_what_the_model_knows_of_the_data(tmp_path: Path) -> None:
    model, events = build(), some_events()
    save_model(tmp_path, model, model.state_dict(), {})
    loaded, _ = load_model(tmp_path)
    assert torch.equal(loaded.eval().encode(events), model.encode(events))


@pytest.mark.parametrize(
    ("options", "changes", "categories", "message"),
    [
        (
            {"side": ("rating",)},
            {"ratings": None},
            CATEGORIES,
            "model.side names rating, but the data has no ratings; name their column in dataset.columns.rating, or do without",
        ),
        (
            {"side": ("category",)},
            {},
            [(), ()],
            "model.side names category, but the data has no categories; name their column in dataset.columns.category, "
            "or do without",
        ),
        (
            {"side": ("recency",)},
            {"timestamps": None},
            CATEGORIES,
            "model.side names recency, but the data has no timestamps; name their column in dataset.columns.timestamp, "
            "or do without",
        ),
        (
            {"time_bias": True},
            {"stats": {"times": "order", "time_unit": "s"}},
            CATEGORIES,
            "model.time_bias is true, but the times of this data only order each user's own events; set dataset.times to "
            "comparable where they are real times, or do without",
        ),
    ],
)
def test_what_the_data_lacks_is_refused(options: Any, changes: Any, categories: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Facts.of_data(ModelParams(**options), store_of(**changes), categories)
    assert str(caught.value) == f"params.yaml: {message}"


def test_it_learns_what_only_times_tell() -> None:
    """After 5 and then any item, 20 comes where a second has passed between the two, and 21 where a day has."""
    rng = np.random.default_rng(0)
    late = rng.integers(0, 2, (40, 4))
    sequences = [[item for day in row for item in (5, int(rng.integers(1, 4)), 21 if day else 20)] for row in late]
    gaps = np.stack([np.full_like(late, 5), np.where(late, 86_400, 1), np.full_like(late, 5)], 2)
    store = SmallStore(sequences, 30, timestamps=10**9 + gaps.reshape(40, -1).cumsum(1).ravel())
    preferred = []
    sides: tuple[tuple[Side, ...], ...] = ("recency",), ()
    for side in sides:
        params = ModelParams(max_len=12, hidden=16, dropout=0.0, position="left", side=side)
        torch.manual_seed(0)
        model = SASRec(params, 30, Facts.of_data(params, store, []))
        trainer = Trainer(model, store, TrainParams(batch_size=8, min_batches=1, lr=0.01, warmup=0.0), 0, device=CPU)
        for epoch in range(1, 26):
            trainer.epoch(epoch)
        times = torch.tensor([[0, 1], [0, 86_400]]).double() + 10**9
        scores = model.eval().score(model.encode(Events(torch.tensor([[5, 2], [5, 2]]), None, times), last=True)[:, 0])
        preferred.append((scores[:, 20] - scores[:, 21]).tolist())
    (after_a_second, after_a_day), (without, same) = preferred
    assert after_a_second > 0.3 and after_a_day < -0.3
    assert without == same


def test_cafe_has_no_side_information() -> None:
    for options in ({"side": ("rating",)}, {"time_bias": True}):
        with pytest.raises(UserError, match=r"^params\.yaml: model\.side and model\.time_bias are not for model\.kind: cafe"):
            registry.of_data(ModelParams(kind="cafe", **options), 2, [("a",), ()])
