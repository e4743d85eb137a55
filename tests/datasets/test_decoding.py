"""Tests of datasets.shared.decoding: the right arrays in order; broken files do not stop the rest."""

from __future__ import annotations

import threading
import time
import types

import cv2
import numpy as np
import pytest

from datasets.shared import decoding
from datasets.shared.archives import SourceFiles
from datasets.shared.decoding import ImageFile, Unreadable, crop_box, decode_images


def png(image):
    """A lossless image file of uint8 (H, W) or RGB (H, W, 3)."""
    return cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def write_source(folder, images):
    folder.mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return SourceFiles(folder, ("*",))


def decode(files, images, size=4, channels=3, **options):
    return list(decode_images(files, images, size, channels, **options))


def every(names):
    return [ImageFile("train", name, 0) for name in names]


@pytest.mark.parametrize("workers", [3, None])
def test_images_come_in_order(tmp_path, workers, monkeypatch):
    """Two images per chunk, the early ones slower than the late ones."""
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 2 * 4 * 4 * 3)
    names = [f"{number:02}.png" for number in range(25)]
    files = write_source(tmp_path / "in", {name: png(np.full((8, 8), 9 * i, np.uint8)) for i, name in enumerate(names)})
    read = files.read
    monkeypatch.setattr(files, "read", lambda name: (time.sleep(0.02 * (name < "08.png")), read(name))[1])
    images = decode(files, every(names), workers=workers)
    assert [image[0, 0, 0] for image in images] == [9 * i for i in range(25)]


def test_shapes_and_colours(tmp_path):
    """A red square of 8 x 6 and a gray one of 3 x 5."""
    red = np.zeros((6, 8, 3), np.uint8)
    red[..., 0] = 200
    files = write_source(tmp_path / "in", {"gray.png": png(np.full((5, 3), 70, np.uint8)), "red.png": png(red)})
    gray3, red3 = decode(files, every(files.names))
    assert (gray3.shape, gray3.dtype, red3.shape) == ((4, 4, 3), np.uint8, (4, 4, 3))
    assert np.all(gray3 == 70) and np.all(red3 == [200, 0, 0])
    gray1, red1 = decode(files, every(files.names), channels=1)
    assert (gray1.shape, red1.shape) == ((4, 4, 1), (4, 4, 1))
    assert np.all(gray1 == 70) and np.all(red1 == round(0.299 * 200))


def test_a_face_is_cut_out_before_it_is_resized(tmp_path):
    image = np.zeros((20, 30), np.uint8)
    image[5:9, 10:16] = 250
    files = write_source(tmp_path / "in", {"a.png": png(image)})
    (face,) = decode(files, [ImageFile("train", "a.png", 0, (10.0, 5.0, 6.0, 4.0))], channels=1)
    assert np.all(face == 250)
    (face,) = decode(files, [ImageFile("train", "a.png", 0, (10.0, 5.0, 6.0, 4.0))], channels=1, margin=0.5)
    assert face[..., 0].tolist() == [[0, 0, 0, 0], [0, 250, 250, 0], [0, 250, 250, 0], [0, 0, 0, 0]]


def test_boxes():
    for box, margin, rows, columns in (
        ((10, 5, 6, 4), 0.0, (5, 9), (10, 16)),
        ((10.4, 4.6, 6.2, 4.2), 0.0, (5, 9), (10, 17)),  # 10.4..16.6 and 4.6..8.8
        ((10, 5, 6, 4), 0.5, (3, 11), (7, 19)),  # 3 pixels left and right, 2 above and below
        ((-4, -3, 10, 10), 0.0, (0, 7), (0, 6)),
        ((25, 15, 10, 10), 0.2, (13, 20), (23, 30)),
    ):
        image = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30, 1)
        assert np.array_equal(crop_box(image, box, margin), image[slice(*rows), slice(*columns)])


def test_what_cannot_be_read_is_told_and_the_rest_decoded(tmp_path):
    whole = png(np.full((8, 8), 50, np.uint8))
    images = {"cut.png": whole[:40], "empty.png": b"", "text.png": b"hello", "whole.png": whole}
    files = write_source(tmp_path / "in", images)
    *broken, image = decode(files, every(files.names), workers=2)
    assert np.all(image == 50)
    assert all(isinstance(found, Unreadable) for found in broken)
    assert broken[1].reason == "the file is empty; expected an image", "the name is not said twice"
    for found, word in zip(broken, ("cannot be decoded", "empty", "cannot be decoded"), strict=True):
        assert word in found.reason
    (outside,) = decode(files, [ImageFile("train", "whole.png", 0, (8.0, 0.0, 5.0, 5.0))])
    assert outside.reason == "expected a face box inside the image of 8 x 8, found (8.0, 0.0, 5.0, 5.0)"


def test_a_failing_disk_is_no_broken_image(tmp_path):
    files = write_source(tmp_path / "in", {"a.png": png(np.zeros((4, 4), np.uint8))})
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        decode(files, every(files.names))


def test_images_wait_for_their_reader(monkeypatch):
    """Memory is bounded: 3 workers read at most 3 x 2 + 1 chunks beyond what was asked for, and stop when told to."""
    data, read = png(np.zeros((4, 4), np.uint8)), []
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 1)  # an image a chunk
    files = types.SimpleNamespace(read=lambda name: (read.append(name), data)[1])
    decoded = decode_images(files, every(map(str, range(100))), 4, 1, workers=3)
    for _ in range(5):
        next(decoded)
    time.sleep(0.2)
    assert len(read) <= 5 + 7
    decoded.close()
    assert len(read) <= 5 + 7


def test_all_workers_decode_at_a_time_and_opencv_adds_none(monkeypatch):
    """Every worker waits in its read for the other two; alone it would wait for ever."""
    data, together, counts = png(np.zeros((4, 4), np.uint8)), threading.Barrier(3, timeout=10), []
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 1)

    def read(_):
        together.wait()
        counts.append(cv2.getNumThreads())
        return data

    before = cv2.getNumThreads()
    assert len(decode(types.SimpleNamespace(read=read), every("abcdef"), workers=3)) == 6
    assert (counts, cv2.getNumThreads()) == ([1] * 6, before)
