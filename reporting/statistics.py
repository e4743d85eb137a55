"""Spread over seeds, and paired tests of two rows of runs; needs no Keras.

A difference in accuracy has two sources of randomness, and each test covers one of them:

- *Training*: another seed gives other weights. `mean_and_std` and `paired_t` look over seeds. They do not cover other
  test images, and with three seeds they find only differences that are large compared with the spread.
- *Images*: other test images of the same kind. `bootstrap_interval`, `paired_bootstrap` and `mcnemar` look over
  images, for the trained networks. They do not cover other seeds.

No test corrects for the number of comparisons; `holm` does. None sees an error that all runs share (labels, leaks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Accuracies are fractions of a few thousand images: spreads below this are rounding.
_ROUNDING = 1e-12


class McNemar(NamedTuple):
    """`mcnemar`'s result: images that only one side predicts correctly, and the two-sided p."""

    only_a: int
    only_b: int
    p: float


class BootstrapDifference(NamedTuple):
    """`paired_bootstrap`'s result: a - b, its 95% interval, and the two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, ``sqrt(sum (x - mean)^2 / (n - 1))``.

    Returns:
        Both; the mean of no value is None, and so is the deviation of fewer than two values.
    """
    if not len(values):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of normally distributed values: ``mean -+ t std / sqrt(n)`` (Student 1908).

    ``t`` is the 97.5% quantile of Student's t with n - 1 degrees of freedom.

    Returns:
        Low and high; None for fewer than two values.
    """
    mean, std = mean_and_std(values)
    if std is None:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / float(np.sqrt(len(values)))
    return mean - half, mean + half


def paired_t(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test: ``t = mean(d) / (std(d) / sqrt(n))`` with n - 1 degrees of freedom.

    ``d`` is the difference of each seed's pair. Source: Student, "The Probable Error of a Mean", Biometrika 1908. p is
    the probability of a mean difference this large or larger when only the seeds make pairs differ, normally
    distributed.

    Args:
        values: one per seed.
        reference: of the same seeds, in the same order.

    Returns:
        p in 0..1; 1 when no pair differs; None for fewer than two pairs, and when all pairs differ by the same
        amount: t is infinite there, and a few seeds do not support p = 0.

    Raises:
        ValueError: not as many values as references.
    """
    if len(values) != len(reference):
        raise ValueError(f"expected one reference per value, received {len(values)} and {len(reference)}")
    differences = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    if len(differences) < 2:
        return None
    if differences.std(ddof=1) <= _ROUNDING:
        return 1.0 if np.abs(differences).max() <= _ROUNDING else None
    return float(stats.ttest_rel(values, reference).pvalue)


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """McNemar's exact test of two networks on the same images.

    When both networks are equally good, each image that only one of them predicts correctly is a fair coin:
    ``p = min(1, 2 * P(X <= min(only_a, only_b)))``, X binomial over the number of such images with 1/2. Source:
    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    1947, as an exact binomial test. It compares two trained networks, not two ways to train: other seeds may give the
    opposite result.

    Args:
        correct_a: bool (N,), True for each image that a predicts correctly.
        correct_b: bool (N,), the same images of b.

    Returns:
        The counts and p; p is 1 when no image distinguishes the two.

    Raises:
        ValueError: shapes that differ, or are not (N,).
    """
    correct_a, correct_b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape:
        raise ValueError(f"expected two arrays (N,) of the same images, received {correct_a.shape}, {correct_b.shape}")
    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(correct_b & ~correct_a))
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(only_a, only_b, float(p))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of p values for their number.

    With the m values in rising order, ``q_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))``. The probability of one or
    more q <= a among comparisons without a true difference is at most a, however the tests depend on each other.
    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.

    Args:
        p_values: one per comparison that was planned, 0..1; None where there is no p yet. It counts as 1, so that the
            correction does not become stricter when it comes.

    Returns:
        The corrected values in the same order; None where there was none.
    """
    order = sorted(range(len(p_values)), key=lambda i: 1.0 if p_values[i] is None else p_values[i])
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        p = p_values[i]
        if p is not None:
            largest = max(largest, min(1.0, (len(order) - place) * p))
            corrected[i] = largest
    return corrected


def bootstrap_interval(correct: np.ndarray, seed: int = 0, num_resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile interval (Efron 1979) over the images of the accuracy, the mean over seeds.

    Args:
        correct: bool (S, N), one row per seed, one column per image. Every resample has the same images for all seeds.
        seed: of the resamples.
        num_resamples: resamples.

    Returns:
        Low and high, 0..1.

    Raises:
        ValueError: not (S, N), or empty.
    """
    hits = _checked(correct).sum(axis=0, dtype=np.int64)
    sums = _resampled_sums(hits, seed, num_resamples)
    low, high = np.percentile(sums / np.size(correct), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    correct_a: np.ndarray, correct_b: np.ndarray, seed: int = 0, num_resamples: int = 10_000
) -> BootstrapDifference:
    """Difference of two rows' accuracies, each the mean over its seeds, with its bootstrap over the images.

    A resample draws N of the N images with replacement, the same for every seed and both sides:
    ``D* = mean_i*( mean_s a_si - mean_s b_si )``. The interval is D*'s 2.5% to 97.5% (Efron 1979); the p is
    ``min(1, 2 * min(#{D* <= 0} + 1, #{D* >= 0} + 1) / (R + 1))``, the inverse of the interval (Efron and Tibshirani,
    "An Introduction to the Bootstrap", 1993, section 15.4; the ones keep p above 0, Davison and Hinkley 1997, 4.2).
    It covers other images for these networks, not other seeds.

    Args:
        correct_a: bool (S, N), one row per seed, one column per image.
        correct_b: bool (S', N), of the same images.
        seed: of the resamples.
        num_resamples: R.

    Raises:
        ValueError: not (S, N), empty, or other images.
    """
    a, b = _checked(correct_a), _checked(correct_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected the same images on both sides, received {a.shape[1]} and {b.shape[1]}")
    # In whole numbers: a tie is exactly 0.
    gains = a.sum(axis=0, dtype=np.int64) * len(b) - b.sum(axis=0, dtype=np.int64) * len(a)  # (N,)
    unit = len(a) * len(b) * a.shape[1]
    sums = _resampled_sums(gains, seed, num_resamples)
    low, high = np.percentile(sums / unit, [2.5, 97.5])
    tail = 1 + min(np.sum(sums <= 0), np.sum(sums >= 0))
    return BootstrapDifference(
        float(gains.sum() / unit), float(low), float(high), min(1.0, float(2 * tail / (num_resamples + 1)))
    )


def _resampled_sums(values: np.ndarray, seed: int, num_resamples: int) -> np.ndarray:
    """Sums of N values drawn with replacement from the N whole numbers ``values``: int64 (num_resamples,).

    Few values are different (counts of seeds), and how often each is drawn is one multinomial draw. So a resample
    costs as many numbers as there are different values; `scipy.stats.bootstrap` would take N.
    """
    different, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=num_resamples)
    return drawn @ different


def _checked(correct: np.ndarray) -> np.ndarray:
    correct = np.asarray(correct, bool)
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"expected bool (seeds, images), at least one of each, received {correct.shape}")
    return correct
