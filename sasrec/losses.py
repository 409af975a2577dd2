"""Losses of next-item recommendation over the real positions of a batch, flattened.

Each takes the states (tokens, hidden), the targets' ids (tokens,) and what negatives it needs, and returns a Result: the
mean loss, and how often the target scores higher than one random negative (pairwise accuracy; ties count half).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sasrec.config import TrainParams

# (states, ids or None for all items) -> scores, as SASRec.score.
Score = Callable[[Tensor, Tensor | None], Tensor]

# Logits held at once by the full cross-entropy, in elements: bounds its memory whatever the batch and the catalogue, and
# keeps them in the cache between the passes (an epoch takes a twelfth less time than with four times as many).
CHUNK_ELEMENTS = 500_000
# The same on a GPU, to which each kernel has to be said: few of much work. The number was not compared with others.
GPU_CHUNK_ELEMENTS = 64_000_000


@dataclass(frozen=True)
class Result:
    loss: Tensor  # ()
    accuracy: Tensor  # ()
    second: Tensor | None = None  # (), of a second task


def negatives_per(params: TrainParams) -> Literal["batch", "sequence", "each", "none"]:
    """What one draw of negatives serves. 'batch': params.negatives items shared by the whole batch; 'sequence': shared by the
    positions of one sequence; 'each': a draw per position; 'none' for cross-entropy.

    gBCE cannot share them with the whole batch: what is drawn is then pushed away by every position at once, and the scores
    swing instead of settling (measured: it never leaves the level of popularity on MovieLens-1M).
    """
    if params.loss == "cross_entropy":
        return "none"
    if params.loss == "sampled_softmax":
        return "batch"
    return "sequence" if params.loss == "gbce" and params.shared_negatives else "each"


def mean(values: Tensor, real: Tensor | None = None) -> Tensor:
    """Of values (tokens,), or of those where real (tokens,) is 1 and not 0, as at what fills a batch up to a fixed shape."""
    return values.mean() if real is None else (values * real).sum() / real.sum()


def pairwise_accuracy(positive: Tensor, negative: Tensor, real: Tensor | None = None) -> Tensor:
    """positive, negative: (tokens,). Share of positions where the target wins, ties counting half. real: as `mean`."""
    with torch.no_grad():
        return mean((positive > negative).float() + 0.5 * (positive == negative).float(), real)


def bce(positive: Tensor, negative: Tensor, real: Tensor | None = None) -> Tensor:
    """-log sigmoid(s+) - mean log(1 - sigmoid(s-)), averaged (Kang and McAuley, section III-E). negative: (tokens, n)."""
    return mean(F.softplus(-positive) + F.softplus(negative).mean(-1), real)


def bpr(positive: Tensor, negative: Tensor, real: Tensor | None = None) -> Tensor:
    """-log sigmoid(s+ - s-), averaged (Rendle et al., UAI 2009). negative: (tokens, n)."""
    return mean(F.softplus(negative - positive.unsqueeze(-1)).mean(-1), real)


def gbce_beta(items: int, negatives: int, t: float) -> float:
    """The power of the positive's probability (Petrov and Macdonald, RecSys 2023, arXiv 2308.07192, equation 15):
    beta = alpha (t (1 - 1/alpha) + 1/alpha) with the sampling rate alpha = negatives / (items - 1)."""
    alpha = negatives / max(items - 1, 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def gbce(positive: Tensor, negative: Tensor, beta: float, real: Tensor | None = None) -> Tensor:
    """-(beta log sigmoid(s+) + sum log(1 - sigmoid(s-))) / (n + 1), averaged. -inf marks a negative to leave out."""
    total = beta * F.softplus(-positive) + F.softplus(negative).sum(-1)
    return mean(total / (negative.shape[-1] + 1), real)


def sampled_softmax(
    positive: Tensor, negative: Tensor, log_expected: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the target among itself and the negatives (tokens, n). -inf marks a negative to leave out.

    log_expected: (n,), the log of how often each negative's item is expected in the draw, log(n Q(item)). With it, exp(s+)
    + sum exp(s-) / (n Q) estimates the softmax's denominator over all items that can be drawn, without bias (Bengio and
    Senecal, IEEE TNN 2008; Jean et al., ACL 2015, arXiv 1412.2007, section 3). The target is in it once for certain, so
    its log is 0: correcting it as if it had been drawn, as in-batch negatives do (Yi et al., RecSys 2019), leaves a bias
    (Khrylchenko et al., RecSys 2025, arXiv 2507.09331).
    """
    if log_expected is not None:
        negative = negative - log_expected
    logits = torch.cat([positive.unsqueeze(-1), negative], -1)
    return mean(logits.logsumexp(-1) - positive, real)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over all items 1..n without ever holding the (tokens, items) logits: the gradients are
    computed with the loss, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
        to_states, to_table = torch.zeros_like(states), torch.zeros_like(table)
        loss = states.new_zeros(())
        step = max(1, (CHUNK_ELEMENTS if states.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // len(table))
        for begin in range(0, len(states), step):
            part, target = states[begin : begin + step], targets[begin : begin + step]
            logits = part @ table.T
            logits[:, 0] = -torch.inf
            highest = logits.amax(-1, keepdim=True)
            to_logits = logits.softmax(-1)
            # The softmax's denominator, without another pass of exponentials: p of the highest is 1 / it.
            log_sum = highest - to_logits.amax(-1, keepdim=True).log()
            own = log_sum - logits.gather(1, target[:, None])
            to_logits.scatter_add_(1, target[:, None], -torch.ones_like(log_sum))
            if real is not None:
                own, to_logits = own * real[begin : begin + step, None], to_logits * real[begin : begin + step, None]
            loss += own.sum()
            to_states[begin : begin + step] = to_logits @ table
            to_table.addmm_(to_logits.T, part)
        ctx.save_for_backward(to_states, to_table)
        ctx.tokens = len(states) if real is None else real.sum()
        return loss / ctx.tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_states, to_table = ctx.saved_tensors
        factor = gradients[0] / ctx.tokens
        return to_states * factor, to_table * factor, None, None


def compute(
    params: TrainParams,
    items: int,
    score: Score,
    table: Callable[[], Tensor],
    states: Tensor,
    targets: Tensor,
    negatives: Tensor,
    places: Tensor | None = None,
    log_expected: Tensor | None = None,
    real: Tensor | None = None,
) -> Result:
    """The loss that `params` names.

    states: (tokens, hidden), and targets: (tokens,). negatives: (tokens, n); (n,) shared by the batch; for cross-entropy
    (tokens, 1), which only the pairwise accuracy uses; or shared by each sequence, (batch, n), and then states: (batch,
    length, hidden) and places: (tokens,), where in (batch * length) the tokens are; None: everywhere. table: gives the scoring
    table, (items + 1, hidden).
    log_expected: (n,) of the sampled softmax, where its negatives are not uniform; the accuracy is by the plain scores.
    real: (tokens,), 0 at tokens that do not count (their targets are any item), 1 at others; None: all count.
    """
    if params.loss == "cross_entropy":
        weights = table()
        loss = ChunkedCrossEntropy.apply(states, weights, targets, real)
        with torch.no_grad():
            positive = (states * weights[targets]).sum(-1)
            negative = (states * weights[negatives[:, 0]]).sum(-1)
        return Result(loss, pairwise_accuracy(positive, negative, real))
    negative = score(states, negatives)  # (tokens, n), or (batch, length, n) for negatives shared by a sequence
    if states.dim() == 3:
        length = states.shape[1]
        states, negative = states.flatten(0, 1), negative.flatten(0, 1)
        if places is None:
            negatives = negatives.repeat_interleave(length, 0)
        else:
            states, negative, negatives = states[places], negative[places], negatives[places // length]
    positive = score(states, targets[:, None]).squeeze(-1)
    accuracy = pairwise_accuracy(positive, negative[:, 0], real)
    if negatives_per(params) in ("batch", "sequence"):
        # A shared negative may be a position's own target.
        negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
    if params.loss == "bce":
        loss = bce(positive, negative, real)
    elif params.loss == "bpr":
        loss = bpr(positive, negative, real)
    elif params.loss == "gbce":
        loss = gbce(positive, negative, gbce_beta(items, negative.shape[-1], params.gbce_t), real)
    else:
        loss = sampled_softmax(positive, negative, log_expected, real)
    return Result(loss, accuracy)
