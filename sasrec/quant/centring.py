"""Takes the means off what is about to be quantized, without changing what the model computes.

A grid about zero spends its levels on a mean that carries nothing, and the error of a weight times the mean of its input is the
same for every token. Biases are in full precision, and can carry means instead (absorbed biases: Nagel et al., ICCV 2019, arXiv
1906.04721, section 4.1.3, there from one layer into the next).
"""

from collections.abc import Sequence

import torch
from torch import nn

from sasrec.models.events import Histories
from sasrec.models.registry import encoders
from sasrec.models.sasrec import Block
from sasrec.models.taps import Linear
from sasrec.quant.attach import recording
from sasrec.quant.layers import inputs_of


@torch.no_grad()
def centre(model: nn.Module, histories: Sequence[Histories]) -> None:
    """Change biases of a full-precision model so that over the real tokens of `histories`, (batch, length) each, these have a
    mean of 0, feature by feature: what norms give to linear layers alone, which is so in `pre_norm` blocks, and keys.

    x' = x - m: off the bias of the norm, and W m onto the biases of the layers that read it. The bias of the keys is free: it
    adds the same to the scores of all keys of a query, and the softmax takes that off. Up to rounding nothing else changes.
    """
    mode = model.training
    model.eval()
    blocks = {
        f"{part}blocks.{i}": block
        for part, encoder in encoders(model).items()  # type: ignore[arg-type]
        for i, block in enumerate(encoder.blocks)
    }
    readers = [f"{name}.{layer}" for name in blocks for layer in ("attention.key", "feed_forward.inner")]
    with recording(model, kinds=()):
        means = {name: inputs.mean(0) for name, inputs in inputs_of(model, readers, histories).items()}
    for name, block in blocks.items():
        assert isinstance(block, Block)
        attention = block.attention
        if block.kind == "pre_norm":
            move(means[f"{name}.attention.key"], block.attention_norm, attention.query, attention.key, attention.value)
            move(means[f"{name}.feed_forward.inner"], block.feed_forward_norm, block.feed_forward.inner)
            attention.key.bias.zero_()
        else:
            attention.key.bias.copy_(-(attention.key.weight @ means[f"{name}.attention.key"]))
    model.train(mode)


def move(mean: torch.Tensor, norm: nn.LayerNorm, *readers: Linear) -> None:
    """The mean of what a norm gives, (features,), off its bias and onto those of all layers that read it."""
    norm.bias.sub_(mean)
    for layer in readers:
        layer.bias.add_(layer.weight @ mean)
