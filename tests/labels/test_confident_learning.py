"""Confident learning finds what its published formula finds."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from files import UserError
from labels.confident_learning import find_suspects


def oracle(labels, probabilities):
    """The formula, image by image, in float64: (row, likeliest class, score), the lowest score first."""
    classes = range(probabilities.shape[1])
    thresholds = {}
    for j in classes:
        own = [float(p[j]) for p, label in zip(probabilities, labels, strict=True) if label == j]
        thresholds[j] = sum(own) / len(own) if own else np.inf
    found = []
    for row, (p, label) in enumerate(zip(probabilities, labels, strict=True)):
        reached = [j for j in classes if p[j] >= thresholds[j]]
        likeliest = max(classes, key=lambda j: p[j])
        if reached and max(reached, key=lambda j: p[j]) != label and likeliest != label:
            found.append((float(p[label] - p[likeliest]), row, likeliest))
    return sorted(found)


def noisy(seed, num_classes=5, absent=None):
    rng = np.random.default_rng(seed)
    truth = rng.choice([c for c in range(num_classes) if c != absent], 300)
    labels = np.where(rng.random(300) < 0.8, truth, rng.choice([c for c in range(num_classes) if c != absent], 300))
    logits = rng.normal(0, 1, (300, num_classes)) + 2 * np.eye(num_classes)[truth]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("seed", "absent"), [(0, None), (1, None), (2, 3)])
def test_suspects_are_those_of_the_formula(seed, absent):
    pytest.importorskip("cleanlab")
    labels, probabilities = noisy(seed, absent=absent)
    found, wanted = find_suspects(labels, probabilities), oracle(labels, probabilities)
    assert 20 < len(wanted) < 150
    assert found.rows.tolist() == [row for _, row, _ in wanted]
    assert found.suggested.tolist() == [code for _, _, code in wanted]
    np.testing.assert_allclose(found.scores, [score for score, _, _ in wanted], atol=1e-12)


def test_half_precision_gives_the_same_suspects():
    pytest.importorskip("cleanlab")
    labels, probabilities = noisy(4)
    exact = set(find_suspects(labels, probabilities).rows.tolist())
    assert len(exact ^ set(find_suspects(labels, probabilities.astype(np.float16)).rows.tolist())) <= 2


def test_labels_of_one_class_are_refused():
    pytest.importorskip("cleanlab")
    with pytest.raises(UserError, match="two classes or more"):
        find_suspects(np.ones(4, int), np.full((4, 2), 0.5))


def test_without_the_library_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(UserError, match=r"cleanlab.*pip install -r requirements\.txt"):
        find_suspects(*noisy(0))
