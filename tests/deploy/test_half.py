"""The float16 row of the tables: what is rounded, what is stored, and what that takes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec.checkpoint import load_model, save_model
from sasrec.deploy.artefact import export
from sasrec.deploy.recommender import Recommender
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.errors import UserError
from sasrec.models.sasrec import SASRec
from sasrec.quant import fp16
from sasrec.quant.frozen import tensors
from tests.deploy.conftest import CATALOGUE, ITEMS, build


def half() -> SASRec:
    model = build(hidden=32)
    fp16.reconstruct(model, [], fp16.Options(), 0)
    return model


def test_tables_and_weights_are_the_nearest_halves_and_nothing_else_changes() -> None:
    whole, rounded = build(hidden=32), half()
    for name, weight in whole.named_parameters():
        own = rounded.get_parameter(name)
        expected = weight.half().float() if name in tensors(whole) else weight
        assert torch.equal(own, expected)
    assert not torch.equal(whole.item_table.weight, rounded.item_table.weight)


def test_it_takes_half_the_bytes_and_scores_as_the_checkpoint(tmp_path: Path) -> None:
    whole, model = build(hidden=32), half()
    save_model(tmp_path / "saved", model, model.state_dict(), {})
    read, _ = load_model(tmp_path / "saved")
    card = {"valid_ndcg@10": 0.5}
    full, small = (export(tmp_path / name, each, {}, CATALOGUE, card) for name, each in (("full", whole), ("half", read)))
    assert 2 * small.embedding_bytes == full.embedding_bytes and 2 * small.weight_bytes == full.weight_bytes
    assert (full.bits, small.bits) == (32, 16)
    saved = full.embedding_bytes + full.weight_bytes - small.embedding_bytes - small.weight_bytes
    assert full.bytes - small.bytes == pytest.approx(saved, abs=1500)  # of padding, casts and the manifest
    manifest = read_manifest(tmp_path / "half")
    assert manifest["tensors"]["item_table.weight"]["unpacked"]["dtype"] == "float16"
    histories = np.random.default_rng(0).integers(1, ITEMS + 1, (16, 6))
    runtime = Recommender.load(tmp_path / "half")
    with torch.no_grad():
        expected = model.score(model.encode(torch.from_numpy(histories), last=True)[:, 0])
    found = runtime.scores_of(runtime.encode(histories))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_value_beyond_float16_is_refused() -> None:
    model = build()
    with torch.no_grad():
        model.item_table.weight[3, 2] = 70_000
    with pytest.raises(UserError, match=r"item_table\.weight has values above 65,504"):
        fp16.reconstruct(model, [], fp16.Options(), 0)
