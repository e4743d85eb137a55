"""Groups: their measures, the interval and the test of the largest gap, compared with closed forms and enumerations."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from scipy import stats

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import evaluation
import metrics
from data_helper import PreparedSplit
from files import UserError
from measuring import groups
from measuring.study import Measured

CLASSES = ("Neutral", "Happy", "Sad")


def random_predictions(sizes, accuracies, seed=0):
    """Labels, predictions and groups: group g has sizes[g] images, predicted right with probability accuracies[g]."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = rng.integers(0, 3, len(codes))
    right = rng.random(len(codes)) < np.take(accuracies, codes)
    return labels, np.where(right, labels, (labels + rng.integers(1, 3, len(codes))) % 3), codes


def test_a_groups_measures_are_those_of_its_images_alone():
    labels, predicted, codes = random_predictions((80, 200, 31), (0.35, 0.8, 0.65))
    found = groups.measured(labels, predicted, codes, ("a", "b", "c"), CLASSES, exchanges=50)
    for code, name in enumerate(("a", "b", "c")):
        inside = codes == code
        expected = metrics.score(labels[inside], np.eye(3)[predicted[inside]], CLASSES, num_resamples=20_000)
        group = found["by_group"][name]
        assert (group["n"], group["absent"], group["compared"]) == (inside.sum(), [], True)
        for measure in ("accuracy", "mean_class_recall", "macro_f1"):
            assert group[measure] == pytest.approx(expected[measure])
            np.testing.assert_allclose(group["intervals"][measure], expected["intervals"][measure], atol=0.035)
    everything = metrics.score(labels, np.eye(3)[predicted], CLASSES)
    assert found["all"]["n"] == 311 and found["all"]["macro_f1"] == pytest.approx(everything["macro_f1"])
    gap = found["largest_gaps"]["accuracy"]
    assert (gap["higher"], gap["lower"]) == ("b", "a")
    assert gap["gap"] == pytest.approx(found["by_group"]["b"]["accuracy"] - found["by_group"]["a"]["accuracy"])


def test_small_groups_and_absent_classes_are_reported_and_small_groups_not_compared():
    labels = np.array([0, 1, 2] * 20 + [0, 1] * 20 + [0] * 5)
    predicted = np.where(np.arange(105) < 100, labels, 1)  # the small group is never right
    codes = np.repeat([0, 1, 2], [60, 40, 5])
    found = groups.measured(labels, predicted, codes, ("big", "two", "small"), CLASSES, exchanges=20)
    assert found["by_group"]["two"]["absent"] == ["Sad"] and found["by_group"]["two"]["mean_class_recall"] == 1
    assert [group["compared"] for group in found["by_group"].values()] == [True, True, False]
    assert found["largest_gaps"]["accuracy"]["gap"] == 0 and found["largest_gaps"]["accuracy"]["p"] == 1
    assert found["largest_gaps"]["accuracy"]["interval"] == [0, 0]  # without an error nothing varies
    text = "\n".join(groups.lines({"groups": {"file": "g.csv", "n": 105, "without": 3, **found}}))
    assert "105 of 108 images" in text and "in no gap: small (5)" in text
    assert "two (Sad); small (Happy, Sad)" in text
    alone = groups.measured(labels[60:], predicted[60:], codes[60:] - 1, ("two", "small"), CLASSES)
    assert alone["largest_gaps"] is None
    assert "no gap to test" in "\n".join(groups.lines({"groups": {"file": "", "n": 45, "without": 0, **alone}}))


@pytest.mark.parametrize("num_groups", [2, 3, 8])
def test_the_interval_holds_for_all_pairs_at_once(num_groups):
    """For normal draws of one variance, q is Tukey's: the studentised range over the root of 2."""
    rng = np.random.default_rng(0)
    values = np.linspace(0.5, 0.7, num_groups)
    draws = values + 0.01 * rng.standard_normal((20_000, num_groups))
    low, high = groups.simultaneous_interval(values, draws, num_groups - 1, 0)
    half = stats.studentized_range.ppf(0.95, num_groups, np.inf) / np.sqrt(2) * 0.01 * np.sqrt(2)
    assert (low + high) / 2 == pytest.approx(0.2) and (high - low) / 2 == pytest.approx(half, rel=0.02)


def test_groups_are_resampled_independently():
    """Two groups with the same images: the same resamples for both would have no spread."""
    labels, predicted, _ = random_predictions((200,), (0.8,))
    found = groups.measured(
        *(np.tile(each, 2) for each in (labels, predicted)), np.repeat([0, 1], 200), ("a", "b"), CLASSES
    )
    low, high = found["largest_gaps"]["accuracy"]["interval"]
    share = found["all"]["accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(2 * share * (1 - share) / 200), rel=0.1)


def test_an_interval_stays_inside_the_range():
    draws = np.random.default_rng(0).standard_normal((500, 2))
    assert groups.simultaneous_interval(np.array([0.9, 0.1]), draws, 0, 1) == (-1, 1)


def largest_gap(labels, predicted, codes):
    """By measure, written out."""
    values = []
    for group in sorted(set(codes)):
        inside = [i for i in range(len(codes)) if codes[i] == group]
        recalls, f1s = [], []
        for c in {labels[i] for i in inside}:
            true = [i for i in inside if labels[i] == c]
            taken = [i for i in inside if predicted[i] == c]
            hits = len(set(true) & set(taken))
            recalls.append(hits / len(true))
            f1s.append(2 * hits / (len(true) + len(taken)))
        values.append((np.mean([labels[i] == predicted[i] for i in inside]), np.mean(recalls), np.mean(f1s)))
    return np.ptp(values, axis=0)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("codes", [(0, 0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, 2, 2)], ids=["two groups", "three"])
def test_p_is_the_share_of_all_exchanges(within, codes):
    labels = np.array([0, 0, 0, 1, 1, 1, 0])
    predicted = np.array([0, 0, 0, 1, 0, 0, 1])
    codes = np.array(codes)
    observed, reached, count = largest_gap(labels, predicted, codes), np.zeros(3), 0
    for order in itertools.permutations(range(7)):
        if within and any(labels[i] != labels[j] for i, j in enumerate(order)):
            continue
        reached += largest_gap(labels, predicted, codes[list(order)]) >= observed - 1e-9
        count += 1
    found = groups.exchange_test(labels, predicted, codes, 2, within, seed=1, exchanges=4_000)
    np.testing.assert_allclose(list(found.values()), reached / count, atol=0.03)
    assert reached[0] <= 0.5 * count  # or the oracle could not tell


def test_p_counts_for_all_pairs():
    """Ten groups without a difference: a test of the largest pair alone would find one; ours is uniform."""
    ps = []
    for seed in range(60):
        labels, predicted, codes = random_predictions((40,) * 10, (0.7,) * 10, seed)
        ps.append(groups.exchange_test(labels, predicted, codes, 3, seed=seed, exchanges=99)["accuracy"])
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    different = groups.exchange_test(*random_predictions((150, 150), (0.9, 0.6)), 3, exchanges=999)
    assert different["accuracy"] == pytest.approx(0.001)


def test_exchanges_within_classes_ignore_that_a_group_has_easier_classes():
    """Happy is always right, Sad half the time, in both groups; one group has more Happy images."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 300)
    labels = np.where(rng.random(600) < np.where(codes, 0.8, 0.3), 1, 2)
    predicted = np.where((labels == 1) | (rng.random(600) < 0.5), labels, 0)
    freely, within = (groups.exchange_test(labels, predicted, codes, 3, each, exchanges=999) for each in (False, True))
    assert freely["accuracy"] < 0.01 < 0.05 < within["accuracy"]


def test_a_table_becomes_a_study_and_an_entry_of_the_result(tmp_path):
    labels, predicted, codes = random_predictions((50, 60), (0.5, 0.9))
    images = np.zeros((112, 4, 4, 1), np.uint8)
    meta = {"dataset": "toy", "split": "val", "class_names": list(CLASSES)}
    split = PreparedSplit(images, np.r_[labels, 0, 0], meta)
    order = np.random.default_rng(1).permutation(110)
    rows = "".join(f"{row},{'mf'[codes[row]]}\n" for row in order)
    (tmp_path / "sex.csv").write_text(f"image,group\n{rows}")
    study = groups.open_groups(tmp_path / "sex.csv", split, seed=5)
    probabilities = np.eye(3, dtype=np.float32)[np.r_[predicted, 1, 1]]
    scores = metrics.score(split.labels, probabilities, CLASSES)
    entry = study(Measured(lambda images: None, probabilities, scores, tmp_path, "toy"))["groups"]
    assert (entry["file"], entry["n"], entry["without"]) == ("sex.csv", 110, 2)
    for code, name in ((1, "f"), (0, "m")):
        right = (labels == predicted)[codes == code]
        assert (entry["by_group"][name]["n"], entry["by_group"][name]["accuracy"]) == (len(right), right.mean())
    assert list(entry["by_group"]) == ["f", "m"] and (tmp_path / "groups.png").stat().st_size > 5_000
    result = {**RESULT_HEAD, **scores, "groups": entry}
    gap = entry["largest_gaps"]["accuracy"]
    text = evaluation.format_table(result)
    assert max(map(len, text.splitlines())) <= 80
    table = [" ".join(line.split()) for line in text.splitlines()]
    low, high = (100 * end for end in gap["interval"])
    expected = f"accuracy f over m {100 * gap['gap']:.2f} {low:.2f} to {high:.2f} {gap['p']:.4f}"
    assert any(line.startswith(expected) for line in table)
    with pytest.raises(UserError, match=r"toy/val, 0 to 111"):
        (tmp_path / "bad.csv").write_text("image,group\n112,a\n")
        groups.open_groups(tmp_path / "bad.csv", split)


RESULT_HEAD = {"dataset": "toy", "split": "val", "class_names": list(CLASSES)}
