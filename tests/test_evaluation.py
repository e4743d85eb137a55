"""Every image is predicted once, and the report holds what was predicted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import pytest
from keras import ops

import evaluation
import metrics
import plots
from data_helper import PreparedSplit
from files import UserError

NAMES = ("Dark", "Mid", "Bright")
CENTERS = (0.0, 100.0, 200.0)


@pytest.fixture(scope="module")
def network():
    """Logits -|mean pixel - center| / 50 and embeddings (2, 3) = mean pixel * [[1, 2, 3], [4, 5, 6]]."""
    pixels = keras.Input((None, None, 1))
    mean = keras.layers.GlobalAveragePooling2D()(pixels)
    logits = -ops.abs(mean - np.array(CENTERS, "float32")) / 50
    embeddings = ops.reshape(mean * np.arange(1, 7, dtype="float32"), (-1, 2, 3))
    return keras.Model(pixels, {"logits": logits, "embeddings": embeddings})


def flat_images(values, dtype=np.uint8):
    """An image of 4 x 4 equal pixels a value."""
    return np.broadcast_to(np.array(values, dtype)[:, None, None, None], (len(values), 4, 4, 1))


def expected_outputs(values):
    """What the network's docstring says, an image at a time."""
    probabilities, embeddings = [], []
    for value in np.array(values, np.float64):
        weights = [np.exp(-abs(value - center) / 50) for center in CENTERS]
        probabilities.append([weight / sum(weights) for weight in weights])
        embeddings.append([[value, 2 * value, 3 * value], [4 * value, 5 * value, 6 * value]])
    return np.array(probabilities), np.array(embeddings)


def prepared(values, labels, names=NAMES):
    meta = {"dataset": "toy", "split": "val", "class_names": list(names)}
    return PreparedSplit(flat_images(values), np.array(labels, np.int64), meta)


@pytest.mark.parametrize(
    ("num_images", "batch_size"),
    [(8, 4), (10, 4), (3, 8), (1, 256), (5, 1)],
    ids=["full batches", "short tail", "fewer than a batch", "one image", "batches of one"],
)
def test_predict_counts_every_image(network, num_images, batch_size):
    values = np.arange(num_images) * 24 + 7
    probabilities, embeddings = evaluation.predict(network, flat_images(values), batch_size)
    expected = expected_outputs(values)
    assert probabilities.dtype == embeddings.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected[0], rtol=1e-5)
    np.testing.assert_allclose(embeddings, expected[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_predict_reads_a_memory_map_batch_by_batch(network, tmp_path, dtype):
    values = np.arange(11) * 20.0
    np.save(tmp_path / "images.npy", flat_images(values, dtype))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    seen = []

    class Spy:
        def __len__(self):
            return len(images)

        def __getitem__(self, rows):
            seen.append((rows.start, rows.stop))
            return images[rows]

    probabilities, _ = evaluation.predict(network, Spy(), batch_size=4)
    np.testing.assert_allclose(probabilities, expected_outputs(values)[0], rtol=1e-5)
    assert seen == [(0, 4), (4, 8), (8, 11)]


def test_predict_shows_the_network_one_shape(network, monkeypatch):
    shapes = []
    run = network.predict_on_batch
    monkeypatch.setattr(network, "predict_on_batch", lambda batch: shapes.append(batch.shape) or run(batch))
    evaluation.predict(network, flat_images(range(10)), batch_size=4)
    assert shapes == [(4, 4, 4, 1)] * 3


def test_predict_survives_large_logits():
    pixels = keras.Input((None, None, 1))
    mean = keras.layers.GlobalAveragePooling2D()(pixels)
    logits = mean * np.array([100.0, -100.0], "float32")  # exp(25500) would be infinite
    network = keras.Model(pixels, {"logits": logits, "embeddings": ops.reshape(mean, (-1, 1, 1))})
    probabilities, _ = evaluation.predict(network, flat_images([255, 0]))
    np.testing.assert_allclose(probabilities, [[1, 0], [0.5, 0.5]])


def test_predict_names_the_first_image_that_is_not_finite(network):
    images = flat_images([1, 2, np.nan, np.nan], np.float32)
    with pytest.raises(UserError, match="not finite for 2 of 4 images, first image 2"):
        evaluation.predict(network, images)


def test_predict_needs_an_image(network):
    with pytest.raises(UserError, match="at least one image"):
        evaluation.predict(network, flat_images([]))


# Predicted classes 0 0 0 1 1 1 2 2 2 1: nine are right, and the wrong tenth sits in the tail of batches of four.
VALUES = (0, 10, 20, 90, 100, 110, 190, 200, 210, 120)
LABELS = (0, 0, 0, 1, 1, 1, 2, 2, 2, 2)


@pytest.fixture(scope="module")
def brighter_side():
    """Logits (mean of the left half, mean of the right half, 0) / 50: flipping swaps the first two classes."""
    pixels = keras.Input((4, 4, 1))
    half = keras.layers.AveragePooling2D((4, 2))(pixels)  # (B, 1, 2, 1)
    sides = ops.reshape(half, (-1, 2)) / 50
    logits = ops.pad(sides, ((0, 0), (0, 1)))
    return keras.Model(
        pixels, {"logits": logits, "embeddings": ops.reshape(ops.pad(sides, ((0, 0), (0, 1))), (-1, 1, 3))}
    )


def test_flip_averages_each_image_with_its_mirror_image(brighter_side):
    images = np.zeros((5, 4, 4, 1), np.uint8)
    images[:, :, :2] = np.array([0, 50, 100, 150, 200], np.uint8)[:, None, None, None]
    plain, embeddings = evaluation.predict(brighter_side, images, batch_size=2)
    flipped, same = evaluation.predict(brighter_side, images, batch_size=2, views="flip")
    exponentials = np.exp(np.stack([np.arange(5.0), np.zeros(5), np.zeros(5)], axis=1))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    np.testing.assert_allclose(flipped, (expected + expected[:, [1, 0, 2]]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(same, embeddings)


@pytest.mark.parametrize(("views", "named"), [("flip", "its mirror image"), ("ten-crop", "four corner crops")])
def test_an_evaluation_names_its_views(network, tmp_path, views, named):
    split = prepared(VALUES, LABELS)
    result = evaluation.evaluate(network, split, tmp_path, views=views)
    assert result["views"] == views and named in (table := evaluation.format_table(result)) and views in table
    plain = evaluation.evaluate(network, split, tmp_path)
    assert plain["views"] == "none" and "mean over" not in evaluation.format_table(plain)
    assert plain["accuracy"] == result["accuracy"]  # flat images are their own mirror images and crops


def test_a_result_of_an_older_version_is_named_flip(network, tmp_path):
    plain = evaluation.evaluate(network, prepared(VALUES, LABELS), tmp_path)
    del plain["views"]
    assert "--views flip" in evaluation.format_table({**plain, "flip": True})
    assert "--views" not in evaluation.format_table({**plain, "flip": False})


def test_a_calibration_that_was_fitted_on_the_measured_split_is_named():
    table = evaluation.format_table({**RESULT, "temperature": 1.5, "calibrated_on": "toy/test"})
    assert "calibration was fitted on this same split" in table
    other = evaluation.format_table({**RESULT, "temperature": 1.5, "calibrated_on": "toy/val"})
    assert "same split" not in other


def test_evaluate_writes_what_it_returns(network, tmp_path):
    split = prepared(VALUES, LABELS)
    result = evaluation.evaluate(network, split, tmp_path / "run", batch_size=4, seed=5, extra={"selected_on": "val"})
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (result["dataset"], result["split"], result["n"], result["seed"]) == ("toy", "val", 10, 5)
    assert (result["class_names"], result["selected_on"]) == (list(NAMES), "val")
    assert result["accuracy"] == pytest.approx(9 / 10)
    assert result["mean_class_recall"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert result["confusion_matrix"] == [[3, 0, 0], [0, 3, 0], [0, 1, 3]]
    names = {"macro_f1", "ece", "per_class", "intervals", "commit"}
    assert names <= set(result)
    assert result["correlations"] == metrics.correlations(split.labels, expected_outputs(VALUES)[1].astype("f4"), 3)
    assert result["parameters"] == 0  # this network has none
    assert {"confusion_matrix.png", "per_class.png", "reliability.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_saved_predictions_reproduce_the_result(network, tmp_path):
    result = evaluation.evaluate(network, prepared(VALUES, LABELS), tmp_path)
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as saved:
        labels, probabilities, names = saved["labels"], saved["probabilities"], saved["class_names"]
        rows, places = saved["tsne_rows"], saved["tsne_places"]
    assert (labels.dtype, probabilities.dtype) == (np.int64, np.float32)
    assert tuple(names) == NAMES
    np.testing.assert_allclose(probabilities, expected_outputs(VALUES)[0], rtol=1e-5)
    assert sorted(rows) == list(range(10)) and places.shape == (10, 2)
    assert (probabilities.argmax(axis=1) == labels).mean() == pytest.approx(result["accuracy"])


def test_evaluate_passes_its_seed_on(network, tmp_path, monkeypatch):
    drawn_with = []
    monkeypatch.setattr(metrics, "tsne", lambda embeddings, seed: drawn_with.append(seed) or ((), ()))
    monkeypatch.setattr(plots, "save_figures", lambda *args: None)
    split = prepared(np.arange(100) * 2, np.arange(100) // 34)
    intervals = [evaluation.evaluate(network, split, tmp_path, seed=seed)["intervals"] for seed in (0, 1)]
    assert intervals[0] != intervals[1]
    assert drawn_with == [0, 1]


@pytest.fixture(scope="module")
def explained_network():
    """A small network of three classes that can be explained."""
    from cnn_model import build_model

    keras.utils.set_random_seed(1)
    return build_model("mini_xcp", num_classes=3, num_embeddings=2, embedding_size=8, input_size=24)


def noisy(n=11):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 24, 24, 1), np.uint8)
    meta = {"dataset": "toy", "split": "val", "class_names": list(NAMES)}
    return PreparedSplit(pixels, np.arange(n) % 3, meta)


@pytest.mark.parametrize("views", ["none", "flip"])
def test_maps_explain_the_predicted_labels(explained_network, tmp_path, monkeypatch, views):
    import explain

    monkeypatch.setattr(plots, "save_figures", lambda *args: None)
    split = noisy()
    plain = evaluation.evaluate(explained_network, split, tmp_path, views=views)
    assert "explain" not in plain and not (tmp_path / "explain.png").exists()
    assert "overlap" not in evaluation.format_table(plain)

    asked = []
    batches = explain.batches
    monkeypatch.setattr(explain, "batches", lambda *args: asked.append(args) or batches(*args))
    result = evaluation.evaluate(explained_network, split, tmp_path, batch_size=4, views=views, with_maps=True)
    probabilities, _ = evaluation.predict(explained_network, split.images, views=views)
    ((_, images, labels, batch_size),) = asked
    assert images is split.images and batch_size == 4
    np.testing.assert_array_equal(labels, probabilities.argmax(axis=1))
    expected = explain.overlap(explain.maps(explained_network, split.images, labels).vector_maps)
    found = result["explain"]
    assert found["overlap"] == pytest.approx(np.nanmean(expected), abs=1e-6)
    assert found["interval"][0] < found["overlap"] < found["interval"][1]
    assert (found["n"], found["num_embeddings"]) == (11, 2)
    assert json.loads((tmp_path / "result.json").read_text())["explain"] == found
    table = evaluation.format_table(result)
    assert f"{found['overlap']:.3f}   95% interval {found['interval'][0]:.3f}" in table
    assert ("not of their mirror images" in table) == (views == "flip")
    assert (tmp_path / "explain.png").stat().st_size > 0

    evaluation.evaluate(explained_network, split, tmp_path, views=views)
    assert not (tmp_path / "explain.png").exists()  # it would not belong to the new result


def test_one_vector_has_a_figure_and_no_overlap(tmp_path, monkeypatch):
    from cnn_model import build_model

    monkeypatch.setattr(plots, "save_figures", lambda *args: None)
    network = build_model("mini_xcp", num_classes=3, num_embeddings=1, embedding_size=8, input_size=24)
    result = evaluation.evaluate(network, noisy(), tmp_path, with_maps=True)
    assert (result["explain"]["overlap"], result["explain"]["interval"], result["explain"]["n"]) == (None, None, 0)
    assert "no overlap" in evaluation.format_table(result) and (tmp_path / "explain.png").exists()


def test_a_network_that_cannot_be_explained_is_refused_before_it_runs(network, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "predict", lambda *args, **options: pytest.fail("predicted"))
    with pytest.raises(UserError, match="embedding_dense"):
        evaluation.evaluate(network, prepared(VALUES, LABELS), tmp_path, with_maps=True)


def test_evaluate_refuses_a_network_of_other_classes(network, tmp_path):
    split = prepared(VALUES, LABELS, names=(*NAMES, "Glaring"))
    with pytest.raises(
        UserError, match=r"toy/val: expected a network of its 4 classes \(Dark, .*\), received one of 3"
    ):
        evaluation.evaluate(network, split, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_result_comes_last(network, tmp_path, monkeypatch):
    """A run without result.json is unfinished, so nothing may follow it."""

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(plots, "save_figures", fail)
    with pytest.raises(OSError, match="no space left"):
        evaluation.evaluate(network, prepared(VALUES, LABELS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_says_whether_the_code_is_the_committed_one(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    code = tmp_path / "evaluation.py"
    code.write_text("one")
    monkeypatch.setattr(evaluation, "__file__", str(code))
    assert evaluation.commit() is None  # no repository yet
    git("init")
    assert evaluation.commit() is None  # no commit yet
    git("add", "evaluation.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    head = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("untracked files change no result")
    assert evaluation.commit() == head
    code.write_text("two")
    assert evaluation.commit() == f"{head}-dirty"


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert evaluation.commit() is None


RESULT = {
    "dataset": "toy",
    "split": "test",
    "n": 1200,
    "accuracy": 0.9,
    "mean_class_recall": 0.55,
    "macro_f1": 0.5,
    "ece": 0.0321,
    "intervals": {"accuracy": [0.8826, 0.9174], "mean_class_recall": [0.5, 0.6], "macro_f1": [0.45, 0.55]},
    "per_class": {
        "Neutral": {"n": 1190, "precision": 0.95, "recall": 0.9, "f1": 0.924},
        "Happy": {"n": 10, "precision": 0.1, "recall": 0.2, "f1": 0.133},
        "Contempt": {"n": 0, "precision": None, "recall": None, "f1": None},
    },
    "class_names": ["Neutral", "Happy", "Contempt"],
    "confusion_matrix": [[1071, 119, 0], [8, 2, 0], [0, 0, 0]],
}


def test_format_table_holds_every_number():
    """Rows of words and numbers; how they are aligned and titled is free."""
    rows = [" ".join(line.split()) for line in evaluation.format_table(RESULT).splitlines()]
    for row in (
        *("toy/test: 1,200 images", "accuracy 90.00% 95% interval 88.26% to 91.74%"),
        *("mean class recall 55.00% 95% interval 50.00% to 60.00%", "macro F1 50.00% 95% interval 45.00% to 55.00%"),
        *("expected calibration error 0.032", "Neutral 95.0% 90.0% 92.4% 1,190", "Contempt - - - 0"),
        *("Neutral 1,071 119 0", "Happy 8 2 0", "Contempt 0 0 0"),
    ):
        assert row in rows


@pytest.mark.parametrize(
    ("selected_on", "split", "published", "flatters"),
    [("test", "test", True, True), ("val", "test", False, False), ("val", "val", False, True)],
)
def test_format_table_names_the_split_that_chose_the_epoch(selected_on, split, published, flatters):
    table = evaluation.format_table({**RESULT, "split": split, "selected_on": selected_on})
    assert ("selected on the test split (--select-on test)" in table) is published
    assert ("selected on this same split" in table) is flatters


def test_a_split_selected_the_epoch_where_the_file_says_so_of_this_data_set():
    split, metrics_of_file = prepared(VALUES, LABELS), {"split": "val", "accuracy": 0.5}
    assert evaluation.selected_on("toy/train", metrics_of_file, split) == "val"
    assert evaluation.selected_on("other/train", metrics_of_file, split) is None
    assert evaluation.selected_on("toy/train", {"split": "test"}, split) is None
    assert evaluation.selected_on("toy/train", {}, split) is None
