"""What a model with side information has to know of the data beside the number of items, and what data must have for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.errors import UserError

# In the place of a category where an item has fewer than another. 1 stands for "unknown", categories follow.
NONE = 0

# Data with more distinct ratings than this gets so many bins of about equal counts.
RATING_BINS = 20

LACKS = {
    "rating": "the data has no ratings; name their column in dataset.columns.rating",
    "category": "the data has no categories; name their column in dataset.columns.category",
    "no times": "the data has no timestamps; name their column in dataset.columns.timestamp",
    "order": (
        "the times of this data only order each user's own events; set dataset.times to comparable where they are real times"
    ),
}


@dataclass(frozen=True)
class Facts:
    """rating_edges: (bins - 1,) float32 ascending, between one bin of ratings and the next. item_categories: (items + 1,
    most) int32, the categories of each id: 1 for unknown, 2 and up for categories, NONE behind the last."""

    rating_edges: Tensor = field(default_factory=lambda: torch.zeros(0))
    item_categories: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int32))

    @property
    def categories(self) -> int:
        """How many distinct ones there are."""
        return max(int(self.item_categories.max()) - 1, 0) if self.item_categories.numel() else 0

    @classmethod
    def of_state(cls, tensors: dict[str, Tensor]) -> "Facts":
        """From the tensors of a checkpoint, which hold what the model was built with."""
        found = {name: tensors[f"side.{name}"] for name in ("rating_edges", "item_categories") if f"side.{name}" in tensors}
        return cls(**found)

    @classmethod
    def of_data(cls, params: ModelParams, store: Any, categories: Sequence[Sequence[str]]) -> "Facts":
        """What `model.side` and `model.time_bias` need of the prepared data. categories: of the items 1, 2, ...

        Raises UserError where the data lacks what is asked for.
        """
        if "rating" in params.side:
            require(store, "rating", "model.side names rating")
        if "category" in params.side and not any(categories):
            raise refusal("category", "model.side names category")
        if "recency" in params.side:
            require(store, "times", "model.side names recency")
        if params.time_bias:
            require(store, "times", "model.time_bias is true")
        return cls(
            *([rating_edges(store)] if "rating" in params.side else [torch.zeros(0)]),
            *([item_categories(categories)] if "category" in params.side else []),
        )


def refusal(lack: str, asked: str) -> UserError:
    return UserError(f"params.yaml: {asked}, but {LACKS[lack]}, or do without")


def require(store: Any, what: str, asked: str) -> None:
    """Raise UserError, which begins with what was `asked`, where the data lacks `what`: rating, or times in real units."""
    if what == "rating":
        if store.ratings is None:
            raise refusal("rating", asked)
    elif store.timestamps is None:
        raise refusal("no times", asked)
    elif store.stats["times"] != "comparable":
        raise refusal("order", asked)


def rating_edges(store: Any) -> Tensor:
    """Half-way between the distinct ratings of the training part; where those are more than RATING_BINS, quantiles."""
    trained = np.asarray(store.ratings)[store.known("validation")]
    distinct = np.unique(trained)
    if len(distinct) > RATING_BINS:
        edges = np.unique(np.quantile(trained, np.arange(1, RATING_BINS) / RATING_BINS))
    else:
        edges = (distinct[1:] + distinct[:-1]) / 2
    return torch.from_numpy(edges.astype(np.float32))


def item_categories(categories: Sequence[Sequence[str]]) -> Tensor:
    """Ids of the categories of each item, in alphabetical order; categories named twice count once."""
    names = sorted({name for own in categories for name in own})
    number = {name: i for i, name in enumerate(names, 2)}
    own = [[number[name] for name in dict.fromkeys(names)] or [1] for names in categories]
    most = max(map(len, own))
    rows = [[1], *own]
    return torch.tensor([row + [NONE] * (most - len(row)) for row in rows], dtype=torch.int32)
