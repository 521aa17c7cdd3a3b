"""95 % intervals of means by the bootstrap (Efron 1979): what is drawn again, with replacement, are groups of rows that belong together."""

import numpy as np

# So that the noise of a bound is a few percent of the interval's width.
N_RESAMPLES = 2000
_BOUNDS = (0.025, 0.975)


def mean_intervals(values: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Where the mean of each column of values [n, k] lies with 95 % confidence: [k, 2], percentiles of the means of resamples. groups:
    int [n], from 0 on without a gap, a number for rows that are drawn together, such as pairs of one prompt, whose outcomes depend on
    one another. All columns share each resample, so that the interval of a difference of two columns is that of paired rows.
    Fewer than two groups tell nothing of their spread: NaN.

    >>> mean_intervals(np.array([[1.0], [1.0]]), np.array([0, 1]), seed=0).tolist()
    [[1.0, 1.0]]
    """
    counts = np.bincount(groups)
    n = len(counts)
    if n < 2:
        return np.full((values.shape[1], 2), np.nan)
    sums = np.stack([np.bincount(groups, column) for column in values.T], axis=1)
    random = np.random.default_rng(seed % 2**64)
    means = np.empty((N_RESAMPLES, values.shape[1]))
    # One at a time: all draws at once would be resamples * groups numbers.
    for i in range(N_RESAMPLES):
        times = np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64)
        means[i] = times @ sums / (times @ counts)
    return np.quantile(means, _BOUNDS, axis=0).T
