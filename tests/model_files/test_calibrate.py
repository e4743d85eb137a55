"""A calibration is kept in the model file, and acts wherever probabilities come out."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import shutil

import numpy as np
import pytest
from conftest import write_split

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import evaluation
import explain
import test as test_module
from config import DatasetName, ModelConfig
from data_helper import open_split
from datasets import CLASS_NAMES
from files import UserError
from measuring.calibration import Calibration
from model_files import calibrate, export, model_file
from model_files.safe_hdf5 import read_arrays
from test import CalibrateConfig
from test_model import TestModels

FITTED = Calibration(1.6, 1.4)


@pytest.fixture(scope="module")
def calibrated_weights(tiny_weights, tmp_path_factory):
    """A copy of the file of a network with a calibration of its own."""
    path = tmp_path_factory.mktemp("calibrated") / "calibrated.weights.h5"
    shutil.copy(tiny_weights, path)
    info = model_file.read_info(path)
    network = dataclasses.replace(info.network, **dataclasses.asdict(FITTED))
    model_file.redescribe(path, dataclasses.replace(info, network=network, calibrated_on="synthetic/val"))
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (6, 24, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def expected(tiny_weights, images):
    """Probabilities of the formula, from the logits of the file without a calibration."""
    logits, _ = evaluation.outputs(model_file.load_model(tiny_weights)[0], images)
    below = logits.max(axis=1, keepdims=True).astype(np.float64) - logits
    shares = np.exp(-(below**1.4) / 1.6)
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.fixture
def split(tmp_path):
    rng = np.random.default_rng(0)
    write_split(
        tmp_path / "data",
        np.arange(70) % 7,
        split="val",
        shape=(24, 24, 1),
        images=rng.integers(0, 256, (70, 24, 24, 1), np.uint8),
    )
    return open_split(tmp_path / "data", "synthetic", "val")


def test_every_way_to_probabilities_is_calibrated(calibrated_weights, tiny_weights, images, expected):
    network, _ = model_file.load_model(calibrated_weights)
    found, embeddings = evaluation.predict(network, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain, same = evaluation.predict(model_file.load_model(tiny_weights)[0], images)
    np.testing.assert_array_equal(embeddings, same)
    np.testing.assert_array_equal(found.argmax(axis=1), plain.argmax(axis=1))
    np.testing.assert_allclose(TestModels(calibrated_weights).predict(images)[0], expected, atol=1e-6)
    np.testing.assert_allclose(explain.maps(network, images).probabilities, expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 0.01  # or nothing of this could fail


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_the_graph_of_an_export_holds_the_calibration(calibrated_weights, images, expected, tmp_path, format):
    if format == "onnx" and not (importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnxruntime")):
        pytest.skip("pip install -r requirements-export.txt")
    path = tmp_path / f"a.{format}"
    export.export_network(*model_file.load_model(calibrated_weights), path, format)
    found, _ = export.open_export(path, format)(images.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_training_starts_without_the_calibration_of_its_weights(calibrated_weights):
    options = ModelConfig(num_embeddings=2, embedding_size=8)
    network, described = model_file.new_network(options, CLASS_NAMES[:7], calibrated_weights)
    assert (described.temperature, described.exponent) == (1.0, 1.0)
    assert "calibration" not in {layer.name for layer in network.layers}


def test_a_converted_and_a_kept_model_stay_calibrated(calibrated_weights, images, expected, tmp_path):
    network, info = model_file.load_model(calibrated_weights)
    model_file.save_model(tmp_path / "half.weights.h5", network, info, half=True)
    network.save(tmp_path / "a.keras")
    for name, tolerance in (("half.weights.h5", 1e-3), ("a.keras", 1e-6)):
        found, _ = evaluation.predict(model_file.load_model(tmp_path / name)[0], images)
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_calibrate_changes_the_description_alone_and_only_once(tiny_weights, split, tmp_path):
    path = tmp_path / "a.weights.h5"
    shutil.copy(tiny_weights, path)
    before = read_arrays(path).arrays
    _, info = calibrate.calibrate(path, split, batch_size=16)
    assert info == dataclasses.replace(
        model_file.read_info(tiny_weights), network=info.network, calibrated_on="synthetic/val"
    )
    measured = calibrate.measure(tiny_weights, split)
    assert (info.network.temperature, info.network.exponent) == dataclasses.astuple(measured.fitted)
    assert measured.nll[1] < measured.nll[0] and measured.nll[1] < measured.nll[2]
    after = read_arrays(path).arrays
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    calibrate.calibrate(path, split)  # what the file has already does not matter
    again = model_file.read_info(path).network
    assert again.temperature == pytest.approx(info.network.temperature, rel=1e-3)
    assert again.exponent == pytest.approx(info.network.exponent, rel=1e-3)


def test_the_command_prints_the_error_before_and_after(tiny_weights, split, tmp_path, capsys):
    path = tmp_path / "a.weights.h5"
    shutil.copy(tiny_weights, path)
    test_module.calibrate(CalibrateConfig(str(path), DatasetName.synthetic, data_dir=str(tmp_path / "data")))
    shown = capsys.readouterr().out
    network, measured = model_file.read_info(path).network, calibrate.measure(tiny_weights, split)
    assert f"temperature {network.temperature:.4f}, exponent {network.exponent:.4f}" in shown
    assert "synthetic/val, 70 images" in shown and f"wrote {path}" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "expected calibration error {:.4f} {:.4f} {:.4f}".format(*measured.ece) in rows
    assert model_file.describe(path)["calibration"].endswith("fitted on synthetic/val")
    assert model_file.describe(tiny_weights)["calibration"] == "none"


def test_a_file_that_cannot_be_written_stays_whole(tiny_weights, split, tmp_path, monkeypatch):
    path = tmp_path / "a.weights.h5"
    shutil.copy(tiny_weights, path)

    def fail(arrays, attributes):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(model_file, "to_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        calibrate.calibrate(path, split)
    assert path.read_bytes() == tiny_weights.read_bytes()
    assert [item.name for item in tmp_path.glob("*a.weights.h5")] == ["a.weights.h5"]


def test_what_cannot_be_calibrated_is_refused(tiny_weights, split, tmp_path):
    network, _ = model_file.load_model(tiny_weights)
    network.save(tmp_path / "a.keras")
    with pytest.raises(UserError, match=r"a\.keras: .*test\.py convert"):
        calibrate.calibrate(tmp_path / "a.keras", split)
    with pytest.raises(UserError, match=r"hf://o/r/a\.weights\.h5: .*this machine"):
        test_module.calibrate(CalibrateConfig("hf://o/r/a.weights.h5"))
    write_split(tmp_path / "data", np.arange(16) % 8, split="test", shape=(24, 24, 1), num_classes=8)
    eight = open_split(tmp_path / "data", "synthetic", "test")
    with pytest.raises(UserError, match="expected a network of its 8 classes"):
        calibrate.calibrate(tiny_weights, eight)
