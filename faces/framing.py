"""Cuts faces out as FER-2013 frames them, and recognises images that are such crops already."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

from faces.face import Face
from images import resize_image


@dataclasses.dataclass(frozen=True)
class Frame:
    """How a reference square maps to FER-2013's square: its centre moves by shift * side, its side grows by scale."""

    scale: float
    shift_x: float = 0.0
    shift_y: float = 0.0


# Medians on pasted faces: python benchmarks/face_detection.py --only framing; docs/faces.md has their spread.
FRAMES = {"haar": Frame(1.02), "mtcnn": Frame(1.112, 0.019, 0.003)}
# The same for the square of `landmark_square`. It is used for yunet, whose boxes were not measured, and for turned
# faces: landmarks do not depend on the detector.
LANDMARK_FRAME = Frame(1.853, 0.017, 0.019)

# The reference centre lies this share of the way from between the eyes to the mouth: it varies least there.
MOUTH_SHARE = 0.3

# An image is a face crop when its longer side is at most this multiple of the shorter one ...
MAX_ASPECT = 1.2
# ... and the face's square has at least this share of the shorter side, with its centre this near to the middle.
MIN_FILL, MAX_OFFSET = 0.75, 0.15
# Detectors often miss a face without surroundings. Up to this shorter side a nearly square image counts as a face crop
# when no face is found: FER-2013 has 48 pixels, RAF-DB 100. A face that is found may fill less of it, and lie further
# from the middle, because FER-2013's own images vary as much.
SMALL_SIDE = 128
SMALL_FILL, SMALL_OFFSET = 0.6, 0.22
# A box of less than this side in a small image is not trusted.
TRUSTED_SIDE = 24
# An image whose pixels vary less than this (standard deviation, 0 to 255) shows nothing.
MIN_CONTRAST = 4.0


def square(face: Face) -> tuple[float, float, float]:
    """FER-2013's square around a face, upright.

    Returns:
        x and y of the upper left corner and the side, in pixels of the image. It may reach over the border.
    """
    frame = FRAMES.get(face.detector)
    if frame is None and face.landmarks is not None:
        center, side = _framed(*landmark_square(face), LANDMARK_FRAME)
    else:
        center, side = _framed(face.center, face.side, frame or Frame(1.0))
    return center[0] - side / 2, center[1] - side / 2, side


def pixel_square(face: Face) -> tuple[int, int, int]:
    """`square` in whole pixels, as `crop` without a turn cuts it out: x, y, side."""
    x, y, side = square(face)
    n = max(1, round(side))
    return round(x + (side - n) / 2), round(y + (side - n) / 2), n


def landmark_square(face: Face) -> tuple[tuple[float, float], float]:
    """Centre and side of a square that turns with the face: the side is the hypotenuse of the distance between the
    eyes and that from between them to the mouth."""
    left_eye, right_eye, _, left_mouth, right_mouth = face.landmarks.astype(float)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    center = eyes + MOUTH_SHARE * (mouth - eyes)
    return tuple(center.tolist()), math.hypot(*(right_eye - left_eye), *(mouth - eyes))


def angle(face: Face) -> float:
    """Angle of the line through the eyes in degrees, positive when the right one is lower; 0 without landmarks."""
    if face.landmarks is None:
        return 0.0
    across, down = (face.landmarks[1] - face.landmarks[0]).tolist()
    return math.degrees(math.atan2(down, across))


def crop(image: np.ndarray, face: Face, align: bool = False, size: int | None = None) -> np.ndarray:
    """Cuts a face out as FER-2013 frames it.

    Where the square reaches over the border, the border's pixels are repeated: the face keeps its proportions and its
    place. Without a turn the pixels are copied, and resized as `images.resize_image` does.

    Args:
        image: uint8 (H, W, C), the image that the face was found in, or its gray version.
        align: turn the eyes level, where the face has landmarks.
        size: side of the result in pixels; None keeps the image's resolution.

    Returns:
        uint8 (size, size, C), a copy: it does not keep the image in memory.
    """
    turned = align and face.landmarks is not None
    pixels = _turned(image, face) if turned else _cut(image, *pixel_square(face))
    return pixels if size is None else resize_image(pixels, size)


def is_face_crop(image: np.ndarray, faces: Sequence[Face]) -> bool:
    """Whether an image is a face crop already, to be used whole.

    That is so when it is nearly square and its best face is centred and fills it; or when it is small and nearly
    square, shows something, and no face was found in it, because detectors miss faces without surroundings.

    Args:
        image: uint8 (H, W, C).
        faces: what a detector found in it, best first.
    """
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        return False
    fill, reach = MIN_FILL, MAX_OFFSET
    if short <= SMALL_SIDE:
        fill, reach = SMALL_FILL, SMALL_OFFSET
        faces = [face for face in faces if face.side >= TRUSTED_SIDE]
        if not faces:
            return bool(image.std() >= MIN_CONTRAST)
    if not faces:
        return False
    x, y, side = square(faces[0])
    offset = max(abs(x + side / 2 - width / 2), abs(y + side / 2 - height / 2))
    return side >= fill * short and offset <= reach * short


def _framed(center: tuple[float, float], side: float, frame: Frame) -> tuple[tuple[float, float], float]:
    return (center[0] + frame.shift_x * side, center[1] + frame.shift_y * side), side * frame.scale


def _cut(image: np.ndarray, x: int, y: int, n: int) -> np.ndarray:
    """A copy of n x n pixels from x, y on, with the border repeated beyond the image."""
    height, width = image.shape[:2]
    rows, columns = (np.clip(np.arange(at, at + n), 0, size - 1) for at, size in ((y, height), (x, width)))
    return image[rows[:, None], columns]


def _turned(image: np.ndarray, face: Face) -> np.ndarray:
    """The square around a face with its eyes level, at the image's resolution."""
    (x, y), side = landmark_square(face)
    turn = math.radians(angle(face))
    cosine, sine = math.cos(turn), math.sin(turn)
    # The shift was measured on upright faces: it turns with the face.
    right, down = LANDMARK_FRAME.shift_x * side, LANDMARK_FRAME.shift_y * side
    x, y, side = x + cosine * right - sine * down, y + sine * right + cosine * down, side * LANDMARK_FRAME.scale
    n = max(1, round(side))
    # warpAffine takes no image of more than 32,767 pixels a side: only the surroundings of the face go there.
    reach = math.ceil(side * 0.75) + 2
    x0, y0 = round(x) - reach, round(y) - reach
    part = _cut(image, x0, y0, 2 * reach + 1)
    step, middle = side / n, (n - 1) / 2
    a, b = cosine * step, sine * step
    matrix = np.array([[a, -b, x - 0.5 - x0 - (a - b) * middle], [b, a, y - 0.5 - y0 - (a + b) * middle]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(part, matrix, (n, n), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return pixels.reshape(n, n, image.shape[2])
