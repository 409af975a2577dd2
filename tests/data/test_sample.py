"""The simulator: a real format, with the difficulties of real files, and habits that reward a memory."""

from collections import Counter
from pathlib import Path

import numpy as np

from sasrec.data import sample


def lines(folder: Path, users: int = 400, items: int = 200, seed: int = 0) -> list[list[int]]:
    sample.write(folder, users, items, seed)
    return [[int(part) for part in line.split("::")] for line in (folder / "ratings.dat").read_text().splitlines()]


def test_file_has_ties_gaps_and_short_users(tmp_path: Path) -> None:
    rows = lines(tmp_path)
    users, items, ratings, times = (np.array(column) for column in zip(*rows, strict=True))
    lengths = np.array(list(Counter(users.tolist()).values()))
    assert (lengths < 5).sum() >= 5 and 25 < lengths.mean() < 50 and lengths.max() <= 150
    assert users.max() > len(set(users.tolist())) and items.max() > len(set(items.tolist()))
    assert set(ratings.tolist()) == {1, 2, 3, 4, 5}
    assert (np.diff(times) >= 0).all() and 0.05 < 1 - len(set(zip(users, times, strict=True))) / len(rows) < 0.3
    movies = (tmp_path / "movies.dat").read_text().splitlines()
    assert len(movies) == 200 and set(items.tolist()) <= {int(line.split("::")[0]) for line in movies}


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    first, again, other = lines(tmp_path), lines(tmp_path), lines(tmp_path, seed=1)
    assert first == again != other


def test_smallest_sizes(tmp_path: Path) -> None:
    assert lines(tmp_path, 10, 20)


def test_the_last_item_says_less_than_the_one_before() -> None:
    """What follows is an episode of a series left a step or more ago, rather than of the one just watched."""
    random = np.random.default_rng(0)
    the = sample.world(500, random)
    user, item, _, _ = sample.simulate(the, 500, random)
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    series, episode = the.series[item], the.episode[item]

    def continues(back: int) -> float:
        same = (user[back:] == user[:-back]) & (series[back:] == series[:-back])
        return float((same & (episode[back:] == episode[:-back] + 1)).mean())

    assert 0.1 < continues(1) < 0.2 < continues(2) + continues(3)
