"""Statistics shared by the tests: z-scores with a bound that accounts for how many of them are looked at.

With D draws of an array the mean of each entry has z = (mean - expected) / (standard deviation / sqrt(D)), standard
normal if the draws are unbiased. The largest of K such |z| exceeds `bound(K)` with probability below `FALSE_ALARM`, by
the union bound, however the entries depend on each other. Fixed keys make a pass stay a pass.
"""

from statistics import NormalDist

import numpy as np

FALSE_ALARM = 1e-3


def bound(comparisons, false_alarm=FALSE_ALARM):
    """The |z| that the largest of so many standard normals exceeds with probability below `false_alarm`."""
    return -NormalDist().inv_cdf(false_alarm / (2 * max(1, comparisons)))


def z_scores(draws, mean, rounding=0.0):
    """z-score of the mean of each entry, shape of `mean`.

    :param draws: array of shape (draws, *mean.shape).
    :param mean: the expected value of each entry.
    :param rounding: by how much arithmetic in a narrower dtype than that of the draws may be off, relative to the
        largest of them.

    The error of the mean has two floors, each far below 1 / sqrt(draws) of the spread. An entry that hardly varies is
    allowed a few units in the last place. And an entry may have an outcome so rare that no draw shows it (a value next
    to a rounding level), so one unseen draw, as far out as the furthest of the array, is always allowed.
    """
    draws, mean = np.asarray(draws), np.asarray(mean).astype(np.float64)
    deviation = draws.astype(np.float64) - mean
    eps = np.finfo(draws.dtype).eps if draws.dtype.itemsize >= 4 else 2.0**-23  # half precision is computed in float32
    size = np.abs(draws.astype(np.float64))
    rounding = 4 * float(eps) * size.max(0, initial=0.0) + rounding * size.max(initial=0.0)
    unseen = np.abs(deviation).max(initial=0.0) / len(draws)
    error = np.sqrt(deviation.var(0, ddof=1) / len(draws) + rounding**2 + unseen**2)
    return deviation.mean(0) / np.where(error == 0, 1e-300, error)


def assert_unbiased(draws, expected, what="estimate", rounding=0.0):
    """Fail if the mean of any entry over the draws is further from `expected` than chance allows.

    :param draws: array of shape (draws, *expected.shape), one independent estimate each.
    :param expected: what the estimates should be on average.
    :param rounding: as in `z_scores`.
    """
    z = np.abs(z_scores(draws, expected, rounding))
    limit = bound(z.size)
    worst = np.unravel_index(np.argmax(z), z.shape) if z.ndim else ()  # argmax finds a NaN as well
    assert np.all(z < limit), (
        f"{what} is biased: |z| = {z[worst]:.2f} at entry {tuple(int(i) for i in worst)}, bound {limit:.2f} "
        f"for {z.size} entries and {len(draws)} draws; {int((~(z < limit)).sum())} entries exceed it"
    )


def assert_uncorrelated(a, b, what="errors"):
    """Fail if any column of `a` is correlated with the same column of `b`.

    :param a, b: arrays of shape (draws, pairs). Columns that do not vary are skipped.
    """
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    spread = a.std(0) * b.std(0)
    z = np.sqrt(len(a)) * (a * b).mean(0)[spread > 0] / spread[spread > 0]
    limit = bound(z.size)
    assert np.all(np.abs(z) < limit), (
        f"{what} are correlated: |z| = {np.abs(z).max():.2f}, bound {limit:.2f}, {z.size} pairs"
    )
