"""Scores of several seeds and tasks as one number with an interval: Agarwal et al. 2021, arXiv 2108.13264."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 10_000


def interquartile_mean(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean of scores [..., n] without their n // 4 lowest and n // 4 highest; of fewer than four, of all."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    count = ordered.shape[-1]
    return ordered[..., count // 4 : count - count // 4].mean(-1)


def bootstrap_interval(scores: ArrayLike) -> tuple[float, float]:
    """Ends of the interval, at `LEVEL`, of the interquartile mean of scores [seeds, tasks].

    Percentiles over resamples in which every task, a stratum of its own, has its seeds drawn anew with replacement.
    What varies is thus what other seeds would have given on the same tasks. The same scores have the same interval.
    """
    scores = np.asarray(scores, dtype=np.float64)
    seeds, tasks = scores.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds, tasks))
    means = interquartile_mean(scores[drawn, np.arange(tasks)].reshape(RESAMPLES, -1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
