"""A file in 8-bit integers is calibrated on training images, measured, and kept only if it is about as accurate."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import types
import zipfile

import numpy as np
import pytest
from conftest import write_split

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import evaluation
import test as test_module
from data_helper import open_split
from files import UserError
from model_files import export, model_file, quantization
from model_files.description import ExportInfo, from_json
from model_files.onnx_network import OnnxNetwork
from model_files.quantization import Quantization

ONNX_HERE = all(importlib.util.find_spec(name) for name in ("tf2onnx", "onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX_HERE, reason="pip install -r requirements-export.txt")


@pytest.fixture(scope="module")
def loaded(tiny_weights):
    return model_file.load_model(tiny_weights)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Gray images of 24 pixels: 40 to train on and 300 to measure on, more than one batch."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 300)):
        coarse = rng.integers(0, 256, (number, 4, 4, 1), np.uint8)
        images = coarse.repeat(6, axis=1).repeat(6, axis=2)
        labels = rng.integers(0, 7, number)
        write_split(folder, labels, split=split, dataset="fer2013", shape=(24, 24, 1), images=images)
    return folder


@pytest.fixture(scope="module")
def splits(data_dir):
    return [open_split(data_dir, "fer2013", split) for split in ("train", "val")]


# Calibration images


def test_calibration_images_are_a_seeded_choice_as_a_file_takes_them(splits):
    train, _ = splits
    images, source = quantization.calibration_images(train, 24, 10, seed=3)
    assert images.shape == (10, 24, 24, 3) and images.dtype == np.uint8
    assert source == "10 images of fer2013/train, seed 3"
    known = {image.tobytes() for image in np.asarray(train.images)}
    chosen = {np.ascontiguousarray(image[..., :1]).tobytes() for image in images}
    assert len(chosen) == 10 and chosen <= known  # without replacement
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    assert not np.array_equal(images, quantization.calibration_images(train, 24, 10, seed=4)[0])
    smaller, source = quantization.calibration_images(train, 12, 1_000, seed=3)
    assert smaller.shape == (40, 12, 12, 3) and source.startswith("40 images")


# The measurement


def shifted(network, every):
    """A run whose label is wrong for one of ``every`` images, and whose first embedding vector is turned round."""

    def run(pixels):
        probabilities, embeddings = evaluation.predict(network, pixels)
        if every:
            probabilities[::every] = np.roll(probabilities[::every], 1, axis=1)
        embeddings[:, 0] *= -2
        return probabilities, embeddings

    return run


def test_the_measures_are_those_of_every_image(loaded, splits):
    network, (_, val) = loaded[0], splits
    found = quantization.measure(shifted(network, 4), network, val, 24)
    probabilities, _ = evaluation.predict(network, np.repeat(val.images, 3, axis=-1))
    labels, before = val.labels.tolist(), probabilities.argmax(axis=1).tolist()
    # Batches of 256 and 44 images.
    after = [(label + 1) % 7 if (i % 256) % 4 == 0 else label for i, label in enumerate(before)]
    assert found.n == 300 and found.same_label == sum(a == b for a, b in zip(after, before, strict=True)) / 300
    assert found.before == sum(a == b for a, b in zip(before, labels, strict=True)) / 300
    assert found.after == sum(a == b for a, b in zip(after, labels, strict=True)) / 300
    assert found.points == pytest.approx(100 * (found.after - found.before))
    assert found.cosine == pytest.approx(0, abs=1e-6)  # one vector of two turned round: (-1 + 1) / 2


@pytest.mark.parametrize(("after", "kept"), [(0.5, True), (0.497, True), (0.4969, False), (0.6, True)])
def test_a_larger_loss_than_allowed_is_refused_with_the_numbers(splits, monkeypatch, after, kept):
    found = quantization.Accuracies(0.5, after, 0.9, 0.99, 300)
    monkeypatch.setattr(quantization, "measure", lambda *_: found)
    data = Quantization(np.zeros((1, 24, 24, 3), np.uint8), splits[1], "")
    if kept:
        assert data.measure(None, None, "a.onnx") is found
    else:
        with pytest.raises(UserError, match=r"a\.onnx: .*0\.3 points.* 50\.00% before and 49\.69% after .*--max-drop"):
            data.measure(None, None, "a.onnx")


def test_a_file_that_lost_too_much_is_not_kept(loaded, splits, tmp_path, monkeypatch):
    """A converter that writes a file of which the runtime says something else."""
    plan = dataclasses.replace(
        export._FORMATS["tflite"],
        write=lambda serving, path, info, images: path.write_bytes(b"new"),
        open=lambda path: lambda pixels: tuple(np.nan * array for array in shifted(loaded[0], 0)(pixels)),
    )
    monkeypatch.setitem(export._FORMATS, "tflite", plan)
    path = tmp_path / "a.tflite"
    path.write_bytes(b"of an earlier export")
    images, source = quantization.calibration_images(splits[0], 24, 4, 0)
    with pytest.raises(UserError, match="NaN or infinity"):
        export.export_quantized(*loaded, path, "tflite", Quantization(images, splits[1], source))
    assert path.read_bytes() == b"of an earlier export" and list(tmp_path.iterdir()) == [path]


# What stays in float32


def test_integers_follow_large_convolutions_and_end_before_the_classifier():
    weights = {"w1": (8, 3, 3, 3), "w2": (8, 8, 1, 1), "depthwise": (8, 1, 3, 3), "m1": (8, 9), "m2": (9, 7), "c": (1,)}
    nodes = [
        ("first", "Conv", ("pixels", "w1"), "a"),
        ("relu of floats", "Relu", ("a",), "b"),
        ("second", "Conv", ("b", "w2"), "c1"),
        ("relu", "Relu", ("c1",), "c2"),
        ("depthwise", "Conv", ("c2", "depthwise"), "d"),
        ("residual", "Add", ("c2", "d"), "e"),
        ("offset", "Add", ("e", "c"), "f"),
        ("gate", "Sigmoid", ("f",), "g"),
        ("sum of floats", "Add", ("g", "b"), "h"),
        ("embedding", "Gemm", ("h", "m1"), "i"),
        ("products", "MatMul", ("i", "h"), "j"),
        ("classifier", "MatMul", ("j", "m2"), "k"),
    ]
    groups = [types.SimpleNamespace(name="group", i=8)]
    graph = types.SimpleNamespace(
        initializer=[types.SimpleNamespace(name=name, dims=dims) for name, dims in weights.items()],
        node=[
            types.SimpleNamespace(
                name=name, op_type=kind, input=inputs, output=(output,), attribute=groups if name == "depthwise" else []
            )
            for name, kind, inputs, output in nodes
        ],
    )
    assert quantization.integer_nodes(graph) == ["second", "relu", "depthwise", "residual", "embedding"]


def test_float_tensors_are_those_of_the_layers_around_the_backbone():
    scope = "serving_1/mini_xcp_1/"
    shapes = {
        "serving_default_pixels:0": (1, 48, 48, 3),
        f"{scope}pixel_input_1/moments/mean": (1, 1, 1, 1),
        f"{scope}backbone_1/conv2d_1/convolution": (32, 5, 5, 1),
        f"{scope}backbone_1/re_lu_1/Relu;{scope}backbone_1/conv2d_1/convolution;{scope}b/sub1": (1, 24, 24, 32),
        f"{scope}backbone_1/conv2d_1_2/convolution": (64, 3, 3, 32),
        f"{scope}backbone_1/re_lu_1_2/Relu;{scope}backbone_1/conv2d_1_2/convolution": (1, 12, 12, 64),
        f"{scope}embedding_dense_1/BiasAdd": (1, 1792),
        f"{scope}embeddings_1/mul": (1, 7, 256),
        f"{scope}logits_1/MatMul;{scope}logits_1/BiasAdd": (1, 7),
        "StatefulPartitionedCall_1:1": (1, 7),
    }
    names = list(shapes)
    assert quantization.float_tensors(shapes) == [names[i] for i in (1, 2, 3, 7, 8, 9)]


def test_what_cannot_be_quantised_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--quantize int8: expected --format onnx or tflite, received saved_model"):
        export.check_target(tmp_path / "a", "saved_model", quantize=True)


# The command


@pytest.mark.slow
@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "tflite"])
def test_the_command_writes_a_small_file_of_about_the_same_network(
    tiny_weights, loaded, splits, data_dir, tmp_path, monkeypatch, capsys, format
):
    monkeypatch.chdir(tmp_path)
    weights = shutil.copy(tiny_weights, "tiny.weights.h5")
    monkeypatch.setattr(
        "sys.argv",
        [
            *("test.py", "export", "--quantize", "int8", "--weights", weights, "--format", format),
            *("--data-dir", str(data_dir), "--calibration-images", "20", "--max-drop", "100"),
        ],
    )
    test_module.main()
    path = tmp_path / f"tiny_int8.{format}"
    assert {item.name for item in tmp_path.iterdir()} == {weights, path.name}
    first, calibrated, accuracy, change, same = capsys.readouterr().out.splitlines()
    assert first == f"wrote {path.name}: mini_xcp, 7 classes, {path.stat().st_size:,} bytes, int8"
    assert calibrated == "calibrated on 20 images of fer2013/train, seed 0"
    assert accuracy.startswith("accuracy on fer2013/val, n = 300: ") and "points" in change
    assert float(same.split("%")[0].split()[-1]) > 70  # of a network without training, whose labels are close calls
    export.export_network(*loaded, tmp_path / f"float.{format}", format)
    assert path.stat().st_size < 0.5 * (tmp_path / f"float.{format}").stat().st_size
    run = export.open_export(path, format)
    pixels = quantization.faces(splits[1], np.arange(50), 24)
    found, expected = run(pixels.astype(np.float32)), evaluation.predict(loaded[0], pixels)
    differences = [np.abs(found[i] - expected[i]).max() for i in range(2)]
    assert 1e-4 < differences[0] < 0.1 and 1e-4 < differences[1] < 0.3  # integers, but of the same network
    np.testing.assert_allclose(found[0].sum(axis=1), 1, atol=1e-5)  # the softmax is in float32
    np.testing.assert_allclose(np.linalg.norm(found[1], axis=-1), 1, atol=1e-5)
    for count in (1, 3):
        np.testing.assert_allclose(run(pixels[:count].astype(np.float32))[0], found[0][:count], atol=2e-2)
    if format == "onnx":
        info = OnnxNetwork(path, gpu=False).info
    else:
        info = from_json(ExportInfo, zipfile.ZipFile(path).read("ad_corre.json"), path)
    origin = f"{loaded[1].origin}; int8, calibrated on 20 images of fer2013/train, seed 0"
    assert info == ExportInfo(loaded[1].network, "synthetic/train", origin)
