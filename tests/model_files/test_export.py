"""Every exported file agrees with its network; one that does not is not kept."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import pickle
import shutil
import sys
import threading
import time
import weakref
import zipfile

import numpy as np
import pytest
from conftest import ROOT, run_python

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cv2
import keras

import evaluation
import test as test_module
from datasets import CLASS_NAMES
from files import UserError, whole_folder
from model_files import export, model_file
from model_files.description import ExportInfo, from_json
from model_files.onnx_network import OnnxNetwork
from test_model import TestModels

ONNX_HERE = all(importlib.util.find_spec(name) for name in ("tf2onnx", "onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX_HERE, reason="pip install -r requirements-export.txt")
PATHS = {"onnx": "tiny.onnx", "tflite": "tiny.tflite", "saved_model": "tiny_saved_model"}
FORMATS = [pytest.param("onnx", marks=needs_onnx), "tflite", "saved_model"]


@pytest.fixture(scope="module")
def loaded(tiny_weights):
    return model_file.load_model(tiny_weights)


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    """A function of a format: the file, exported once."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def path_of(format):
        if format not in done:
            path = folder / format / PATHS[format]
            differences = export.export_network(*loaded, path, format)
            assert set(differences) == {"probabilities", "embeddings"} and max(differences.values()) <= 1e-4
            done[format] = path
        return done[format]

    return path_of


def run_main(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["test.py", *map(str, args)])
    test_module.main()


# What is written


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_what_the_network_says(loaded, exported, format):
    path = exported(format)
    assert [item.name for item in path.parent.iterdir()] == [PATHS[format]]  # nothing temporary is left
    run = export.open_export(path, format)
    pixels = np.random.default_rng(3).uniform(0, 255, (3, 24, 24, 3)).astype(np.float32)
    outputs = loaded[0](pixels, training=False)
    exponentials = np.exp(np.asarray(outputs["logits"], np.float64))
    for count in (3, 1):
        probabilities, embeddings = run(pixels[:count])
        expected = (exponentials / exponentials.sum(axis=1, keepdims=True))[:count]
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
        np.testing.assert_allclose(embeddings, outputs["embeddings"][:count], atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_description_travels_with_the_file(exported, loaded, format):
    path = exported(format)
    if format == "onnx":
        info = OnnxNetwork(path, gpu=False).info
    elif format == "tflite":
        info = from_json(ExportInfo, zipfile.ZipFile(path).read("ad_corre.json"), path)
    else:
        info = from_json(ExportInfo, (path / "assets.extra" / "ad_corre.json").read_text(), path)
    assert info == ExportInfo(loaded[1].network, "synthetic/train", "train.py")


@needs_onnx
def test_onnx_holds_its_batch_open(exported):
    import onnx

    graph = onnx.load(exported("onnx")).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    assert [value.name for value in graph.input] == ["pixels"]


def test_the_command_writes_a_folder_beside_the_weights_and_replaces_its_own(
    tiny_weights, exported, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = exported("saved_model")  # converting once is enough
    replace_format(monkeypatch, "saved_model", write=lambda serving, path, info: shutil.copytree(before, path))
    stale = tmp_path / PATHS["saved_model"] / "stale"
    stale.mkdir(parents=True)
    (stale.parent / "saved_model.pb").write_bytes(b"of an earlier export")
    weights = shutil.copy(tiny_weights, "tiny.weights.h5")
    run_main(monkeypatch, "export", "--weights", weights, "--format", "saved_model")
    first, *differences = capsys.readouterr().out.splitlines()
    size = sum(item.stat().st_size for item in before.rglob("*") if item.is_file())
    assert first == f"wrote tiny_saved_model: mini_xcp, 7 classes, {size:,} bytes"
    assert [line.split(": ")[0] for line in differences] == ["largest difference from Keras"] * 2
    assert sorted(os.listdir()) == ["tiny.weights.h5", "tiny_saved_model"] and not stale.exists()


# What is not written


def replace_format(monkeypatch, format, **parts):
    monkeypatch.setitem(export._FORMATS, format, dataclasses.replace(export._FORMATS[format], **parts))


@pytest.mark.parametrize(
    ("place", "shift"), [("probabilities", 9e-5), ("probabilities", float("nan")), ("embeddings", 1.2e-4)]
)
def test_a_file_that_does_not_agree_is_not_kept(loaded, tmp_path, monkeypatch, shift, place):
    """A converter that writes a file of which the runtime says something else, of the picture alone at least."""

    def run(pixels):
        probabilities, embeddings = evaluation.predict(loaded[0], pixels)
        if len(pixels) == 1:
            (probabilities if place == "probabilities" else embeddings)[0, -1] += shift
        return probabilities, embeddings

    write = lambda serving, path, info: path.write_bytes(b"new")  # noqa: E731
    replace_format(monkeypatch, "tflite", write=write, open=lambda path: run)
    path = tmp_path / "a.tflite"
    path.write_bytes(b"of an earlier export")
    if shift == 9e-5:
        assert export.export_network(*loaded, path, "tflite")[place] == pytest.approx(shift, abs=1e-5)
        assert path.read_bytes() == b"new"
    else:
        with pytest.raises(UserError, match=rf"a\.tflite: .*does not agree .* found .* in the {place}"):
            export.export_network(*loaded, path, "tflite")
        assert path.read_bytes() == b"of an earlier export"
    assert list(tmp_path.iterdir()) == [path]


def test_other_shapes_do_not_agree(loaded):
    def without_embeddings(pixels):
        return np.zeros((len(pixels), 7), np.float32), np.zeros((len(pixels), 1), np.float32)

    found = export.compare(without_embeddings, loaded[0], 24)
    assert found["embeddings"] == float("inf") and 0 < found["probabilities"] < 1


def test_what_a_converter_raises_is_one_message(loaded, tmp_path, monkeypatch):
    def fail(network, size):
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(export, "serving_network", fail)
    with pytest.raises(UserError, match=r"a\.tflite: this network .*\(RuntimeError: no such operation\)"):
        export.export_network(*loaded, tmp_path / "a.tflite", "tflite")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_said_before_anything_is_read(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name in ("onnxruntime", "tf2onnx") else there(name)
    )
    remedy = r"tf2onnx and .*onnxruntime not installed here.*run: pip install -r requirements-export\.txt"
    with pytest.raises(UserError, match=remedy):
        run_main(monkeypatch, "export", "--weights", tmp_path / "none.h5", "--output", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_only_tensorflow_exports(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(UserError, match=r"TensorFlow backend, Keras runs on jax; set KERAS_BACKEND=tensorflow"):
        export.export_network(*loaded, tmp_path / "a.tflite", "tflite")


def test_a_target_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder.tflite").mkdir()
    for name, format, message in (
        ("a.onnx", "tflite", r"a\.onnx: expected a name that ends with \.tflite"),
        ("photos", "saved_model", "photos: expected a new folder or a SavedModel to replace"),
        ("notes", "saved_model", "notes: expected a new folder or a SavedModel to replace"),
        ("folder.tflite", "tflite", r"folder\.tflite: expected a file to write, found a folder"),
        ("a.pb", "graph", "format: expected one of onnx, tflite, saved_model, received 'graph'"),
    ):
        with pytest.raises(UserError, match=message):
            export.check_target(tmp_path / name, format)


@pytest.mark.parametrize(
    ("weights", "format", "expected"),
    [
        ("runs/a/best.weights.h5", "onnx", "runs/a/best.onnx"),
        ("hf://owner/a/best.weights.h5", "onnx", "best.onnx"),
        ("AffectNet_6336.h5", "tflite", "AffectNet_6336.tflite"),
        ("a.b.keras", "saved_model", "a.b_saved_model"),
    ],
)
def test_an_export_is_named_after_its_weights_and_written_beside_them(weights, format, expected):
    assert str(export.default_path(weights, format)) == expected


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a"
    for content in ("first", "second"):
        with whole_folder(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert [item.name for item in target.iterdir()] == [content]
    with pytest.raises(RuntimeError), whole_folder(target) as temporary:
        temporary.mkdir()
        (temporary / "third").write_text("third")
        raise RuntimeError
    assert [str(item.relative_to(target.parent)) for item in target.parent.rglob("*")] == ["a", "a/second"]
    with pytest.raises(FileNotFoundError), whole_folder(target):
        pass  # the block made nothing: what was there stays
    assert [str(item.relative_to(target.parent)) for item in target.parent.rglob("*")] == ["a", "a/second"]


# Recognising through it


@needs_onnx
def test_recognition_through_onnx_is_that_of_keras(tiny_weights, exported, tmp_path):
    ours, through_onnx = TestModels(tiny_weights), TestModels(exported("onnx"))
    assert through_onnx.class_names == ours.class_names and through_onnx.input_size == ours.input_size
    rng = np.random.default_rng(1)
    faces = [rng.integers(0, 256, shape, np.uint8) for shape in ((24, 24, 3), (50, 40, 1), (10, 10), (24, 24, 3))]
    for batch_size in (3, 64):
        for found, expected in zip(through_onnx.predict(faces, batch_size), ours.predict(faces), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    cv2.imwrite(str(tmp_path / "face.png"), faces[0])
    assert through_onnx.recognize_fer(tmp_path / "face.png").label == ours.recognize_fer(tmp_path / "face.png").label


@needs_onnx
def test_onnx_model_survives_pickling_and_explains_nothing(exported):
    model = TestModels(exported("onnx"))
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    found = pickle.loads(pickle.dumps(model)).predict(pixels)
    np.testing.assert_array_equal(found[0], model.predict(pixels)[0])
    with pytest.raises(UserError, match=r"exported file .*use the weights file"):
        model.explain(model.recognize(pixels, detect_face=False)[0].faces)


@needs_onnx
def test_the_first_label_through_onnx_needs_no_keras(exported):
    code = "; ".join(
        [
            "import sys, test",
            f"sys.argv = ['test.py', 'recognize', {str(ROOT / 'examples/astronaut.png')!r}, '--weights', sys.argv[1]]",
            "test.main()",
            "print(sorted({'keras', 'tensorflow', 'h5py', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)))",
        ]
    )
    done = run_python("-c", code, exported("onnx"))
    assert done.returncode == 0, done.stderr
    head, row, heavy = done.stdout.splitlines()
    assert head.split()[:2] == ["image", "label"] and row.split()[1] in CLASS_NAMES[:7] and heavy == "[]"
    assert done.stderr == ""


@pytest.fixture
def inference(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import inference

    return inference


def test_what_the_benchmark_compares_is_the_same_work(inference, exported, tiny_weights, tmp_path):
    ours, through_onnx = TestModels(tiny_weights), TestModels(exported("onnx")) if ONNX_HERE else None
    faces = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    sides = inference.model_sides(ours, through_onnx, exported("tflite"), faces)
    expected = sides.pop("ours")()
    np.testing.assert_allclose(sides.pop("model.predict")()["embeddings"], expected[1], atol=1e-5)
    assert set(sides) == ({"onnx", "tflite"} if ONNX_HERE else {"tflite"})
    for call in sides.values():
        for found, wanted in zip(call(), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, face in zip(paths, faces, strict=True):
        cv2.imwrite(str(path), face)
    sides = inference.file_sides(ours, through_onnx, paths, detect_face=False)
    expected = sides.pop("model.predict")()
    for call in sides.values():
        assert [face.label for face in call()] == expected


def test_the_benchmark_counts_time_and_memory(inference):
    def side(seconds):
        return lambda: time.sleep(seconds)

    rows = inference.time_calls("toy", 4, {"model.predict": side(0.04), "ours": side(0.01)}, calls=3)
    assert [row["calls"] for row in rows] == [3, 3]
    assert rows[1]["p99_s"] >= rows[1]["p50_s"] >= 0.01 and rows[0]["images_per_s"] <= 4 / 0.04
    assert rows[0]["speed_over_predict"] == 1 < rows[1]["speed_over_predict"] <= 4.5
    code = "import time; b = b'x' * (9 * 10**7); time.sleep(0.3)"
    found = inference.run_once(["-c", code])
    assert found["seconds"] > 0.3 and found["seconds"] > found["processor_seconds"] > 0
    assert 9e7 < found["peak_bytes"] < 2e8
    with pytest.raises(UserError, match="failed"):
        inference.run_once(["-c", "raise SystemExit(3)"])


def test_garbage_is_collected_while_the_converter_runs():
    """Otherwise the copies of the graph that it leaves would fill the memory."""

    class Copy:
        pass

    enabled = gc.isenabled()
    gc.disable()
    try:
        with export._garbage_collected(seconds=0.01):
            copied = Copy()
            copied.itself, gone = copied, threading.Event()
            weakref.finalize(copied, gone.set)
            del copied
            assert gone.wait(30)
    finally:
        if enabled:
            gc.enable()
