"""Calibrates probabilities: bends and scales the logits, so that a confidence is the share of right labels.

Networks that are trained with label smoothing are too sure in the middle and not sure enough at the top. One
temperature (Guo, Pleiss, Sun and Weinberger, ICML 2017) can only scale that, so there is an exponent too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Without an error a split would have the temperature 0, and one that is predicted by chance an infinite one.
TEMPERATURES = (0.1, 10.0)
EXPONENTS = (0.5, 3.0)
_LIMITS = (TEMPERATURES, EXPONENTS)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Two numbers; the default changes no probability.

    Attributes:
        temperature: T, above 0.
        exponent: g, above 0; 1 is temperature scaling alone.
    """

    temperature: float = 1.0
    exponent: float = 1.0

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits: ``-(max_j z_j - z_c)^g / T``.

        They keep their order, so that no label changes: an order-preserving function of Rahimi, Shaban, Cheng, Hartley
        and Boots, "Intra Order-Preserving Functions for Calibration of Multi-Class Neural Networks", NeurIPS 2020.

        Args:
            logits: float (N, C); logarithms of probabilities give the same.

        Returns:
            Float64 (N, C), 0 for the predicted class and negative for the others.
        """
        z = np.asarray(logits, np.float64)
        return -((z.max(axis=1, keepdims=True) - z) ** self.exponent) / self.temperature


def negative_log_likelihood(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean of ``-log softmax(logits)[label]`` over the samples, labels int (N,), logits float (N, C)."""
    from scipy.special import log_softmax

    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def fit(labels: np.ndarray, logits: np.ndarray) -> Calibration:
    """The calibration with the smallest `negative_log_likelihood`, within `TEMPERATURES` and `EXPONENTS`.

    Args:
        labels: int (N,), codes 0 <= label < C, N at least 1.
        logits: float (N, C).
    """
    from scipy.optimize import minimize

    def loss(logs: np.ndarray) -> float:
        return negative_log_likelihood(labels, Calibration(*np.exp(logs)).logits(logits))

    bounds = np.log(_LIMITS)
    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", bounds=bounds, options={"xatol": 1e-5, "fatol": 1e-9})
    # Rounding must not leave the bounds.
    return Calibration(*(float(np.clip(np.exp(x), *limits)) for x, limits in zip(found.x, _LIMITS, strict=True)))


def cross_fitted(labels: np.ndarray, logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Calibrated logits, float64 (N, C): each half of the samples with the calibration that fits the other half.

    Args:
        labels: int (N,), N at least 2.
        logits: float (N, C).
        seed: of the halves, which are drawn at random.
    """
    halves = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 2)
    calibrated = np.empty(logits.shape)
    for half, other in (halves, halves[::-1]):
        calibrated[half] = fit(labels[other], logits[other]).logits(logits[half])
    return calibrated
