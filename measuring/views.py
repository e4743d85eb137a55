"""The views of an image whose probabilities are averaged (test-time augmentation); needs no Keras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

Views = Literal["none", "flip", "ten-crop"]
# Images (N, H, W, C) to one view of each, without a copy.
View = Callable[[np.ndarray], np.ndarray]
CROP_SHARE = 7 / 8  # of the side, as 224 of 256 in Krizhevsky, Sutskever and Hinton, NIPS 2012, section 4.1


def whole(images: np.ndarray) -> np.ndarray:
    """The images as they are."""
    return images


def mirrored(images: np.ndarray, view: View = whole) -> np.ndarray:
    """The mirror images of a view."""
    return view(images)[:, :, ::-1]


def cropped(images: np.ndarray, down: float, right: float) -> np.ndarray:
    """A crop of `CROP_SHARE` of both sides, rounded to pixels, at least one.

    Args:
        images: (N, H, W, C).
        down: place of the crop, 0 (top) to 1 (bottom).
        right: place of the crop, 0 (left) to 1 (right).
    """
    height, width = images.shape[1:3]
    crop_height, crop_width = max(1, round(CROP_SHARE * height)), max(1, round(CROP_SHARE * width))
    top, left = int(down * (height - crop_height)), int(right * (width - crop_width))
    return images[:, top : top + crop_height, left : left + crop_width]


_CROPS = [partial(cropped, down=down, right=right) for down, right in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
VIEWS: dict[Views, tuple[View, ...]] = {
    "none": (whole,),
    "flip": (whole, mirrored),
    "ten-crop": (*_CROPS, *(partial(mirrored, view=crop) for crop in _CROPS)),
}
VIEW_TITLES: dict[Views, str] = {
    "none": "the image alone",
    "flip": "the image and its mirror image",
    "ten-crop": "four corner crops, the centre crop and their mirror images",
}


def views_of(result: Mapping[str, Any]) -> Views:
    """The views of a result; one of an older version says ``flip`` only."""
    return result.get("views") or ("flip" if result.get("flip") else "none")
