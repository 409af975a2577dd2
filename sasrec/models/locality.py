"""Local heads of attention: keys count for more or less by their item and by how far back they are.

CaFe (arXiv 2204.01839, section 3.2.2) multiplies the weights of attention by w_ij before they are normalised, so that its item
encoder attends to what is near: softmax(ln w_ij + q_i k_j / sqrt(d)) with ln w_ij = u (v_i + v_j + r_ij) + c, where v are the
values, r_ij an embedding of the distance, and u and c a linear layer with one output; it takes this from Locker (He et al.,
CIKM 2021). What is the same for all keys of a query cancels in its softmax: u v_i and c. And u r_ij is one learned number per
distance, because r is used for nothing else. So what is left, and computed here, is

    ln w_ij = u v_j + b[i - j].

The authors' code adds a position embedding to queries and keys of local heads once more; here they get positions with their
inputs only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasrec.config import ModelParams
from sasrec.models.taps import INITIAL_STD

# ln w of keys beyond the window. Finite: padding sees nothing, and its softmax must not be NaN.
BEYOND = -1e9


class Locality(nn.Module):
    """ln w_ij of `model.local_heads` heads, the last ones; 0 for the others.

    As with biases and the gains of norms, no tap: a number per distance and one per feature of a head, in float32.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.heads, self.window = params.heads, params.local_window
        self.content = nn.Parameter(torch.randn(params.local_heads, params.hidden // params.heads) * INITIAL_STD)  # u
        self.distance = nn.Parameter(torch.zeros(params.local_heads, params.max_len))  # b, by how many places back

    def forward(self, values: Tensor, n: int) -> Tensor:
        """values: (batch * heads, length, head_dim), head by head of each row, the last n of which are the queries' own.
        Returns (batch * heads, n, length); keys after the query have some number, which the causal mask hides."""
        length = values.shape[1]
        content, distance = self.by_head()
        by_key = (values.unflatten(0, (-1, self.heads)) * content[:, None]).sum(-1)  # (batch, heads, length)
        places = torch.arange(length, device=values.device)
        back = (places[length - n :, None] - places).clamp_(min=0)  # (n, length)
        return (by_key[:, :, None] + distance[:, back]).flatten(0, 1)

    def by_head(self) -> tuple[Tensor, Tensor]:
        """u, (heads, head_dim), and b, (heads, max_len), of all heads: beyond the window b is as low as what is hidden."""
        from_global = (0, 0, self.heads - len(self.content), 0)
        distance: Tensor = self.distance
        if self.window is not None and self.window < distance.shape[1]:
            beyond = torch.arange(distance.shape[1], device=distance.device) >= self.window
            distance = distance.masked_fill(beyond, BEYOND)
        return F.pad(self.content, from_global), F.pad(distance, from_global)
