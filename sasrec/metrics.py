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


def bootstrap_interval(values: Floats, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (users,), resampling users (Efron 1979).

    A resample of n users with replacement is a multinomial weight vector, so that no index matrix is built.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.empty(resamples)
    for i in range(resamples):
        means[i] = np.bincount(rng.integers(0, n, n), minlength=n) @ values / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
