"""The built-in simulated data set: a MovieLens-like file of users with sequential habits.

Every item is an episode of a series, every series belongs to a category. A user follows a few series at once and goes
on with one of them at a time, seldom the one just watched; now and then an episode is skipped, or something else
is picked on a whim. So the last item says little about the next one, while the history says a lot: what is sought is
the episode after that of a series left a few steps ago. A finished series gives way to a popular one that is new to the
user, mostly of the categories the user likes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CATEGORIES = ("Comedy", "Drama", "Thriller", "Romance", "Adventure", "Mystery", "Fantasy", "History")
EPISODES = 10  # per series
SLOTS = 4  # series followed at once, at most; 2 at least
FAVOURITES = 2  # categories a user likes
FREE = 0.45  # chance that any followed series may be next; otherwise not the one just watched
SKIP = 0.1  # chance to leave out an episode
WHIM = 0.12  # chance of an item by popularity alone
STRAY = 0.15  # chance that a new series is not of a favourite category
SHORT = 0.04  # share of users with fewer than 5 interactions
LONGEST = 150
TIE = 0.15  # chance that an event carries the same second as the one before
START = 978_300_000  # seconds since 1970
FIRST = ("Silent", "Golden", "Broken", "Hidden", "Distant", "Crimson", "Endless", "Paper", "Winter", "Electric")
SECOND = ("Harbour", "Garden", "Letters", "River", "Tower", "Orchard", "Mirror", "Signal", "Island", "Lantern")


@dataclass(frozen=True)
class World:
    """`series`, `episode`: int (items,) of each item; `category`, `popularity` (series,), the latter adding to 1;
    `raw_ids`: int (items,) ascending with gaps."""

    series: Array
    episode: Array
    category: Array
    popularity: Array
    raw_ids: Array


def world(items: int, random: np.random.Generator) -> World:
    count = -(-items // EPISODES)
    order = random.permutation(items)  # raw ids must not tell the series
    series, episode = np.empty(items, np.int64), np.empty(items, np.int64)
    series[order], episode[order] = np.arange(items) // EPISODES, np.arange(items) % EPISODES
    popularity = 1.0 / (1.0 + random.permutation(count)) ** 0.9
    raw_ids = np.sort(random.choice(np.arange(1, items + items // 8 + 1), items, replace=False))
    category = random.permutation(np.arange(count) % len(CATEGORIES))
    return World(series, episode, category, popularity / popularity.sum(), raw_ids)


def simulate(the: World, users: int, random: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Users, items (from 0), ratings and timestamps of all events, in the order of time. All users take each step
    together, so there is one loop, over the places in a sequence."""
    everyone = np.arange(users)
    n_series = len(the.category)
    size = np.bincount(the.series, minlength=n_series)
    item_of = np.full((n_series, EPISODES), -1)
    item_of[the.series, the.episode] = np.arange(len(the.series))
    lengths = np.clip(np.rint(random.lognormal(np.log(33), 0.6, users)), 5, LONGEST).astype(np.int64)
    lengths = np.where(random.random(users) < SHORT, random.integers(1, 5, users), lengths)
    likes = np.zeros((users, len(CATEGORIES)), bool)
    likes[everyone[:, None], np.argsort(random.random(likes.shape), axis=1)[:, :FAVOURITES]] = True

    taste = np.where(likes[:, the.category], 1 - STRAY, STRAY * FAVOURITES / len(CATEGORIES))
    weight = np.log(the.popularity * taste)  # (users, series)
    started = np.zeros((users, n_series), bool)

    def new_series(who: Array) -> Array:
        """One series for each of `who`, not started before as long as there are such (Gumbel-max sampling)."""
        score = weight[who] + random.gumbel(size=(len(who), n_series)) - 1e6 * started[who]
        chosen: Array = score.argmax(axis=1)
        started[who, chosen] = True
        return chosen

    followed = random.integers(2, SLOTS + 1, users)
    slots = np.stack([new_series(everyone) for _ in range(SLOTS)], axis=1)
    # People are found in the middle of some of their series.
    at = random.integers(-1, EPISODES // 2, (users, SLOTS))
    last = np.full(users, -1)
    item_popularity = the.popularity[the.series] / size[the.series]
    sequence = np.zeros((users, LONGEST), np.int64)
    for step in range(LONGEST):
        keys = random.random((users, SLOTS))
        keys[np.arange(SLOTS) >= followed[:, None]] = 2.0
        again = (last >= 0) & (random.random(users) >= FREE)
        keys[everyone[again], last[again]] = 1.5
        slot = keys.argmin(axis=1)
        place = at[everyone, slot] + 1 + (random.random(users) < SKIP)
        over = np.flatnonzero(place >= size[slots[everyone, slot]])
        slots[over, slot[over]] = new_series(over)
        place[over] = 0
        whim = random.random(users) < WHIM
        picked = random.choice(len(the.series), users, p=item_popularity)
        sequence[:, step] = np.where(whim, picked, item_of[slots[everyone, slot], place])
        # A whim interrupts: the series stays where it was.
        at[everyone[~whim], slot[~whim]] = place[~whim]
        at[over, slot[over]] = np.where(whim[over], -1, 0)
        last = np.where(whim, -1, slot)

    taken = np.arange(LONGEST) < lengths[:, None]
    gaps = random.exponential(6 * 3600.0, sequence.shape) + 1
    gaps = np.where(random.random(sequence.shape) < TIE, 0, np.ceil(gaps)).astype(np.int64)
    gaps[:, 0] = random.integers(0, 2 * 365 * 86400, users)
    times = START + np.cumsum(gaps, axis=1)
    liked = likes[everyone[:, None], the.category[the.series[sequence]]]
    ratings = np.clip(np.rint(3.0 + liked + random.normal(0, 0.8, sequence.shape)), 1, 5).astype(np.int64)
    user = np.broadcast_to(everyone[:, None], sequence.shape)[taken]
    order = np.argsort(times[taken], kind="stable")  # stable: order in the file is the order of ties
    return user[order], sequence[taken][order], ratings[taken][order], times[taken][order]


def write(folder: Path, users: int, items: int, seed: int) -> None:
    """Write ratings.dat (`user::item::rating::timestamp`, ordered by time) and movies.dat
    (`item::title::category`) into `folder`. The same arguments give the same bytes."""
    random = np.random.default_rng(seed)
    the = world(items, random)
    user, item, rating, time = simulate(the, users, random)
    names = random.permutation(users) * 7 // 6 + 1  # gaps in the users' ids as well
    rows = zip(names[user].tolist(), the.raw_ids[item].tolist(), rating.tolist(), time.tolist(), strict=True)
    with open(folder / "ratings.dat", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows)
    with open(folder / "movies.dat", "w", encoding="utf-8", newline="\n") as file:
        for raw_id, series, episode in zip(the.raw_ids.tolist(), the.series.tolist(), the.episode.tolist(), strict=True):
            number = series // (len(FIRST) * len(SECOND))
            title = f"{FIRST[series % len(FIRST)]} {SECOND[series // len(FIRST) % len(SECOND)]}"
            title += f" {number + 1}" if number else ""
            file.write(f"{raw_id}::{title}, episode {episode + 1}::{CATEGORIES[the.category[series]]}\n")
