"""Causal scaled dot-product attention with heads, and a tap on everything that enters a matrix product."""

from typing import Any

import torch
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.models.dropout import Dropping, dropout_mask
from sasrec.models.locality import Locality
from sasrec.models.taps import Linear, Tap

# Queries whose products are worked out together where no gradient is asked for. In one piece, half of the products of a causal
# attention are of what is hidden; in smaller ones each takes longer.
QUERIES = 50

# Added to the scores of keys that a query may not see. Finite: a padded query sees nothing, and its softmax must not be NaN.
HIDDEN_SCORE = -1e9


class WeightedSum(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias), times a dropout mask, times v; all of shape (batch * heads, n or length, d).

    The same as the operators one by one, with fewer passes over the (n, length) matrices: scale and bias are part
    of the product, and the gradient is worked out in place. That of the bias only where it is asked for.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        scale = query.shape[-1] ** -0.5
        scores = torch.baddbmm(bias.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1)
        dropped = weights if mask is None else weights * mask
        ctx.save_for_backward(query, key, value, weights, dropped, mask)
        ctx.scale, ctx.bias_shape = scale, bias.shape
        return dropped @ value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        query, key, value, weights, dropped, mask = ctx.saved_tensors
        to_value = dropped.transpose(1, 2) @ gradients[0]
        to_weights = gradients[0] @ value.transpose(1, 2)
        if mask is not None:
            to_weights *= mask
        # The softmax: w (g - sum(g w)).
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        # A copy, because the scale comes in place.
        to_bias = to_scores.clone().sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        to_scores.mul_(ctx.scale)
        return to_scores @ key, to_scores.transpose(1, 2) @ query, to_value, to_bias, None


def in_parts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`WeightedSum` where no query sees a key after its own place: some queries at a time, with the keys up to the last of
    them."""
    length = query.shape[1]
    ends = [(begin, min(begin + QUERIES, length)) for begin in range(0, length, QUERIES)]
    parts = [(slice(begin, end), slice(end)) for begin, end in ends]
    found = [WeightedSum.apply(query[:, own], key[:, to], value[:, to], bias[:, own, to], None) for own, to in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


class Numerators(torch.autograd.Function):
    """exp(s - max s) for the scores s = q k^T / sqrt(d) + bias, (batch * heads, n, length): what a softmax divides by its sum,
    for attention whose weights are quantized. The largest of each row is 1, so that one grid suits short and long histories.

    The gradient goes through the maximum, too: raising the largest score lowers all other numerators. Taken as a constant,
    which is the same for a softmax, it leaves the others without their counterweight where a quantizer clips the largest, and
    training at 4 bits falls below its start. The gradient of the keys is made contiguous, because it would come transposed,
    and every pass of the quantizer behind it would be a slow one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        scores = torch.baddbmm(bias.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scale)
        # By way of the softmax, because the exponential alone takes three times as long where keys are hidden.
        numerators = scores.softmax(-1)
        numerators.div_(numerators.amax(-1, keepdim=True))
        ctx.save_for_backward(query, key, numerators)
        ctx.scale, ctx.bias_shape = scale, bias.shape
        return numerators

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        query, key, numerators = ctx.saved_tensors
        to_scores = gradients[0] * numerators
        largest = numerators.floor()  # 1 where they are 1, else 0: as a comparison, at a ninth of its time
        to_scores.addcmul_(largest, to_scores.sum(-1, keepdim=True) / largest.sum(-1, keepdim=True), value=-1)
        to_bias = to_scores.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        to_query = (to_scores @ key).mul_(ctx.scale)
        # This way round, because the other rounds other sums for 5 to 9 positions.
        to_key = (query.transpose(1, 2) @ to_scores).mul_(ctx.scale).transpose(1, 2).contiguous()
        return to_query, to_key, to_bias


class Average(torch.autograd.Function):
    """sum_j w_j m_j v_j / sum_j w_j for numerators w (batch * heads, n, length), a dropout mask m, and values v. The divisor is
    the sum of the numerators as they are rounded, so that the weights add up to 1 however coarse their grid."""

    @staticmethod
    def forward(ctx: Any, numerators: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropped = numerators if mask is None else numerators * mask
        # No grid that training ends in rounds the largest, which is 1, to 0.
        total = numerators.sum(-1, keepdim=True).clamp_min_(torch.finfo(numerators.dtype).tiny)
        average = (dropped @ value).div_(total)
        ctx.save_for_backward(dropped, value, mask, total, average)
        return average

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        dropped, value, mask, total, average = ctx.saved_tensors
        own = gradients[0] / total
        through_total = (own * average).sum(-1, keepdim=True)
        if mask is None:
            to_numerators = torch.baddbmm(through_total, own, value.transpose(1, 2), beta=-1)
        else:
            to_numerators = own @ value.transpose(1, 2)
            torch.addcmul(-through_total, to_numerators, mask, out=to_numerators)
        return to_numerators, dropped.transpose(1, 2) @ own, None


class Attention(Dropping):
    """Attention over real tokens of the past (Kang and McAuley, section III-B)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        hidden = params.hidden
        self.heads, self.rate = params.heads, params.dropout
        self.query = Linear(hidden, hidden)
        self.key = Linear(hidden, hidden)
        self.value = Linear(hidden, hidden)
        self.query_tap = Tap("activation", hidden)
        self.key_tap = Tap("activation", hidden)
        self.value_tap = Tap("activation", hidden)
        self.weights_tap = Tap("activation", params.max_len, signed=False)
        self.context_tap = Tap("activation", hidden) if params.attention_output else None
        self.output = Linear(hidden, hidden) if params.attention_output else None
        self.locality = Locality(params) if params.local_heads else None

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None,
        by_head: Tensor | None = None,
        reorder: bool = False,
    ) -> Tensor:
        """queries: (batch, n, hidden); keys: (batch, length, hidden), the last n of which are the queries' own positions.
        bias: (1 or batch, n, length), 0 where visible. mask, query_mask: (batch, length) and (batch, n), as taps take
        them. by_head: (batch * heads, n, length), added to the scores, too, and learned. reorder: products may be taken in
        another order where that is less work and no gradient is asked for; some layers are then never called. Returns
        (batch, n, hidden)."""
        reorder = reorder and self.combines and not (self.training or torch.is_grad_enabled())
        if reorder and queries.shape[1] == 1:
            return self.of_one(queries, keys, bias, query_mask, by_head)
        if reorder and self.heads == 1 and self.query_tap.quantizer is None and self.query.weight_tap.quantizer is None:
            query, key, value, bias = self.turned(queries), keys, self.value(keys), self.biases(bias, by_head)
        else:
            query, key, value, bias = self.projected(queries, keys, bias, mask, query_mask, by_head)
        query_heads = query_mask
        if self.heads > 1 and query_mask is not None:
            query_heads = query_mask.repeat_interleave(self.heads, 0)
        drop = None
        if self.training and self.rate:
            drop = dropout_mask(query.new_empty(()).expand(len(query), query.shape[1], key.shape[1]), self.rate)
        if self.weights_tap.quantizer is None:
            if torch.is_grad_enabled() or drop is not None or query.shape[1] != key.shape[1]:
                context = WeightedSum.apply(query, key, value, bias, drop)
            else:
                context = in_parts(query, key, value, bias)
        else:
            numerators = self.weights_tap(Numerators.apply(query, key, bias), mask=query_heads)
            context = Average.apply(numerators, value, drop)
        context = self._join(context)
        if self.output is None or self.context_tap is None:
            return context
        return self.output(self.context_tap(context, mask=query_mask))

    @property
    def combines(self) -> bool:
        """Whether keys and values are nothing but products of what they are made from, so that these may be reordered."""
        if not all(isinstance(layer, Linear) for layer in (self.query, self.key, self.value)):
            return False  # products of integers, as `deploy.simulation` puts them in
        between = (self.key_tap, self.value_tap, self.key.weight_tap, self.value.weight_tap, self.weights_tap)
        return self.locality is None and self.context_tap is None and all(tap.quantizer is None for tap in between)

    def of_one(self, queries: Tensor, keys: Tensor, bias: Tensor, query_mask: Tensor | None, by_head: Tensor | None) -> Tensor:
        """`forward` for a single query (batch, 1, hidden), without the keys and values of all positions: the products are
        taken in another order, q (W x) = (q W) x and sum w (W x) = W sum w x. What the bias of the keys adds is the same for
        all keys and changes no weight."""
        query = self._split(self.query_tap(self.query(queries), mask=query_mask))
        query = query.view(len(queries), self.heads, -1).transpose(0, 1)  # (heads, batch, head_dim)
        of_keys, of_values = (linear.weight.unflatten(0, (self.heads, -1)) for linear in (self.key, self.value))
        turned = (query @ of_keys).transpose(0, 1)  # (batch, heads, hidden)
        added = self.biases(bias, by_head)
        added = added if len(added) == 1 else added.view(len(queries), self.heads, -1)
        scores = torch.baddbmm(
            added.expand(len(queries), self.heads, -1), turned, keys.transpose(1, 2), alpha=query.shape[-1] ** -0.5
        )
        summed = (scores.softmax(-1) @ keys).transpose(0, 1)  # (heads, batch, hidden)
        context = (summed @ of_values.transpose(1, 2)).transpose(0, 1)
        return context.flatten(1)[:, None] + self.value.bias

    def turned(self, queries: Tensor) -> Tensor:
        """Of one head, (batch, n, hidden) to be multiplied with the inputs of the keys in place of the keys: both projections
        in one product as large as either. As in `of_one` the bias of the keys changes no weight."""
        of_keys = self.key.weight.T
        return torch.nn.functional.linear(queries, of_keys @ self.query.weight, of_keys @ self.query.bias)

    def projected(
        self,
        queries: Tensor,
        keys: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None,
        by_head: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the attention is worked out from, of the arguments of `forward`: query (batch * heads, n, head_dim), key and
        value (batch * heads, length, head_dim), and all that is added to the scores, (1 or batch * heads, n, length)."""
        query = self._split(self.query_tap(self.query(queries), mask=query_mask))
        key = self._split(self.key_tap(self.key(keys), mask=mask))
        value = self._split(self.value_tap(self.value(keys), mask=mask))
        if self.locality is not None:
            local = self.locality(value, query.shape[1])
            by_head = local if by_head is None else by_head + local
        return query, key, value, self.biases(bias, by_head)

    def biases(self, bias: Tensor, by_head: Tensor | None) -> Tensor:
        """What `forward` adds to the scores, (1 or batch * heads, n, length)."""
        if self.heads > 1 and len(bias) > 1:
            bias = bias.repeat_interleave(self.heads, 0)
        return bias if by_head is None else bias + by_head

    def _split(self, x: Tensor) -> Tensor:
        """(batch, n, hidden) -> (batch * heads, n, hidden / heads)"""
        return x if self.heads == 1 else x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def _join(self, x: Tensor) -> Tensor:
        """The inverse of `_split`."""
        return x if self.heads == 1 else x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
