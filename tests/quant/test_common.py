"""What holds for every method at every width."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sasrec.config import ModelParams, QuantParams
from sasrec.errors import UserError
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import taps
from sasrec.quant import attach
from sasrec.quant.frozen import thaw
from sasrec.quant.grid import Grid, half_parts
from sasrec.quant.quantizer import BinaryQuantizer, Quantizer

Build = Callable[..., Quantizer]

# Every method and, where an option chooses another grid or another transform of the weights, each of those.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ptq", {}),
    ("ptq", {"range": "minmax"}),
    ("ptq", {"range": "percentile", "percentile": 99.0}),
    ("ste", {}),
    ("ste", {"range": "minmax"}),
    ("lsq", {"start": "paper"}),
    ("lsq", {"start": "mse"}),
    ("lsq", {"offset": True}),
    ("lsq", {"offset": True, "start": "paper"}),
    ("pact", {}),
    ("pact", {"weights": "sawb"}),
    ("dorefa", {}),
    ("dorefa", {"grid": "paper"}),
    ("dorefa", {"grid": "zero"}),
    ("apot", {}),
    ("adaround", {}),
]
LEARNED = {"lsq": "log_step", "pact": "log_alpha", "apot": "log_alpha"}
NAMES = ["-".join([method, *map(str, options.values())]) for method, options in CASES]
cases = pytest.mark.parametrize(("method", "options"), CASES, ids=NAMES)
every_kind = pytest.mark.parametrize("kind", ["weight", "table", "activation"])


def widths(options: dict[str, Any], *wanted: int) -> tuple[int, ...]:
    """2 to 8 bits, or those wanted; of them what is published for SAWB."""
    chosen = wanted or (2, 3, 4, 5, 6, 7, 8)
    return tuple(bits for bits in chosen if options.get("weights") != "sawb" or bits in (2, 4, 8))


def shape(values: Tensor, kind: str) -> Tensor:
    return values.flatten() if kind == "activation" else values


def grid_values(quantizer: Quantizer, values: Tensor) -> Tensor:
    """What the frozen form makes of values."""
    if quantizer.place.kind == "activation":
        return quantizer.grid().quantize(values)
    return quantizer.grid(values).decode(quantizer.codes(values)).to(values.dtype)


def test_every_file_is_a_case() -> None:
    files = {path.stem for path in Path(attach.__file__).parent.glob("*.py")}
    shared = {"__init__", "attach", "conventions", "frozen", "grid", "layers", "quantizer", "recipe", "schedule", "sensitivity"}
    shared |= {"tanh_weight", "budgets", "calibration", "centring", "features", "fits", "overrides", "rates", "together"}
    # The first two have no quantizers; pq has another method's, and for the item table one of its own.
    assert files - shared == {method for method, _ in CASES} | {"control", "fp16", "pq"}


@cases
@every_kind
def test_live_and_frozen_agree_and_are_idempotent(build: Build, method: str, options: dict[str, Any], kind: str) -> None:
    values = shape(torch.randn(8, 24), kind)
    for bits in widths(options):
        quantizer = build(method, bits, kind, values=values, **options).eval()
        live = quantizer(values)
        assert torch.equal(live, grid_values(quantizer, values))
        grid = quantizer.grid(None if kind == "activation" else values)
        assert torch.equal(grid.quantize(live), live)
        assert torch.equal(grid.decode(grid.encode(live)), live)


UNUSUAL = {
    "zeros": torch.zeros(8, 16),
    "constant": torch.full((8, 16), 0.3),
    "negative": torch.full((8, 16), -0.3),
    "outlier": torch.linspace(-2, 2, 128).reshape(8, 16).index_fill(1, torch.tensor([3]), 50.0),
    "tiny": torch.linspace(-2e-6, 2e-6, 128).reshape(8, 16),
}


@cases
@every_kind
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors(build: Build, method: str, options: dict[str, Any], kind: str, name: str) -> None:
    for bits, dtype in itertools.product(widths(options, 2, 4, 8), (torch.float32, torch.bfloat16)):
        x = shape(UNUSUAL[name].to(dtype), kind)
        quantizer = build(method, bits, kind, values=x, **options)
        out = quantizer(x.clone().requires_grad_())
        assert out.dtype == dtype and out.shape == x.shape
        assert out.isfinite().all()
        assert torch.equal(quantizer.eval()(x), grid_values(quantizer, x))
        if out.requires_grad:
            out.float().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())
        error = (out - x).detach().float().abs().max()
        if name == "zeros":
            assert error <= 1e-12
        elif name in ("constant", "negative") and options.get("start") != "paper":
            # One value is a level of the best grid, whatever the width; tanh bends it a little.
            assert error <= (0.01 if kind != "activation" and method in ("dorefa", "pact") else 0.002)


@cases
@pytest.mark.parametrize("per_row", [True, False])
def test_gather_then_quantize_is_quantize_then_gather(
    build: Build, method: str, options: dict[str, Any], per_row: bool
) -> None:
    for bits, features in itertools.product(widths(options, 2, 8), (16, 50, 67)):
        values = torch.randn(301, features) * torch.rand(301, 1)
        quantizer = build(method, bits, "table", values=values, per_row=per_row, **options)
        if method != "adaround":
            values *= 1.1  # trained on since the statistics were taken
        whole = quantizer(values)
        for ids in (torch.tensor([7]), torch.randint(0, 301, (5, 9)), torch.arange(300)):
            assert torch.equal(quantizer(values[ids], ids), whole[ids])


@cases
@every_kind
@pytest.mark.parametrize("per_row", [True, False])
def test_one_scale_a_row_or_one_for_all(build: Build, method: str, options: dict[str, Any], kind: str, per_row: bool) -> None:
    """Rows of different widths: one scale for all rounds the narrowest to two values at most, a scale each does not."""
    values = shape(torch.randn(8, 64) * torch.logspace(0, -3, 8)[:, None], kind)
    quantizer = build(method, 4, kind, values=values, per_row=per_row, **options)
    scale = quantizer.grid(None if kind == "activation" else values).scale
    own = per_row and kind != "activation"
    assert scale.shape == ((8, 1) if own else ())
    if kind != "activation":
        assert (len(grid_values(quantizer, values)[-1].unique()) > 2) == own


@cases
@pytest.mark.parametrize("kind", ["weight", "table"])
def test_statistics_of_a_whole_tensor_are_those_of_the_last_refresh(
    build: Build, method: str, options: dict[str, Any], kind: str
) -> None:
    """One scale for all follows a tensor from refresh to refresh as the scale of a row follows its row at once."""
    values = torch.randn(8, 16)
    whole = build(method, 4, kind, values=values, per_row=False, **options)
    whole.refresh(2 * values)
    row = build(method, 4, kind, values=values.reshape(1, -1), **options)
    wanted = row.grid(2 * values.reshape(1, -1)).scale.reshape(())
    torch.testing.assert_close(whole.grid(2 * values).scale, wanted)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("features", [16, 67])
def test_one_bit_is_sign_and_mean(build: Build, per_row: bool, features: int) -> None:
    values = torch.randn(31, features)
    ptq = build("ptq", 2, "table", values=values, per_row=per_row)
    binary = BinaryQuantizer(ptq.place, 1, per_row)
    binary.initialize(values)
    mean = values.abs().mean(1, keepdim=True) if per_row else values.abs().mean()
    torch.testing.assert_close(binary(values), values.sign() * mean)
    binary.refresh(2 * values)
    torch.testing.assert_close(binary(2 * values), 2 * values.sign() * mean)
    binary.refresh(values)
    assert torch.equal(binary(values), grid_values(binary, values))
    ids = torch.tensor([[3, 30], [0, 3]])
    assert torch.equal(binary(values[ids], ids), binary(values)[ids])
    values[0, :2] = torch.tensor([1.5, -0.5])
    binary(values.requires_grad_()).sum().backward()
    assert values.grad is not None and values.grad[0, :2].tolist() == [0, 1]


@cases
@pytest.mark.parametrize("table", ["per_row", "per_tensor"])
def test_a_model_with_tables_of_one_bit(
    quantized: Callable[..., SASRec],
    model: SASRec,
    histories: Tensor,
    method: str,
    options: dict[str, Any],
    table: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside an encoder of 8 bits: two values a row, or one pair for all, and what is frozen is what was live, with LSQ's step
    off the mean that it started at."""
    monkeypatch.setattr(Grid, "with_half_scales", lambda self: self)
    plain = copy.deepcopy(model)
    live = quantized(method, 8, options, embedding_bits=1, table=table)
    quantizer = attach.quantizers(live)["item_table.weight"]
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.3)
    frozen = attach.freeze(live)
    assert bool(list(quantizer.parameters())) == (method == "lsq")
    assert frozen["item_table.weight"].grid.levels.tolist() == [-1, 1]
    rows = live.item_table.all().detach().abs()
    mean = live.item_table.weight.detach().abs().mean(*([1, True] if table == "per_row" else []))
    torch.testing.assert_close(rows, (mean * (1.3498588 if method == "lsq" else 1)).expand_as(rows))  # e^0.3
    plain.load_state_dict({name: tensor for name, tensor in live.state_dict().items() if ".quantizer." not in name})
    thaw(plain, frozen)
    with torch.no_grad():
        assert torch.equal(live.encode(histories), plain.encode(histories))
        assert torch.equal(live.item_table.all(), plain.item_table.all())


def test_activations_and_weights_of_one_bit_are_refused(quantized: Callable[..., SASRec]) -> None:
    with pytest.raises(UserError, match="quant.overrides.final: an activation takes 2 to 8 bits, not 1"):
        quantized("lsq", 8, overrides={"final": 1})
    with pytest.raises(ValueError, match="weight_bits must be between 2 and 8"):
        QuantParams(weight_bits=1)


@cases
@every_kind
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_passes_the_rounding_and_stops_at_the_clip(
    build: Build, method: str, options: dict[str, Any], kind: str, bits: int
) -> None:
    values = shape(torch.randn(6, 64), kind)
    quantizer = build(method, bits, kind, values=values, **options)
    if method == "adaround" and kind != "activation":
        pytest.skip("its weights are not trained")
    x = values.clone().requires_grad_()
    quantizer(x).backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    grid = quantizer.grid(None if kind == "activation" else values)
    if kind != "activation" and (method == "dorefa" or (method == "pact" and not options)):
        unit = quantizer.get_buffer("unit")
        torch.testing.assert_close(x.grad, 3 * (1 - (values / unit).tanh() ** 2))
        return
    scaled = (values - grid.shift) / grid.scale
    # Fixed ranges let pass what rounds to their ends, learned ones stop at the ends.
    reach = 0.5 if quantizer.__class__.__name__ in ("FixedScale", "AdaRound", "STE", "SawbWeight", "BoundedActivation") else 0.0
    inside = (scaled > grid.levels[0] - reach) & (scaled < grid.levels[-1] + reach)
    assert torch.equal(x.grad, 3.0 * inside)
    if bits == 2 and "range" not in options and options.get("start") != "paper":
        assert not inside.all()


@cases
def test_sign_comes_from_the_place(build: Build, method: str, options: dict[str, Any]) -> None:
    """A batch without negative values makes a signed place neither unsigned nor finer, and the other way round."""
    if options.get("offset"):
        pytest.skip("an offset is where calibration says")
    values = torch.rand(1000)
    signed = build(method, 4, values=values, signed=True, **options).eval()
    assert signed(torch.tensor([-0.5]))[0] < -0.2
    unsigned = build(method, 4, values=torch.randn(1000), signed=False, **options).eval()
    assert unsigned(torch.tensor([-0.5, 0.5])).tolist()[0] == 0
    assert unsigned(torch.tensor([-0.5, 0.5])).tolist()[1] > 0.2


@cases
@every_kind
@pytest.mark.parametrize("per_row", [True, False])
def test_state_round_trip(build: Build, method: str, options: dict[str, Any], kind: str, per_row: bool) -> None:
    values = shape(torch.randn(8, 16), kind)
    first = build(method, 4, kind, values=values, per_row=per_row, **options).eval()
    second = build(method, 4, kind, values=torch.ones_like(values), per_row=per_row, **options).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(values), second(values))
    twin = copy.deepcopy(first)
    assert torch.equal(first(values), twin(values))


@pytest.mark.parametrize("method", LEARNED)
@every_kind
def test_own_parameters_learn_from_the_loss(build: Build, method: str, kind: str) -> None:
    """Ten steps of Adam from a threshold that is far too wide bring it in, and the error down."""
    if (method, kind) in (("pact", "weight"), ("pact", "table")):
        pytest.skip("PACT learns the clips of activations only")
    values = shape(torch.randn(8, 64), kind)
    quantizer = build(method, 4, kind, values=values)
    (parameter,) = quantizer.parameters()
    assert [name for name, _ in quantizer.named_parameters()] == [LEARNED[method]]
    # PACT's gradient is 0 inside the clip: it can only learn from clipped values.
    start = parameter.detach() + (-1.0 if method == "pact" else 1.0)
    with torch.no_grad():
        parameter.copy_(start)
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    errors = []
    for _ in range(10):
        error = (quantizer(values) - values).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    moved = parameter.detach() - start
    assert (moved.abs() > 0.2).all()
    assert ((moved > 0) == (method == "pact")).all()
    assert errors[-1] < 0.8 * errors[0]


@cases
@pytest.mark.parametrize(("bits", "table"), [(2, "per_row"), (4, "per_tensor"), (8, "per_row")])
def test_frozen_model_is_the_live_model(
    quantized: Callable[..., SASRec],
    model: SASRec,
    histories: Tensor,
    method: str,
    options: dict[str, Any],
    bits: int,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # How the scales of table rows are rounded is the next test's.
    monkeypatch.setattr(Grid, "with_half_scales", lambda self: self)
    plain = copy.deepcopy(model)
    live = quantized(method, bits, options, table=table)
    with torch.no_grad():
        for parameter in live.parameters() if method != "adaround" else ():  # as training would
            parameter.add_(0.01 * torch.randn_like(parameter) * (parameter != 0))
    frozen = attach.freeze(live)
    assert frozen.keys() == taps(live).keys()
    state = {name: tensor for name, tensor in live.state_dict().items() if ".quantizer." not in name}
    plain.load_state_dict(state)
    thaw(plain, frozen)
    with torch.no_grad():
        states = live.encode(histories)
        assert torch.equal(states, plain.encode(histories))
        assert torch.equal(live.score(states), plain.score(states))
        assert torch.equal(live.encode(histories[2:3]), states[2:3])  # no batch mates
        real = histories[0, 3:]  # nor padding
        torch.testing.assert_close(live.encode(real[None])[0], states[0, 3:], rtol=0, atol=1e-5)
    assert all(int(item.codes.max()) < 2**bits for item in frozen.values() if item.codes is not None)


def test_freezing_rounds_the_scales_of_table_rows_to_what_16_bits_hold(quantized: Callable[..., SASRec]) -> None:
    live = quantized("ptq", 4, {})
    table = live.item_table
    own = table.weight_tap.quantizer
    assert isinstance(own, Quantizer)
    frozen = attach.freeze(live)["item_table.weight"]
    exact = own.grid(table.weight).scale
    assert not torch.equal(frozen.grid.scale, exact)
    torch.testing.assert_close(frozen.grid.scale[1:], exact[1:], rtol=2**-11, atol=0)  # row 0 is padding, all zeros
    half, unit = half_parts(frozen.grid.scale)
    assert torch.equal(half.float() * unit, frozen.grid.scale)
    assert frozen.codes is not None
    assert torch.equal(frozen.codes, own.codes(table.weight))


@pytest.mark.parametrize("method", ["ptq", "lsq", "dorefa"])
@pytest.mark.parametrize("table", ["per_row", "per_tensor"])
def test_positions_from_the_left_are_quantized_alike_in_any_batch(
    histories: Tensor, method: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the left, a padded batch looks up one row a token: more than the table has, or fewer."""
    torch.manual_seed(1)
    model = SASRec(ModelParams(max_len=8, hidden=16, heads=2, position="left"), 60).eval()
    monkeypatch.setattr(Grid, "with_half_scales", lambda self: self)
    module, options = attach.load_method(method, {})
    attach.attach(model, QuantParams(bits=4, table=table), module, options)  # type: ignore[arg-type]
    attach.calibrate(model, [histories])
    plain = SASRec(model.params, model.items).eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".quantizer." not in name})
    thaw(plain, attach.freeze(model))
    with torch.no_grad():
        states = model.encode(histories)
        assert torch.equal(states, plain.encode(histories))
        assert torch.equal(model.encode(histories[:1]), states[:1])
        torch.testing.assert_close(model.encode(histories[:1, 3:])[0], states[0, 3:], rtol=0, atol=1e-5)


@cases
def test_training_statistics_ignore_padding(
    quantized: Callable[..., SASRec], histories: Tensor, method: str, options: dict[str, Any]
) -> None:
    """A training pass leaves the same grids whether or not there is more padding."""
    first = quantized(method, 8, options)
    second = copy.deepcopy(first)
    first.train().encode(histories)
    second.train().encode(torch.nn.functional.pad(histories, (2, 0)))
    a, b = attach.freeze(first), attach.freeze(second)
    for name in a:
        torch.testing.assert_close(a[name].grid.scale, b[name].grid.scale, rtol=1e-4, atol=0, msg=name)


def test_control_has_no_quantizers(quantized: Callable[..., SASRec], model: SASRec, histories: Tensor) -> None:
    before = model.encode(histories)
    live = quantized("control", 4)
    assert not attach.quantizers(live) and not attach.freeze(live)
    assert torch.equal(live.encode(histories), before)


@cases
def test_error_falls_with_every_bit(build: Build, method: str, options: dict[str, Any]) -> None:
    """No width is broken: on a Gaussian tensor the error falls by about 2 a bit; powers of two stop helping at the top."""
    if options.get("range") == "percentile" or options.get("start") == "paper":
        pytest.skip("a percentile clips the same values at every width; the paper's start is far too wide at many bits")
    values = torch.randn(4096)
    errors = []
    for bits in range(2, 9):
        quantizer = build(method, bits, values=values, **options).eval()
        errors.append(float((quantizer(values) - values).detach().square().mean().sqrt()))
    for narrow, wide in itertools.pairwise(errors):
        assert wide < narrow * (0.8 if method != "apot" else 0.95)
    assert errors[-1] < (0.02 if method != "apot" else 0.05)
