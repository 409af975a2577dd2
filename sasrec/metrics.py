"""Ranking metrics from ranks alone: one relevant item a user.

Ranks are 1-based and may be halves: rank = 1 + (candidates that score higher) + (others that score the same) / 2, the mean
over the orders of the tied ones, so that the place of the target among the candidates changes nothing.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CUTOFFS = (1, 5, 10, 20)


def hit_rate(ranks: Floats, k: int) -> Floats:
    """1 where rank <= k, else 0; of the ranks' shape."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: Floats, k: int) -> Floats:
    """1 / log2(rank + 1) where rank <= k, else 0 (the ideal gain of one relevant item is 1)."""
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def reciprocal_rank(ranks: Floats) -> Floats:
    """1 / rank, without a cut-off."""
    return 1 / ranks


def summarize(ranks: Floats, prefix: str = "") -> dict[str, float]:
    """Means over users (and seeds, where ranks has an axis for them) of every metric, by name."""
    result = {f"{prefix}hr@{k}": float(hit_rate(ranks, k).mean()) for k in CUTOFFS}
    result |= {f"{prefix}ndcg@{k}": float(ndcg(ranks, k).mean()) for k in CUTOFFS}
    result[f"{prefix}mrr"] = float(reciprocal_rank(ranks).mean())
    return result


def deviation(means: Floats) -> float | None:
    """Sample standard deviation of one mean per seed, (seeds,); None of a single seed, which has none."""
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def bootstrap_intervals(values: Floats, resamples: int, seed: int, level: float = 0.95) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals (Efron 1979) of the mean of each row of `values` (n, seeds, users).

    Each resample draws users with replacement and, where there are several, seeds: the interval then covers what another
    set of users and another training run would have given. With few seeds it is a little too narrow, as all bootstraps
    of few are. All rows share the resamples, so that they can be compared, and drawing them is what takes the time.
    """
    rng = np.random.default_rng(seed)
    rows, seeds, users = values.shape
    means = np.empty((resamples, rows))
    for i in range(resamples):
        # A resample with replacement is a multinomial weight vector, so that no index matrix is built.
        of_seeds = values @ np.bincount(rng.integers(0, users, users), minlength=users) / users  # (n, seeds)
        if seeds > 1:
            of_seeds = of_seeds[:, rng.integers(0, seeds, seeds)]
        means[i] = of_seeds.mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def bootstrap_interval(values: Floats, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of one set of `values`, (users,) or (seeds, users)."""
    return bootstrap_intervals(np.atleast_2d(values)[None], resamples, seed, level)[0]
