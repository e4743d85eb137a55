"""The study of corruptions: its numbers are those of the predictions, and an evaluation reports them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import run_python, write_split

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import evaluation
import metrics
import plots
from data_helper import PreparedSplit
from measuring.corruptions import CORRUPTIONS, corrupt
from measuring.study import Measured
from reporting import robustness

NAMES = ("Dark", "Mid", "Bright")


def certain(predicted):
    return np.eye(3, dtype=np.float32)[np.asarray(predicted)]


def by_brightness(images):
    """Probabilities of a network that looks at the mean pixel only: below 85, below 170, above."""
    means = np.array([images[[row]].mean() for row in range(len(images))])
    return certain(np.digitize(means, (85, 170)))


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    light = rng.integers(0, 256, 40)
    images = np.clip(light[:, None, None, None] + rng.integers(-20, 21, (40, 12, 12, 1)), 0, 255).astype(np.uint8)
    labels = by_brightness(images).argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 3  # the network is not always right
    return PreparedSplit(images, labels, {"dataset": "toy", "split": "val", "class_names": list(NAMES)})


def test_numbers_are_those_of_the_predictions_written_out():
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 0])
    clean = certain([0, 0, 1, 1, 2, 2, 0, 1])  # 6 of 8
    first = certain([0, 1, 1, 0, 2, 2, 0, 1])  # 4 of 8
    second = certain([0, 0, 1, 1, 2, 2, 2, 1])  # 7 of 8
    found = robustness.measured(labels, clean, {"blur_1": first, "jpeg_30": second}, NAMES, seed=3)
    assert list(found["by_name"]) == ["blur_1", "jpeg_30"] and found["seed"] == 3
    for name, accuracy, drop, recalls in (
        ("blur_1", 4 / 8, 2 / 8, (1 / 3, 1 / 2, 2 / 3)),
        ("jpeg_30", 7 / 8, -1 / 8, (2 / 3, 1, 1)),
    ):
        each = found["by_name"][name]
        assert (each["title"], each["accuracy"]) == (CORRUPTIONS[name].title, pytest.approx(accuracy))
        assert each["drop"] == pytest.approx(drop) and each["mean_class_recall"] == pytest.approx(np.mean(recalls))
        assert each["interval"][0] < accuracy < each["interval"][1]
        assert each["drop_interval"][0] <= drop <= each["drop_interval"][1]
    assert found["mean"]["accuracy"] == pytest.approx((4 + 7) / 16)
    assert found["mean"]["drop"] == pytest.approx(6 / 8 - 11 / 16)


def test_intervals_of_drop_and_mean_are_the_bootstraps_over_the_same_images():
    """Compared with resamples drawn image by image; an unpaired interval would be twice as wide."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    right = rng.random(500) < 0.7
    lost = right & (rng.random(500) < 0.1)
    more = right & (rng.random(500) < 0.3)
    clean, first, second = (
        certain(np.where(hits, labels, (labels + 1) % 3)) for hits in (right, right & ~lost, right & ~more)
    )
    found = robustness.measured(labels, clean, {"blur_1": first, "blur_2": second}, NAMES)
    drawn = rng.integers(0, 500, (4000, 500))
    gains = {"blur_1": lost.astype(float), "blur_2": more.astype(float)}
    for name, gain in gains.items():
        expected = np.percentile(gain[drawn].mean(axis=1), [2.5, 97.5])
        np.testing.assert_allclose(found["by_name"][name]["drop_interval"], expected, atol=0.004)
    both = (right & ~lost).astype(float) / 2 + (right & ~more) / 2
    np.testing.assert_allclose(
        found["mean"]["interval"], np.percentile(both[drawn].mean(axis=1), [2.5, 97.5]), atol=0.006
    )
    drop = (gains["blur_1"] + gains["blur_2"]) / 2
    np.testing.assert_allclose(
        found["mean"]["drop_interval"], np.percentile(drop[drawn].mean(axis=1), [2.5, 97.5]), atol=0.004
    )


def test_every_corruption_is_predicted_of_every_image(split, tmp_path):
    clean = by_brightness(split.images)
    scores = metrics.score(split.labels, clean, NAMES)
    study = robustness.Robustness(split, seed=2)
    entry = study(Measured(by_brightness, clean, scores, tmp_path, "toy"))["corruptions"]
    assert list(entry["by_name"]) == list(CORRUPTIONS)
    with np.load(tmp_path / "corruptions.npz", allow_pickle=False) as saved:
        assert saved["names"].tolist() == list(CORRUPTIONS)
        predicted = saved["predicted"]
    for name, row in zip(CORRUPTIONS, predicted, strict=True):
        changed = [corrupt(image, name, 2, place) for place, image in enumerate(split.images)]
        expected = [int(np.digitize(image.mean(), (85, 170))) for image in changed]
        assert row.tolist() == expected
        assert entry["by_name"][name]["accuracy"] == pytest.approx(np.mean(expected == split.labels))
    # Light costs this network much, contrast about the mean next to nothing.
    by_name = entry["by_name"]
    assert by_name["brighter"]["drop"] > 0.2 > abs(by_name["low_contrast"]["drop"])
    assert (tmp_path / "corruptions.png").stat().st_size > 10_000


def test_an_evaluation_reports_them_and_removes_those_of_an_earlier_one(split, tmp_path, monkeypatch):
    import keras
    from keras import ops

    pixels = keras.Input((None, None, 1))
    mean = keras.layers.GlobalAveragePooling2D()(pixels)
    logits = -ops.abs(mean - np.array([42.0, 127.0, 212.0], "float32"))
    network = keras.Model(
        pixels, {"logits": logits, "embeddings": ops.reshape(mean * np.arange(1, 7, dtype="float32"), (-1, 2, 3))}
    )
    monkeypatch.setattr(plots, "save_figures", lambda *args: None)  # tested elsewhere, and slow
    study = robustness.Robustness(split)
    result = evaluation.evaluate(network, split, tmp_path, batch_size=7, views="flip", studies=[study])
    entry = result["corruptions"]
    assert json.loads((tmp_path / "result.json").read_text())["corruptions"] == entry
    table = [" ".join(line.split()) for line in evaluation.format_table(result).splitlines()]
    low, high = entry["by_name"]["blur_2"]["interval"]
    accuracy = entry["by_name"]["blur_2"]["accuracy"]
    assert any(line.startswith(f"Gaussian blur, sigma 2 {accuracy:.2%} {low:.2%} to {high:.2%}") for line in table)
    assert any(line.startswith(f"mean of the 13 {entry['mean']['accuracy']:.2%}") for line in table)
    plain = evaluation.evaluate(network, split, tmp_path)
    assert "corruptions" not in plain and "corruption" not in evaluation.format_table(plain)
    assert not list(tmp_path.glob("corruptions.*"))


@pytest.mark.parametrize(("shape", "is_gray"), [((48, 48, 1), True), ((30, 40, 3), False)])
def test_the_example_is_a_face_of_the_data_sets_form(shape, is_gray):
    face = robustness.example_face(*shape)
    assert (face.shape, face.dtype) == (shape, np.uint8) and face.std() > 20
    assert is_gray or (face[..., 0] != face[..., 2]).any()


@pytest.mark.slow
def test_the_script_replaces_the_section_of_a_card(tiny_weights, tmp_path):
    write_split(tmp_path, np.arange(14) % 7, split="val", dataset="fer2013", shape=(24, 24, 1))
    card = tmp_path / "card" / "README.md"
    card.parent.mkdir()
    args = ("docs/figures/corruptions.py", "--weights", tiny_weights, "--data-dir", tmp_path, "--card", card)
    card.write_text("no comments")
    done = run_python(*args)
    assert done.returncode == 2 and "<!-- corruptions -->" in done.stderr
    card.write_text("before\n<!-- corruptions -->\nold\n<!-- end of corruptions -->\nafter\n")
    done = run_python(*args)
    assert done.returncode == 0, done.stderr
    text = card.read_text()
    assert text.startswith("before\n") and text.endswith("```\n<!-- end of corruptions -->\nafter\n")
    assert "old" not in text and "mean of the 13" in text and "fer2013/val: 14 images" in text
    entry = json.loads((card.parent / "tiny.corruptions.json").read_text())["corruptions"]
    assert f"{entry['mean']['accuracy']:.2%}" in text and (card.parent / "figures" / "tiny.corruptions.png").exists()
