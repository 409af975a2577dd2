"""torch's optimizers without torch's compiler.

Of a method that a compiler may not look into, torch tells the compiler at the first call, and imports it for that: sympy and
torch._inductor, 70 MiB and a second of every process that trains. Nothing is compiled here; the methods are called as they
stand behind that.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class EagerOptimizer(Optimizer):
    """What every optimizer has, as torch has it."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class Adam(EagerOptimizer, torch.optim.Adam):
    """torch.optim.Adam, by its fused kernel; decoupled: torch.optim.AdamW. capturable: steps can be captured as a CUDA graph,
    and learning rates are tensors, which a graph reads anew each time."""

    def __init__(
        self, params: Iterable[Tensor] | list[dict[str, Any]], lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.999),
        decoupled: bool = False, capturable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, fused=True, decoupled_weight_decay=decoupled, capturable=capturable)

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
