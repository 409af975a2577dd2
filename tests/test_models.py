"""The invariants of the model: what it counts, what it may see, and that its fast paths compute the plain thing."""

import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.models.attention import WeightedSum
from sasrec.models.dropout import add_dropped, dropout, dropout_mask
from sasrec.models.sasrec import Block, SASRec
from sasrec.models.taps import Tap, taps

BLOCKS = ["original", "pre_norm", "post_norm"]


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


def test_parameter_counts_of_published_models() -> None:
    large = {"hidden": 128, "blocks": 3, "max_len": 50, "ffn_dim": 512, "embedding_norm": True, "final_norm": False}
    large["attention_output"] = True
    assert parameters(83_632, **large) == 11_306_368
    paper = {"hidden": 50, "blocks": 2, "max_len": 200}
    assert parameters(3_417, **paper, attention_output=False) == 206_850
    assert parameters(3_417, **paper, attention_output=True) == 211_950
    gsasrec = {"hidden": 128, "blocks": 2, "max_len": 200, "ffn_dim": 128, "attention_output": False}
    assert parameters(3_417, **gsasrec) == 629_376


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
def test_padding_and_batch_mates_change_nothing(block: str, heads: int) -> None:
    model = build(block=block, heads=heads)
    short = torch.randint(1, 31, (1, 3))
    alone = model.encode(short)
    for length in (4, 8):
        padded = torch.cat([torch.zeros(1, length - 3, dtype=torch.long), short], 1)
        mates = torch.cat([padded, torch.randint(1, 31, (5, length))])
        torch.testing.assert_close(model.encode(mates)[:1, -3:], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_position_alone_is_the_last_of_all(block: str, blocks: int) -> None:
    model = build(block=block, blocks=blocks, heads=2)
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


def test_the_last_item_always_has_the_last_position() -> None:
    model = build()
    with torch.no_grad():
        model.position_table.weight[:-1] = 1e6  # type: ignore[union-attr]
    assert model.encode(torch.tensor([[7]])).abs().max() < 1e3


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
    assert [name for name, place in places.items() if place.scoring] == ["item_table.weight"]
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
