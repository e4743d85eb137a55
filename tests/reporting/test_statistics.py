"""Do the tests say what their formulas say? Closed forms, sums over all outcomes, how often luck alone convinces."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from reporting.statistics import bootstrap_interval, mcnemar, mean_and_std, paired_bootstrap, paired_t


def test_mean_and_std():
    mean, std = mean_and_std([1.0, 2.0, 6.0])  # deviations -2, -1, 3: 14 / 2
    assert (mean, std) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_std([0.5]) == (0.5, None)
    assert mean_and_std([]) == (None, None)


def test_paired_t_of_three_pairs():
    # differences 1, 2, 3: t = 2 / (1 / sqrt 3), t^2 = 12; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert paired_t([5.0, 2.0, 9.0], [4.0, 0.0, 6.0]) == pytest.approx(1 - math.sqrt(12 / 14))


def test_paired_t_of_two_pairs():
    # differences 1, 3: t = 2 / (sqrt 2 / sqrt 2) = 2; with one degree of freedom p = 1 - 2/pi * atan t
    assert paired_t([1.0, 3.0], [0.0, 0.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2))


def test_paired_t_pairs_the_seeds_and_has_two_sides():
    a, b = [0.61, 0.70, 0.66], [0.60, 0.68, 0.65]
    assert paired_t(a, b) == pytest.approx(paired_t(b, a))
    assert paired_t(a, b) < 0.1 < paired_t(a, b[::-1])  # the same numbers, other pairs


@pytest.mark.parametrize(("a", "b"), [([0.7], [0.6]), ([], []), ([0.7, 0.8, 0.9], [0.6, 0.7, 0.8])])
def test_paired_t_claims_nothing_without_a_spread(a, b):
    """0.7 - 0.6 and its like differ by rounding only: t would be some 1e15."""
    assert paired_t(a, b) is None


def test_paired_t_of_equal_values():
    assert paired_t([0.7, 0.8], [0.7, 0.8]) == 1.0


def test_paired_t_needs_pairs():
    with pytest.raises(ValueError, match="received 2 values, 1 references"):
        paired_t([1.0, 2.0], [1.0])


def test_mcnemar_counts_the_images_that_tell_them_apart():
    both, neither = [(1, 1)] * 7, [(0, 0)] * 4
    a, b = np.array(both + neither + [(1, 0)] + [(0, 1)] * 5, bool).T
    # 6 images, at most 1 for a: 2 * (1 + 6) / 2^6
    assert mcnemar(a, b) == (1, 5, pytest.approx(14 / 64))
    assert mcnemar(b, a) == (5, 1, pytest.approx(14 / 64))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (0, 1), (2, 9), (40, 71)])
def test_mcnemar_sums_the_binomial(only_a, only_b):
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    a = np.repeat([True, False], [only_a, only_b])
    assert mcnemar(a, ~a).p == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_needs_the_same_images():
    with pytest.raises(ValueError, match=r"received \(3,\), \(2,\)"):
        mcnemar(np.ones(3, bool), np.ones(2, bool))


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


def test_bootstrap_interval_is_the_distribution_over_all_resamples():
    every = every_resample(A, np.zeros((1, 5), bool))
    found = bootstrap_interval(A, num_resamples=200_000)
    assert found == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=1e-9)


def test_paired_bootstrap_turned_round():
    forth, back = paired_bootstrap(A, B), paired_bootstrap(B, A)
    assert back.difference == -forth.difference
    assert (back.low, back.high) == (pytest.approx(-forth.high, abs=0.05), pytest.approx(-forth.low, abs=0.05))
    assert back.p == pytest.approx(forth.p, abs=0.03)


def test_the_same_network_twice_is_no_more_certain():
    """Seeds share their images: repeating a seed must not narrow the interval, as independent images would."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 400)) < [[[0.7]], [[0.6]]]
    once, twice = paired_bootstrap(a, b), paired_bootstrap(np.repeat(a, 4, axis=0), np.repeat(b, 4, axis=0))
    assert twice == once
    assert bootstrap_interval(np.repeat(a, 4, axis=0)) == bootstrap_interval(a)


def test_equal_networks_differ_by_nothing():
    assert paired_bootstrap(A, A) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_never_zero():
    found = paired_bootstrap(np.ones((1, 50), bool), np.zeros((1, 50), bool), num_resamples=999)
    assert (found.low, found.high, found.p) == (1.0, 1.0, pytest.approx(2 / 1000))


def test_luck_alone_convinces_one_time_in_twenty():
    """Both sides right with 0.65, on 400 images: p < 0.05 in 5% of 600 trials, give or take 2.7 standard deviations."""
    rng = np.random.default_rng(1)
    trials = [rng.random((2, 1, 400)) < 0.65 for _ in range(600)]
    convinced = np.mean(
        [paired_bootstrap(a, b, seed=i, num_resamples=1000).p < 0.05 for i, (a, b) in enumerate(trials)]
    )
    assert abs(convinced - 0.05) < 2.7 * math.sqrt(0.05 * 0.95 / 600)


def test_the_seed_decides_the_resamples():
    assert paired_bootstrap(A, B, seed=3, num_resamples=100) == paired_bootstrap(A, B, seed=3, num_resamples=100)
    assert len({paired_bootstrap(A, B, seed=i, num_resamples=100).p for i in range(5)}) > 1


def test_memory_stays_small():
    """3 seeds on FER-2013's test: 10,000 resamples of 3,589 images would be 287 MB of indices."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 3589)) < 0.7
    tracemalloc.start()
    try:
        paired_bootstrap(a, b)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("shape", [(3,), (0, 5), (2, 0)])
def test_bootstrap_needs_seeds_and_images(shape):
    with pytest.raises(ValueError, match="expected bool"):
        bootstrap_interval(np.ones(shape, bool))


def test_paired_bootstrap_needs_the_same_images():
    with pytest.raises(ValueError, match="received 5 and 4"):
        paired_bootstrap(A, B[:, :4])
