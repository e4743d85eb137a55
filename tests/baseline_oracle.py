"""The losses beside Ad-Corre, loop by loop from their papers.

Plain NumPy in float64, one loop per index, written from the formulas and not from ``baseline_losses.py``, so that the
two can disagree. Embeddings are (B, k, d), labels (B,) integers.
"""

from __future__ import annotations

import math

import numpy as np


def face_vectors(embeddings) -> list[list[float]]:
    """One vector a face: its k vectors one after the other, every number over sqrt(k)."""
    k = np.shape(embeddings)[1]
    return [[float(t) / math.sqrt(k) for vector in face for t in vector] for face in np.asarray(embeddings, np.float64)]


def inner(u, v) -> float:
    return sum(s * t for s, t in zip(u, v, strict=True))


def squared_distance(u, v) -> float:
    return sum((s - t) ** 2 for s, t in zip(u, v, strict=True))


def supervised_contrastive(embeddings, labels, temperature=0.1) -> float:
    """Khosla et al. 2020, eq. 2: over the anchors i with P(i) not empty, the mean of

    -1/|P(i)| sum_{p in P(i)} log [ exp(z_i.z_p / t) / sum_{a in A(i)} exp(z_i.z_a / t) ], A(i) all faces but i.
    """
    z, total, anchors = face_vectors(embeddings), 0.0, 0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        anchors += 1
        denominator = sum(math.exp(inner(z[i], z[a]) / temperature) for a in others)
        for p in positives:
            total -= math.log(math.exp(inner(z[i], z[p]) / temperature) / denominator) / len(positives)
    return total / anchors if anchors else 0.0


def triplet_semihard(embeddings, labels, margin=0.2) -> float:
    """Schroff et al. 2015: mean of max(0, D_ap - D_an + margin) over the ordered pairs a != p of one class.

    n is the nearest negative of a with D_an > D_ap, the farthest where there is none; without negatives no triplet.
    """
    x, losses = face_vectors(embeddings), []
    for a in range(len(x)):
        negatives = [squared_distance(x[a], x[n]) for n in range(len(x)) if labels[n] != labels[a]]
        for p in range(len(x)):
            if p == a or labels[p] != labels[a] or not negatives:
                continue
            to_positive = squared_distance(x[a], x[p])
            farther = [to_negative for to_negative in negatives if to_negative > to_positive]
            to_negative = min(farther) if farther else max(negatives)
            losses.append(max(0.0, to_positive - to_negative + margin))
    return sum(losses) / len(losses) if losses else 0.0


class Centers:
    """Wen et al. 2016: the centers of the classes, as nested lists, all 0 at first."""

    def __init__(self, num_classes: int, length: int, alpha: float):
        self.centers = [[0.0] * length for _ in range(num_classes)]
        self.alpha = alpha

    def loss(self, embeddings, labels) -> float:
        """Eq. 2 as a mean: 1/(2B) sum_i |x_i - c_{y_i}|^2."""
        x = face_vectors(embeddings)
        return sum(squared_distance(x[i], self.centers[labels[i]]) for i in range(len(x))) / (2 * len(x))

    def move(self, embeddings, labels) -> None:
        """Eq. 4: c_j -= alpha * sum_i [y_i = j] (c_j - x_i) / (1 + sum_i [y_i = j])."""
        x = face_vectors(embeddings)
        for j, center in enumerate(self.centers):
            members = [i for i in range(len(x)) if labels[i] == j]
            for t in range(len(center)):
                change = sum(center[t] - x[i][t] for i in members) / (1 + len(members))
                center[t] -= self.alpha * change


def attention_maps(features, kernel, bias, classifier) -> np.ndarray:
    """(B, h, w, C): v_cl . (W_l A(x) + b_l) / |z_l|, summed over l, with z_l the mean of W_l A(x) + b_l over x.

    Features (B, h, w, F), kernel (F, k, d), bias (k, d), classifier (k, d, C).
    """
    features, kernel, bias, classifier = (np.asarray(x, np.float64) for x in (features, kernel, bias, classifier))
    images, height, width, channels = features.shape
    _, k, d = kernel.shape
    maps = np.zeros((images, height, width, classifier.shape[2]))
    places = [(y, x) for y in range(height) for x in range(width)]
    for i in range(images):
        for vector in range(k):
            at = {}
            for y, x in places:
                at[y, x] = [
                    float(bias[vector, t]) + sum(kernel[f, vector, t] * features[i, y, x, f] for f in range(channels))
                    for t in range(d)
                ]
            z = [sum(at[place][t] for place in places) / len(places) for t in range(d)]
            length = max(math.sqrt(inner(z, z)), 1e-6)
            for y, x in places:
                for c in range(maps.shape[3]):
                    maps[i, y, x, c] += inner(classifier[vector, :, c], at[y, x]) / length
    return maps


def attention_consistency(maps, maps_of_mirrored) -> list[float]:
    """Zhang et al. 2022: of each image the mean over places and classes of (M(y, x) - M'(y, w - 1 - x))^2."""
    images, height, width, classes = np.shape(maps)
    found = []
    for i in range(images):
        total = 0.0
        for y in range(height):
            for x in range(width):
                for c in range(classes):
                    total += float(maps[i][y][x][c] - maps_of_mirrored[i][y][width - 1 - x][c]) ** 2
        found.append(total / (height * width * classes))
    return found
