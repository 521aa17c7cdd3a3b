"""Bootstrap intervals against scipy's, and against what can be said without drawing."""

import numpy as np
import pytest
from rwkv_dpo.evaluation.intervals import mean_intervals
from scipy import stats


def test_scipy_finds_the_same_intervals():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(1, 2, 300), rng.random(300) < 0.3], axis=1).astype(np.float64)
    got = mean_intervals(values, np.arange(300), seed=1)
    for column, bounds in zip(values.T, got, strict=True):
        want = stats.bootstrap((column,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2))
        # The bounds of 2,000 and of 9,999 resamples differ by the noise of a percentile: a few hundredths of the width.
        assert bounds == pytest.approx(list(want.confidence_interval), abs=0.06 * (bounds[1] - bounds[0]))


def test_rows_of_a_group_are_drawn_together_as_scipy_draws_groups():
    """Groups of 1 to 9 rows that are alike: drawn by themselves, the interval would be much too narrow."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(60), rng.integers(1, 10, 60))
    values = (rng.normal(0, 1, 60)[groups] + rng.normal(0, 0.1, len(groups)))[:, None]
    sums, counts = np.bincount(groups, values[:, 0]), np.bincount(groups)
    (got,) = mean_intervals(values, groups, seed=4)
    want = stats.bootstrap(
        (sums, counts), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), paired=True, n_resamples=9999, method="percentile",
        vectorized=True, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert got == pytest.approx(list(want), abs=0.06 * (want[1] - want[0]))
    (alone,) = mean_intervals(values, np.arange(len(values)), seed=4)
    assert got[1] - got[0] > 1.5 * (alone[1] - alone[0])


def test_two_groups_by_hand():
    """Of the four equally likely resamples of (0, 1) one is all 0 and one all 1: the 2.5th and 97.5th percentile are 0 and 1. What is
    always 1 has the mean 1 in every resample."""
    assert mean_intervals(np.array([[0.0, 1.0], [1.0, 1.0]]), np.arange(2), seed=0).tolist() == [[0, 1], [1, 1]]


def test_one_group_tells_nothing():
    assert np.isnan(mean_intervals(np.ones((5, 2)), np.zeros(5, np.int64), seed=0)).all()


def test_columns_share_their_resamples_and_the_seed_decides_which():
    values = np.random.default_rng(6).normal(0, 1, (50, 1))
    twice = np.concatenate([values, values + 3], axis=1)
    got = mean_intervals(twice, np.arange(50), seed=-7)
    np.testing.assert_allclose(got[1] - got[0], 3, rtol=1e-12)
    assert np.array_equal(got, mean_intervals(twice, np.arange(50), seed=-7))
    assert not np.array_equal(got, mean_intervals(twice, np.arange(50), seed=8))


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    """400 sets of 80 draws: 380 are expected within 95 %, and 0.95 +- 4 * sqrt(0.95 * 0.05 / 400) is what chance allows."""
    draws = np.random.default_rng(9).normal(0.5, 1, (80, 400))
    bounds = mean_intervals(draws, np.arange(80), seed=10)
    share = ((bounds[:, 0] < 0.5) & (bounds[:, 1] > 0.5)).mean()
    assert 0.95 - 0.044 <= share <= 0.95 + 0.044
