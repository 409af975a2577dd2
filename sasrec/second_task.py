"""A second task beside the next item: the rating that it gets. Its head is for training alone and is not part of the model.

The head sees the target's embedding besides the state. From the state alone it could only predict the mean rating of
whatever may come next; given the item, what is left to learn is how this user likes this item, in terms of the product of
the two that also scores it. It is a linear layer on [h, e, h * e], for a state h and an embedding e of the item (brought
to the size of an input, sqrt(hidden) e). Its loss is the squared error of the rating, in standard deviations of those of
the training part. Joint tasks on one representation: Caruana, Machine Learning 28, 1997.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sasrec.models.facts import require
from sasrec.models.transfer import send


class RatingTask(nn.Module):
    """store: with the ratings; raises UserError where there are none."""

    def __init__(self, store: Any, hidden: int) -> None:
        super().__init__()
        require(store, "rating", "train.rating_weight is above 0")
        self.ratings: NDArray[np.float32] = store.ratings
        trained = np.asarray(store.ratings)[store.known("validation")].astype(np.float64)
        self.mean, self.deviation = float(trained.mean()), float(trained.std()) or 1.0
        self.scale = hidden**0.5
        self.head = nn.Linear(3 * hidden, 1)
        # From nothing: no draw that would shift others, and at first a prediction of the mean.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Ratings, in standard deviations from the mean, (tokens,), for states and embeddings (tokens, hidden)."""
        embeddings = embeddings * self.scale
        return self.head(torch.cat([states, embeddings, states * embeddings], -1)).squeeze(-1)

    def loss(self, states: Tensor, embeddings: Tensor, places: NDArray[np.int64]) -> Tensor:
        """Mean squared error, (), for targets at `places` (tokens,) of the store."""
        wanted = (self.ratings[places] - self.mean) / self.deviation
        target = send(wanted.astype(np.float32), states.device)
        return (self(states, embeddings) - target).square().mean()
