"""AdaRound: learned rounding of the weights, layer by layer, after training (Nagel et al., ICML 2020, arXiv 2004.10568).

Each weight goes up or down, whichever makes the layer's output nearest to the full-precision layer's, instead of the
weight itself. Steps come first, by least squared error, and stay. Activations and look-up tables are as in `ptq`: for a
look-up, where the output is the row itself, nearest rounding is the best there is; a table that items are scored against
is a layer whose inputs are the final states and whose outputs are the logits. With `after: lsq` (or ste) the model is first
trained with that method, and AdaRound is the last step: it rounds the trained weights on the learned steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sasrec.adam import Adam
from sasrec.guardian import stop_if_orphaned
from sasrec.mapping import within
from sasrec.models.events import Histories, ids
from sasrec.models.taps import Linear, Place, Table, taps
from sasrec.quant.attach import load_method, quantizers, recording
from sasrec.quant.frozen import tensors
from sasrec.quant.layers import STATES, inputs_of, is_looked_up
from sasrec.quant.quantizer import FixedScale, Quantizer

TRAINS = False

# Stretch of the rectified sigmoid, equation 23.
ZETA, GAMMA = 1.1, -0.1
# Annealing of the regulariser's exponent, equation 24, after a share of the iterations without regulariser.
BETA_START, BETA_END, WARM_START = 20.0, 2.0, 0.2
# What nearest rounding's output error counts as, per weight, beside a regulariser of 0.01 per weight. At ten times as much
# half of the weights are undecided at the end, and making them hard undoes what was learned.
NEAREST_COST = 1e-3
# Layers whose output goes through a ReLU before anything else sees it.
RECTIFIED = "feed_forward.inner"


@dataclass(frozen=True)
class Options:
    iterations: int = 500
    lr: float = 0.03
    positions: int = 256  # real tokens per iteration
    samples: int = 8192  # real tokens in all
    regularizer: float = 0.01  # lambda of equation 21
    # A method that trains first, with its default options and those in after_options; AdaRound then takes over its steps.
    after: Literal["ste", "lsq"] | None = None
    after_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        within("iterations", self.iterations, 1)
        within("lr", self.lr, 0)
        within("positions", self.positions, 1)
        within("samples", self.samples, 1)
        within("regularizer", self.regularizer, 0)
        if self.after is None and self.after_options:
            raise ValueError("after_options are given, but no method in after; name it, or leave after_options empty")
        if self.after is not None:
            # Now, so that a mistake is named before anything is trained, and a resume file names the method's code, too.
            load_method(self.after, self.after_options, "methods.adaround.after_options")


class AdaRound(FixedScale):
    """Rounds to chosen codes once `choose` was called, to the nearest before."""

    chosen: Tensor

    def __init__(self, place: Place, bits: int, per_row: bool) -> None:
        super().__init__(place, bits, per_row)
        self.register_buffer("chosen", torch.zeros(place.rows, place.features, dtype=torch.uint8))

    def initialize(self, values: Tensor) -> None:
        super().initialize(values)
        self.chosen.copy_(self.grid().encode(values))

    @torch.no_grad()
    def choose(self, values: Tensor, up: Tensor) -> None:
        """Round each value up where `up` is true and down elsewhere, within the grid."""
        levels = (values / self.scale).floor() + up
        self.chosen.copy_(levels.clamp_(self.low, self.high) - self.low)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        levels = (self.chosen if rows is None else self.chosen[rows]).float() + self.low
        return (levels * self.of_rows(self.scale, rows)).to(x.dtype)

    def codes(self, values: Tensor) -> Tensor:
        return self.chosen.clone()


@torch.no_grad()
def take_over(model: nn.Module) -> None:
    """Put an `AdaRound` with the same steps in the place of every trained quantizer whose rounding can be learned."""
    weights = tensors(model)
    for name, quantizer in quantizers(model).items():
        place = quantizer.place
        if quantizer.bits == 1 or place.kind == "activation" or (place.kind == "table" and not place.scoring):
            continue
        grid = quantizer.grid(weights[name])
        own = AdaRound(place, quantizer.bits, quantizer.per_row).to(grid.scale.device)
        own.scale.copy_(grid.scale)
        own.chosen.copy_(own.grid().encode(weights[name]))
        taps(model)[name].quantizer = own


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    learned = place.kind == "weight" or (place.kind == "table" and place.scoring)
    return AdaRound(place, bits, per_row) if learned else FixedScale(place, bits, per_row)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), equation 23."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def starting_point(fraction: Tensor) -> Tensor:
    """The V at which h(V) is the fraction w / s - floor(w / s)."""
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def exponent(progress: float) -> float | None:
    """beta at `progress` (0..1): None in the warm start, then 20 to 2 by half a cosine."""
    if progress < WARM_START:
        return None
    rest = (progress - WARM_START) / (1 - WARM_START)
    return BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * rest)) / 2


def regularization(h: Tensor, beta: float) -> Tensor:
    """sum of 1 - |2 h - 1|^beta, equation 24: 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def learn_rounding(
    weight: Tensor,
    bias: Tensor | None,
    quantizer: AdaRound,
    full: Tensor,
    inputs: Tensor,
    options: Options,
    generator: torch.Generator,
    *,
    rectified: bool = False,
    looked_up: bool = False,
) -> Tensor:
    """h(V) after the optimisation of equation 25, (outputs, inputs), nearly all of it 0 or 1.

    full, inputs: (positions, inputs), what the full-precision layer gets and what the layer gets in the quantized model.
    rectified: a ReLU follows. looked_up: the rows are used as embeddings, too; their own error then counts as much.
    """
    low, high, scale = quantizer.low, quantizer.high, quantizer.scale
    activation = torch.relu if rectified else nn.Identity()
    scaled = weight / scale
    floor = scaled.floor()
    v = starting_point(scaled - floor).requires_grad_()
    optimizer = Adam([v], options.lr)

    def error(rounded: Tensor, chosen: Tensor) -> Tensor:
        """Squared error of the layer's output, summed over outputs, a mean over positions."""
        wanted = activation(nn.functional.linear(full[chosen], weight, bias))
        return (activation(nn.functional.linear(inputs[chosen], rounded, bias)) - wanted).square().sum(1).mean()

    with torch.no_grad():
        # Errors relative to nearest rounding's: lambda then means the same in every layer.
        nearest = scaled.round().clamp(low, high) * scale
        some = torch.arange(min(len(inputs), 1024), device=weight.device)
        unit = error(nearest, some).clamp_min(1e-20) / (NEAREST_COST * weight.numel())
        own_unit = (nearest - weight).square().sum().clamp_min(1e-20) / (NEAREST_COST * weight.numel())
    for i in range(options.iterations):
        h = rectified_sigmoid(v)
        chosen = torch.randint(len(inputs), (options.positions,), generator=generator).to(weight.device)
        rounded = (floor + h).clamp(low, high) * scale
        loss = error(rounded, chosen) / unit
        if looked_up:
            loss = loss + (rounded - weight).square().sum() / own_unit
        beta = exponent(i / options.iterations)
        if beta is not None:
            loss = loss + options.regularizer * regularization(h, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rectified_sigmoid(v.detach())


def enough(histories: Sequence[Histories], samples: int) -> list[Histories]:
    """The first histories that hold `samples` real tokens, of each batch the same share."""
    tokens = sum(int((ids(batch) != 0).sum()) for batch in histories)
    share = min(1.0, samples / max(tokens, 1))
    return [batch[: max(1, math.ceil(share * len(batch)))] for batch in histories if len(batch)]


def reconstruct(model: nn.Module, histories: Sequence[Histories], options: Options, seed: int) -> None:
    """Learn the rounding of every layer whose quantizer is an `AdaRound`, in the order of the forward pass, each on its
    inputs in the model as quantized so far. histories: (batch, length) each; the model is calibrated already.

    A scoring table that is looked up, too (tied embeddings) is the first layer as well as the last. It comes first, so
    that the layers between are learned on the embeddings they will get.
    """
    mode = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    histories = enough(histories, options.samples)
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | Table) and isinstance(module.weight_tap.quantizer, AdaRound):
            layers[name] = module
    # The part of the states that each scoring table is multiplied with.
    columns = {part.name.removesuffix(".weight"): part.columns for part in model.scoring_parts}  # type: ignore[union-attr]
    tables = [name for name in layers if name in columns]
    linears = [name for name in layers if name not in columns]
    with torch.no_grad(), recording(model, kinds=()):
        full = inputs_of(model, linears, histories)
    looked_up = {name for name in tables if is_looked_up(model, layers[name], histories[0])}
    encoder = [name for name in full if name in layers]
    order = [*(name for name in tables if name in looked_up), *encoder, *(name for name in tables if name not in looked_up)]
    for name in order:
        stop_if_orphaned()
        with torch.no_grad():
            inputs = inputs_of(model, [] if name in columns else [name], histories)
        layer, quantizer = layers[name], layers[name].weight_tap.quantizer
        weight = layer.weight.detach()
        h = learn_rounding(
            weight,
            layer.bias.detach() if isinstance(layer, Linear) else None,
            quantizer,
            full[STATES][:, columns[name]] if name in columns else full[name],
            inputs[STATES][:, columns[name]] if name in columns else inputs[name],
            options,
            generator,
            rectified=name.endswith(RECTIFIED),
            looked_up=name in looked_up,
        )
        quantizer.choose(weight, h >= 0.5)
    model.train(mode)
