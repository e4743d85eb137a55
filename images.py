"""Reads and resizes image files; OpenCV, NumPy, and Pillow for EXIF."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# OpenCV reads both when it is first imported: an image of more pixels is refused before it takes the
# memory, and OpenCV's own warnings do not mix with our one message.
from reading.limits import IMAGE_BYTES, MAX_PIXELS, read_bytes

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2
import numpy as np

from files import UserError
from reading.image_size import check_decoded_size

MID_GRAY = 128

_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112  # EXIF's tag
# What libjpeg and libpng write about a damaged file, and OpenCV does not catch.
_COMPLAINT = re.compile(
    rb"(?:Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS|Unknown Adobe color|"
    rb"Warning: unknown JFIF|libpng (?:error|warning)).*\r?\n?"
)
# What EXIF's orientations need: t transposes, then y mirrors top and bottom, and x left and right.
_TURNS = {2: "x", 3: "yx", 4: "y", 5: "t", 6: "tx", 7: "tyx", 8: "ty"}


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the bytes of a JPEG, PNG, BMP, TIFF, WebP or GIF file.

    16-bit pixels are scaled to 8 bits, transparent pixels are drawn over mid gray, and the image is turned upright as
    its orientation tag says (JPEG, PNG, WebP and TIFF have one).

    Args:
        data: the whole file.
        name: its name in messages.

    Returns:
        uint8 (H, W, 1) for a gray file, (H, W, 3) RGB for a colour file.

    Raises:
        UserError: empty, no image, cut off (also a JPEG that has an end mark, but too little data before it), more
            than `MAX_PIXELS` pixels, or neither 8 nor 16 bits per channel.
    """
    check_decoded_size(data, name)
    if not data:
        raise UserError(f"{name}: the file is empty; expected an image")
    with _complaints.hidden() as complained:
        try:
            pixels = _decode(data)
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
    if complained() and _ends_early(data):
        raise UserError(f"{name}: the JPEG is damaged: a part of its data is missing; get the whole file")
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    pixels = pixels.reshape(*pixels.shape[:2], -1)  # (H, W, C), also for gray
    pixels = _upright(pixels, data)
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(
            f"{name}: expected 8 or 16 bits per channel, gray or colour, found {pixels.dtype} with "
            f"{pixels.shape[2]} channels; save it as PNG or JPEG"
        )
    if pixels.shape[2] == 4:
        pixels = over_mid_gray(pixels)
    return pixels if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _decode(data: bytes) -> np.ndarray | None:
    # Only IMREAD_UNCHANGED keeps transparency, and it alone ignores EXIF; a JPEG has the latter, never the former.
    flag = cv2.IMREAD_ANYCOLOR if data.startswith(_JPEG) else cv2.IMREAD_UNCHANGED
    return cv2.imdecode(np.frombuffer(data, np.uint8), flag)


def _ends_early(data: bytes) -> bool:
    """Whether a JPEG's last scan has too little data: the decoder fills the rest, and reports no error.

    Then more data before the end mark changes the image; otherwise a decoder passes over it.
    """
    end = data.rfind(b"\xff\xd9")
    if not data.startswith(_JPEG) or end < 0:
        return False
    noise = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # 255 would begin a mark
    try:
        expected = _pillow_pixels(data)
    except OSError:  # a kind of JPEG that only OpenCV reads
        return False
    try:
        return _pillow_pixels(data[:end] + noise + data[end:]) != expected
    except OSError:
        return True


def _pillow_pixels(jpeg: bytes) -> bytes:
    """The pixels of a JPEG; unlike OpenCV, Pillow prints nothing about the data."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels: OpenCV's limit is the one that counts
        return Image.open(io.BytesIO(jpeg)).tobytes()


class _Complaints:
    """Keeps the decoders' complaints off the screen: they write them to file descriptor 2.

    The descriptor belongs to the whole process. So threads that decode at the same time share one redirection, and
    what anything else writes meanwhile is passed on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None
        self._screen = -1  # the descriptor that 2 was, while any thread decodes
        self._threads = 0
        self._read = 0  # bytes of the file
        self._count = 0  # complaints so far

    @contextlib.contextmanager
    def hidden(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that says, after the block, whether a decoder may have complained in it.

        True may be due to another thread. It is also True where the process has no file descriptor 2, and on Windows,
        where nothing is hidden.
        """
        with self._lock:
            is_on = self._begin()
            before = self._count
        after = before + 1
        try:
            yield lambda: after > before
        finally:
            if is_on:
                with self._lock:
                    after = self._end()

    def _begin(self) -> bool:
        if not hasattr(os, "pread"):  # Windows
            return False
        if self._threads:
            self._pass_on()
        else:
            try:
                self._screen = os.dup(2)
            except OSError:
                return False
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as we are
            os.dup2(self._file.fileno(), 2)
        self._threads += 1
        return True

    def _end(self) -> int:
        self._threads -= 1
        if not self._threads:
            os.dup2(self._screen, 2)
        self._pass_on()
        if not self._threads:
            os.close(self._screen)
            if self._read:
                self._file.seek(0)
                self._file.truncate()
                self._read = 0
        return self._count

    def _pass_on(self) -> None:
        # Reading must not move the position, because other threads write there.
        while written := os.pread(self._file.fileno(), 1_000_000, self._read):
            self._read += len(written)
            others, found = _COMPLAINT.subn(b"", written)
            self._count += found
            if others:
                os.write(self._screen, others)


_complaints = _Complaints()


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Turns what OpenCV left as it is: it follows the orientation of JPEG and TIFF only."""
    turn = _TURNS.get(_orientation(data), "")
    if "t" in turn:
        pixels = pixels.transpose(1, 0, 2)
    if "y" in turn:
        pixels = pixels[::-1]
    if "x" in turn:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(data: bytes) -> int:
    """EXIF's orientation in a PNG or WebP file, 1 (upright) when there is none."""
    exif = _exif(data)
    if exif is None:
        return 1
    from PIL import Image

    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(exif)
            return tags.get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):  # damaged tags cost no image
        return 1


def _exif(data: bytes) -> bytes | None:
    """The EXIF chunk of a PNG or WebP file; None where there is none, and for another file."""
    is_png = data.startswith(b"\x89PNG")
    if not is_png and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return None
    at = 8 if is_png else 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if is_png:
            length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"eXIf", b"EXIF"):
            return data[at + 8 : at + 8 + length]
        at += 8 + length + (4 if is_png else length % 2)  # a checksum; a byte that makes the length even
    return None


def over_mid_gray(pixels: np.ndarray) -> np.ndarray:
    """Blends uint8 (H, W, 4) with `MID_GRAY` by its last channel, which is the opacity; uint8 (H, W, 3)."""
    blended = np.empty((*pixels.shape[:2], 3), np.uint8)
    for start in range(0, len(pixels), 256):  # because the 16-bit copies take five times the memory
        rows = pixels[start : start + 256]
        alpha = rows[..., 3:].astype(np.uint16)
        blend = rows[..., :3] * alpha + MID_GRAY * (255 - alpha) + 127  # at most 255 * 255 + 127 < 2**16
        blended[start : start + 256] = blend // 255
    return blended


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
    image = decode_image(read_bytes(path, IMAGE_BYTES, "an image"), str(path))
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
