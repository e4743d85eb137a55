"""Recognition from Python: faces and image files to labels, and what is refused."""

from __future__ import annotations

import functools
import re

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python

import evaluation
import runtime
import test_model
from datasets.shared.expressions import CLASS_NAMES
from files import UserError
from images import resize_image
from model_files import model_file
from model_files.description import ModelInfo, NetworkDescription
from test_model import TestModels


@pytest.fixture(scope="module")
def model(tiny_weights):
    return TestModels(tiny_weights)


def image(*shape, seed=0, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def save(path, pixels) -> str:
    """Writes a PNG; colour arrays are OpenCV's (H, W, BGR or BGRA)."""
    assert cv2.imwrite(str(path), pixels)
    return str(path)


@pytest.mark.slow
def test_a_notebook_imports_it_from_any_folder(tmp_path):
    """Python's own package `test` is in the way of `from test import TestModels`; not of this name."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from test_model import TestModels, DEFAULT_WEIGHTS; "
        "assert DEFAULT_WEIGHTS.is_file(); assert not {'keras', 'tensorflow'} & set(sys.modules)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# Faces to probabilities


def test_probabilities_are_the_softmax_of_the_networks_logits(model):
    faces = image(5, 24, 24, 3)
    probabilities, embeddings = model.predict(faces)
    assert (probabilities.shape, probabilities.dtype) == ((5, 7), np.float32)
    assert (embeddings.shape, embeddings.dtype) == ((5, 2, 8), np.float32)
    outputs = model.network(faces)
    exponentials = np.exp(np.asarray(outputs["logits"], np.float64))
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(embeddings, outputs["embeddings"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    assert len({row.tobytes() for row in probabilities}) == 5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_changes_nothing(model, batch_size):
    faces = image(7, 24, 24, 1)
    for found, expected in zip(model.predict(faces, batch_size), model.predict(faces, 7), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_arrays_lists_and_gray_in_every_form_are_the_same(model):
    gray = image(3, 30, 20)
    colour = np.repeat(gray[..., None], 3, axis=-1)
    expected = model.predict(colour)
    for same in (
        gray[..., None],
        list(gray),
        list(gray[..., None]),
        tuple(colour),
        [gray[0], colour[1], gray[2][..., None]],
    ):
        for found, wanted in zip(model.predict(same), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_faces_of_any_size_are_resized_to_the_networks_side_in_order(model):
    faces = [image(*shape, seed=i) for i, shape in enumerate([(24, 24, 3), (100, 60, 3), (1, 1, 3), (3, 500, 3)])]
    probabilities, _ = model.predict(faces)
    for face, found in zip(faces, probabilities, strict=True):
        alone, _ = model.predict(resize_image(face, 24)[None])
        np.testing.assert_allclose(found, alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images\[0\]: expected uint8 .* received float32 \(8, 8, 3\)"),
        ([image(8, 8, 3), image(8, 8, 3) / 255], r"images\[1\]: .* received float64 \(8, 8, 3\)"),
        ([image(8, 8, 4)], r"images\[0\]: .* received uint8 \(8, 8, 4\)"),
        ([image(8)], r"images\[0\]: .* received uint8 \(8,\)"),
        ([image(0, 8, 3)], r"images\[0\]: .* received uint8 \(0, 8, 3\)"),
        ([image(8, 8, dtype=np.uint16)], r"images\[0\]: .* received uint16 \(8, 8"),
        ([], "images: expected one or more, received none"),
    ],
)
def test_what_is_no_face_is_refused(model, images, message):
    with pytest.raises(UserError, match=message):
        model.predict(images)


def test_one_image_is_not_taken_for_many_rows(model):
    """A single (H, W, 3) array would otherwise be H gray images of W x 3 pixels."""
    with pytest.raises(UserError, match=r"images: .*\(48, 48, 3\)"):
        model.predict(image(48, 48, 3))


@pytest.mark.parametrize("batch_size", [-1])
def test_a_batch_size_below_1_is_refused(model, batch_size):
    """A step of -1 would pass over every face and leave what the memory held before."""
    faces = image(2, 24, 24, 1)
    for predict in (model.predict, functools.partial(evaluation.predict, model.network)):
        with pytest.raises(UserError, match=f"batch_size: .*{batch_size}"):
            predict(faces, batch_size)


def test_the_first_batch_alone_is_not_compiled_for(tiny_weights):
    """Most often no others follow; the same faces again are, and give the same."""
    model, faces = TestModels(tiny_weights), image(3, 24, 24, 1)
    first = model.predict(faces)
    assert model.network.predict_function is None
    for found, expected in zip(model.predict(faces), first, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert model.network.predict_function is not None
    several = TestModels(tiny_weights)
    several.predict(faces, batch_size=2)
    assert several.network.predict_function is not None


# Pictures to a label


def test_recognize_fer_prints_and_returns_the_label(model, tmp_path, capsys):
    pixels = image(60, 50, 3)
    found = model.recognize_fer(save(tmp_path / "face.png", pixels))
    assert capsys.readouterr().out == f"{found.label}\n"
    probabilities, embeddings = model.predict(pixels[None, ..., ::-1])
    assert tuple(found.probabilities) == model.class_names == CLASS_NAMES[:7]
    np.testing.assert_allclose(list(found.probabilities.values()), probabilities[0], rtol=1e-5)
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert found.label == CLASS_NAMES[int(np.argmax(probabilities[0]))]
    np.testing.assert_allclose(found.embeddings, embeddings[0], rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.image, pixels[..., ::-1])


def test_a_notebook_shows_the_recognition_as_an_image(model, tmp_path):
    data = model.recognize_fer(save(tmp_path / "face.png", image(30, 30, 3)))._repr_png_()
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and min(shown.shape[:2]) > 50


def test_the_face_is_looked_for_unless_that_is_switched_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr(test_model, "largest_face", lambda image: image[10:40, 5:35])
    pixels = image(60, 50, 3)
    path = save(tmp_path / "face.png", pixels)
    assert np.array_equal(model.recognize_fer(path).image, pixels[10:40, 5:35, ::-1])
    assert np.array_equal(model.recognize_fer(path, detect_face=False).image, pixels[..., ::-1])


def test_many_images_keep_their_order(model, tmp_path):
    paths = [save(tmp_path / f"{i}.png", image(20 + i, 20, 3, seed=i)) for i in range(5)]
    found = model.recognize(paths, batch_size=2)
    assert [face.image.shape[0] for face in found] == [20, 21, 22, 23, 24]
    for path, face in zip(paths, found, strict=True):
        alone = model.recognize([path])[0]
        np.testing.assert_allclose(list(face.probabilities.values()), list(alone.probabilities.values()), rtol=1e-4)


@pytest.mark.parametrize(
    "pixels",
    [
        image(40, 30, 4),
        image(40, 30, dtype=np.uint16),
        image(1, 1, 3),
        image(3, 3000, 3),
        np.zeros((40, 40, 3), np.uint8),
    ],
    ids=["transparent", "16-bit gray", "1x1", "wide", "black"],
)
def test_every_image_is_recognised(model, tmp_path, pixels):
    found = model.recognize_fer(save(tmp_path / "face.png", pixels))
    assert found.image.shape == (*pixels.shape[:2], 3) and found.label in CLASS_NAMES
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert found._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n and no more"])
def test_a_file_that_is_no_image_is_refused(model, tmp_path, content):
    (tmp_path / "face.png").write_bytes(content)
    with pytest.raises(UserError, match=r"face\.png: "):
        model.recognize_fer(tmp_path / "face.png")


def test_a_missing_image_and_a_folder_are_refused(model, tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            model.recognize_fer(path)


# The model


def test_the_network_that_comes_with_the_project_is_the_default(tiny_weights, monkeypatch):
    assert test_model.DEFAULT_WEIGHTS == ROOT / "trained_models" / "fer2013_mini_xcp.weights.h5"
    monkeypatch.setattr(test_model, "DEFAULT_WEIGHTS", tiny_weights)
    assert TestModels().info.network.embedding_size == 8


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.weights\.h5: no such weights file"):
        TestModels(tmp_path / "none.weights.h5")


@pytest.mark.parametrize(("gpu", "there", "notice"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_wanted_gpu_that_is_not_there_is_one_line(tiny_weights, monkeypatch, capsys, gpu, there, notice):
    monkeypatch.setattr(runtime, "has_gpu", lambda: there)
    asked = []
    monkeypatch.setattr(runtime, "set_up", lambda **options: asked.append(options))
    TestModels(tiny_weights, GPU=gpu)
    assert asked == [{"gpu": gpu}]
    assert capsys.readouterr() == ("", "no GPU found: running on the CPU\n" * notice)


def test_a_file_without_an_input_size_means_the_architectures(model, tmp_path):
    assert model.input_size == 24
    described = NetworkDescription("mini_xcp", CLASS_NAMES[:7], num_embeddings=1, embedding_size=4)
    model_file.save_model(tmp_path / "a.weights.h5", model_file.build_network(described), ModelInfo(described))
    assert TestModels(tmp_path / "a.weights.h5").input_size == 48
