"""Reads and resizes image files, and finds the largest face; OpenCV and NumPy only."""

from __future__ import annotations

import functools
import os
from pathlib import Path

# OpenCV reads both when it is first imported: an image of more pixels is refused before it takes the
# memory, and OpenCV's own warnings do not mix with our one message.
MAX_PIXELS = 100_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from files import UserError  # noqa: E402

MAX_BYTES = 1_000_000_000
MID_GRAY = 128

# The face is searched in a copy whose longer side has at most this many pixels.
SEARCH_SIDE = 640
# Below this side, or when its face fills this share of the shorter side, an image is a face crop already.
CROP_SIDE = 96
CROP_SHARE = 0.5


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the bytes of a JPEG, PNG, BMP, TIFF, WebP or GIF file.

    16-bit pixels are scaled to 8 bits, transparent pixels are drawn over mid gray, and a JPEG is turned
    upright as its EXIF orientation says.

    Args:
        data: the whole file.
        name: its name in messages.

    Returns:
        uint8 (H, W, 1) for a gray file, (H, W, 3) RGB for a colour file.

    Raises:
        UserError: empty, no image, cut off, more than `MAX_PIXELS` pixels, or neither 8 nor 16 bits per channel.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; expected an image")
    # Only IMREAD_UNCHANGED keeps transparency, and it alone ignores EXIF; a JPEG has the latter, never the former.
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR if is_jpeg else cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if "MAX_IMAGE" in error.err:
            raise UserError(
                f"{name}: the image is too large; expected at most {MAX_PIXELS:,} pixels, and no side of more than "
                "1,048,576; make it smaller first"
            ) from None
        pixels = None
    if pixels is None:
        raise UserError(
            f"{name}: expected a whole JPEG, PNG, BMP, TIFF, WebP or GIF image, found {len(data):,} bytes that "
            f"begin with {data[:8]!r} and cannot be decoded"
        )
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    pixels = pixels.reshape(*pixels.shape[:2], -1)  # (H, W, C), also for gray
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(
            f"{name}: expected 8 or 16 bits per channel, gray or colour, found {pixels.dtype} with "
            f"{pixels.shape[2]} channels; save it as PNG or JPEG"
        )
    if pixels.shape[2] == 4:
        pixels = over_mid_gray(pixels)
    return pixels if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def over_mid_gray(pixels: np.ndarray) -> np.ndarray:
    """Blends uint8 (H, W, 4) with `MID_GRAY` by its last channel, which is the opacity; uint8 (H, W, 3)."""
    alpha = pixels[..., 3:].astype(np.uint16)
    blend = pixels[..., :3] * alpha + MID_GRAY * (255 - alpha) + 127  # at most 255 * 255 + 127 < 2**16
    return (blend // 255).astype(np.uint8)


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file as `decode_image` does; a gray one is repeated to three channels.

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        UserError: missing, no regular file, too large, or what `decode_image` refuses.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected an image")
    if not path.is_file():
        raise UserError(f"{path}: expected an image file, found {'a folder' if path.is_dir() else 'a device'}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path}: the file is too large; expected at most {MAX_BYTES:,} bytes, found {size:,}")
    image = decode_image(path.read_bytes(), str(path))
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Stretches an image to a square.

    Each axis that shrinks is averaged over area (no aliasing), each that grows is interpolated linearly.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
        size: the new side in pixels.

    Returns:
        uint8 (size, size, C).
    """
    height, width, channels = image.shape
    # Two steps, because INTER_AREA averages only when both axes shrink.
    small = cv2.resize(image, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR).reshape(size, size, channels)


def largest_face(image: np.ndarray) -> np.ndarray:
    """Crops an image to its largest frontal face, found with OpenCV's Haar cascade.

    The crop is the detector's square without a margin, because FER-2013 was cut like that: of 150 of its test
    images put on a wider background the detector found 111 again, and the median square had 1.00 of the
    image's side and its centre within 0.3% of it.

    Args:
        image: uint8 (H, W, C), C 1 (gray) or 3 (RGB).

    Returns:
        A view of the square around the face. The whole image when its shorter side is below `CROP_SIDE` or
        its face fills `CROP_SHARE` of that side (it is a face crop already), or when no face is found.
    """
    height, width = image.shape[:2]
    if min(height, width) < CROP_SIDE:
        return image
    boxes = _face_boxes(image)
    if not boxes:
        return image
    x, y, side = max(boxes, key=lambda box: (box[2], box))
    if side >= CROP_SHARE * min(height, width):
        return image
    return image[round(y) : round(y + side), round(x) : round(x + side)]


def _face_boxes(image: np.ndarray) -> list[tuple[float, float, float]]:
    """The faces in an image as (x, y, side) in its pixels."""
    gray = image if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    height, width = image.shape[:2]
    scale = min(1.0, SEARCH_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(gray, small_size, interpolation=cv2.INTER_AREA)
    found = _face_cascade().detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(32, 32))
    return [(x / scale, y / scale, side / scale) for x, y, side, _ in np.reshape(found, (-1, 4)).tolist()]


@functools.cache
def _face_cascade() -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(os.path.join(cv2.data.haarcascades, "haarcascade_frontalface_default.xml"))
