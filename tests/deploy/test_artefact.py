"""The files of the exported folder: what they hold, their sizes, and that they repeat to the byte."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec.config import ModelParams, QuantParams
from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export, sizes
from sasrec.deploy.recommender.manifest import read_manifest
from sasrec.deploy.recommender.tensors import Tensors
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from tests.deploy.conftest import CATALOGUE, ITEMS, build, files_of, histories, quantize

Export = Callable[..., Path]


def test_sizes_count_packed_bits_and_scales(tmp_path: Path) -> None:
    frozen = quantize("lsq", 4, {}, embedding_bits=2)
    found = export(tmp_path, build(), frozen, CATALOGUE, {})
    # The item table: 31 rows of 16 two-bit codes and a float16 scale each; that of 8 positions has float32 scales.
    assert found.embedding_bytes == 31 * (16 * 2 // 8 + 2) + 8 * (16 * 2 // 8 + 4)
    assert found.weight_bytes == 10 * 16 * (16 * 4 // 8 + 4)
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file() and file.name != "items.csv")
    entries, weights = 39 * 16, 10 * 16 * 16
    assert found.bits == pytest.approx((entries * 2 + weights * 4) / (entries + weights))


def test_a_table_of_product_quantization_ships_as_its_centroids_and_their_numbers(tmp_path: Path) -> None:
    frozen = quantize("pq", 8, {}, embedding_bits=4)
    model = build()
    found = export(tmp_path, model, frozen, CATALOGUE, {})
    # 30 items of four numbers of three bits; four times eight centroids of four values of four bits; one scale. The eight
    # positions have 16 values of four bits and a scale each.
    numbers, book = ITEMS * 4 * 3 // 8, 4 * 8 * 4 * 4 // 8
    assert found.embedding_bytes == numbers + book + 4 + 8 * (16 * 4 // 8 + 4)
    assert (tmp_path / "item_table.bin").stat().st_size == 64 + book  # numbers, filled up to 64 bytes, and centroids
    entry = read_manifest(tmp_path)["tensors"]["item_table.weight"]
    assert (entry["bytes"], entry["compute"]) == (numbers + book, "int8")
    assert entry["bits"] == pytest.approx(8 * (numbers + book) / (31 * 16), abs=0.005)
    assert found.bits == pytest.approx((8 * (numbers + book) + 8 * 16 * 4 + 10 * 16 * 16 * 8) / (39 * 16 + 10 * 16 * 16))
    stored, tensors = frozen["item_table.weight"], Tensors(tmp_path, read_manifest(tmp_path))
    assert stored.codes is not None and stored.product is not None
    levels = stored.grid.levels[stored.codes.long()].numpy()
    assert (tensors.stored("item_table.weight") == levels).all() and not levels[0].any()


def test_a_table_of_product_quantization_and_few_bits_is_shortlisted_as_any_other(tmp_path: Path) -> None:
    frozen = quantize("pq", 8, {"hidden": 32}, embedding_bits=4)
    export(tmp_path, build(hidden=32), frozen, CATALOGUE, {}, shortlist_from=1)
    model = Recommender.load(tmp_path)
    assert model.shortlist is not None
    history = np.array([[3, 1, 4]])
    scores = model.scores(history)[0]
    values, items = model.top_k(model.encode(history), 5, [np.zeros(0, np.int64)])
    assert items[0].tolist() == (np.argsort(-scores[1:], kind="stable")[:5] + 1).tolist()
    assert values[0] == pytest.approx(scores[items[0]], rel=1e-5)


def test_a_table_of_product_quantization_beside_full_precision(tmp_path: Path) -> None:
    """rest: none. The scores of states in float32 are products with the integers of the table."""
    model = build()
    module, chosen = load_method("pq", {"splits": 4, "centroids": 8, "rest": "none"})
    live = build()
    attach(live, QuantParams(), module, chosen)
    frozen = freeze(live)
    assert list(frozen) == ["item_table.weight"]
    export(tmp_path, model, frozen, CATALOGUE, {})
    scores = torch.from_numpy(Recommender.load(tmp_path).scores(histories().numpy()))
    with torch.no_grad():
        expected = live.score(live.encode(histories(), last=True)[:, 0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("table", ["per_row", "per_tensor"])
def test_tables_of_one_bit_ship_as_one_bit(method: str, table: str, tmp_path: Path) -> None:
    """Packed eight to a byte, with a scale a row, and scored as simulated."""
    frozen = quantize(method, 8, {}, embedding_bits=1, table=table)
    model = build()
    export(tmp_path / "m", model, frozen, CATALOGUE, {})
    # 16 bits a row of items and of positions; a scale each of 2 and of 4 bytes, or one of 4 for the table.
    items, positions = ITEMS + 1, 8
    scales = 2 * items + 4 * positions if table == "per_row" else 4 + 4
    assert sizes(tmp_path / "m").embedding_bytes == 16 // 8 * (items + positions) + scales
    agreement = Agreement(Simulation(model, frozen), Recommender.load(tmp_path / "m"))
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    assert agreement.steps <= 1 and agreement.same_users >= 63
    assert int(((scores - expected).abs() <= 1e-5 * expected.abs().max()).all(1).sum()) >= 63


@pytest.mark.parametrize(("bits", "times"), [(8, 3.4), (4, 5.0), (2, 7.0)])
def test_the_size_of_a_model_of_hidden_50(bits: int, times: float, tmp_path: Path) -> None:
    """MovieLens-1M's 3,416 items, two blocks, length 50, against float32."""
    torch.manual_seed(0)
    model = SASRec(ModelParams(max_len=50, hidden=50), 3416)
    module, options = load_method("ptq", {"range": "minmax"})
    full = sum(parameter.numel() * 4 for parameter in model.parameters())
    attach(model, QuantParams(bits=bits), module, options)
    calibrate(model, [torch.randint(1, 3417, (4, 50))])
    frozen = freeze(model)
    plain = SASRec(ModelParams(max_len=50, hidden=50), 3416)
    found = export(tmp_path, plain, frozen, [type(CATALOGUE[0])(str(i)) for i in range(3416)], {})
    assert full / found.bytes >= times


def test_a_full_precision_model_is_exported_as_it_is(exported: Export) -> None:
    folder = exported(None)
    manifest = read_manifest(folder)
    assert sizes(folder).bits == 32
    assert set(manifest["products"].values()) == {"float32"}


def test_the_same_model_exports_to_the_same_bytes(exported: Export) -> None:
    first, second = exported("apot", 4, "a"), exported("apot", 4, "b")
    names = {str(file.relative_to(first)) for file in files_of(first)}
    runtime = ("__init__", "__main__", "answers", "command", "events", "manifest", "model", "tensors")
    assert names == {
        "encoder.onnx", "scores.onnx", "top_k.onnx", "item_table.bin", "weights.bin", "items.csv", "manifest.json",
        *(f"recommender/{name}.py" for name in runtime),
    }  # fmt: skip
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_titles_and_categories_of_any_characters_come_back(tmp_path: Path) -> None:
    odd = ["a\rb", "a\r", "a\r\n", "a\nb", 'a "b", c', " \x1c ", "\0", "\x85\u2028\v\f", "x" * 100_000]
    items = [Item(f"i{i}", odd[i % len(odd)], (odd[i % len(odd)], "b")) for i in range(ITEMS)]
    export(tmp_path, build(), {}, items, {})
    model = Recommender.load(tmp_path)
    assert model.titles[1:] == [item.title for item in items]
    assert model.categories[1:] == [item.categories for item in items]


def test_the_catalogue_of_plain_titles_is_lines_that_end_with_a_newline(exported: Export) -> None:
    lines = (exported() / "items.csv").read_bytes().split(b"\n")
    assert lines[:2] == [b"id,original,title,categories,count", b"1,sku/1,Title 1,a|b,7"]
    assert len(lines) == ITEMS + 2
