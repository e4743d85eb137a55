"""Digests of single images, which tell the same image in any prepared data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from reading.arrays import Rows

_DIGITS = 16  # 64 bits: two of 300,000 different images share them with probability 2e-9
_BLOCK = 256  # images in memory at a time


def image_digest(image: np.ndarray) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an image's shape and pixels.

    Args:
        image: uint8 (H, W, C).
    """
    digest = hashlib.sha256(repr(tuple(map(int, image.shape))).encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()[:_DIGITS]


def image_digests(images: np.ndarray | Rows, name: str = "images", rows: Iterable[int] | None = None) -> list[str]:
    """The digest of each image, in order, with a progress bar where that takes more than a second.

    Args:
        images: uint8 (N, H, W, C); may be rows of a memory map (`data_helper.PreparedSplit.rows`).
        name: of the images, for the bar.
        rows: the rows that are wanted; None is all of them.
    """
    wanted = np.arange(len(images)) if rows is None else np.asarray(list(rows), np.int64)
    found: list[str] = []
    # delay: a bar for less than a second would only be noise.
    with tqdm(total=len(wanted), desc=f"digests of {name}", unit="image", delay=1, disable=None) as bar:
        for start in range(0, len(wanted), _BLOCK):
            block = images[wanted[start : start + _BLOCK]]
            found += map(image_digest, block)
            bar.update(len(block))
    return found
