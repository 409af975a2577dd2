"""Where to put points and labels so that they do not cover each other."""

import numpy as np

from sasrec.metrics import Floats


def spread(positions: Floats, gap: float, low: float, high: float) -> Floats:
    """Places (n,) for labels that want to stand at `positions` (n,): at least `gap` apart, with the least squared shift
    (isotonic regression by pooling adjacent violators), and inside low..high as far as they fit."""
    order = np.argsort(positions, kind="stable")
    pools: list[list[float]] = []  # mean wanted place of the first, how many
    for i, position in enumerate(positions[order]):
        pools.append([float(position) - i * gap, 1])
        while len(pools) > 1 and pools[-1][0] < pools[-2][0]:
            (mean, count), (before, others) = pools.pop(), pools.pop()
            pools.append([(mean * count + before * others) / (count + others), count + others])
    flat = np.repeat([mean for mean, _ in pools], [int(count) for _, count in pools])
    flat = np.clip(flat, low, max(low, high - (len(positions) - 1) * gap))
    places = np.empty(len(positions))
    places[order] = flat + np.arange(len(positions)) * gap
    return places


def side_by_side(positions: Floats, step: float) -> Floats:
    """positions (n,) with those that are nearer than `step` set `step` apart around their mean, in the order given."""
    order = np.argsort(positions, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if groups and positions[i] - positions[groups[-1][-1]] < step:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    places = positions.astype(np.float64).copy()
    for group in groups:
        members = sorted(group)
        places[members] = positions[members].mean() + step * (np.arange(len(members)) - (len(members) - 1) / 2)
    return places
