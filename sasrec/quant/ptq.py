"""Plain post-training quantization: scales from data, nothing is trained. The baseline that every method must beat."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasrec.mapping import within
from sasrec.models.taps import Linear, Place
from sasrec.quant.attach import recording
from sasrec.quant.layers import inputs_of
from sasrec.quant.quantizer import FixedScale, Quantizer, Rule

TRAINS = False


@dataclass(frozen=True)
class Options:
    # What sets a scale: minmax: nothing is clipped; percentile: that share of the magnitudes is not; mse: least squared
    # error. At 8 bits they agree; below, min-max spends its few levels on the tails.
    range: Rule = "mse"
    percentile: float = 99.99  # only for range: percentile
    bias_correction: bool = False

    def __post_init__(self) -> None:
        within("percentile", self.percentile, 50, 100)


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return FixedScale(place, bits, per_row, options.range, options.percentile)


def reconstructs(options: Options) -> bool:
    """Whether `reconstruct` has anything to do."""
    return options.bias_correction


def reconstruct(model: nn.Module, histories: list[Tensor], options: Options, seed: int) -> None:
    """With `bias_correction`, take the mean error of every linear layer's output off its bias."""
    if options.bias_correction:
        correct_biases(model, histories)


@torch.no_grad()
def correct_biases(model: nn.Module, histories: list[Tensor]) -> None:
    """b += E[W x] - E[W' x'] for each linear layer in the order of the forward pass: W, x of the full-precision model, W'
    the quantized weights, x' what the layer gets in the quantized model as corrected so far (Nagel et al., ICCV 2019, arXiv
    1906.04721, section 4.2, with the means taken from data). histories: (batch, length) each.
    """
    mode = model.training
    model.eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    with recording(model, kinds=()):
        full = {name: inputs.mean(0) for name, inputs in inputs_of(model, list(layers), histories).items()}
    for name in full:
        if name not in layers:
            continue
        layer = layers[name]
        mean = inputs_of(model, [name], histories)[name].mean(0)
        wanted = F.linear(full[name], layer.weight)
        layer.bias.add_(wanted - F.linear(mean, layer.weight_tap(layer.weight)))
    model.train(mode)
