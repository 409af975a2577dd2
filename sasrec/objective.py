"""What training minimises: the loss that `train.loss` names, of a model's scores, and of its intents where it has such."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sasrec import losses
from sasrec.config import TrainParams
from sasrec.data.batches import Ints, NegativeSampler
from sasrec.models.transfer import send


@dataclass(frozen=True)
class Positions:
    """What a loss is of, as `losses.compute` takes it: states (tokens, features), targets (tokens,) and negatives; where these
    are shared by each sequence, states are (batch, length, features) and places (tokens,), where in (batch * length) the
    tokens are."""

    states: Tensor
    targets: Tensor
    negatives: Tensor
    places: Tensor | None = None
    log_expected: Tensor | None = None
    real: Tensor | None = None


class ItemObjective:
    """The loss of the items."""

    def __init__(self, model: Any, params: TrainParams) -> None:
        self.model, self.params = model, params

    def __call__(self, of: Positions, users: Ints, rng: np.random.Generator) -> losses.Result:
        """users: (tokens,), whose positions they are."""
        return self.of_items(of)

    def of_items(self, of: Positions) -> losses.Result:
        model, given = self.model, (of.states, of.targets, of.negatives, of.places, of.log_expected, of.real)
        return losses.compute(self.params, model.items, model.score, model.scoring_table.all, *given)


class IntentObjective:
    """L = L(items) + `train.intent_weight` L(intents), as CaFe adds them (arXiv 2204.01839; in the authors' code both weigh 1).

    The items' loss is that of `train.loss`, of the joint score or of the item part alone (`train.item_loss`); the authors'
    code trains the parts one by one and adds them in inference alone. The intents' loss is of the same family, of the intent
    part against the intents of the targets: where `train.loss` is a softmax, over all intents, which are few; where it
    compares with negatives (bce, gbce: binary cross-entropy; bpr), with one intent a position, uniform over those not in the
    user's training history, as in the authors' code. Users of all intents get any, which does not count where it is the
    target's own.
    """

    def __init__(self, model: Any, params: TrainParams, store: Any) -> None:
        self.model, self.params = model, params
        self.sampler = NegativeSampler(IntentStore(store, model.intents.cpu().numpy()), params.negatives_from == "unseen")

    def __call__(self, of: Positions, users: Ints, rng: np.random.Generator) -> losses.Result:
        """As `ItemObjective`."""
        model, hidden = self.model, self.model.params.hidden
        if self.params.item_loss == "joint":
            result = ItemObjective(model, self.params).of_items(of)
        else:
            result = ItemObjective(model.fine, self.params).of_items(replace(of, states=of.states[..., :hidden]))
        states = of.states[..., hidden:]
        states = states.flatten(0, -2)
        states = states if of.places is None else states[of.places]
        loss = self.of_intents(states, model.intents[of.targets].long(), users, rng)
        return losses.Result(result.loss + self.params.intent_weight * loss, result.accuracy)

    def of_intents(self, states: Tensor, targets: Tensor, users: Ints, rng: np.random.Generator) -> Tensor:
        """The mean loss of intent states (tokens, hidden) against the targets' intents (tokens,)."""
        table = self.model.coarse.scoring_table.all()
        if self.params.loss in ("cross_entropy", "sampled_softmax"):
            return F.cross_entropy(states @ table[1:].T, targets - 1)
        drawn = send(self.sampler.draw(users, (len(users), 1), rng), targets.device)
        positive = (states * table[targets]).sum(-1)
        negative = (states * table[drawn[:, 0]]).sum(-1).masked_fill(drawn[:, 0] == targets, -torch.inf)
        return (losses.bpr if self.params.loss == "bpr" else losses.bce)(positive, negative[:, None])


@dataclass
class IntentStore:
    """The sequences of intents of a store, for drawing negatives. of_items: (items + 1,)."""

    store: Any
    of_items: NDArray[np.int32]

    def __post_init__(self) -> None:
        self.items = self.of_items[self.store.items]
        self.offsets, self.train_ends = np.asarray(self.store.offsets), self.store.train_ends
        self.items_count = int(self.of_items.max())


def of(model: Any, params: TrainParams, store: Any) -> ItemObjective | IntentObjective:
    """What `model` is trained by."""
    return ItemObjective(model, params) if getattr(model, "intents", None) is None else IntentObjective(model, params, store)
