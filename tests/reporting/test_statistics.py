"""Statistics, compared with closed forms and with sums over all outcomes."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from reporting.statistics import bootstrap_interval, holm, mcnemar, mean_and_std, paired_bootstrap, paired_t, t_interval


def test_mean_and_std():
    mean, std = mean_and_std([1.0, 2.0, 6.0])  # deviations -2, -1, 3: 14 / 2
    assert (mean, std) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_std([0.5]) == (0.5, None)
    assert mean_and_std([]) == (None, None)


def test_t_interval_in_closed_form():
    half = math.tan(0.475 * math.pi)  # the quantile with one degree of freedom; std / sqrt(2) is 1
    assert t_interval([0.0, 2.0]) == pytest.approx((1 - half, 1 + half))
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # with two; std / sqrt(3) is 1 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))
    assert t_interval([1.0]) is None and t_interval([]) is None


def test_paired_t_in_closed_form():
    # differences 1, 2, 3: t = 2 / (1 / sqrt 3), t^2 = 12; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert paired_t([5.0, 2.0, 9.0], [4.0, 0.0, 6.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    # differences 1, 3: t = 2 / (sqrt 2 / sqrt 2) = 2; with one degree of freedom p = 1 - 2/pi * atan t
    assert paired_t([1.0, 3.0], [0.0, 0.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2))
    a, b = [0.61, 0.70, 0.66], [0.60, 0.68, 0.65]
    assert paired_t(a, b) == pytest.approx(paired_t(b, a))
    assert paired_t(a, b) < 0.1 < paired_t(a, b[::-1])  # the same numbers, other pairs


def test_paired_t_of_degenerate_pairs():
    assert paired_t([0.7, 0.8], [0.7, 0.8]) == 1.0
    assert paired_t([], []) is None and paired_t([0.7], [0.6]) is None
    # 0.7 - 0.6 and 0.9 - 0.8 differ by rounding only: t would be about 1e15
    assert paired_t([0.7, 0.8, 0.9], [0.6, 0.7, 0.8]) is None
    with pytest.raises(ValueError, match="2 and 1"):
        paired_t([1.0, 2.0], [1.0])


def test_mcnemar_sums_the_binomial():
    cases = [(0, 0), (3, 3), (0, 1), (9, 2), (40, 71)]
    for only_a, only_b in cases:
        n = only_a + only_b
        tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
        pairs = [(1, 1)] * 7 + [(0, 0)] * 4 + [(1, 0)] * only_a + [(0, 1)] * only_b
        a, b = np.array(pairs, bool).T
        assert mcnemar(a, b) == (only_a, only_b, pytest.approx(min(1.0, 2 * tail)))


def every_resample(a, b):
    """D* of each of the N^N equally likely resamples, seed by seed and image by image."""
    n = a.shape[1]
    found = []
    for rows in itertools.product(range(n), repeat=n):
        of_a = sum(float(a[s, i]) for s in range(len(a)) for i in rows) / (len(a) * n)
        of_b = sum(float(b[s, i]) for s in range(len(b)) for i in rows) / (len(b) * n)
        found.append(of_a - of_b)
    return np.round(found, 12)


A = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [1, 1, 0, 0, 1]], bool)
B = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]], bool)


def test_paired_bootstrap_is_the_distribution_over_all_resamples():
    every = every_resample(A, B)
    found = paired_bootstrap(A, B, num_resamples=200_000)
    assert found.difference == pytest.approx(A.mean() - B.mean())
    assert [found.low, found.high] == pytest.approx(list(np.quantile(every, [0.025, 0.975])), abs=1e-9)
    exact = 2 * min(np.mean(every <= 0), np.mean(every >= 0))
    assert 0.05 < exact < 1 and found.p == pytest.approx(exact, abs=0.01)
    back = paired_bootstrap(B, A, num_resamples=200_000)
    assert back.difference == -found.difference and back.p == pytest.approx(found.p, abs=0.01)


def test_bootstrap_interval_is_the_distribution_over_all_resamples():
    every = every_resample(A, np.zeros((1, 5), bool))
    found = bootstrap_interval(A, num_resamples=200_000)
    assert found == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=1e-9)


def test_repeated_seeds_do_not_narrow_the_interval():
    """Seeds share their images, so they are not independent samples."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 400)) < [[[0.7]], [[0.6]]]
    once, twice = paired_bootstrap(a, b), paired_bootstrap(np.repeat(a, 4, axis=0), np.repeat(b, 4, axis=0))
    assert twice == once
    assert bootstrap_interval(np.repeat(a, 4, axis=0)) == bootstrap_interval(a)


def test_p_of_equal_and_of_opposite_networks():
    assert paired_bootstrap(A, A) == (0.0, 0.0, 0.0, 1.0)
    found = paired_bootstrap(np.ones((1, 50), bool), np.zeros((1, 50), bool), num_resamples=999)
    assert (found.low, found.high, found.p) == (1.0, 1.0, pytest.approx(2 / 1000))  # never 0


def test_one_false_alarm_in_twenty():
    """Both sides right with 0.65, on 400 images: p < 0.05 in 5% of 600 trials, within 2.7 standard deviations."""
    rng = np.random.default_rng(1)
    trials = [rng.random((2, 1, 400)) < 0.65 for _ in range(600)]
    alarms = [paired_bootstrap(a, b, seed=i, num_resamples=1000).p < 0.05 for i, (a, b) in enumerate(trials)]
    assert abs(np.mean(alarms) - 0.05) < 2.7 * math.sqrt(0.05 * 0.95 / 600)


def test_the_seed_decides_the_resamples():
    assert paired_bootstrap(A, B, seed=3, num_resamples=100) == paired_bootstrap(A, B, seed=3, num_resamples=100)
    assert len({paired_bootstrap(A, B, seed=i, num_resamples=100).p for i in range(5)}) > 1


def test_memory_stays_small():
    """10,000 resamples of the 3,589 images of FER-2013's test split would be 287 MB of indices."""
    a, b = np.random.default_rng(0).random((2, 3, 3589)) < 0.7
    tracemalloc.start()
    try:
        paired_bootstrap(a, b)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6


def test_images_must_fit():
    cases = [
        lambda: bootstrap_interval(np.ones(3, bool)),
        lambda: bootstrap_interval(np.ones((2, 0), bool)),
        lambda: paired_bootstrap(A, B[:, :4]),
        lambda: mcnemar(np.ones(3, bool), np.ones(2, bool)),
    ]
    for wrong in cases:
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_holm_by_hand():
    """4 comparisons: the smallest times 4, the next times 3, ...; never below a smaller one, and at most 1.

    0.01 x 4; 0.02 x 3 = 0.06; 0.022 x 2 = 0.044, which is below 0.06; 0.6 x 1.
    """
    np.testing.assert_allclose(holm([0.6, 0.02, 0.01, 0.022]), [0.6, 0.06, 0.04, 0.06])
    assert holm([0.4, 0.5]) == [0.8, 0.8] and holm([0.9, 0.7]) == [1, 1] and holm([]) == []


def test_holm_counts_the_comparisons_that_have_no_p_yet():
    assert holm([None, 0.01, None, 0.03]) == [None, 0.04, None, pytest.approx(0.09)]
