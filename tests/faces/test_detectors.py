"""The detectors on the astronaut (her face: 95 pixels around (224, 113)) and on images without a face."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python

import faces
from faces import mtcnn_networks, yunet
from files import UserError
from images import read_image

X, Y, SIDE = 177, 66, 95  # her face as FER-2013 would frame it

needs_mtcnn = pytest.mark.skipif(importlib.util.find_spec("mtcnn") is None, reason="needs the package mtcnn")
DETECTORS = ["haar", pytest.param("mtcnn", marks=needs_mtcnn)]


@pytest.fixture(scope="module")
def astronaut():
    return read_image(ROOT / "examples" / "astronaut.png")


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    return faces.open_detector(request.param)


def background(width, height):
    coarse = np.random.default_rng(0).integers(60, 200, (9, 16, 3), np.uint8)
    return cv2.GaussianBlur(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), (0, 0), 9)


def assert_framed(face, x, y, side):
    """The square lies within an eighth of the true one's side, and is as large to a fifth."""
    left, top, found = faces.square(face)
    assert found == pytest.approx(side, rel=0.2)
    assert abs(left + found / 2 - x - side / 2) < side / 8 and abs(top + found / 2 - y - side / 2) < side / 8


# --- scenes


@pytest.mark.parametrize("side", [304, 448, 496])
def test_face_wins_over_a_false_box_on_the_suit(detector, astronaut, side):
    k = side / 512
    small = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    assert_framed(detector.detect(small)[0], X * k, Y * k, SIDE * k)


@pytest.mark.parametrize("share", [0.48, 0.7])
@pytest.mark.parametrize("aspect", [4 / 3, 9 / 16])
def test_close_up_is_no_face_crop(detector, astronaut, aspect, share):
    """A webcam's frame and a telephone's, in which the face has half of the shorter side or more."""
    short = SIDE / share
    width, height = short * max(aspect, 1), short * max(1 / aspect, 1)
    x, y = max(0, int(X + SIDE / 2 - width / 2)), max(0, int(Y + SIDE / 2 - height / 2))
    part = astronaut[y : int(y + height), x : int(x + width)]
    k = 480 / short
    frame = cv2.resize(part, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC)
    found = detector.detect(frame)
    assert_framed(found[0], (X - x) * k, (Y - y) * k, SIDE * k)
    assert not faces.is_face_crop(frame, found)


def test_every_face_of_a_group(detector, astronaut):
    group = background(1600, 900)
    places = ((50, 300), (500, 420), (1100, 500))
    for x, side in places:
        group[900 - side :, x : x + side] = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    found = detector.detect(group)
    assert detector.name == "haar" or len(found) == 3  # haar invents some, but ranks them last
    found = sorted(found[:3], key=lambda face: face.box)
    for face, (x, side) in zip(found, places, strict=True):
        assert_framed(face, x + X * side / 512, 900 - side + Y * side / 512, SIDE * side / 512)


@pytest.mark.slow
def test_small_and_large_face_in_12_megapixels(detector, astronaut):
    """27 pixels and 1,100: the finest and the coarsest scale."""
    image = background(4000, 3000)
    image[40:185, 100:245] = cv2.resize(astronaut, (145, 145), interpolation=cv2.INTER_AREA)
    large = cv2.resize(astronaut[0:256, 96:352], (2964, 2964), interpolation=cv2.INTER_CUBIC)
    image[36:, 1000:3964] = large
    first, second = detector.detect(image)[:2]
    assert_framed(first, 1000 + (X - 96) * 2964 / 256, 36 + Y * 2964 / 256, SIDE * 2964 / 256)
    assert_framed(second, 100 + X * 145 / 512, 40 + Y * 145 / 512, SIDE * 145 / 512)


@pytest.mark.parametrize(
    "image",
    [
        np.full((480, 640, 3), (90, 180, 200), np.uint8),
        background(640, 480),
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((5, 2000, 3), np.uint8),
    ],
    ids=["plain", "blurred", "one pixel", "narrow"],
)
def test_no_face(detector, image):
    assert detector.detect(image) == []


def test_view_with_gaps_in_memory(detector, astronaut):
    """A frame of a video is often given as a reversed or cut view."""
    wide = np.zeros((512, 600, 3), np.uint8)
    wide[:, :512] = astronaut[..., ::-1]
    assert detector.detect(wide[:, :512, ::-1]) == detector.detect(astronaut)


# --- mtcnn


@needs_mtcnn
def test_landmarks_lie_on_the_face_from_left_to_right(astronaut):
    face = faces.open_detector("mtcnn").detect(astronaut)[0]
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    np.testing.assert_allclose(left_eye, (203, 105), atol=6)
    np.testing.assert_allclose(right_eye, (242, 103), atol=6)
    assert left_eye[1] < nose[1] < left_mouth[1] and left_mouth[0] < nose[0] < right_mouth[0]
    assert left_mouth[0] < right_mouth[0] and abs(faces.angle(face)) < 10


@needs_mtcnn
def test_mtcnn_imports_no_tensorflow():
    code = "import sys, faces, numpy; faces.open_detector('mtcnn').detect(numpy.zeros((99, 99, 3), 'uint8'))"
    done = run_python("-c", code + "; print(*{'tensorflow', 'keras', 'mtcnn'} & set(sys.modules))")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@needs_mtcnn
@pytest.mark.slow
def test_networks_compute_what_the_package_computes():
    """The package's Keras networks are the reference, on odd sizes too, where padding matters."""
    from mtcnn.network import onet, pnet, rnet  # imports TensorFlow

    rng = np.random.default_rng(0)
    for name, network, shape in (
        ("pnet", pnet.PNet(), (1, 47, 62, 3)),
        ("rnet", rnet.RNet(), (5, 24, 24, 3)),
        ("onet", onet.ONet(), (3, 48, 48, 3)),
    ):
        network.build()
        network.set_weights(mtcnn_networks._weights(name))
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        ours = mtcnn_networks.load(name)
        ours.setInput(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        for expected, got in zip(network(x), ours.forward(mtcnn_networks.HEADS[name]), strict=True):
            expected = np.asarray(expected)
            got = got.transpose(0, 2, 3, 1) if expected.ndim == 4 else got[..., 0, 0]
            np.testing.assert_allclose(got, expected, atol=2e-5)


@needs_mtcnn
def test_first_network_in_bands_is_the_network_at_once(monkeypatch, astronaut):
    from faces import mtcnn

    detector = mtcnn.MtcnnDetector()
    image = astronaut[:201, :300]
    whole = detector._scan(image)
    monkeypatch.setattr(mtcnn, "BAND_PIXELS", 300 * 31)
    for banded, once in zip(detector._scan(image), whole, strict=True):
        assert len(once) > 20
        np.testing.assert_allclose(banded, once, atol=1e-3)


@needs_mtcnn
@pytest.mark.slow
def test_memory_is_bounded():
    """30 megapixels of noise: less than 500 MB above the image itself."""
    code = """
import resource, numpy as np, faces
detector = faces.open_detector("mtcnn")
image = np.random.default_rng(0).integers(0, 256, (5000, 6000, 3), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
detector.detect(image)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500_000


# --- yunet


class StandInYunet:
    """Answers for `cv2.FaceDetectorYN`: one face where the image is brightest, if it is 20 to 300 pixels wide there."""

    def setInputSize(self, size):
        self.size = size

    def detect(self, bgr):
        assert bgr.shape[1::-1] == self.size
        x, y, w, h = cv2.boundingRect((bgr[..., 0] > 200).astype(np.uint8))  # blue: the channels were turned
        if not 20 <= w <= 300:
            return 1, None
        eyes = [x + 0.3 * w, y + 0.4 * h, x + 0.7 * w, y + 0.4 * h]
        rest = [x + 0.5 * w, y + 0.6 * h, x + 0.35 * w, y + 0.8 * h, x + 0.65 * w, y + 0.8 * h]
        return 1, np.array([[x, y, w, h, *eyes, *rest, 0.93]], np.float32)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", staticmethod(lambda *_: StandInYunet()))
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    return faces.open_detector("yunet", file)


@pytest.mark.parametrize("side", [30, 250, 1500])
def test_yunet_finds_small_and_large_faces_once(stand_in, side):
    image = np.zeros((1800, 2400, 3), np.uint8)
    image[120 : 120 + side, 300 : 300 + side, 2] = 255
    (face,) = stand_in.detect(image)
    grain = 8 if side < 300 else 16  # pixels of the scale in which it was found
    np.testing.assert_allclose(face.box, (300, 120, side, side), atol=grain)
    expected = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * side + (300, 120)
    np.testing.assert_allclose(face.landmarks, expected, atol=grain)
    assert face.score == pytest.approx(0.93) and face.detector == "yunet"
    assert stand_in.detect(image[:, :250]) == []


def test_yunet_fetches_its_pinned_file(monkeypatch, tmp_path):
    """What the cache folder holds is opened; the pinned facts are those of OpenCV's zoo."""
    asked = []
    monkeypatch.setattr(yunet, "fetch", lambda model, option: asked.append(model) or tmp_path)
    with pytest.raises(UserError):
        faces.open_detector("yunet")
    assert [(m.size, m.sha256[:8], m.name) for m in asked] == [
        (232_589, "8f2383e4", "face_detection_yunet_2023mar.onnx")
    ]


def test_yunet_file_that_is_none(tmp_path):
    file = tmp_path / "not a model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(UserError, match="not a model"):
        faces.open_detector("yunet", file)
    with pytest.raises(UserError, match="missing"):
        faces.open_detector("yunet", tmp_path / "missing.onnx")


# --- choosing


def test_auto_takes_what_is_installed(monkeypatch):
    assert faces.open_detector("auto").name == ("mtcnn" if importlib.util.find_spec("mtcnn") else "haar")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert faces.open_detector("auto").name == "haar"
    with pytest.raises(UserError, match="pip install"):
        faces.open_detector("mtcnn")


def test_unknown_name_and_file_for_another_detector(tmp_path):
    with pytest.raises(UserError, match="haar, mtcnn, yunet"):
        faces.open_detector("retina")
    with pytest.raises(UserError, match="yunet"):
        faces.open_detector("haar", tmp_path / "model.onnx")
