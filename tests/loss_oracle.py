"""The Ad-Corre loss, loop by loop from its formulas.

Plain NumPy in float64, one loop per index, written from the formulas (DESIGN.md, section 3; Fard & Mahoor, IEEE Access
2022, doi 10.1109/ACCESS.2022.3156598) and not from ``custom_loss.py``, so that the two can disagree.

Embeddings are (B, k, d), labels (B,) integers, logits (B, C), recall (C,).
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np


def pearson(u, v) -> float:
    """Pearson's correlation of two vectors (d,); 0 where one of them is constant and it is not defined."""
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    if np.ptp(u) == 0 or np.ptp(v) == 0:
        return 0.0
    du, dv = u - u.mean(), v - v.mean()
    return float(np.dot(du, dv) / (math.sqrt(np.dot(du, du)) * math.sqrt(np.dot(dv, dv))))


def feature_discriminator(embeddings, labels, recall=None, floor=1.0) -> float:
    """FD = 1/(k B^2) sum_l sum_{i != j} W_ij |Omega_ij - rho(e_i^l, e_j^l)|; W_ij = 1 where `recall` is None."""
    batch, k, _ = np.shape(embeddings)
    total = 0.0
    for l in range(k):  # noqa: E741 - the formula's own letter
        for i in range(batch):
            for j in range(batch):
                if i == j:
                    continue
                omega = 1.0 if labels[i] == labels[j] else -1.0
                weight = 1.0
                if recall is not None:
                    weight = floor + (1.0 - recall[labels[i]]) + (1.0 - recall[labels[j]])
                total += weight * abs(omega - pearson(embeddings[i][l], embeddings[j][l]))
    return total / (k * batch**2)


def mean_discriminator(embeddings, labels) -> float:
    """MD = 1/k sum_l 1/P^2 sum_{c != c'} (1 + rho(mu_c, mu_c')) over the P classes present; 0 when P < 2."""
    embeddings = np.asarray(embeddings, np.float64)
    means = [embeddings[[i for i in range(len(labels)) if labels[i] == c]].mean(0) for c in sorted({*labels})]
    return _mean_correlation(means) if len(means) > 1 else 0.0


def published_mean_discriminator(embeddings, labels, num_classes) -> float:
    """MD as the published code has it: C classes always, and a class absent from the batch has the batch's mean."""
    embeddings = np.asarray(embeddings, np.float64)
    means = []
    for c in range(num_classes):
        rows = [i for i in range(len(labels)) if labels[i] == c]
        means.append((embeddings[rows] if rows else embeddings).mean(0))
    return _mean_correlation(means)


def _mean_correlation(means) -> float:
    """1/k sum_l 1/P^2 sum_{c != c'} (1 + rho) over the P means, each (k, d)."""
    total, present, k = 0.0, len(means), len(means[0])
    for l in range(k):  # noqa: E741 - the formula's own letter
        for c in range(present):
            for other in range(present):
                if c != other:
                    total += 1.0 + pearson(means[c][l], means[other][l])
    return total / (k * present**2)


def embedding_discriminator(embeddings) -> float:
    """ED = 1/(B k^2) sum_i sum_{l != m} (1 + rho(e_i^l, e_i^m))."""
    batch, k, _ = np.shape(embeddings)
    total = 0.0
    for i in range(batch):
        for l in range(k):  # noqa: E741 - the formula's own letter
            for m in range(k):
                if l != m:
                    total += 1.0 + pearson(embeddings[i][l], embeddings[i][m])
    return total / (batch * k**2)


def cross_entropy(labels, logits, smoothing=0.0) -> float:
    """CE = 1/B sum_i -sum_c q_ic log p_ic, p = softmax(logits); q_ic = smoothing/C, plus 1 - smoothing at y_i."""
    batch, num_classes = np.shape(logits)
    total = 0.0
    for i in range(batch):
        row = [float(z) for z in logits[i]]
        log_sum = max(row) + math.log(sum(math.exp(z - max(row)) for z in row))
        for c in range(num_classes):
            target = smoothing / num_classes + (1.0 - smoothing if labels[i] == c else 0.0)
            total -= target * (row[c] - log_sum)
    return total / batch


class History:
    """The last `size` (true, predicted) pairs, the oldest forgotten first."""

    def __init__(self, num_classes: int, size: int):
        self.num_classes = num_classes
        self.pairs = deque(maxlen=size)

    def add(self, labels, logits) -> None:
        """Appends a batch in its order; a prediction is the class of the largest logit."""
        for label, row in zip(labels, logits, strict=True):
            self.pairs.append((int(label), int(np.argmax(row))))

    def recall(self) -> np.ndarray:
        """Right predictions over samples seen, class by class (C,); 0 for a class never seen."""
        recall = np.zeros(self.num_classes)
        for c in range(self.num_classes):
            predicted = [guess for label, guess in self.pairs if label == c]
            if predicted:
                recall[c] = sum(guess == c for guess in predicted) / len(predicted)
        return recall
