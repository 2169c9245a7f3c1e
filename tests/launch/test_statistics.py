"""Interquartile means and their intervals, against scipy, enumeration and the paper's own implementation."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import trim_mean

from launch.statistics import bootstrap_interval, interquartile_mean


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 30])
def test_mean_of_the_middle_half(count):
    scores = np.random.default_rng(count).lognormal(size=(7, count))
    np.testing.assert_allclose(interquartile_mean(scores), trim_mean(scores, 0.25, axis=-1))


def test_interval_holds_nineteen_twentieths_of_all_resamples():
    scores = np.array([[1.0, 30.0], [2.0, 50.0], [4.0, 41.0]])
    draws = list(product(range(3), repeat=3))  # equally likely for each task
    means = np.array([interquartile_mean([*scores[list(a), 0], *scores[list(b), 1]]) for a, b in product(draws, draws)])
    low, high = bootstrap_interval(scores)
    for beyond, upto in ((means < low, means <= low), (means > high, means >= high)):
        assert beyond.mean() < 0.026
        assert upto.mean() > 0.024


def test_tasks_are_not_drawn_only_their_seeds():
    assert bootstrap_interval([[1.0, 50.0, 900.0], [1.0, 50.0, 900.0]]) == (250.25, 250.25)
    assert bootstrap_interval([[3.0], [7.0]]) == (3.0, 7.0)  # each drawn twice in a quarter of resamples


def test_agrees_with_rliable():
    """What rliable 1.2.0 gives: `aggregate_iqm`, and percentiles of 100,000 resamples by `get_interval_estimates`."""
    iqm, low, high = 353.77778, 333.0, 377.33333
    scores = [[312, 81, 640], [355, 120, 702], [298, 60, 655], [401, 95, 588], [330, 140, 810]]
    assert interquartile_mean(np.ravel(scores)) == pytest.approx(iqm)
    assert bootstrap_interval(scores) == pytest.approx((low, high), abs=0.02 * (high - low))
