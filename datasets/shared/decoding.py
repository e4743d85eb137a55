"""Decodes image files to arrays of one shape, on all cores and in order; OpenCV and NumPy only."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from datasets.shared.archives import SourceFiles
from files import UserError
from images import decode_image, resize_image
from reading.text import printable

# isort: split
import cv2  # after images, which sets the limits that OpenCV reads when it is first imported

CHUNK_BYTES = 2_000_000  # of pixels that a worker returns at once

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to prepare, before it is read.

    Attributes:
        split: train, val or test.
        name: the file's name inside the source, with ``/``.
        label: canonical code.
        box: x, y, width, height of the face in pixels, before the margin; None is the whole image.
    """

    split: str
    name: str
    label: int
    box: Box | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Replaces the pixels of an image that cannot be read; says why."""

    reason: str


def decode_images(
    files: SourceFiles,
    images: Sequence[ImageFile],
    size: int,
    channels: int,
    *,
    margin: float = 0.0,
    workers: int | None = None,
) -> Iterator[np.ndarray | Unreadable]:
    """Decodes images on all cores, in order, a few megabytes ahead of the consumer.

    The workers are threads, because reading and OpenCV release Python's lock. Processes would copy the pixels once
    more (a fifth of the time of a 400-pixel JPEG) and need one interpreter's memory per core. OpenCV itself uses one
    thread per call meanwhile.

    Args:
        files: the source.
        images: what to decode.
        size: side of the result in pixels; images are stretched to it (`images.resize_image`).
        channels: 1 (gray) or 3 (RGB).
        margin: share of a face box added on each side.
        workers: number of threads; None is one per core.

    Yields:
        For each image uint8 (size, size, channels), or `Unreadable`: no image, or its face box is outside.

    Raises:
        OSError: the disk fails, or a file is missing or not readable for us; the image itself may be fine.
    """
    workers = workers or os.cpu_count() or 1
    chunk = max(1, CHUNK_BYTES // (size * size * channels))

    def decode(start: int) -> list[np.ndarray | Unreadable]:
        return [_decoded(files, image, size, channels, margin) for image in images[start : start + chunk]]

    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for start in range(0, len(images), chunk):
            waiting.append(pool.submit(decode, start))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _decoded(files: SourceFiles, image: ImageFile, size: int, channels: int, margin: float) -> np.ndarray | Unreadable:
    try:
        pixels = decode_image(files.read(image.name), image.name)
        if image.box is not None:
            pixels = crop_box(pixels, image.box, margin)
    except UserError as error:
        return Unreadable(str(error).removeprefix(f"{printable(image.name)}: "))
    return _with_channels(resize_image(pixels, size), channels)


def crop_box(image: np.ndarray, box: Box, margin: float) -> np.ndarray:
    """Cuts a face out of an image.

    Args:
        image: uint8 (H, W, C).
        box: x, y, width, height in pixels.
        margin: share of the width added on the left and on the right, and of the height above and below.

    Returns:
        A view of the part of the box inside the image.

    Raises:
        UserError: the box has no pixel inside the image.
    """
    height, width = image.shape[:2]
    x, y, box_width, box_height = box
    left, right = round(x - margin * box_width), round(x + (1 + margin) * box_width)
    top, bottom = round(y - margin * box_height), round(y + (1 + margin) * box_height)
    inside = image[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    if inside.size == 0:
        raise UserError(f"expected a face box inside the image of {width} x {height}, found {box}")
    return inside


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == channels:
        return image
    code = cv2.COLOR_GRAY2RGB if channels == 3 else cv2.COLOR_RGB2GRAY
    return cv2.cvtColor(image, code).reshape(*image.shape[:2], channels)
