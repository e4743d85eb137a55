"""How do many picture files become arrays of one shape, on all cores and in order? OpenCV and NumPy only."""

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

# isort: split
import cv2  # after images, which sets the limits that OpenCV reads when it is first imported

CHUNK_BYTES = 2_000_000  # pixels that a worker hands over at a time

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """One picture to prepare, before it is read.

    Attributes:
        split: train, val or test.
        name: the file's name inside the source, with ``/``.
        label: canonical code.
        box: x, y, width, height of the face in pixels, before the margin; None is the whole picture.
    """

    split: str
    name: str
    label: int
    box: Box | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a picture's pixels should: why they cannot be had."""

    reason: str


def decode_pictures(
    files: SourceFiles,
    pictures: Sequence[Picture],
    size: int,
    channels: int,
    *,
    margin: float = 0.0,
    workers: int | None = None,
) -> Iterator[np.ndarray | Unreadable]:
    """Decodes pictures on all cores, in order, a few megabytes ahead of whoever asks for them.

    The workers are threads: what takes the time, reading and OpenCV, runs outside of Python's lock. Against
    processes they save a copy of the pixels (a fifth of the time of a 400-pixel JPEG) and the memory of an interpreter
    a core. Meanwhile OpenCV itself uses one thread a call.

    Args:
        files: the source.
        pictures: what to decode.
        size: side of the result in pixels; pictures are stretched to it (`images.resize_image`).
        channels: 1 (gray) or 3 (RGB).
        margin: share of a face box added on each side.
        workers: how many; None is one a core.

    Yields:
        For each picture uint8 (size, size, channels), or why there is no such array: no picture, or no face in it.

    Raises:
        OSError: the disk fails, or a file is not there or not ours to read: that says nothing of a picture.
    """
    workers = workers or os.cpu_count() or 1
    chunk = max(1, CHUNK_BYTES // (size * size * channels))

    def decode(start: int) -> list[np.ndarray | Unreadable]:
        return [_decoded(files, picture, size, channels, margin) for picture in pictures[start : start + chunk]]

    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for start in range(0, len(pictures), chunk):
            waiting.append(pool.submit(decode, start))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _decoded(files: SourceFiles, picture: Picture, size: int, channels: int, margin: float) -> np.ndarray | Unreadable:
    try:
        image = decode_image(files.read(picture.name), picture.name)
        if picture.box is not None:
            image = crop_box(image, picture.box, margin)
    except UserError as error:
        return Unreadable(str(error).removeprefix(f"{picture.name}: "))
    return _with_channels(resize_image(image, size), channels)


def crop_box(image: np.ndarray, box: Box, margin: float) -> np.ndarray:
    """Cuts a face out of a picture.

    Args:
        image: uint8 (H, W, C).
        box: x, y, width, height in pixels.
        margin: share of the width added on the left and on the right, and of the height above and below.

    Returns:
        A view of what lies inside the picture.

    Raises:
        UserError: the box has no pixel inside the picture.
    """
    height, width = image.shape[:2]
    x, y, box_width, box_height = box
    left, right = round(x - margin * box_width), round(x + (1 + margin) * box_width)
    top, bottom = round(y - margin * box_height), round(y + (1 + margin) * box_height)
    inside = image[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    if inside.size == 0:
        raise UserError(f"expected a face box inside the picture of {width} x {height}, found {box}")
    return inside


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == channels:
        return image
    code = cv2.COLOR_GRAY2RGB if channels == 3 else cv2.COLOR_RGB2GRAY
    return cv2.cvtColor(image, code).reshape(*image.shape[:2], channels)
