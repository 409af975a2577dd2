"""Puts quantizers on the taps of a model, calibrates them, and freezes what they learned."""

import importlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sasrec.config import QuantParams, known_methods
from sasrec.mapping import from_mapping, unknown
from sasrec.models.events import Histories
from sasrec.models.taps import Linear, Place, taps
from sasrec.quant import overrides
from sasrec.quant.conventions import EDGE_BITS
from sasrec.quant.features import PerFeature
from sasrec.quant.frozen import FrozenTensor, tensors
from sasrec.quant.quantizer import BinaryQuantizer, Quantizer
from sasrec.quant.rates import of_quantizer
from sasrec.quant.together import weights_together
from sasrec.training import Extras

FULL_PRECISION = 32
# Values of an activation kept of each calibration batch; more do not change a scale visibly, and the search for the least
# squared error costs 50 passes.
BATCH_SAMPLE = 25_000


class Method(Protocol):
    """What a module `sasrec/quant/<method>.py` provides. Where it differs from most, also

    - `QUANTIZES = False`: it puts no quantizers on the model, and `build` is not asked;
    - `SHIFTED`: kinds of tensors whose rows have a shift beside their scale, which takes as many bytes;
    - `RATES`, where Options has an `lr` that may be None: that of a quantizer's parameters by its width (`quant.rates`);
    - `binary(place, bits, per_row, options)`: its own way for 1 bit;
    - `check(model, quant, options)`, which raises UserError: not every model or recipe suits;
    - `prepare(options, store, seed)`: what `build` takes for its options, where those need the data or the seed;
    - `reconstruct(model, histories, options, seed)`: what comes after calibration, or training; with `reconstructs(options)`
      only where that is true;
    - `Options.after`, a method that trains first, with `Options.after_options`, and `take_over(model)`, which then puts this
      method's quantizers in the place of that one's.
    """

    Options: type
    TRAINS: bool  # whether the model is trained on with the quantizers in place

    @staticmethod
    def build(place: Place, bits: int, per_row: bool, options: Any) -> Quantizer | None: ...


def load_method(name: str, options: Any, where: str | None = None) -> tuple[Any, Any]:
    """The module of a method and its options, from the section `methods.<name>` unless `where` names another. Raises
    UserError."""
    if name not in (known := known_methods()):
        raise unknown("method", name, known)
    module = importlib.import_module(f"sasrec.quant.{name}")
    return module, from_mapping(module.Options, options, where or f"methods.{name}")


def quantizes(method: Any) -> bool:
    """Whether a method puts quantizers on the model."""
    return bool(getattr(method, "QUANTIZES", True))


def shifted(method: Any) -> Collection[str]:
    """Kinds of tensors whose rows have a shift beside their scale."""
    kinds: Collection[str] = getattr(method, "SHIFTED", ())
    return kinds


def width(place: Place, params: QuantParams) -> int:
    """Bits of the tensor at `place`: its override, else what `quant.preset` says of it, else the width of its kind, else
    `quant.bits`.

    paper: what quantization papers quantize has that width: the weights of the layers between, and what enters their
    products. The first and the last layer keep 8 bits: the tables, which are both, and what enters the scoring. So does the
    stream that the blocks add to: papers leave sums over skip connections in full precision, and quantize the inputs of the
    layers that read them, which have places of their own here. source: only the stream and the final states, as the study that
    this one redoes.
    """
    if place.name in params.overrides:
        return params.overrides[place.name]
    own = {"weight": params.weight_bits, "activation": params.activation_bits, "table": params.embedding_bits}
    bits = params.bits if own[place.kind] is None else int(own[place.kind] or 0)
    if params.preset == "paper" and place.kind == "table":
        return params.embedding_bits or EDGE_BITS
    # States, not what blocks make of them on their way.
    states = place.kind == "activation" and (place.stream or place.scoring)
    if params.preset == "paper" and states:
        return max(EDGE_BITS, bits)
    if params.preset == "source":
        return bits if states else FULL_PRECISION
    return bits


def build(model: nn.Module, params: QuantParams, method: Any, options: Any) -> dict[str, Quantizer]:
    """A quantizer of `method` for every tap of `model` that gets one, by the tap's name; none is initialized or in place.

    Raises UserError for an override of a tensor that the model does not have, or of a weight or an activation below 2 bits.
    """
    all_taps = taps(model)
    if not quantizes(method):
        return {}
    overrides.check(model, params.overrides)
    built = {}
    for name, tap in all_taps.items():
        place = tap.place(name)
        bits = width(place, params)
        if bits == FULL_PRECISION:
            continue
        rows = {"weight": params.weights, "table": params.table, "activation": "per_tensor"}[place.kind]
        per_row = rows == "per_row"
        quantizer = build_one(place, bits, per_row, method, options)
        if quantizer is None:
            continue
        if place.stream and params.stream == "per_feature":
            quantizer = PerFeature(quantizer)
        quantizer.rate = of_quantizer(method, options, bits)
        quantizer.stochastic = place.kind == "table" and params.table_rounding == "stochastic"
        built[name] = quantizer.to(next(model.parameters()).device)
    return built


def build_one(place: Place, bits: int, per_row: bool, method: Any, options: Any) -> Quantizer | None:
    """The quantizer of `method` for one place; None where it leaves that in full precision."""
    if bits > 1:
        return method.build(place, bits, per_row, options)
    if hasattr(method, "binary"):
        return method.binary(place, bits, per_row, options)
    return BinaryQuantizer(place, bits, per_row)


def place(model: nn.Module, built: dict[str, Quantizer]) -> None:
    """Put those quantizers on the model's taps, and nothing on the others; weights and tables are initialized from what
    they are now, activations are not yet."""
    weights = tensors(model)
    for name, tap in taps(model).items():
        tap.quantizer = built.get(name)
        if name in built and name in weights:
            built[name].initialize(weights[name].detach())


@torch.no_grad()
def renew(model: nn.Module, histories: Iterable[Histories]) -> None:
    """Set the scales of the quantizers in place anew, from the weights and activations as they are now."""
    weights = tensors(model)
    for name, quantizer in quantizers(model).items():
        if name in weights:
            quantizer.renew(weights[name].detach())
    calibrate(model, histories)


def attach(model: nn.Module, params: QuantParams, method: Any, options: Any) -> None:
    """`build` and `place`."""
    place(model, build(model, params, method, options))


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers in place, by tap name."""
    return {name: tap.quantizer for name, tap in taps(model).items() if isinstance(tap.quantizer, Quantizer)}


class Recorder(nn.Module):
    """Stands in for a quantizer while values of real tokens are collected; the identity. features: of a token, where whole
    tokens are kept, else 1: attention weights are as many as a batch is long."""

    def __init__(self, features: int = 1) -> None:
        super().__init__()
        self.features = features
        self.parts: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        values = (x if mask is None else x[mask != 0]).detach().reshape(-1, self.features)
        if len(values):
            self.ends += [values.amin(0), values.amax(0)]
        if len(values) > (most := max(1, BATCH_SAMPLE // self.features)):
            # Drawn, not every n-th: that would hit the same features of every token.
            values = values[torch.randint(len(values), (most,), generator=self.generator).to(values.device)]
        self.parts.append(values)
        return x

    def sample(self) -> Tensor:
        """At most BATCH_SAMPLE values of each batch, and the smallest and the largest of all: (n,), or of whole tokens
        (n, features), the two ends in tokens of zeros, and of the features the one that reaches furthest for its size."""
        values, ends = torch.cat(self.parts), torch.stack(self.ends)
        size = values.square().mean(0).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
        added = torch.zeros_like(ends[:2])
        for row, end in enumerate((ends.amin(0), ends.amax(0))):
            furthest = (end / size).argmax() if row else (end / size).argmin()
            added[row, furthest] = end[furthest]
        values = torch.cat([values, added])
        return values if self.features > 1 else values.flatten()


@contextmanager
def recording(model: nn.Module, kinds: Iterable[str] = ("activation",)) -> Iterator[dict[str, Recorder]]:
    """Replace the quantizers of the given kinds by recorders for the time of the block; the others are switched off."""
    before = {name: tap.quantizer for name, tap in taps(model).items()}
    recorders: dict[str, Recorder] = {}
    for name, tap in taps(model).items():
        recorder = Recorder(tap.features if tap.stream else 1)
        tap.quantizer = recorders.setdefault(name, recorder) if tap.kind in kinds else None
    try:
        yield recorders
    finally:
        for name, tap in taps(model).items():
            tap.quantizer = before[name]


@torch.no_grad()
def calibrate(model: nn.Module, histories: Iterable[Histories]) -> None:
    """Initialize the quantizers of activations from the full-precision model's values on training histories, each
    (batch, length). The model is left in the mode it was in."""
    mode = model.training
    model.eval()
    with recording(model) as recorders:
        for batch in histories:
            model.encode(batch)  # type: ignore[operator]
    for name, quantizer in quantizers(model).items():
        if quantizer.place.kind == "activation":
            quantizer.initialize(recorders[name].sample())
    model.train(mode)


def own_training(model: nn.Module, seed: int) -> Extras:
    """What the quantizers in place add to a training run."""

    # Once: the walk over all modules takes a while, and this is done every step.
    all_taps = list(taps(model).values())
    layers = [module for module in model.modules() if isinstance(module, Linear)]

    def penalty() -> Tensor | None:
        by_class: dict[type[Quantizer], list[Quantizer]] = {}
        for tap in all_taps:
            if isinstance(tap.quantizer, Quantizer):
                own = tap.quantizer.method
                by_class.setdefault(type(own), []).append(own)
        terms = [term for kind, of in by_class.items() if (term := kind.joint_penalty(of)) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_epoch(epoch: int, epochs: int) -> None:
        for quantizer in quantizers(model).values():
            quantizer.start_epoch(epoch, epochs, seed)

    def refresh() -> None:
        weights = tensors(model)
        for name, quantizer in quantizers(model).items():
            if name in weights:
                quantizer.refresh(weights[name].detach())

    own, weights = parameters(quantizers(model).values())
    return Extras(
        parameters=own,
        penalty=penalty,
        step=lambda: weights_together(layers),
        on_epoch=on_epoch,
        refresh=refresh,
        weights=weights,
        draws=draw(quantizers(model).values()),
    )


def draw(built: Iterable[Quantizer]) -> bool:
    """Whether training steps of any of them draw from generators of their own."""
    return any(quantizer.method.draws for quantizer in built)


def parameters(built: Iterable[Quantizer]) -> tuple[dict[float, list[nn.Parameter]], list[nn.Parameter]]:
    """The quantizers' own parameters by their rate, and those that stand in the place of weights."""
    own: dict[float, list[nn.Parameter]] = {}
    weights: list[nn.Parameter] = []
    for quantizer in built:
        weights += quantizer.weights()
        known = {id(parameter) for parameter in quantizer.weights()}
        if learned := [parameter for parameter in quantizer.parameters() if id(parameter) not in known]:
            own.setdefault(quantizer.rate, []).extend(learned)
    return own, weights


@torch.no_grad()
def freeze(model: nn.Module) -> dict[str, FrozenTensor]:
    """The grid of every quantized place, and the codes of every quantized weight and table, by tap name."""
    weights = tensors(model)
    frozen = {}
    for name, quantizer in quantizers(model).items():
        if name in weights:
            quantizer.refresh(weights[name])
            grid, codes = quantizer.grid(weights[name]), quantizer.codes(weights[name])
            # Scales per table row are stored in 16 bits; rounded here, so that the checkpoint is what ships.
            if quantizer.place.kind == "table":
                grid = grid.with_half_scales()
            frozen[name] = FrozenTensor(grid, codes, quantizer.product())
        else:
            frozen[name] = FrozenTensor(quantizer.grid(), None)
    return frozen
