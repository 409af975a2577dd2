"""Adam for embedding tables of which a step looks up few rows: time and memory traffic grow with those rows, not the table.

Lazy Adam (so TensorFlow's `LazyAdam`; `torch.optim.SparseAdam` is the same rule) does to the looked-up rows exactly what Adam
(Kingma and Ba, ICLR 2015, arXiv 1412.6980) does, and nothing to the others. Adam itself moves every row at every step: the
moments of a row without gradient decay, and it goes on by what is left of the first one. Here the moments of such a row
stand still and so does the row; when it is looked up again, its momentum is that of its own last look-ups, however long
ago. Weight decay, too, reaches a row only when it is looked up. The bias correction counts the steps of the table, not of
the row. A table whose rows are all looked up at every step is trained as by Adam.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from sasrec.adam import EagerOptimizer


class LazyAdam(EagerOptimizer):
    """Of parameters (rows, features) whose gradients are sparse in their rows (`Table.sparse`).

    Looked-up rows are gathered, stepped by torch's fused kernel, and put back: twice as fast as `SparseAdam`, which makes a
    pass for each operation. Row-wise Adagrad would take 0.7 to 0.8 of the time, but wants a rate of its own.
    """

    def __init__(
        self, tables: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, decoupled: bool
    ) -> None:
        """decoupled: weight decay as in AdamW (Loshchilov and Hutter, ICLR 2019), else a part of the gradient."""
        super().__init__(tables, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every table that has a gradient. Raises TypeError where that is not sparse: something used the
        whole table."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group)

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        if not table.grad.is_sparse:  # type: ignore[union-attr]
            raise TypeError("the gradient of a table is dense: something besides look-ups used it")
        gradient = table.grad.coalesce()  # type: ignore[union-attr]
        rows = gradient.indices()[0]
        state = self.state[table]
        if not state:
            state |= {"step": torch.zeros((), device=table.device)}
            state |= {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
        whole = (table, state["exp_avg"], state["exp_avg_sq"])
        value, first, second = (tensor.index_select(0, rows) for tensor in whole)
        adam(
            [value], [gradient.values()], [first], [second], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, eps=1e-8, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], decoupled_weight_decay=group["decoupled"],
        )  # fmt: skip
        for tensor, changed in zip(whole, (value, first, second), strict=True):
            tensor.index_copy_(0, rows, changed)


@torch.no_grad()
def clip_norm(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """As `nn.utils.clip_grad_norm_`, for gradients of which some are sparse."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            # Only with the rows that occur several times added up does it have the norm of the dense gradient.
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    scale = (largest / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
