"""Measures equal their definitions, worked out by hand and by plain loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import metrics
from metrics import correlations, expected_calibration_error, reliability_bins, score, tsne

# Worked out by hand. Rows are true classes, columns predictions:
#        a  b  c
#   a  [ 2  2  0 ]
#   b  [ 0  3  0 ]
#   c  [ 1  0  2 ]
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
PREDICTIONS = np.array([0, 0, 1, 1, 1, 1, 1, 2, 2, 0])


def probabilities_of(predictions, num_classes, confidence=0.8):
    """Rows whose largest entry, ``confidence``, is the prediction's."""
    rows = np.full((len(predictions), num_classes), (1 - confidence) / (num_classes - 1))
    rows[np.arange(len(predictions)), predictions] = confidence
    return rows


def random_case(n, num_classes=5, seed=0):
    """Labels with a rare class, and predictions about six in ten of which are correct."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, n, p=[0.4, 0.3, 0.2, 0.08, 0.02])
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities


def test_score_by_hand():
    scores = score(LABELS, probabilities_of(PREDICTIONS, 3), ["a", "b", "c"])
    assert scores["n"] == 10
    assert scores["confusion_matrix"] == [[2, 2, 0], [0, 3, 0], [1, 0, 2]]
    assert scores["accuracy"] == pytest.approx((2 + 3 + 2) / 10)
    # recall: 2 of 4, 3 of 3, 2 of 3; precision: 2 of 3, 3 of 5, 2 of 2; F1 = 2 hits / (true + predicted)
    assert scores["mean_class_recall"] == pytest.approx((2 / 4 + 3 / 3 + 2 / 3) / 3)
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 6 / 8 + 4 / 5) / 3)
    expected = {
        "a": {"n": 4, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7},
        "b": {"n": 3, "precision": 3 / 5, "recall": 3 / 3, "f1": 6 / 8},
        "c": {"n": 3, "precision": 2 / 2, "recall": 2 / 3, "f1": 4 / 5},
    }
    assert list(scores["per_class"]) == ["a", "b", "c"]
    for name, values in expected.items():
        assert scores["per_class"][name] == pytest.approx(values)
    # every confidence is 0.8, 7 of 10 are right
    assert scores["ece"] == pytest.approx(0.8 - 0.7)


def test_score_equals_plain_loops():
    labels, probabilities = random_case(400)
    scores = score(labels, probabilities, "abcde")
    confusion = [[0] * 5 for _ in range(5)]
    for label, row in zip(labels, probabilities, strict=True):
        best = 0
        for code in range(5):
            if row[code] > row[best]:
                best = code
        confusion[label][best] += 1
    recalls, f1s = [], []
    for code in range(5):
        hits = confusion[code][code]
        recall = hits / sum(confusion[code])
        precision = hits / sum(confusion[other][code] for other in range(5))
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall))
    assert scores["confusion_matrix"] == confusion
    assert scores["accuracy"] == pytest.approx(sum(confusion[code][code] for code in range(5)) / 400)
    assert scores["mean_class_recall"] == pytest.approx(sum(recalls) / 5)
    assert scores["macro_f1"] == pytest.approx(sum(f1s) / 5)


def test_scores_are_strict_json():
    labels, probabilities = random_case(50)
    # float32 and a class without samples are where NumPy numbers and NaN would slip through
    scores = score(np.minimum(labels, 2), probabilities.astype(np.float32), "abcde")
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_absent_class_has_no_recall_and_leaves_the_means():
    labels = np.array([0, 0, 1, 1])
    scores = score(labels, probabilities_of([0, 2, 1, 1], 4), ["here", "also", "guessed", "nowhere"])
    assert scores["per_class"]["guessed"] == {"n": 0, "precision": 0.0, "recall": None, "f1": None}
    assert scores["per_class"]["nowhere"] == {"n": 0, "precision": None, "recall": None, "f1": None}
    assert scores["mean_class_recall"] == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 4) / 2)


def test_class_never_predicted_has_no_precision_and_counts_as_zero():
    scores = score(np.array([0, 0, 1]), probabilities_of([0, 0, 0], 2), ["a", "b"])
    assert scores["per_class"]["b"] == {"n": 1, "precision": None, "recall": 0.0, "f1": 0.0}
    assert scores["mean_class_recall"] == pytest.approx((1 + 0) / 2)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 0) / 2)


def test_intervals_follow_the_seed_and_hold_the_estimate():
    case = random_case(300)
    first, again, other = (score(*case, "abcde", seed=seed) for seed in (3, 3, 4))
    assert first == again and first["intervals"] != other["intervals"]
    assert all(low < first[name] < high for name, (low, high) in first["intervals"].items())


def test_accuracy_interval_is_near_the_normal_approximation():
    labels = np.zeros(1000, np.int64)
    predictions = (np.arange(1000) < 300).astype(np.int64)  # 700 of 1000 correct
    scores = score(labels, probabilities_of(predictions, 2), "ab", num_resamples=20_000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert scores["intervals"]["accuracy"] == pytest.approx([0.7 - half, 0.7 + half], abs=0.002)


def test_intervals_equal_resampling_the_samples_themselves():
    labels, probabilities = random_case(250)
    predictions = probabilities.argmax(axis=1)
    rng = np.random.default_rng(1)
    recall_means, f1_means = [], []
    for _ in range(2000):
        rows = rng.integers(0, 250, 250)
        y, p = labels[rows], predictions[rows]
        there = [code for code in range(5) if (y == code).any()]
        recall_means.append(np.mean([np.mean(p[y == code] == code) for code in there]))
        f1_means.append(
            np.mean([2 * np.sum((y == code) & (p == code)) / (np.sum(y == code) + np.sum(p == code)) for code in there])
        )
    intervals = score(labels, probabilities, "abcde", num_resamples=2000)["intervals"]
    assert intervals["mean_class_recall"] == pytest.approx(np.percentile(recall_means, [2.5, 97.5]), abs=0.015)
    assert intervals["macro_f1"] == pytest.approx(np.percentile(f1_means, [2.5, 97.5]), abs=0.015)


def test_extremes():
    scores = score(LABELS, probabilities_of(LABELS, 3), "abc")
    assert scores["intervals"] == {"accuracy": [1, 1], "mean_class_recall": [1, 1], "macro_f1": [1, 1]}
    # the first of equal probabilities is predicted
    assert score(np.array([0]), np.array([[0.5, 0.5]]), "ab")["confusion_matrix"] == [[1, 0], [0, 0]]
    scores = score(np.array([1]), np.array([[0.3, 0.7]]), "ab")
    assert (scores["accuracy"], scores["mean_class_recall"], scores["n"]) == (1, 1, 1)


def test_calibration_error_by_hand():
    cases = [
        # 8 of 10 correct at 0.8 and 5 of 10 at 0.5
        ([0] * 8 + [1] * 2 + [0] * 5 + [1] * 5, [0.8] * 10 + [0.5] * 10, 0),
        # 1 of 3 correct at 0.9 and 1 of 1 at 0.6: bins weighted by their samples
        ([0, 1, 1, 0], [0.9] * 3 + [0.6], 3 / 4 * (0.9 - 1 / 3) + 1 / 4 * 0.4),
        # 0.61 and 0.65 share the bin (9/15, 10/15]: accuracy 1/2 against confidence 0.63, averaged first
        ([0, 1], [0.61, 0.65], 0.63 - 0.5),
    ]
    for labels, confidences, expected in cases:
        probabilities = np.array([[confidence, 1 - confidence] for confidence in confidences])
        assert expected_calibration_error(np.array(labels), probabilities) == pytest.approx(expected, abs=1e-12)


def test_reliability_bins_equal_plain_loops():
    labels, probabilities = random_case(300)
    confidence, accuracy, count = reliability_bins(labels, probabilities, num_bins=8)
    assert count.sum() == 300
    for index in range(8):
        members = [
            (max(row), int(np.argmax(row) == label))
            for label, row in zip(labels, probabilities, strict=True)
            if index / 8 < max(row) <= (index + 1) / 8
        ]
        assert count[index] == len(members)
        if members:
            assert confidence[index] == pytest.approx(sum(c for c, _ in members) / len(members))
            assert accuracy[index] == pytest.approx(sum(right for _, right in members) / len(members))
        else:
            assert np.isnan(confidence[index]) and np.isnan(accuracy[index])


def test_reliability_bins_are_closed_above():
    # 0.5 closes the first of two bins, 1.0 the second
    _, _, count = reliability_bins(np.array([0, 0, 0]), np.array([[0.5, 0.5], [0.51, 0.49], [1.0, 0.0]]), num_bins=2)
    assert count.tolist() == [1, 2]


GOOD = np.array([[0.5, 0.5], [0.25, 0.75]])


def test_input_that_cannot_be_measured():
    cases = [
        (np.zeros(0, int), np.zeros((0, 2)), "none"),
        (np.zeros(3, int), GOOD, r"\(3,\).*\(2, 2\)"),
        (np.zeros(2), GOOD, "float64"),
        (np.array([0, 2]), GOOD, "0..1.*2 at row 1"),
        (np.array([-1, 0]), GOOD, "-1 at row 0"),
        (np.zeros(2, int), np.array([[0.5, 0.5], [np.nan, 0.5]]), "nan.*row 1"),
        (np.zeros(2, int), np.array([[3.0, -2.0], [0.5, 0.5]]), r"-2\.0.*row 0"),
        (np.zeros(2, int), np.array([[4.0, 1.0], [0.5, 0.5]]), r"4\.0.*row 0"),
    ]
    for labels, probabilities, facts in cases:
        with pytest.raises(ValueError, match=facts):
            score(labels, probabilities, ["a", "b"])
    with pytest.raises(ValueError, match=r"2 class names.*3: a, b, c"):
        score(np.zeros(2, int), GOOD, ["a", "b", "c"])


def pearson(u, v):
    """By its definition; 0 for a constant vector."""
    u = [x - sum(u) / len(u) for x in u]
    v = [x - sum(v) / len(v) for x in v]
    norm = math.sqrt(sum(x * x for x in u) * sum(x * x for x in v))
    return sum(x * y for x, y in zip(u, v, strict=True)) / norm if norm else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def correlations_by_loops(labels, embeddings, num_classes):
    n, k, _ = embeddings.shape
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def over(chosen):
        return mean(pearson(embeddings[i, m], embeddings[j, m]) for i, j in pairs if chosen(i, j) for m in range(k))

    means = {c: embeddings[labels == c].mean(axis=0) for c in range(num_classes) if (labels == c).any()}
    between = {
        (c, e): mean(pearson(means[c][m], means[e][m]) for m in range(k)) for c in means for e in means
    }  # fmt: skip
    return {
        "same_class": over(lambda i, j: labels[i] == labels[j]),
        "different_classes": over(lambda i, j: labels[i] != labels[j]),
        "class_means": [[between.get((c, e)) for e in range(num_classes)] for c in range(num_classes)],
        "between_class_means": mean(value for (c, e), value in between.items() if c != e),
        "between_embeddings": mean(
            pearson(embeddings[i, a], embeddings[i, b]) for i in range(n) for a in range(k) for b in range(k) if a != b
        ),
    }


@pytest.mark.parametrize(
    ("labels", "num_classes", "k"),
    [
        ([0, 1, 2, 0, 1, 2, 0, 0], 3, 3),
        ([0, 0, 2, 2, 2], 4, 2),  # classes 1 and 3 are absent
        ([1, 1, 1], 3, 2),  # one class
        ([2], 3, 2),  # one image
        ([0, 1, 1, 0], 2, 1),  # one embedding
    ],
)
def test_correlations_equal_plain_loops(labels, num_classes, k):
    labels = np.array(labels)
    embeddings = np.random.default_rng(3).normal(size=(len(labels), k, 6)) + 1
    found, expected = (
        correlations(labels, embeddings, num_classes),
        correlations_by_loops(labels, embeddings, num_classes),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "class_means":
            assert [[v is None for v in row] for row in found[name]] == [[v is None for v in row] for row in value]
            np.testing.assert_allclose(np.array(found[name], float), np.array(value, float), atol=1e-12)
        else:
            assert found[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name
    json.dumps(found, allow_nan=False)


def test_correlations_of_a_simplex():
    """The centred unit vectors of 3 classes, a class each: rho = -1/2 between any two, (2/3 - 1) / (1 - 1/3)."""
    embeddings = np.eye(3)[[0, 1, 2, 0, 1, 2], None]
    found = correlations(np.array([0, 1, 2, 0, 1, 2]), embeddings, 3)
    assert found["same_class"] == pytest.approx(1)
    assert found["different_classes"] == pytest.approx(-0.5)
    assert found["between_class_means"] == pytest.approx(-0.5)
    np.testing.assert_allclose(found["class_means"], 1.5 * np.eye(3) - 0.5, atol=1e-12)
    assert found["between_embeddings"] is None


def test_correlations_of_constant_vectors_are_zero():
    found = correlations(np.array([0, 0, 1]), np.full((3, 2, 4), 0.1, np.float32), 2)
    assert (found["same_class"], found["different_classes"], found["between_embeddings"]) == (0, 0, 0)


def test_tsne_separates_what_is_separate_and_follows_its_seed():
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    embeddings = rng.normal(size=(80, 2, 8)) + 6 * labels[:, None, None]
    rows, places = tsne(embeddings, seed=1)
    assert sorted(rows) == list(range(80)) and places.shape == (80, 2) and places.dtype == np.float32
    groups = [places[labels[rows] == label] for label in (0, 1)]
    distance = np.linalg.norm(groups[0].mean(axis=0) - groups[1].mean(axis=0))
    assert distance > 2 * max(group.std(axis=0).max() for group in groups)
    again, other = tsne(embeddings, seed=1), tsne(embeddings, seed=2)
    np.testing.assert_array_equal(again[0], rows)
    np.testing.assert_array_equal(again[1], places)
    assert not np.array_equal(other[0], rows)


def test_tsne_takes_a_share_of_many_samples(monkeypatch):
    monkeypatch.setattr(metrics, "_TSNE_SAMPLES", 30)
    rows, places = tsne(np.random.default_rng(0).normal(size=(100, 2, 4)))
    assert len(set(rows.tolist())) == 30 == len(places)


def test_tsne_of_too_few_different_images_is_empty():
    for embeddings in (np.random.default_rng(0).normal(size=(9, 2, 4)), np.ones((40, 2, 4))):
        rows, places = tsne(embeddings)
        assert (rows.shape, places.shape) == ((0,), (0, 2))
