"""One model's predictions against two sets of labels: numbers, text, figure and the entry of the result."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import write_split

import test as test_module
from config import DatasetName
from data_helper import open_split
from labels import second_ruler
from reading import run_files

NAMES = ("Neutral", "Happy", "Sad")


@pytest.fixture
def triples():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 400)
    return [np.where(rng.random(400) < share, truth, rng.integers(0, 3, 400)) for share in (0.7, 0.8, 0.75)]


def test_measures_are_counts(triples):
    """The arithmetic written out, image by image, in float64."""
    found = second_ruler.measure(*triples, NAMES)
    right = also_right = equal = errors = with_model = with_label = third = 0
    table = [[0] * 3 for _ in range(3)]
    for label, second, predicted in zip(*map(np.ndarray.tolist, triples), strict=True):
        right += predicted == label
        also_right += predicted == second
        equal += label == second
        table[label][second] += 1
        if predicted != label:
            errors += 1
            with_model += second == predicted
            with_label += second == label
            third += second not in (predicted, label)
    chance = sum(sum(table[c]) * sum(row[c] for row in table) for c in range(3)) / 400**2
    expected = {
        "n": 400,
        "accuracy": right / 400,
        "also_accuracy": also_right / 400,
        "difference": (also_right - right) / 400,
        "label_agreement": equal / 400,
        "kappa": (equal / 400 - chance) / (1 - chance),
        "errors": errors,
        "also_with_model": with_model,
        "also_with_label": with_label,
        "third": third,
        "share_with_model": with_model / errors,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert with_model + with_label + third == errors
    # Wilson's interval from its formula
    p, z = with_model / errors, 1.959963984540054
    middle, half = p + z * z / (2 * errors), z * np.sqrt(p * (1 - p) / errors + z * z / (4 * errors**2))
    interval = [(middle - half) / (1 + z * z / errors), (middle + half) / (1 + z * z / errors)]
    assert found["share_with_model_interval"] == pytest.approx(interval, abs=1e-9)
    for name in ("", "also_", "difference_", "label_agreement_", "kappa_", "share_with_model_"):
        low, high = found[f"{name}interval"]
        value = found[name.rstrip("_") if name not in ("", "also_") else f"{name}accuracy"]
        assert low < value < high


def test_counts_by_class_add_up(triples):
    labels, second, predicted = triples
    for code, name in enumerate(NAMES):
        counts = second_ruler.measure(*triples, NAMES)["per_class"][name]
        members = labels == code
        assert counts.pop("n") == members.sum() == sum(counts.values())
        assert counts["both"] == np.sum(members & (predicted == code) & (second == code))
        assert counts["also_only"] == np.sum(members & (predicted != code) & (second == predicted))
        assert counts["labels_agree"] == np.sum(members & (predicted != code) & (second == code))


def test_interval_of_kappa_is_that_of_resampled_images(triples):
    labels, second, _ = triples
    second = np.where(second == 2, 0, second)  # other shares of the classes than in the labels
    rng, values = np.random.default_rng(0), []
    for _ in range(2000):
        rows = rng.integers(0, 400, 400)
        a, b = labels[rows], second[rows]
        chance = sum(np.mean(a == code) * np.mean(b == code) for code in range(3))
        values.append((np.mean(a == b) - chance) / (1 - chance))
    found = second_ruler.kappa_interval(labels, second)
    assert found == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.006)


def test_a_model_without_errors_and_labels_of_one_class():
    zeros = np.zeros(5, np.int64)
    found = second_ruler.measure(zeros, zeros, zeros, NAMES)
    assert (found["errors"], found["share_with_model"], found["share_with_model_interval"]) == (0, None, None)
    assert (found["kappa"], found["kappa_interval"], found["accuracy"]) == (None, None, 1.0)
    result = {"dataset": "a", "n": 9, "also": {"dataset": "b", "left_out": {"c": 4}, **found}}
    text = "\n".join(second_ruler.lines(result))
    assert "errors by the labels of a: 0" in text and "kappa" not in text and "4 c" in text
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_evaluate_adds_the_second_ruler_to_its_report(tmp_path, tiny_weights, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 24, 24, 1), np.uint8)
    labels, second = rng.integers(0, 7, (2, 30))
    write_split(tmp_path, labels, images=images, shape=(24, 24, 1), split="val", dataset="fer2013")
    write_split(tmp_path, second[:20], images=images, shape=(24, 24, 1), split="test", dataset="ferplus")
    folder = tmp_path / "report"
    usual = {"weights": str(tiny_weights), "data_dir": str(tmp_path), "run_dir": str(folder)}
    settings = test_module.EvaluateConfig(**usual, also=DatasetName.ferplus)
    assert test_module._studies(settings, open_split(tmp_path, "fer2013", "val"))[0].startswith("-also-ferplus-")
    result = test_module.evaluate(settings)
    shown = capsys.readouterr().out
    predicted = np.load(folder / "predictions.npz")["probabilities"].argmax(axis=1)[:20]
    also = result["also"]
    assert (also["dataset"], also["n"], also["left_out"]) == ("ferplus", 20, {"not in ferplus": 10})
    assert also["accuracy"] == np.mean(predicted == labels[:20]) and also["also_accuracy"] == np.mean(
        predicted == second[:20]
    )
    assert run_files.read_result(folder / "result.json") == result
    assert "20 of the 30 images" in shown and f"errors by the labels of fer2013: {also['errors']}" in shown
    assert (folder / second_ruler.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert "also" not in test_module.evaluate(test_module.EvaluateConfig(**usual))
    assert not (folder / second_ruler.FIGURE).exists()
