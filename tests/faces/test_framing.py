"""Crops: their place, the border, the turn, and images that are crops already."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import faces
from faces.face import Face
from faces.framing import FRAMES, LANDMARK_FRAME


def landmarks(center, eyes=40.0, degrees=0.0):
    """Five points around the middle of a face, turned clockwise."""
    points = np.array([[-0.5, -0.4], [0.5, -0.4], [0, 0.1], [-0.4, 0.6], [0.4, 0.6]]) * eyes
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (points @ np.array([[c, s], [-s, c]]) + center).astype(np.float32)


def test_crop_copies_the_square():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    crop = faces.crop(image, Face((30, 20, 40, 40), 0.9))
    np.testing.assert_array_equal(crop, image[20:60, 30:70])
    assert not np.shares_memory(crop, image)
    assert faces.crop(image[..., :1], Face((30, 20, 40, 40), 0.9), size=48).shape == (48, 48, 1)


@pytest.mark.parametrize("name", FRAMES)
def test_square_scales_and_shifts_the_box(name):
    """A box that is no square counts as the square of its area around its centre."""
    frame = FRAMES[name]
    x, y, side = faces.square(Face((100, 200, 40, 90), 0.9, detector=name))
    assert side == pytest.approx(60 * frame.scale)
    assert (x + side / 2, y + side / 2) == pytest.approx((120 + frame.shift_x * 60, 245 + frame.shift_y * 60))


def test_square_of_landmarks_where_boxes_were_not_measured():
    upright = Face((0, 0, 1, 1), 0.9, landmarks((100, 100)), "yunet")
    x, y, side = faces.square(upright)
    assert side == pytest.approx(LANDMARK_FRAME.scale * 40 * np.hypot(1, 1))  # eyes 40 apart, mouth 40 below
    assert x + side / 2 == pytest.approx(100, abs=2) and 84 < y + side / 2 < 104


def test_border_is_repeated_and_the_face_keeps_its_proportions():
    image = np.full((60, 80, 3), 50, np.uint8)
    image[:, 0] = 200
    crop = faces.crop(image, Face((-20, 10, 40, 40), 0.9))
    assert crop.shape == (40, 40, 3)
    assert (crop[:, :21] == 200).all() and (crop[:, 21:] == 50).all()
    assert faces.crop(image, Face((-100, -100, 40, 40), 0.9)).shape == (40, 40, 3)


@pytest.mark.parametrize("degrees", [-45, -20, 0, 30, 45])
def test_align_turns_the_eyes_level(degrees):
    """Two dots where the eyes are, and one at the mouth: after the turn they lie as in the upright face."""
    image = np.zeros((200, 260, 3), np.uint8)
    points = landmarks((130, 100), degrees=degrees)
    for (x, y), color in zip(points[[0, 1, 3]].tolist(), np.eye(3) * 255, strict=True):
        cv2.circle(image, (round(16 * (x - 0.5)), round(16 * (y - 0.5))), 64, color.tolist(), -1, shift=4)
    face = Face((90, 60, 80, 80), 0.99, points, "mtcnn")
    assert faces.angle(face) == pytest.approx(degrees, abs=0.01)
    crop = faces.crop(image, face, align=True)
    side = LANDMARK_FRAME.scale * 40 * np.hypot(1, 1)
    assert crop.shape == (round(side), round(side), 3)
    dots = [np.argwhere(crop[..., c] > 100).mean(axis=0)[::-1] for c in range(3)]
    middle = side / 2 - 0.5 - np.array([LANDMARK_FRAME.shift_x, LANDMARK_FRAME.shift_y]) * 40 * np.hypot(1, 1)
    expected = middle + np.array([[-20, -12], [20, -12], [-16, 28]])  # from 0.3 of the way to the mouth
    np.testing.assert_allclose(dots, expected, atol=1.0)


def test_align_without_landmarks_is_the_upright_crop():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    face = Face((30, 20, 40, 40), 5.0, None, "haar")
    np.testing.assert_array_equal(faces.crop(image, face, align=True), faces.crop(image, face))


@pytest.mark.parametrize(
    "shape, box, whole",
    [
        ((200, 200), (10, 10, 180, 180), True),
        ((200, 230), (30, 10, 170, 170), True),
        ((200, 300), (60, 10, 180, 180), False),  # a frame is never squashed
        ((200, 200), (60, 60, 80, 80), False),  # does not fill it
        ((200, 200), (60, 10, 160, 160), False),  # not in the middle
        ((200, 200), None, False),
        ((48, 48), None, True),  # FER-2013's own
        ((100, 100), None, True),  # RAF-DB's
        ((48, 80), None, False),
        ((48, 48), (3, 3, 15, 15), True),  # such a box is no face
        ((48, 48), (4, 8, 32, 32), True),  # FER-2013's images vary as much
        ((100, 100), (10, 10, 40, 40), False),
    ],
)
def test_is_face_crop(shape, box, whole):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert faces.is_face_crop(image, [Face(box, 0.99)] if box else []) is whole


def test_small_plain_image_is_no_face_crop():
    assert not faces.is_face_crop(np.full((48, 48, 3), 90, np.uint8), [])
