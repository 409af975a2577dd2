"""What a caller gets."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """id: the original one. score: higher is better; of a recommendation by popularity, the item's training interactions."""

    id: str
    title: str
    categories: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Recommendation:
    """items: best first, ties by the lower internal id; fewer than asked for where no more are left. unknown: ids of the
    history that the model does not know, and that were ignored; unknown_allow, unknown_block: the same of
    what is allowed and blocked. by_popularity: whether no known id was left; nothing_allowed: whether none was in allow."""

    items: tuple[Item, ...]
    unknown: int
    by_popularity: bool
    unknown_allow: int = 0
    unknown_block: int = 0
    nothing_allowed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON; dataclasses.asdict takes three times as long, as long as scoring."""
        items = [{"id": i.id, "title": i.title, "categories": i.categories, "score": i.score} for i in self.items]
        return {
            "items": items,
            "unknown": self.unknown,
            "by_popularity": self.by_popularity,
            "unknown_allow": self.unknown_allow,
            "unknown_block": self.unknown_block,
            "nothing_allowed": self.nothing_allowed,
        }
