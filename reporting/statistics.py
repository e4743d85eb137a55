"""What is a difference worth? Spread over seeds, and paired tests of two rows of runs; no Keras.

Two kinds of luck stand behind a difference in accuracy, and each test sees one of them:

- *Training*: another seed, other weights. `mean_and_std` and `paired_t` look over seeds. They say nothing of other
  test pictures, and with three seeds they find only differences that are large beside the spread.
- *Pictures*: other test images of the same kind. `bootstrap_interval`, `paired_bootstrap` and `mcnemar` look over
  images, for the networks that were trained. They say nothing of what another seed would have given.

None of them corrects for the number of comparisons made, nor sees an error that all runs share (labels, leaks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Accuracies are fractions of a few thousand images: spreads below this are rounding.
_ROUNDING = 1e-12


class McNemar(NamedTuple):
    """`mcnemar`'s result: images that only one side has right, and the two-sided p."""

    only_a: int
    only_b: int
    p: float


class BootstrapDifference(NamedTuple):
    """`paired_bootstrap`'s result: a less b, its 95% interval, and the two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, ``sqrt(sum (x - mean)^2 / (n - 1))``.

    Returns:
        The two; no mean of no value, and no deviation of fewer than two values: None.
    """
    if not len(values):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_t(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test: ``t = mean(d) / (std(d) / sqrt(n))`` with n - 1 degrees of freedom.

    ``d`` is the difference of each seed's pair. Source: Student, "The Probable Error of a Mean", Biometrika 1908.
    It says how likely so large a mean difference is when the seed alone makes the difference, normally distributed.

    Args:
        values: one a seed.
        reference: of the same seeds, in the same order.

    Returns:
        p in 0..1; 1 when no pair differs; None for fewer than two pairs, and for pairs that all differ by one same
        amount: t is infinite there, and p = 0 would claim a certainty that a few seeds cannot give.

    Raises:
        ValueError: not as many values as references.
    """
    if len(values) != len(reference):
        raise ValueError(f"expected one reference a value, received {len(values)} values, {len(reference)} references")
    differences = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    n = len(differences)
    if n < 2:
        return None
    std = differences.std(ddof=1)
    if std <= _ROUNDING:
        return 1.0 if np.abs(differences).max() <= _ROUNDING else None
    t = differences.mean() / (std / math.sqrt(n))
    return float(2 * stats.t.sf(abs(t), n - 1))


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """McNemar's exact test of two networks on the same images.

    Of the images that just one side has right, half should go to each side when both are equally good:
    ``p = min(1, 2 * P(X <= min(only_a, only_b)))``, X binomial over their number with 1/2. Source: McNemar, "Note on
    the sampling error of the difference between correlated proportions or percentages", Psychometrika 1947, as an exact
    binomial test. It compares two trained networks, not two ways to train: another seed may turn the result round.

    Args:
        correct_a: bool (N,), which images a has right.
        correct_b: bool (N,), the same images of b.

    Returns:
        The counts and p; p is 1 when no image tells the two apart.

    Raises:
        ValueError: shapes that differ, or are not (N,).
    """
    correct_a, correct_b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape:
        raise ValueError(f"expected two arrays (N,) of the same images, received {correct_a.shape}, {correct_b.shape}")
    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(correct_b & ~correct_a))
    p = 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, float(p)))


def bootstrap_interval(correct: np.ndarray, seed: int = 0, num_resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile interval (Efron 1979) of the accuracy, the mean over seeds, when other images had been drawn.

    Args:
        correct: bool (S, N), a row a seed, a column an image. The seeds keep their images: all see the same resample.
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
    ``min(1, 2 * min(#{D* <= 0} + 1, #{D* >= 0} + 1) / (R + 1))``, the interval turned round (Efron and Tibshirani,
    "An Introduction to the Bootstrap", 1993, section 15.4; the ones keep p above 0, Davison and Hinkley 1997, 4.2).
    It says whether these networks would differ so on other pictures; the seeds are taken as they are.

    Args:
        correct_a: bool (S, N), a row a seed, a column an image.
        correct_b: bool (S', N), of the same images.
        seed: of the resamples.
        num_resamples: R.

    Raises:
        ValueError: not (S, N), empty, or other images.
    """
    a, b = _checked(correct_a), _checked(correct_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected the same images on both sides, received {a.shape[1]} and {b.shape[1]}")
    # In whole numbers, so that a tie is 0 and not some rounding.
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

    The values are few (the seeds that have an image right), so how often each is drawn is one multinomial draw over
    the different values: a resample costs their number, not N.
    """
    different, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=num_resamples)
    return drawn @ different


def _checked(correct: np.ndarray) -> np.ndarray:
    correct = np.asarray(correct, bool)
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"expected bool (seeds, images), at least one of each, received {correct.shape}")
    return correct
