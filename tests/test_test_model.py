"""Recognition from Python: faces and image files to labels, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import os
import pickle
import weakref

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python
from PIL import Image

import evaluation
import faces
import runtime
import test_model
from datasets import CLASS_NAMES
from files import UserError
from images import read_image, resize_image
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
        gray,
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
    ("images", "facts"),
    [
        ([image(8, 8, 3), image(8, 8, 3) / 255], r"images\[1\]: .* float64 \(8, 8, 3\)"),
        ([image(8)], r"images\[0\]: .* uint8 \(8,\)"),
        (["face.png"], r"images\[0\]: .* str; recognize "),
        ("face.png", "str; use recognize"),
        (image(8, 9, 2), r"uint8 \(8, 9, 2\)"),
        (None, "received None"),
        ([], "images: expected one or more, received none"),
    ],
)
def test_what_is_no_face_is_refused(model, images, facts):
    with pytest.raises(UserError, match=facts):
        model.predict(images)


def test_one_image_is_one_face(model):
    """A single (H, W, 3) array is no H gray images of W x 3 pixels."""
    pixels = image(30, 20, 3)
    expected, _ = model.predict(pixels[None])
    for one in (pixels, Image.fromarray(pixels), [Image.fromarray(pixels)]):
        found, _ = model.predict(one)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    np.testing.assert_allclose(model.predict(opaque)[0], expected, rtol=1e-5, atol=1e-6)
    gray = image(30, 20)
    np.testing.assert_allclose(model.predict(gray)[0], model.predict(gray[None, ..., None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2.5, "4"])
def test_a_batch_size_that_is_no_number_is_refused(model, batch_size):
    for call in (model.predict, model.recognize):
        with pytest.raises(UserError, match="batch_size: expected a whole number, 1 or more"):
            call(image(2, 24, 24, 3), batch_size=batch_size)


FORKS = """
import multiprocessing, sys
import numpy as np
from test_model import TestModels
model = TestModels(sys.argv[1])
faces = np.zeros((2, 24, 24, 3), "uint8")
model.predict(faces)
def child():
    try:
        model.predict(faces)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
process.kill()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_gets_a_message_instead_of_waiting_for_ever(tiny_weights):
    done = run_python("-c", FORKS, str(tiny_weights))
    assert done.stdout.startswith("UserError predict: this process was forked") and "spawn" in done.stdout


def test_a_pickled_model_belongs_to_the_process_that_reads_it(model, monkeypatch):
    monkeypatch.setattr(model, "_process", 1)
    copy = pickle.loads(pickle.dumps(model))
    assert copy._process == os.getpid()


@pytest.mark.parametrize("place", ["logits", "embedding_dense"])
def test_a_network_without_finite_outputs_is_refused(tiny_weights, place):
    broken = TestModels(tiny_weights)
    bias = broken.network.get_layer(place).bias
    bias.assign(np.full(bias.shape, np.nan, "float32"))
    photograph = ROOT / "examples" / "astronaut.png"
    for call in (
        lambda: broken.predict(image(2, 24, 24, 3)),
        lambda: broken.recognize([photograph]),
        lambda: broken.recognize_fer(photograph),
    ):
        with pytest.raises(UserError, match="the network's outputs are not finite for"):
            call()


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


# Images to faces


class OneDetector:
    """Finds faces at the same places in every image, the first one best."""

    name = "fixed"

    def __init__(self, *boxes):
        self.found = [faces.Face(box, 0.9 - 0.1 * i) for i, box in enumerate(boxes)]

    def detect(self, image):
        return self.found


@pytest.fixture
def two_faces(model, monkeypatch):
    """The model with a detector that finds the squares 30 at (5, 10) and 12 at (40, 20)."""
    detector = OneDetector((5, 10, 30, 30), (40, 20, 12, 12))
    monkeypatch.setattr(model, "_detector", detector)
    return model


def test_recognize_fer_prints_and_returns_the_best_face(two_faces, tmp_path, capsys):
    pixels = image(60, 80, 3)
    found = two_faces.recognize_fer(save(tmp_path / "photograph.png", pixels[..., ::-1]))
    assert capsys.readouterr().out == f"{found.label}\n"
    cut = pixels[10:40, 5:35]
    assert np.array_equal(found.image, cut) and (found.box, found.score) == ((5, 10, 30, 30), 0.9)
    probabilities, embeddings = two_faces.predict(cut)
    assert tuple(found.probabilities) == two_faces.class_names == CLASS_NAMES[:7]
    np.testing.assert_allclose(list(found.probabilities.values()), probabilities[0], rtol=1e-5)
    assert found.label == CLASS_NAMES[int(np.argmax(probabilities[0]))]
    np.testing.assert_allclose(found.embeddings, embeddings[0], rtol=1e-5, atol=1e-6)


def test_every_face_of_every_image_is_recognised_in_order(two_faces, tmp_path):
    images = [image(60, 80 + i, 3, seed=i) for i in range(5)]
    for batch_size in (1, 3, 64):
        results = two_faces.recognize(iter(images), batch_size=batch_size)
        assert [result.size for result in results] == [(80 + i, 60) for i in range(5)]
        assert results.class_names == two_faces.class_names
        for pixels, result in zip(images, results, strict=True):
            assert [face.box for face in result.faces] == [(5, 10, 30, 30), (40, 20, 12, 12)]
            for face, cut in zip(result.faces, (pixels[10:40, 5:35], pixels[20:32, 40:52]), strict=True):
                assert np.array_equal(face.image, cut)
                expected, _ = two_faces.predict(cut)
                np.testing.assert_allclose(list(face.probabilities.values()), expected[0], rtol=1e-4)


def test_images_are_whole_without_detection(two_faces):
    frame, crop = image(60, 80, 3), image(50, 50, 3)
    wide, square = two_faces.recognize([frame, crop], detect_face=False)
    assert (wide.best.box, wide.best.score) == ((0, 0, 80, 60), None)
    assert np.array_equal(wide.best.image, resize_image(frame, 24)) and np.array_equal(square.best.image, crop)


def test_photographs_are_not_kept_in_memory(two_faces):
    alive = []

    def photographs():
        for i in range(4):
            pixels = np.full((300, 400, 3), 60 + i, np.uint8)
            alive.append(weakref.ref(pixels))
            yield pixels

    results = two_faces.recognize(photographs(), batch_size=64)
    gc.collect()
    assert len(results) == 4 and all(photograph() is None for photograph in alive)
    assert results[3].annotated().shape == (300, 400, 3)  # from the copy


def test_no_face_is_reported_and_never_guessed(model, monkeypatch, capsys):
    monkeypatch.setattr(model, "_detector", OneDetector())
    frame = image(200, 300, 3)
    assert model.recognize_fer(frame) is None and capsys.readouterr().out == "no face found\n"
    assert model.recognize([frame])[0].faces == []
    for recognize in (model.recognize_fer, model.recognize):
        with pytest.raises(UserError, match="no face found"):
            recognize(frame, require_face=True)


def test_face_crop_is_used_whole(model, monkeypatch):
    """A small square image with a pattern in it, in which the detector finds nothing."""
    monkeypatch.setattr(model, "_detector", OneDetector())
    crop = image(48, 48, 3)
    found = model.recognize(crop)[0].best
    assert (found.box, found.score) == ((0, 0, 48, 48), None) and np.array_equal(found.image, crop)


def test_eyes_are_turned_level_on_request(model, monkeypatch):
    detector = OneDetector((20, 20, 40, 40))
    points = np.array([[30, 30], [50, 40], [38, 45], [28, 50], [42, 57]], np.float32)
    detector.found = [dataclasses.replace(detector.found[0], landmarks=points)]
    monkeypatch.setattr(model, "_detector", detector)
    pixels = image(100, 160, 3)
    (result,) = model.recognize(pixels, align=True)
    assert np.array_equal(result.best.landmarks, points)
    assert np.array_equal(result.best.image, faces.crop(pixels, detector.found[0], align=True))


def test_unreadable_image_costs_its_own_result(two_faces, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    bad, missing, good = two_faces.recognize([tmp_path / "empty.png", "none.png", image(60, 80, 3)])
    assert "empty.png" in bad.error and "none.png" in missing.error and good.error is None
    assert (bad.faces, bad.size, bad.label) == ([], (0, 0), None) and len(good.faces) == 2


def test_one_image_that_cannot_be_read_raises(model, tmp_path):
    for wrong in ("none.png", b"no image", tmp_path / "none.png"):
        for recognize in (model.recognize_fer, model.recognize):
            with pytest.raises(UserError, match=r"none\.png|no image"):
                recognize(wrong)
    with pytest.raises(UserError, match=r"images\[1\]: .* float64"):
        model.recognize([image(9, 9, 3), image(9, 9, 3) / 255])


def test_recognize_fer_takes_one_image(model, tmp_path):
    for several in ([image(9, 9, 3)], tmp_path):
        with pytest.raises(UserError, match=r"recognize|no image"):
            model.recognize_fer(several)


def test_every_odd_image_is_recognised_or_has_no_face(model, tmp_path):
    shapes = [(40, 30, 4), (1, 1, 3), (3, 3000, 3), (2000, 2, 3)]
    for i, pixels in enumerate([*(image(*shape) for shape in shapes), image(40, 30, dtype=np.uint16)]):
        (result,) = model.recognize(save(tmp_path / f"{i}.png", pixels))
        assert result.size == pixels.shape[1::-1]
        for face in result.faces:
            assert face.label in CLASS_NAMES and sum(face.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_explanation_is_of_the_faces_that_were_found(two_faces):
    (result,) = two_faces.recognize(image(60, 80, 3))
    explanation = two_faces.explain(result.faces)
    assert explanation.images.shape == (2, 24, 24, 3)
    assert [two_faces.class_names[code] for code in explanation.labels] == [face.label for face in result.faces]
    assert len(two_faces.explain(result.best)) == 1
    with pytest.raises(UserError, match="received none"):
        two_faces.explain([])
    for other in (None, result):  # recognize_fer returns None where there is no face; an image is not its faces
        with pytest.raises(UserError, match=f"expected faces .*received {type(other).__name__}"):
            two_faces.explain(other)


# Photographs, with the detector and the model that come with the project


@pytest.fixture(scope="module")
def bundled():
    return TestModels()


@pytest.fixture(scope="module")
def astronaut():
    """Her face is smiling, 95 pixels wide, with its centre at (224, 113)."""
    return read_image(ROOT / "examples" / "astronaut.png")


def background(width, height):
    coarse = np.random.default_rng(0).integers(60, 200, (9, 16, 3), np.uint8)
    return cv2.GaussianBlur(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), (0, 0), 9)


@pytest.mark.parametrize("detector", ["auto", "haar"])
@pytest.mark.parametrize(("width", "height"), [(4, 3), (16, 9), (9, 16)])
@pytest.mark.parametrize("share", [0.48, 0.6, 0.7])
def test_close_up_is_no_face_crop(bundled, astronaut, monkeypatch, width, height, share, detector):
    """A webcam's or a telephone's frame, in which the face has half of the shorter side or more."""
    monkeypatch.setattr(bundled, "_detector", faces.open_detector(detector))
    unit = 95 / share / min(width, height)
    left, top = max(0, round(224 - width * unit / 2)), max(0, round(113 - height * unit / 2))
    frame = astronaut[top : top + round(height * unit), left : left + round(width * unit)]
    frame = cv2.resize(frame, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    best = bundled.recognize(frame)[0].best
    assert best.label == "Happy" and best.probabilities["Happy"] > 0.8 and best.score is not None


@pytest.mark.parametrize("side", [304, 448, 496])
def test_face_wins_over_a_false_box_on_the_suit(bundled, astronaut, side):
    small = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    assert bundled.recognize(small)[0].label == "Happy"


def test_far_faces_are_all_found(bundled, astronaut):
    """Faces of 56, 74 and 93 pixels in full HD."""
    frame = background(1920, 1080)
    places = [(100, 300), (700, 400), (1400, 500)]
    for x, side in places:
        frame[-side:, x : x + side] = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    (result,) = bundled.recognize(frame)
    assert [face.label for face in result.faces] == ["Happy"] * 3
    centers = sorted((face.box[0] + face.box[2] / 2, face.box[1] + face.box[3] / 2) for face in result.faces)
    for (x, side), center in zip(places, centers, strict=True):
        true = x + side * 224 / 512, 1080 - side + side * 113 / 512
        assert center == pytest.approx(true, abs=side / 30)


def test_wall_has_no_expression(bundled):
    for wall in (np.full((480, 640, 3), (200, 180, 90), np.uint8), background(640, 480)):
        assert bundled.recognize(wall)[0].faces == []


def test_photograph_on_its_side_is_turned_by_its_tag(bundled, astronaut):
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = Image.fromarray(np.rot90(astronaut))
    for kind in ("PNG", "WEBP", "JPEG", "TIFF"):
        file = io.BytesIO()
        turned.save(file, kind, exif=tags)
        best = bundled.recognize(file.getvalue())[0].best
        assert best.label == "Happy" and best.box == pytest.approx((172, 64, 105, 105), abs=6), kind


# The model


def test_the_network_that_comes_with_the_project_is_the_default(tiny_weights, monkeypatch):
    assert test_model.DEFAULT_WEIGHTS == ROOT / "trained_models" / "fer2013_mini_xcp.weights.h5"
    monkeypatch.setattr(test_model, "DEFAULT_WEIGHTS", tiny_weights)
    assert TestModels().info.network.embedding_size == 8


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.weights\.h5: no such weights file"):
        TestModels(tmp_path / "none.weights.h5")
    (tmp_path / "folder.onnx").mkdir()
    for address in (tmp_path, tmp_path / "folder.onnx"):
        with pytest.raises(UserError, match=r"expected a weights file, found a folder; name a file in it"):
            TestModels(address)
    with pytest.raises(UserError, match=r"h5_address: expected the path of a model file, received int"):
        TestModels(3)


def test_unknown_detector_is_refused_before_the_model_is_read():
    with pytest.raises(UserError, match=r"detector: .*haar.* 'dlib'"):
        TestModels("none.weights.h5", detector="dlib")


def test_model_survives_pickling(model):
    pixels = image(24, 24, 3)
    same = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(same.predict(pixels)[0], model.predict(pixels)[0], rtol=1e-5)
    assert same.detector.name == model.detector.name


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
