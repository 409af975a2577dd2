"""Details of what is exported: norms, grids, shifts, files, shortlists and times."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sasrec.deploy import Recommender, artefact
from sasrec.deploy.artefact import export
from sasrec.deploy.encoder import Encoder
from sasrec.deploy.form import integer_form, zero_point
from sasrec.deploy.graph import Graph
from sasrec.deploy.indices import index_of
from sasrec.deploy.recommender import model
from sasrec.deploy.shortlist import shortlist, suits
from sasrec.deploy.side import time_bucket
from sasrec.deploy.simulation import Agreement, Simulation
from sasrec.deploy.storage import Storage
from sasrec.models import side
from sasrec.models.scoring import Part
from sasrec.models.taps import Table
from sasrec.quant.frozen import FrozenTensor
from sasrec.quant.frozen import tensors as tensors_of
from sasrec.quant.grid import Grid
from tests.deploy.conftest import CATALOGUE, build, histories, quantize
from tests.deploy.test_operators import operators

ONE = torch.ones(())


def test_norms_are_exported_with_their_own_epsilon() -> None:
    plain = build(embedding_norm=True)
    norms = [part for part in plain.modules() if isinstance(part, torch.nn.LayerNorm)]
    for norm in norms:
        norm.eps = 0.125
    encoder = Encoder(plain, {}, Storage())
    encoder.build()
    made = [node for node in encoder.graph.nodes if node.op_type == "LayerNormalization"]
    assert [[a.f for a in node.attribute if a.name == "epsilon"] for node in made] == [[0.125]] * len(norms)


@pytest.mark.parametrize("method", [None, "ptq"])
def test_biases_and_what_norms_learned_are_exported(method: str | None, tmp_path: Path) -> None:
    """At the start of training the ones are 0, and the others change nothing."""

    def trained() -> Any:
        made = build(attention_output=True)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(len(parameter)))
        return made

    frozen = quantize(method, 8, {"attention_output": True}) if method else {}
    export(tmp_path, trained(), frozen, CATALOGUE, {})
    agreement = Agreement(Simulation(trained(), frozen), Recommender.load(tmp_path))
    agreement.exported(histories())
    agreement.simulated(histories())
    assert agreement.same_users >= 63 and agreement.steps <= 1
    assert agreement.same_elements >= 0.99 * agreement.elements if method else agreement.difference < 1e-4


def shifted(tensor: torch.Tensor, bits: int) -> FrozenTensor:
    least, most = tensor.amin(1, keepdim=True), tensor.amax(1, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp(min=1e-3)
    grid = Grid.uniform(bits, 0, 2**bits - 1, scale, least).with_half_scales()
    return FrozenTensor(grid, grid.encode(tensor))


def test_a_single_weight_on_a_shifted_grid_is_a_product_of_floats(tmp_path: Path) -> None:
    """Of which onnxruntime makes none that rounds them."""
    name = "blocks.0.feed_forward.inner.weight"
    frozen = {name: shifted(build().get_parameter(name).detach(), 4)}
    export(tmp_path, build(), frozen, CATALOGUE, {})
    assert "MatMulNBits" not in operators(tmp_path, "encoder.onnx", tmp_path)


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_and_tables_on_shifted_grids_are_exported(bits: int, activations: bool, tmp_path: Path) -> None:
    """From the least to the largest of each row, in levels from 0 on; with states of 8 bits and in full precision."""
    frozen = {name: own for name, own in quantize("ptq", 8, {}).items() if own.codes is None} if activations else {}
    frozen |= {name: shifted(tensor.detach(), bits) for name, tensor in tensors_of(build()).items()}
    export(tmp_path, build(), frozen, CATALOGUE, {})
    agreement = Agreement(Simulation(build(), frozen), Recommender.load(tmp_path))
    scores, expected = agreement.exported(histories()), agreement.simulated(histories())
    close = (scores - expected).abs()[:, 1:] <= 1e-6 * expected.abs().max()
    assert int(close.all(1).sum()) >= (62 if activations else 64)
    assert agreement.same_users >= 62 and (agreement.steps <= 1 if activations else agreement.difference < 2e-6)


@pytest.mark.parametrize("place", ["queries", "feed_forward.input", "feed_forward.inner", "attention.context"])
@pytest.mark.parametrize(("method", "bits"), [("ptq", 8), ("apot", 6), ("ptq", 4)])
def test_what_a_layer_takes_may_stay_in_full_precision(place: str, method: str, bits: int, tmp_path: Path) -> None:
    """Its weight is quantized all the same: the product is of floats, of which none is rounded on the way."""
    overrides = {f"blocks.{i}.{place}": 32 for i in range(2)}
    options: dict[str, object] = {"attention_output": True}
    frozen = quantize(method, bits, options, overrides=overrides)
    export(tmp_path, build(**options), frozen, CATALOGUE, {})
    assert "MatMulNBits" not in operators(tmp_path, "encoder.onnx", tmp_path)
    agreement = Agreement(Simulation(build(**options), frozen), Recommender.load(tmp_path))
    agreement.exported(histories())
    agreement.simulated(histories())
    assert agreement.steps <= 1 and agreement.same_users >= 62
    assert agreement.same_elements >= 0.99 * agreement.elements


LEVELS: list[tuple[list[int], Any]] = [
    (list(range(-127, 128)), 0.5),
    (list(range(-128, 128)), 0.5),
    (list(range(-8, 8)), 0.5),
    (list(range(16)), 0.25),
    (list(range(-100, 156)), 0.5),
    (list(range(-7, 8)), [0.5, 1.0, 0.25]),
    ([-4, -2, -1, 0, 1, 2, 4], 0.5),
    ([0, 1, 2, 4, 8, 12], 1.0),
    ([-192, -64, -1, 0, 1, 64, 192], 0.5),
]


@pytest.mark.parametrize(("levels", "scale"), LEVELS)
@pytest.mark.parametrize("bare", [False, True])
def test_activations_of_the_graph_are_on_the_nearest_levels(levels: list[int], scale: Any, bare: bool) -> None:
    """Those of the grid, half-way and beyond its ends, too; as codes of 8 bits, or as levels where they do not fit."""
    grid = Grid(8, torch.tensor(levels, dtype=torch.float32), torch.tensor(scale), torch.zeros(()))
    encoder = Encoder(build(), {"x": FrozenTensor(grid, None)}, Storage())
    value = encoder.tap("x", "x", bare)
    shape = ("rows", 3)
    content = encoder.graph.serialized({"x": ("float32", shape)}, {"y": (value.name, value.type, shape)})
    x = np.array([*np.arange(-70, 100, 0.125), -1e6, 1e6], np.float32).reshape(-1, 3)
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    expected = grid.levels[grid.encode(torch.from_numpy(x)).long()].numpy()
    assert (found.astype(np.float32) - (value.zero or 0) == expected).all()


def test_rows_of_a_smaller_table_are_put_together_from_their_bytes() -> None:
    rows = np.array([0, 1, 255, 256, 70_000, 65_535, 511], np.int32)
    graph, storage = Graph("g"), Storage()
    part = Part("x.weight", Table(70_001, 1, padding=True), slice(0, 1), torch.from_numpy(rows))
    content = graph.serialized({}, {"y": (index_of(graph, storage, part), "int64", ("n",))})
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy((rows >> 8 * place & 255).astype(np.uint8)) for place in range(3)]
    options.add_external_initializers(graph.given_names, values)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == rows.tolist()


@pytest.mark.parametrize(
    ("low", "high", "first", "shift", "zero"),
    [
        (-128, 127, -128, 0, 128),
        (-127, 127, -127, 0, 128),
        (0, 255, -128, 256, 0),
        (0, 127, 0, 0, 0),
        (-100, 155, None, 0, 100),
        (-127, 128, None, 0, 127),
        (-129, 126, None, 0, 129),
        (-100, 156, None, 0, None),
        (0, 256, None, 0, None),
    ],
)
def test_which_levels_fit_8_bits(low: int, high: int, first: int | None, shift: float, zero: int | None) -> None:
    """As int8 of a weight, moved where they are not negative; and as uint8 of an activation. The scale is 2."""
    grid = Grid.uniform(8, low, high, 2 * ONE)
    form = integer_form(grid)
    assert zero_point(grid) == zero
    if first is None:
        assert form is None
        return
    assert form is not None
    assert form.integers.tolist() == list(range(first, first + high - low + 1)) and float(form.shift) == shift


def test_activations_on_a_shifted_grid_have_no_zero_point() -> None:
    assert zero_point(Grid.uniform(8, 0, 255, ONE, ONE)) is None


def test_shifts_are_counted_with_the_scales_and_equal_levels_are_listed_once() -> None:
    storage, scale = Storage(), torch.ones(3, 1)
    for name, shift, count in (("plain", 0 * scale, 3), ("shifted", scale, 6)):
        storage.describe(name, "weight", (3, 2), Grid.uniform(4, -8, 7, scale, shift), "int8")
        assert storage.tensors[name]["scales"] == {"dtype": "float32", "count": count}
    assert [storage._listed(np.array(levels)) for levels in ([0, 1], [0, 2], [0, 1])] == ["0", "1", "0"]
    assert storage.levels == {"0": [0, 1], "1": [0, 2]}


def test_a_scale_that_a_float16_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="is not what a float16 holds"):
        Storage()._half("x.bin", torch.tensor([[1.0], [1.0001]]))


def test_an_export_that_fails_at_a_file_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none that is half written."""
    monkeypatch.setattr(artefact, "RUNTIME", [])
    (tmp_path / "encoder.onnx").write_bytes(b"before")
    original = Path.write_bytes

    def fails(path: Path, content: bytes) -> int:
        original(path, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path, build(), {}, CATALOGUE, {})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["encoder.onnx"]
    assert (tmp_path / "encoder.onnx").read_bytes() == b"before"


def of_table(low: int, high: int, rows: int = 4, features: int = 16, **parts: torch.Tensor) -> FrozenTensor:
    grid = Grid.uniform(8, low, high, parts.get("scale", ONE), parts.get("shift"))
    codes = torch.arange(rows * features).view(rows, features) % (high - low + 1)
    return FrozenTensor(grid, codes.to(torch.uint8))


def test_a_table_suits_a_shortlist_where_its_integers_are_of_4_bits_and_blocks_divide_its_rows() -> None:
    state: Any = SimpleNamespace(is_integer=True)
    assert suits(state, of_table(-8, 7), 64) and not suits(state, of_table(-8, 7), 65)
    for other in (of_table(-8, 8), of_table(-9, 7), of_table(-8, 7, features=24), of_table(-8, 7, shift=ONE)):
        assert not suits(state, other, 1)
    assert not suits(SimpleNamespace(is_integer=False), of_table(-8, 7), 1)  # type: ignore[arg-type]


def test_the_bound_is_the_largest_sum_of_magnitudes_in_a_row() -> None:
    stored = of_table(-8, 7, scale=torch.tensor([[1.0], [2.0], [4.0], [3.0]]))
    state: Any = SimpleNamespace(scale=0.5, zero=3)
    _, _, facts = shortlist(state, stored)
    # Each row has all levels: 8 + 7 + 7 + 6 + 6 + ... + 1 + 1 = 64.
    assert facts == {"width": model.SHORTLIST, "bound": 256.0, "state_scale": 0.5, "state_zero": 3}


def test_times_of_the_graph_are_in_the_buckets_of_the_model() -> None:
    """Also at each power of two and beside it, beyond the last bucket, below 0 and unknown."""
    powers = 2.0 ** np.arange(41)
    seconds = np.concatenate([powers - 2, powers - 1, powers, [-1e9, 0, np.nan, 10.0**11]])
    graph = Graph("g")
    content = graph.serialized({"s": ("float64", ("n",))}, {"y": (time_bucket(graph, "s"), "int64", ("n",))})
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"s": seconds})[0]
    assert found.tolist() == side.time_bucket(torch.from_numpy(seconds)).tolist()
    assert found.max() == side.TIME_BUCKETS
