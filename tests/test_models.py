"""The invariants of the model: what it counts, what it may see, and that its fast paths compute the plain thing."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.models import attention
from sasrec.models.attention import HIDDEN_SCORE, Average, Numerators, WeightedSum
from sasrec.models.dropout import add_dropped, dropout, dropout_mask
from sasrec.models.sasrec import Block, SASRec
from sasrec.models.taps import Tap, taps

BLOCKS = ["original", "pre_norm", "post_norm"]
POSITIONS = ["right", "left", "none"]


def build(**options: object) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(ModelParams(**{"max_len": 8, "hidden": 12, "dropout": 0.3, **options}), 30)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # away from the special values of the start
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.item_table.weight[0] = 0
    return model.eval()


def parameters(rows: int, **options: object) -> int:
    model = SASRec(ModelParams(**options), rows - 1)  # type: ignore[arg-type]
    return sum(p.numel() for p in model.parameters())


# Options that count; none is left to its default. The authors' code, its PyTorch port (whose attention has an output
# projection) and gSASRec's code normalise the last block's output and not the embeddings. (gSASRec's code keeps two rows
# besides the items, of which it uses one; counted here is one.)
FINAL = {"final_norm": True, "embedding_norm": False, "tied": True, "position": "right"}
PAPER = {"hidden": 50, "blocks": 2, "heads": 1, "max_len": 200, "ffn_dim": 50, "block": "original"}
LARGE = {"hidden": 128, "blocks": 3, "max_len": 50, "ffn_dim": 512, "final_norm": False, "embedding_norm": True, "tied": True}


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        pytest.param(3_417, {**PAPER, **FINAL, "attention_output": False}, 206_850, id="SASRec, ML-1M, the paper"),
        pytest.param(3_417, {**PAPER, **FINAL, "attention_output": True}, 211_950, id="SASRec, ML-1M, the PyTorch port"),
        pytest.param(
            3_417, {**PAPER, **FINAL, "hidden": 128, "ffn_dim": 128, "attention_output": False}, 629_376, id="gSASRec, ML-1M"
        ),
        pytest.param(83_632, {**LARGE, "attention_output": True}, 11_306_368, id="83,631 items"),
    ],
)
def test_parameter_counts_of_published_models(rows: int, options: dict[str, object], expected: int) -> None:
    assert parameters(rows, **options) == expected


def test_what_each_choice_adds_to_the_parameter_count() -> None:
    base: dict[str, object] = {**PAPER, **FINAL, "attention_output": False}
    count = parameters(3_417, **base)
    changes: list[tuple[dict[str, object], int]] = [
        ({"position": "left"}, 0),
        ({"position": "none"}, -200 * 50),
        ({"tied": False}, 3_417 * 50),
        ({"final_norm": False}, -100),
        ({"embedding_norm": True}, 100),
        ({"heads": 5}, 0),
        ({"block": "pre_norm"}, 0),
        ({"block": "post_norm"}, 0),
    ]
    for change, added in changes:
        assert parameters(3_417, **{**base, **change}) - count == added, change


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("heads", [1, 3])
def test_no_position_sees_its_future(block: str, heads: int) -> None:
    model = build(block=block, heads=heads)
    histories = torch.randint(1, 31, (4, 8))
    changed = histories.clone()
    changed[:, 5:] = torch.randint(1, 31, (4, 3))
    before, after = model.encode(histories), model.encode(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_padding_and_batch_mates_change_nothing(block: str, heads: int, position: str) -> None:
    model = build(block=block, heads=heads, position=position)
    short = torch.randint(1, 31, (1, 3))
    alone = model.encode(short)
    for length in (4, 8):
        padded = torch.cat([torch.zeros(1, length - 3, dtype=torch.long), short], 1)
        mates = torch.cat([padded, torch.randint(1, 31, (5, length))])
        torch.testing.assert_close(model.encode(mates)[:1, -3:], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_histories_side_by_side_in_a_row_do_not_see_each_other(block: str, heads: int, position: str) -> None:
    model = build(block=block, heads=heads, position=position)
    items = torch.randint(1, 31, (16,))
    row = torch.cat([torch.zeros(1, dtype=torch.long), items[:3], items[3:4], items[4:7]])[None]
    other = items[8:][None]
    windows = torch.tensor([[0, 3, 3, 3, 2, 1, 1, 1], [1] * 8])
    together = model.encode(torch.cat([row, other]), windows=windows)
    for alone, found in (
        (items[None, :3], together[:1, 1:4]),
        (items[None, 3:4], together[:1, 4:5]),
        (items[None, 4:7], together[:1, 5:8]),
        (other, together[1:]),
    ):
        torch.testing.assert_close(found, model.encode(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_last_position_alone_is_the_last_of_all(block: str, blocks: int, position: str) -> None:
    model = build(block=block, blocks=blocks, heads=2, position=position)
    histories = torch.randint(1, 31, (6, 8))
    histories[0, :5] = 0
    torch.testing.assert_close(model.encode(histories, last=True), model.encode(histories)[:, -1:], atol=1e-6, rtol=0)


def plain_block(model: SASRec, x: Tensor) -> Tensor:
    """The first block by the book, one head: queries normalised (`original`), or norms before or after."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    attention = block.attention
    norm1, norm2 = block.attention_norm, block.feed_forward_norm
    length = x.shape[1]
    query_input = norm1(x) if block.kind in ("original", "pre_norm") else x
    key_input = norm1(x) if block.kind == "pre_norm" else x
    scores = attention.query(query_input) @ attention.key(key_input).transpose(1, 2) / x.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out = scores.softmax(-1) @ attention.value(key_input)
    if attention.output is not None:
        out = attention.output(out)
    feed = block.feed_forward

    def network(y: Tensor) -> Tensor:
        return feed.outer(feed.inner(y).relu())

    if block.kind == "original":
        y = norm2(query_input + out)
        return y + network(y)
    if block.kind == "pre_norm":
        y = x + out
        return y + network(norm2(y))
    y = norm1(x + out)
    return norm2(y + network(y))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("output", [True, False])
def test_a_block_is_the_published_formula(block: str, output: bool) -> None:
    model = build(block=block, blocks=1, final_norm=False, attention_output=output)
    histories = torch.randint(1, 31, (5, 8))
    x = model.item_table.weight[histories] * 12**0.5 + model.position_table.weight  # type: ignore[union-attr]
    torch.testing.assert_close(model.encode(histories), plain_block(model, x), atol=1e-5, rtol=1e-5)


def test_the_first_item_always_has_the_first_position_when_counted_from_the_left() -> None:
    """The embedding of every real token is what is looked up by hand; no other position is ever touched."""
    model = build(position="left", blocks=1, block="pre_norm", final_norm=False)
    histories = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 6]])
    seen = []
    model.embedding_tap.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode(histories)
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]])
    assert model.position_table is not None
    expected = model.item_table.weight[histories] * 12**0.5 + model.position_table.weight[positions]
    real = histories > 0
    torch.testing.assert_close(seen[0][real], expected[real], atol=1e-6, rtol=0)
    model.encode(histories)[real].sum().backward()
    assert model.position_table.weight.grad is not None
    assert (model.position_table.weight.grad.abs().sum(1) > 0).tolist() == [True] * 5 + [False] * 3


def test_without_positions_the_order_of_the_past_changes_nothing() -> None:
    """One block and no position embedding: the last state does not depend on the order of the items before."""
    histories, reordered = torch.tensor([[3, 9, 4, 7, 5]]), torch.tensor([[7, 4, 3, 9, 5]])
    for position in POSITIONS:
        model = build(position=position, blocks=1)
        difference = (model.encode(histories, last=True) - model.encode(reordered, last=True)).abs().max().item()
        assert (difference < 1e-6) == (position == "none")


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_attention_has_the_plain_gradients(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 5, 5))
    bias = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(3, 2, 5, generator=generator, dtype=torch.float64) < 0.7) / 0.7 if masked else None

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(1, 2) / 2 + bias).softmax(-1)
        return (weights if mask is None else weights * mask) @ v

    torch.testing.assert_close(WeightedSum.apply(q, k, v, bias, mask), plain(q, k, v))
    assert torch.autograd.gradcheck(lambda *x: WeightedSum.apply(*x, bias, mask), (q, k, v))
    for learned in (bias, bias.expand(3, -1, -1).clone()):
        assert torch.autograd.gradcheck(lambda *x: WeightedSum.apply(*x, mask), (q, k, v, learned.requires_grad_()))


@pytest.mark.parametrize("masked", [False, True])
def test_numerators_and_their_average_are_the_attention(masked: bool) -> None:
    """With nothing rounded between: values and gradients of `WeightedSum`; those of the operators one by one, too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 50, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    bias = torch.randn(1, 7, 9, generator=generator, dtype=torch.float64)
    bias[0, :, 7:] = HIDDEN_SCORE
    bias.requires_grad_()
    mask = (torch.rand(3, 7, 9, generator=generator, dtype=torch.float64) < 0.7) / 0.7 if masked else None
    scores = (q @ k.transpose(1, 2) * 50**-0.5) + bias
    plain = (scores - scores.amax(-1, keepdim=True)).exp()
    plain = (plain if mask is None else plain * mask) @ v / plain.sum(-1, keepdim=True)
    halves = Average.apply(Numerators.apply(q, k, bias), v, mask)
    whole = WeightedSum.apply(q, k, v, bias, mask)
    towards = torch.randn(3, 7, 50, generator=generator, dtype=torch.float64)
    found, *wanted = (torch.autograd.grad(out, (q, k, v, bias), towards) for out in (halves, plain, whole))
    for values in (plain, whole):
        torch.testing.assert_close(halves, values)
    for others in wanted:
        for own, other in zip(found, others, strict=True):
            torch.testing.assert_close(own, other)
            assert own.is_contiguous()


def test_numerators_are_shares_of_the_largest() -> None:
    """(0.5, 0.3, 0.2) / 0.5, and nothing of what is hidden; a row that sees nothing has equal weights, not NaN."""
    logits = torch.tensor([[[0.5, 0.3, 0.2, 1.0], [1.0, 1.0, 1.0, 1.0]]]).log()
    logits[0, 0, 3] += HIDDEN_SCORE
    logits[0, 1] += HIDDEN_SCORE
    zero = torch.zeros(1, 2, 4)
    found = Numerators.apply(zero, torch.zeros(1, 4, 4), logits)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.6, 0.4, 0.0], [1.0, 1.0, 1.0, 1.0]]]))
    value = torch.tensor([[[1.0], [2.0], [3.0], [100.0]]])
    # Of two levels, 0 and 1, the first row keeps 1 and 0.6, and weighs the first two values alike.
    torch.testing.assert_close(Average.apply(found.round(), value, None), torch.tensor([[[1.5], [26.5]]]))


def test_the_gradient_of_numerators_is_their_derivative() -> None:
    """That of the largest score with it, which is what lowers all others; none is left of the sum of a row."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 5, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 4))
    bias = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: Numerators.apply(*x), (q, k, bias))
    towards = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    (to_bias,) = torch.autograd.grad(Numerators.apply(q, k, bias), bias, towards)
    torch.testing.assert_close(to_bias.sum(-1), torch.zeros(1, 3, dtype=torch.float64))
    alike = torch.zeros(1, 1, 2, requires_grad=True)  # both are the largest, and share what the maximum gets
    zero = torch.zeros(1, 1, 1), torch.zeros(1, 2, 1)
    (to_bias,) = torch.autograd.grad(Numerators.apply(*zero, alike), alike, torch.tensor([[[1.0, 0.0]]]))
    assert to_bias.tolist() == [[[0.5, -0.5]]]


def test_the_gradient_of_the_average_is_its_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    numerators = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    value = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    mask = (torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) < 0.7) / 0.7
    for dropped in (None, mask):
        assert torch.autograd.gradcheck(lambda *x, dropped=dropped: Average.apply(*x, dropped), (numerators, value))
    assert torch.equal(Average.apply(torch.zeros(2, 3, 4), value.float(), None), torch.zeros(2, 3, 5))


def test_dropout_keeps_the_mean_and_the_stated_share() -> None:
    torch.manual_seed(0)
    for rate in (0.004, 0.2, 0.5, 0.9):
        mask = dropout_mask(torch.empty(300, 1000), rate)
        values = mask.unique().tolist()
        assert values[0] == 0
        assert len(values) == 2
        assert float((mask == 0).float().mean()) == pytest.approx(rate, abs=0.004)
        assert float(mask.mean()) == pytest.approx(1, abs=0.02)
    x = torch.randn(5, 3)
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(add_dropped(x, x, 0.0, training=True), 2 * x)
    torch.manual_seed(1)
    one = add_dropped(torch.ones(4, 5), torch.full((4, 5), 2.0), 0.25, training=True)
    torch.manual_seed(1)
    assert torch.equal(one, 1 + dropout(torch.full((4, 5), 2.0), 0.25, training=True))


def test_dropout_follows_the_seed() -> None:
    torch.manual_seed(3)
    first = dropout_mask(torch.empty(99), 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropout_mask(torch.empty(99), 0.5))
    assert not torch.equal(first, dropout_mask(torch.empty(99), 0.5))


def test_scores_of_given_items_are_the_columns_of_all_scores() -> None:
    for tied in (True, False):
        model = build(tied=tied)
        states = torch.randn(4, 12)
        everything = model.score(states)
        assert everything.shape == (4, 31)
        shared = torch.tensor([3, 30, 1])
        torch.testing.assert_close(model.score(states, shared), everything[:, shared])
        for n in (1, 7):
            own = torch.randint(1, 31, (4, n))
            torch.testing.assert_close(model.score(states, own), everything.gather(1, own))
        sequences, own = torch.randn(2, 5, 12), torch.randint(1, 31, (2, 7))
        by_sequence = model.score(sequences).gather(2, own[:, None].expand(2, 5, 7))
        torch.testing.assert_close(model.score(sequences, own), by_sequence)


def test_taps_stand_on_every_weight_table_and_product() -> None:
    model = build(blocks=1, attention_output=True)
    places = {name: tap.place(name) for name, tap in taps(model).items()}
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert {name for name, place in places.items() if place.kind != "activation"} == matrices
    unsigned = {name for name, place in places.items() if not place.signed}
    assert unsigned == {"blocks.0.attention.weights", "blocks.0.feed_forward.inner"}
    assert [name for name, place in places.items() if place.scoring] == ["item_table.weight", "final"]
    called = set()

    class Note(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            called.add(self.name)
            return x

    for name, tap in taps(model).items():
        tap.quantizer = Note(name)
    model.score(model.encode(torch.randint(1, 31, (2, 8))))
    assert called == set(places)
    assert sum(isinstance(m, Tap) for m in model.modules()) == len(places)


@pytest.mark.parametrize(("init", "low", "high"), [("normal", 0.5, 1.5), ("xavier", 2, 10)])
def test_what_attention_adds_at_the_start_beside_what_it_is_added_to(init: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=50, hidden=64, block="pre_norm", blocks=1, init=init), 1000).eval()  # type: ignore[arg-type]
    block = model.blocks[0]
    assert isinstance(block, Block)
    sizes: dict[str, float] = {}
    model.embedding_tap.register_forward_hook(lambda module, inputs, output: sizes.update(input=output.std().item()))
    block.attention.register_forward_hook(lambda module, inputs, output: sizes.update(added=output[:, 0].std().item()))
    model.encode(torch.randint(1, 1001, (64, 50)))
    # Of the first position, which attends to itself alone.
    assert low < sizes["added"] / sizes["input"] < high


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_the_start_of_every_matrix(init: str) -> None:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=200, hidden=64, tied=False, init=init), 1000)  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.02 if init == "normal" else (2 / sum(weight.shape)) ** 0.5
            assert weight[1:].std().item() == pytest.approx(expected, rel=0.1), name
    assert not model.item_table.weight[0].any() and not model.output_table.weight[0].any()  # type: ignore[union-attr]


@pytest.mark.parametrize("block", ["original", "pre_norm", "post_norm"])
@pytest.mark.parametrize("heads", [1, 3])
def test_states_without_gradients_are_those_with(
    block: Literal["original", "pre_norm", "post_norm"], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without, queries are taken some at a time; where the last state alone is asked for, the last block's keys and values are
    never made, nor with one head the keys of the others."""
    monkeypatch.setattr(attention, "QUERIES", 3)
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=8, hidden=12, block=block, heads=heads), 20).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    histories = torch.tensor([[0, 0, 3, 4, 5, 6, 7, 1], [1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 9]])
    expected, real = model.encode(histories).detach(), histories > 0
    assert all(isinstance(own, Block) and own.attention.combines for own in model.blocks)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(histories)[real], expected[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.encode(histories, last=True), expected[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["query", "key", "value"])
@pytest.mark.parametrize("tap", ["weight_tap", "tap"])
def test_what_is_rounded_in_attention_is_rounded_where_the_last_state_alone_is_asked_for(layer: str, tap: str) -> None:
    """Each place alone, as the stage `sensitivity` has it: products with it are not taken in another order."""
    model = build()
    histories = torch.tensor([[0, 0, 3, 4, 5, 6, 7, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    plain = model.encode(histories, last=True).detach()

    class Rounded(torch.nn.Module):
        def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            return x.round(decimals=1)

    attended = model.blocks[0].attention
    place = getattr(attended, layer).weight_tap if tap == "weight_tap" else getattr(attended, f"{layer}_tap")
    place.quantizer = Rounded()
    expected = model.encode(histories)[:, -1:].detach()
    with torch.no_grad():
        found = model.encode(histories, last=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4)
