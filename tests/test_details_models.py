"""Details of the network that its own formulas, worked out without dropout and by its own norms, do not show."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sasrec.config import ModelParams
from sasrec.models import attention, dropout
from sasrec.models.sasrec import SASRec

SMALL: dict[str, Any] = {"max_len": 8, "hidden": 12, "heads": 3, "blocks": 1, "ffn_dim": 20, "dropout": 0.3}


def build(**options: Any) -> SASRec:
    torch.manual_seed(0)
    return SASRec(ModelParams(**{**SMALL, **options}), 30)


@pytest.mark.parametrize("block", ["original", "pre_norm", "post_norm"])
def test_what_is_dropped_in_training_and_nothing_elsewhere(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input, the weights of attention by head, and what each layer of the feed-forward network gives."""
    places: list[tuple[tuple[int, ...], float]] = []
    original = dropout.dropout_mask

    def note(x: Tensor, rate: float) -> Tensor:
        places.append((tuple(x.shape), rate))
        return original(x, rate)

    for module in (dropout, attention):
        monkeypatch.setattr(module, "dropout_mask", note)
    model, histories = build(block=block), torch.randint(1, 31, (2, 5))
    model.train().encode(histories)
    assert places == [((2, 5, 12), 0.3), ((6, 5, 5), 0.3), ((2, 5, 20), 0.3), ((2, 5, 12), 0.3)]
    places.clear()
    model.eval().encode(histories)
    assert not places


def test_the_weights_of_attention_are_dropped_behind_the_softmax() -> None:
    """A mask of 0 and 2 on weights that add up to 1, which are not brought back to 1."""
    query, key = torch.zeros(1, 1, 2), torch.zeros(1, 4, 2)
    value = torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]])
    mask = torch.tensor([[[2.0, 0.0, 2.0, 2.0]]])
    found = attention.WeightedSum.apply(query, key, value, torch.zeros(1, 1, 4), mask)
    assert found.item() == pytest.approx(2 * (1 + 100 + 1000) / 4)


def test_norms_add_what_the_authors_add() -> None:
    """1e-8 under the root, where torch has 1e-5."""
    norms = [module for module in build(embedding_norm=True, final_norm=True).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 4 and {norm.eps for norm in norms} == {1e-8}


@pytest.mark.parametrize("norm", ["embedding_norm", "final_norm"])
def test_the_norms_at_both_ends_are_applied_in_their_place(norm: str) -> None:
    """With a shift of 7 what they give has the mean 7: the input of the blocks, and the states."""
    model = build(embedding_norm=norm == "embedding_norm", final_norm=norm == "final_norm").eval()
    nn.init.constant_(getattr(model, norm).bias, 7.0)
    seen: list[Tensor] = []
    model.embedding_tap.register_forward_hook(lambda module, inputs, output: seen.append(output))
    states = model.encode(torch.randint(1, 31, (2, 5)))
    found = seen[0] if norm == "embedding_norm" else states
    torch.testing.assert_close(found.mean(-1), torch.full((2, 5), 7.0))


def test_positions_from_the_right_are_looked_up_up_to_the_last() -> None:
    """What enters the blocks, by hand; a huge embedding in a wrong place would not show behind a norm."""
    model = build(position="right", embedding_norm=False).eval()
    seen: list[Tensor] = []
    model.embedding_tap.register_forward_hook(lambda module, inputs, output: seen.append(output))
    histories = torch.tensor([[0, 7, 8], [1, 2, 3]])
    model.encode(histories)
    assert model.position_table is not None
    expected = model.item_table.weight[histories] * 12**0.5 + model.position_table.weight[5:8]
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)
