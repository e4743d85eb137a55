"""A TensorFlow Lite file recognises without Keras; one that is damaged or not ours is one message."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import tempfile
import zipfile

import numpy as np
import pytest
from conftest import run_python
from test_onnx_network import INFO

from files import UserError
from model_files import lite_check
from model_files.description import to_json
from model_files.lite_network import LiteNetwork
from test_model import TestModels

needs_litert = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None, reason="pip install -r requirements-export.txt"
)


@functools.cache
def toy(kind: str = "good") -> bytes:
    """A TensorFlow Lite model of 2 x 2 pixels: probabilities softmax(-m, m) of the red mean m over 255."""
    import tensorflow as tf

    def function(pixels):
        mean = tf.reduce_mean(pixels, axis=(1, 2)) / 255
        if kind == "no end":
            mean = tf.while_loop(lambda x: tf.reduce_all(x > -1), lambda x: (x + 0 * x,), (mean,))[0]
        logits = tf.stack((-mean[:, 0], mean[:, 0]), axis=1)
        probabilities = logits if kind == "no softmax" else tf.nn.softmax(logits)
        name = "p" if kind == "other names" else "probabilities"
        if kind == "integers":
            probabilities = tf.cast(probabilities, tf.int32)
        return {name: probabilities, "embeddings": tf.reshape(mean, (-1, 1, 3))}

    module = tf.Module()
    module.serve = tf.function(function, input_signature=[tf.TensorSpec((None, 2, 2, 3), tf.float32, name="pixels")])
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": module.serve})
        return tf.lite.TFLiteConverter.from_saved_model(folder).convert()


def write_toy(path, kind="good", info: str | None = to_json(INFO)):
    path.write_bytes(toy(kind))
    if info is not None:
        with zipfile.ZipFile(path, "a") as behind:
            behind.writestr("ad_corre.json", info)
    return path


@needs_litert
def test_every_image_is_predicted_whatever_the_batch(tmp_path):
    network = LiteNetwork(write_toy(tmp_path / "toy.tflite"))
    assert network.info == INFO
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), np.uint8)
    means = images.astype(np.float64).mean(axis=(1, 2)) / 255
    dark = 1 / (1 + np.exp(2 * means[:, 0]))
    for used in (network, pickle.loads(pickle.dumps(network))):
        for batch_size in (2, 64):
            probabilities, embeddings = used.predict(images, batch_size)
            np.testing.assert_allclose(probabilities, np.stack((dark, 1 - dark), axis=1), rtol=1e-5)
            np.testing.assert_allclose(embeddings[:, 0], means, rtol=1e-5)


@needs_litert
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("no end", "runs for 5 s", marks=pytest.mark.slow),
        ("no softmax", "probabilities: expected 0 or more with the sum 1"),
        ("integers", "probabilities: expected float32, found int32"),
        ("other names", r"expected pixels \(N, 2, 2, 3\) in, .*, found "),
    ],
)
def test_a_network_that_is_no_classifier_is_refused(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(lite_check, "SECONDS", 5)
    with pytest.raises(UserError, match=rf"bad\.tflite: .*{message}"):
        LiteNetwork(write_toy(tmp_path / "bad.tflite", kind))


@needs_litert
def test_what_is_none_of_our_files_is_refused(tmp_path):
    path = tmp_path / "bad.tflite"
    whole = toy()
    for content in (b"", b"Dear Sir or Madam", whole[: len(whole) // 2], whole[:40] + b"\xff" * 400 + whole[440:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.tflite: expected a TensorFlow Lite file of a network"):
            LiteNetwork(path)
    with pytest.raises(UserError, match=r"bad\.tflite: no description of its network"):
        LiteNetwork(write_toy(path, info=None))
    with pytest.raises(UserError, match=r"bad\.tflite: cannot read the description"):
        LiteNetwork(write_toy(path, info="{}"))


@needs_litert
def test_operations_of_tensorflow_itself_are_refused(tmp_path):
    """They could write files; LiteRT does not have them."""
    import tensorflow as tf

    module = tf.Module()
    module.serve = tf.function(
        lambda pixels: {"text": tf.io.read_file(tf.strings.as_string(pixels[0, 0, 0, 0]))},
        input_signature=[tf.TensorSpec((1, 2, 2, 3), tf.float32, name="pixels")],
    )
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": module.serve})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    (tmp_path / "bad.tflite").write_bytes(converter.convert())
    with pytest.raises(UserError, match=r"bad\.tflite: expected a TensorFlow Lite file of a network"):
        LiteNetwork(tmp_path / "bad.tflite")


@needs_litert
def test_the_first_label_needs_no_keras(tmp_path):
    code = "import sys; from test_model import TestModels; model = TestModels(sys.argv[1])"
    code += "; print(model.recognize(sys.argv[2], detect_face=False)[0].label)"
    code += "; print(sorted({'keras', 'tensorflow', 'h5py'} & set(sys.modules)))"
    import cv2

    cv2.imwrite(str(tmp_path / "face.png"), np.full((2, 2, 3), 255, np.uint8))
    done = run_python("-c", code, write_toy(tmp_path / "toy.tflite"), tmp_path / "face.png")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "Bright" and last == "[]" and done.stderr == ""


@needs_litert
def test_it_explains_nothing(tmp_path):
    model = TestModels(write_toy(tmp_path / "toy.tflite"))
    with pytest.raises(UserError, match=r"\.tflite.* weights file"):
        model.explain(model.recognize(np.zeros((2, 2, 3), np.uint8), detect_face=False)[0].faces)
