"""The data of the plain reference: Python lists, read from lines of user and item, without importing torch."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Data:
    """sequences: the items of each user in order; the last one is for test, the last but one for validation, where there are
    three or more. items: how many there are, 1..items."""

    sequences: list[list[int]]
    items: int

    def training(self) -> list[list[int]]:
        return [s[:-2] if len(s) >= 3 else s for s in self.sequences]


def read(path: Path) -> Data:
    """Lines of user and item, in order."""
    of_user: dict[int, list[int]] = defaultdict(list)
    items = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            user, item = map(int, line.split())
            of_user[user].append(item)
            items = max(items, item)
    return Data([of_user[user] for user in sorted(of_user)], items)


def prepare(path: Path, min_user: int, min_item: int, to: Path) -> None:
    """Lines of user and item, any words, to numbered lines of users and items with so many interactions, as such scripts do:
    once to count, once to number, users one after the other."""
    of_user, of_item = Counter[str](), Counter[str]()
    with open(path, encoding="utf-8") as file:
        for line in file:
            user, item = line.split()
            of_user[user] += 1
            of_item[item] += 1
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    sequences: dict[int, list[int]] = defaultdict(list)
    with open(path, encoding="utf-8") as file:
        for line in file:
            user, item = line.split()
            if of_user[user] >= min_user and of_item[item] >= min_item:
                number = users.setdefault(user, len(users) + 1)
                sequences[number].append(items.setdefault(item, len(items) + 1))
    with open(to, "w", encoding="utf-8") as file:
        for number, sequence in sequences.items():
            for own in sequence:
                file.write(f"{number} {own}\n")
