"""The intent of an item: the one category that stands for it."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from sasrec.errors import UserError

# A category of fewer items is too fine for an intent, whose sequence is to be dense.
COMMON = 10
UNKNOWN = "(unknown)"


def intent_names(categories: Sequence[Sequence[str]]) -> list[str]:
    """The intent of each item, given its categories.

    Of several categories it is the rarest, by how many items of the catalogue have it, of those that at least COMMON items
    have: rare ones say most about an item (Film-Noir, not Drama; of a path of Amazon's, its end), but an intent of a handful
    of items is no coarser than they are. Where none is so common, the most common. Ties go to the first in the alphabet, so
    that the order in which a file lists them, which means nothing in MovieLens, does not count. Items without a category
    share an intent of their own.
    """
    counts = Counter(name for own in categories for name in set(own))

    def chosen(own: Sequence[str]) -> str:
        common = [name for name in own if counts[name] >= COMMON]
        if common:
            return min(common, key=lambda name: (counts[name], name))
        return min(own, key=lambda name: (-counts[name], name), default=UNKNOWN)

    return [chosen(own) for own in categories]


def item_intents(categories: Sequence[Sequence[str]]) -> Tensor:
    """int32 (items + 1,): the intent of each id, numbered 1, 2, ... in the order of the alphabet; 0 for padding. categories:
    of the items 1, 2, ... Raises UserError where no item has any."""
    if not any(categories):
        raise UserError(
            "params.yaml: model.kind is cafe, whose intents are categories of items, and this data has none: name their column "
            "in dataset.columns.category if your file has one, use data with categories (sample, ml-1m, ml-100k), or take the "
            "model off the lists models and variants"
        )
    names = intent_names(categories)
    number = {name: i for i, name in enumerate(sorted(set(names)), 1)}
    return torch.tensor([0, *(number[name] for name in names)], dtype=torch.int32)
