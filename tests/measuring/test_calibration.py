"""Calibration keeps every label, and its two numbers are those that fit best."""

from __future__ import annotations

import math

import numpy as np
import pytest

from measuring import calibration
from measuring.calibration import Calibration
from metrics import expected_calibration_error


def softmax(z):
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def drawn(true: Calibration, n=20_000, seed=0):
    """Logits, and labels that are drawn from the probabilities that ``true`` makes of them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 5)) * 2
    cumulative = softmax(true.logits(logits)).cumsum(axis=1)
    return (rng.random(n)[:, None] > cumulative).sum(axis=1).clip(max=4), logits


def test_calibrated_logits_are_the_formula_and_keep_every_label():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found = Calibration(1.7, 1.4).logits(logits)
    for row, expected_row in zip(found, logits.tolist(), strict=True):
        top = max(expected_row)
        for value, z in zip(row, expected_row, strict=True):
            assert value == pytest.approx(-math.pow(top - z, 1.4) / 1.7)
    np.testing.assert_array_equal(found.argsort(axis=1), logits.argsort(axis=1))


def test_the_default_changes_no_probability():
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(softmax(Calibration().logits(logits)), softmax(logits))


def test_an_exponent_of_1_is_temperature_scaling():
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(softmax(Calibration(2.5).logits(logits)), softmax(logits / 2.5))


@pytest.mark.parametrize("true", [Calibration(), Calibration(2.0), Calibration(0.7, 1.6)], ids=str)
def test_fit_finds_the_numbers_that_made_the_labels(true):
    labels, logits = drawn(true)
    found = calibration.fit(labels, logits)
    assert found.temperature == pytest.approx(true.temperature, rel=0.06)
    assert found.exponent == pytest.approx(true.exponent, rel=0.06)
    calibrated = softmax(found.logits(logits))
    assert expected_calibration_error(labels, calibrated) < 0.012
    if true != Calibration():
        assert expected_calibration_error(labels, softmax(logits)) > 0.05


def test_no_neighbour_fits_better():
    labels, logits = drawn(Calibration(1.5, 1.3), n=500)
    found = calibration.fit(labels, logits)
    best = calibration.negative_log_likelihood(labels, found.logits(logits))
    for t in np.linspace(0.9, 1.1, 9):
        for g in np.linspace(0.9, 1.1, 9):
            near = Calibration(found.temperature * t, found.exponent * g)
            assert calibration.negative_log_likelihood(labels, near.logits(logits)) >= best - 1e-9


def test_negative_log_likelihood_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert calibration.negative_log_likelihood(np.array([0, 1]), logits) == pytest.approx(math.log(2 * 10) / 2)


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 0]], ids=["all right", "all wrong"])
def test_a_split_without_a_best_calibration_gives_one_within_the_limits(labels):
    found = calibration.fit(np.array(labels), 4 * np.eye(3))
    assert calibration.TEMPERATURES[0] <= found.temperature <= calibration.TEMPERATURES[1]
    assert calibration.EXPONENTS[0] <= found.exponent <= calibration.EXPONENTS[1]


def test_cross_fitting_calibrates_each_half_with_the_other():
    labels, logits = drawn(Calibration(2.0), n=301)
    found = calibration.cross_fitted(labels, logits, seed=3)
    order = np.random.default_rng(3).permutation(301)
    for half, other in ((order[:151], order[151:]), (order[151:], order[:151])):
        expected = calibration.fit(labels[other], logits[other]).logits(logits[half])
        np.testing.assert_array_equal(found[half], expected)
    # A label of one half changes nothing there.
    labels[order[0]] = (labels[order[0]] + 1) % 5
    again = calibration.cross_fitted(labels, logits, seed=3)
    np.testing.assert_array_equal(again[order[:151]], found[order[:151]])
    assert not np.array_equal(again[order[151:]], found[order[151:]])
