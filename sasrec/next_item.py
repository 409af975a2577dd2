"""The task of training and validation: the next item, against negatives that are drawn for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec import losses
from sasrec.config import TrainParams
from sasrec.data.batches import Batch, Ints, NegativeSampler
from sasrec.models.transfer import send
from sasrec.objective import ItemObjective, Positions, of


class NextItem:
    """Draws negatives on the host, the same ones for every device, and gives the loss of a model's states against them."""

    def __init__(self, model: Any, params: TrainParams, store: Any, device: torch.device) -> None:
        self.params, self.device = params, device
        self.sampler = NegativeSampler(store, params.negatives_from == "unseen", params.negative_sampling == "popularity")
        self.kind = losses.negatives_per(params)
        self.objective = of(model, params, store)

    def negatives(self, users: Ints, rng: np.random.Generator) -> Ints:
        """(n,) for the whole batch, or (tokens, n) for users (tokens,); for cross-entropy n = 1."""
        if self.kind == "batch":
            return self.sampler.draw_shared(self.params.negatives, rng)
        return self.sampler.draw(users, (len(users), 1 if self.kind == "none" else self.params.negatives), rng)

    def negatives_of(self, batch: Batch, rng: np.random.Generator) -> Ints:
        """Those of the real positions of a batch: (tokens, n), (rows, n) where rows share them, or (n,) where all do."""
        real = batch.targets > 0
        if self.kind == "sequence":
            return self.sampler.draw_by_row(batch.users, real, self.params.negatives, rng)
        return self.negatives(batch.users[real], rng)

    def log_expected(self, negatives: Ints) -> NDArray[np.float32] | None:
        """What is taken off the logits of a shared draw of negatives that is not uniform, (n,)."""
        return self.sampler.log_expected(negatives)

    def loss(
        self,
        states: Tensor,
        targets: Ints,
        users: Ints,
        negatives: Ints,
        rng: np.random.Generator,
        places: Tensor | None = None,
    ) -> losses.Result:
        """Of states and places as `Positions` has them, with targets and negatives on the host; users: (tokens,)."""
        expected = self.log_expected(negatives)
        log_expected = None if expected is None else send(expected, self.device)
        asked = Positions(states, send(targets, self.device), send(negatives, self.device), places, log_expected)
        return self.objective(asked, users, rng)

    @property
    def of_items_alone(self) -> bool:
        """Whether the loss draws nothing besides negatives, so that it may be had of what is on the device already."""
        return isinstance(self.objective, ItemObjective)

    def loss_of_items(self, asked: Positions) -> losses.Result:
        """The same, where `of_items_alone`."""
        assert isinstance(self.objective, ItemObjective)
        return self.objective.of_items(asked)
