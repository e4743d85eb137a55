"""Reads from an image file's header how much memory its pixels take; nothing is decoded."""

from __future__ import annotations

import io
import math
import struct
import warnings

import numpy as np

from files import UserError
from reading.limits import DECODED_BYTES, MAX_PIXELS

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 4, 4: 4, 6: 4}  # colour type -> what OpenCV makes of it
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> values per pixel in the file
_MOST_DEFLATED = 1_040  # bytes that one byte of Deflate can become, 1,032, and some
_TIFF_BITS, _TIFF_SAMPLES = 258, 277  # tags


def check_decoded_size(data: bytes, name: str) -> None:
    """Refuses an image before it takes the memory.

    OpenCV limits the number of pixels only, and 16 bits in four channels are eight bytes each.

    Args:
        data: the whole file.
        name: its name in messages.

    Raises:
        UserError: the pixels take more than `limits.DECODED_BYTES`, or the header is none that Pillow knows.
    """
    if data.startswith(_JPEG) or not data:
        return  # at most 3 bytes per pixel: OpenCV's limit is enough
    size = _decoded_size(data)
    if size is None:
        raise UserError(
            f"{name}: expected a whole JPEG, PNG, BMP, TIFF, WebP or GIF image, found {len(data):,} bytes that "
            f"begin with {data[:8]!r} and cannot be decoded"
        )
    if size > DECODED_BYTES:
        raise UserError(
            f"{name}: the image is too large; expected at most {MAX_PIXELS:,} pixels and {DECODED_BYTES:,} bytes of "
            "pixels; make it smaller first"
        )


def _chunks_fit(data: bytes) -> bool:
    """Whether no chunk of a PNG claims more bytes than there are: OpenCV allocates what it claims, up to 4 GiB."""
    at, kind = 8, b""
    while kind != b"IEND" and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length  # with the checksum
    return at <= len(data)


def _decoded_size(data: bytes) -> float | None:
    """Bytes that the pixels take; None for a file that is no image."""
    if data.startswith(_PNG) and len(data) >= 26:
        width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
        size = width * height * _PNG_CHANNELS.get(colour, 4) * (2 if bits == 16 else 1)
        in_file = width * height * _PNG_SAMPLES.get(colour, 4) * bits / 8
        if size <= DECODED_BYTES and in_file > _MOST_DEFLATED * len(data):
            return None  # so little data cannot be so many pixels: a damaged header must not cost the memory
        return size if _chunks_fit(data) else None
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            tags = getattr(image, "tag_v2", {})
            bits = max(np.ravel(tags.get(_TIFF_BITS, 16 if image.mode.startswith("I") else 8)).tolist())
            channels = max(4, tags.get(_TIFF_SAMPLES, 1))
    except Image.DecompressionBombError:
        return math.inf
    except Exception:  # Pillow lets through errors of many kinds for a damaged file; what it cannot read is no image
        return None
    return image.width * image.height * channels * max(8, bits) / 8
