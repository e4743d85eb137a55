"""The Face and Detector types, the ranking of faces, and the merging of overlapping boxes."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

# A face is large when its side is at least this share of the largest side among the faces that count as certain.
LARGE_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Face:
    """One face that a detector found.

    Attributes:
        box: x, y, width, height in pixels of the image, x and y of the upper left corner; as the detector draws it.
            It may reach over the border of the image. Pixel (0, 0) covers 0 to 1 on both axes.
        score: how certain the detector is; higher is more certain. mtcnn and yunet: a probability, 0 to 1. haar: the
            weight of the cascade's last stage, without an upper limit; most faces have 3 to 8.
        landmarks: float32 (5, 2), x and y in pixels: left eye, right eye, nose, left and right corner of the mouth,
            where left is the left side of the image (so the person's own right eye comes first). None for haar.
        detector: name of the detector; it decides how `crop` frames the box.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: np.ndarray | None = dataclasses.field(default=None, compare=False)
    detector: str = ""

    @property
    def side(self) -> float:
        """Side in pixels of the square that has the box's area."""
        return math.sqrt(self.box[2] * self.box[3])

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box, x and y in pixels."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


class Detector(Protocol):
    """Finds faces in an image; safe to keep for many images, not to share between threads.

    Attributes:
        name: as `faces.open_detector` takes it.
        certain: the score from which a face counts as certain.
    """

    name: str
    certain: float

    def detect(self, image: np.ndarray) -> list[Face]:
        """Finds every face.

        Args:
            image: uint8 (H, W, 3) RGB, upright.

        Returns:
            The faces, best first (`ranked`); empty when there is none.
        """
        ...


def ranked(faces: list[Face], certain: float) -> list[Face]:
    """Sorts faces so that the most certain of the large ones comes first.

    The largest box alone is no good choice: false boxes are often large and have a low score.

    Args:
        faces: of one image.
        certain: the score from which a face counts as certain. When no face reaches it, all count.
    """
    sure = [face for face in faces if face.score >= certain] or faces
    large = LARGE_SHARE * max((face.side for face in sure), default=0.0)

    def key(face: Face) -> tuple:
        is_sure = face.score >= certain or len(sure) == len(faces)
        # Equal scores: the larger one, then the upper left one, so that the order never depends on the detector's.
        return not (is_sure and face.side >= large), not is_sure, -face.score, -face.side, face.box

    return sorted(faces, key=key)


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float, of_smaller: bool = False) -> np.ndarray:
    """Greedy non-maximum suppression: the best box stays, those that overlap it by more than the threshold go.

    Args:
        boxes: float (N, 4): x1, y1, x2, y2.
        scores: float (N,).
        threshold: largest overlap that stays, 0 to 1.
        of_smaller: the overlap is divided by the smaller area, so that a box inside another one goes; False divides
            it by the union.

    Returns:
        Int indices of the boxes that stay, best first.
    """
    order = np.argsort(-scores, kind="stable")
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    keep = []
    while order.size:
        best, rest = order[0], order[1:]
        keep.append(best)
        overlap = np.minimum(boxes[best, 2:], boxes[rest, 2:]) - np.maximum(boxes[best, :2], boxes[rest, :2])
        shared = np.prod(np.maximum(overlap, 0), axis=1)
        whole = np.minimum(areas[best], areas[rest]) if of_smaller else areas[best] + areas[rest] - shared
        order = rest[shared <= threshold * whole]
    return np.array(keep, int)
