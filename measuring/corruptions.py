"""Thirteen changes of an image that photographs and webcams bring, each a fixed function; needs no Keras.

The idea is that of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. The list and the severities are our own, one severity per line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import cv2
import numpy as np

from reading.arrays import Rows

# An image uint8 (H, W, C), C 1 or 3, and the generator of its random numbers, to an image of the same shape.
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]

SIDE = 48  # pixels: a blur's width is given for an image of this side, and grows with the side
_BORDER = cv2.BORDER_REFLECT_101  # what lies outside is mirrored, because a black frame would be a second change


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One change of an image.

    Attributes:
        title: its name in tables and figures.
        change: the function.
    """

    title: str
    change: Change


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _brightened(image: np.ndarray, rng: np.random.Generator, levels: float) -> np.ndarray:
    """``x + levels``."""
    return _rounded(np.float64(image) + levels)


def _contrasted(image: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    """``m + factor (x - m)`` with the mean m of all the image's values."""
    mean = image.mean()
    return _rounded(mean + factor * (np.float64(image) - mean))


def _blurred(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """A Gaussian of ``sigma`` pixels for a shorter side of `SIDE` pixels, in proportion for others."""
    wide = sigma * min(image.shape[:2]) / SIDE
    return cv2.GaussianBlur(image, (0, 0), wide, borderType=_BORDER).reshape(image.shape)


def _noisy(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """``x + sigma z``, z a standard normal number of its own for every value."""
    return _rounded(image + sigma * rng.standard_normal(image.shape))


def _compressed(image: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    """Encoded as JPEG and decoded."""
    is_gray = image.shape[2] == 1
    encoded = image if is_gray else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", encoded, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    decoded = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if is_gray else cv2.IMREAD_COLOR)
    return decoded[..., None] if is_gray else cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def _rotated(image: np.ndarray, rng: np.random.Generator, degrees: float) -> np.ndarray:
    """Rotated about the centre, counter-clockwise, bilinearly."""
    height, width = image.shape[:2]
    move = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    return cv2.warpAffine(image, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=_BORDER).reshape(image.shape)


def _shifted(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Moved by ``share`` of the side, rounded to pixels: left, right, up or down, drawn for each image."""
    right, down = ((-1, 0), (1, 0), (0, -1), (0, 1))[rng.integers(4)]
    height, width = image.shape[:2]
    y, x = round(share * height), round(share * width)
    framed = cv2.copyMakeBorder(image, y, y, x, x, _BORDER)
    top, left = y - down * y, x - right * x
    return framed[top : top + height, left : left + width].reshape(image.shape)


def _smaller(image: np.ndarray, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Scaled down by the mean of areas and put into the middle."""
    height, width = image.shape[:2]
    y, x = max(1, round(scale * height)), max(1, round(scale * width))
    small = cv2.resize(image, (x, y), interpolation=cv2.INTER_AREA)
    top, left = (height - y) // 2, (width - x) // 2
    edges = top, height - y - top, left, width - x - left
    return cv2.copyMakeBorder(small, *edges, _BORDER).reshape(image.shape)


# A list of 13 and no more: another entry would change the mean, and with it every number that was reported.
CORRUPTIONS: dict[str, Corruption] = {
    "brighter": Corruption("brighter, +50", partial(_brightened, levels=50)),
    "darker": Corruption("darker, -50", partial(_brightened, levels=-50)),
    "low_contrast": Corruption("contrast x 0.5", partial(_contrasted, factor=0.5)),
    "high_contrast": Corruption("contrast x 1.5", partial(_contrasted, factor=1.5)),
    "blur_1": Corruption("Gaussian blur, sigma 1", partial(_blurred, sigma=1)),
    "blur_2": Corruption("Gaussian blur, sigma 2", partial(_blurred, sigma=2)),
    "noise_10": Corruption("Gaussian noise, sigma 10", partial(_noisy, sigma=10)),
    "noise_20": Corruption("Gaussian noise, sigma 20", partial(_noisy, sigma=20)),
    "jpeg_30": Corruption("JPEG, quality 30", partial(_compressed, quality=30)),
    "rotated_left": Corruption("rotated left by 15 degrees", partial(_rotated, degrees=15)),
    "rotated_right": Corruption("rotated right by 15 degrees", partial(_rotated, degrees=-15)),
    "shifted": Corruption("shifted by 10%", partial(_shifted, share=0.1)),
    "smaller": Corruption("smaller face, x 0.8", partial(_smaller, scale=0.8)),
}


def corrupt(image: np.ndarray, name: str, seed: int = 0, row: int = 0) -> np.ndarray:
    """The image under one of `CORRUPTIONS`.

    Args:
        image: uint8 (H, W, C), C 1 (gray) or 3 (RGB).
        name: of the corruption.
        seed: of what is drawn at random (noise, the direction of a shift).
        row: the image's row in its data set: every row draws its own numbers, whatever batch it is in.

    Returns:
        uint8 (H, W, C).

    >>> corrupt(np.full((48, 48, 1), 100, np.uint8), "brighter")[0, 0, 0]
    np.uint8(150)
    """
    return CORRUPTIONS[name].change(image, np.random.default_rng((seed, row)))


class CorruptedRows:
    """Images that are corrupted as they are read, so that one batch is in memory at a time.

    Args:
        images: uint8 (N, H, W, C), or rows of a memory map (`data_helper.PreparedSplit.rows`).
        name: one of `CORRUPTIONS`.
        seed: see `corrupt`.
    """

    def __init__(self, images: np.ndarray | Rows, name: str, seed: int = 0):
        self.images, self.name, self.seed = images, name, seed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Iterable[int]) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows
        return np.stack(list(self._changed(self.images[rows], numbers)))

    def _changed(self, images: np.ndarray, rows: Iterable[int]) -> Iterator[np.ndarray]:
        for image, row in zip(images, rows, strict=True):
            yield corrupt(image, self.name, self.seed, int(row))
