"""The exported file: its bits, its sizes, and that what is loaded computes what was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sasrec.checkpoint import load_tensors
from sasrec.config import ModelParams, QuantParams
from sasrec.deploy import artefact
from sasrec.deploy.packing import pack, unpack
from sasrec.errors import UserError
from sasrec.files import read_json, write_json
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import from_tensors, to_tensors

METHODS = ["ptq", "ste", "lsq", "pact", "dorefa", "apot", "adaround"]


def test_bits_are_packed_least_significant_first() -> None:
    # Three-bit codes 1, 7, 2, 5: the stream, bit 0 first, is 100 111 010 101, in bytes 01111001 and 1010 upside down.
    assert pack(np.array([1, 7, 2, 5], np.uint8), 3).tolist() == [0b10111001, 0b1010]
    assert pack(np.array([1, 0, 1], np.uint8), 1).tolist() == [0b101]
    assert pack(np.array([200, 3], np.uint8), 8).tolist() == [200, 3]


@given(st.integers(1, 8), st.data())
def test_packing_round_trips_at_every_width(bits: int, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(max_dims=2, max_side=9))
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    stream = pack(codes, bits)
    assert len(stream) == -(-codes.size * bits // 8)
    assert (unpack(stream, bits, shape) == codes).all()


def test_codes_that_do_not_fit_and_streams_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into 3 bits"):
        pack(np.array([8], np.uint8), 3)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(np.zeros(2, np.uint8), 3, (6,))


def quantized(method: str, bits: int, **options: object) -> tuple[SASRec, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=8, hidden=16), 30)
    module, chosen = load_method(method, {})
    attach(model, QuantParams(bits=bits, **options), module, chosen)  # type: ignore[arg-type]
    histories = [torch.randint(1, 31, (16, 8))]
    calibrate(model, histories)
    if hasattr(module, "reconstruct"):
        with torch.enable_grad():
            some = type(chosen)(**{"iterations": 20} if method == "adaround" else {"bias_correction": True})
            module.reconstruct(model, histories, some, 0)
    return model.eval(), {name: t for name, t in model.state_dict().items() if ".quantizer." not in name}


def plain(tensors: dict[str, torch.Tensor]) -> SASRec:
    model = SASRec(ModelParams(max_len=8, hidden=16), 30)
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@torch.no_grad()
def test_the_loaded_artefact_scores_as_the_trained_model_to_the_bit(method: str, bits: int, tmp_path: Path) -> None:
    model, tensors = quantized(method, bits)
    frozen = from_tensors(*to_tensors(freeze(model)))
    artefact.export(tmp_path, plain(tensors), frozen, {"valid_ndcg@10": 0.5})
    loaded, manifest = artefact.load(tmp_path)
    histories = torch.randint(1, 31, (20, 8))
    histories[:5, :3] = 0
    expected = model.score(model.encode(histories, last=True))
    assert torch.equal(loaded.score(loaded.encode(histories, last=True)), expected)
    assert manifest["valid_ndcg@10"] == 0.5
    assert manifest["tensors"]["item_table.weight"]["bits"] == bits


def test_sizes_count_packed_bits_and_scales(tmp_path: Path) -> None:
    model, tensors = quantized("lsq", 4, embedding_bits=2)
    sizes = artefact.export(tmp_path, plain(tensors), freeze(model), {})
    # Tables: 31 + 8 rows of 16 two-bit codes and a float32 scale a row.
    assert sizes.embedding_bytes == (31 + 8) * (16 * 2 // 8 + 4)
    assert sizes.weight_bytes == 10 * 16 * (16 * 4 // 8 + 4)
    assert sizes.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    entries, weights = 39 * 16, 10 * 16 * 16
    assert sizes.bits == pytest.approx((entries * 2 + weights * 4) / (entries + weights))


def test_levels_of_a_method_are_stored_once(tmp_path: Path) -> None:
    model, tensors = quantized("apot", 8)
    artefact.export(tmp_path, plain(tensors), freeze(model), {})
    stored, _ = load_tensors(tmp_path / "model.safetensors")
    tables = [name for name in stored if name.startswith("levels/")]
    assert sorted(len(stored[name]) for name in tables) == [255, 256, 256]  # weights; signed and unsigned activations


def test_a_full_precision_model_is_exported_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=8, hidden=16), 30)
    sizes = artefact.export(tmp_path, model, {}, {})
    loaded, _ = artefact.load(tmp_path)
    assert sizes.bits == 32
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_the_same_model_exports_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model, tensors = quantized("apot", 4)
        artefact.export(tmp_path / name, plain(tensors), freeze(model), {"x": 1})
    for file in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_missing_edited_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest.json does not exist"):
        artefact.load(tmp_path)
    artefact.export(tmp_path, SASRec(ModelParams(max_len=8, hidden=16), 30), {}, {})
    weights, manifest = tmp_path / "model.safetensors", tmp_path / "manifest.json"
    good = weights.read_bytes()
    for bad in (good[:-1], good[:100] + b"\0" + good[101:], b""):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match="not the file its manifest describes"):
            artefact.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="not the file its manifest describes"):
        artefact.load(tmp_path)
    weights.write_bytes(good)
    content = read_json(manifest)
    write_json(manifest, {**content, "format": 99})
    with pytest.raises(UserError, match="not a manifest of format"):
        artefact.load(tmp_path)
    manifest.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        artefact.load(tmp_path)
