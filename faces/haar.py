"""OpenCV's cascade of Haar features: always there, frontal upright faces only, no landmarks."""

from __future__ import annotations

import os

import cv2
import numpy as np

from faces.face import Face, ranked, suppress

NAME = "haar"
CERTAIN = 3.0  # weight of the last stage

MIN_SIDE = 24  # the cascade's own window
# Weaker boxes are mostly false ones (docs/faces.md).
MIN_WEIGHT = 2.5
MIN_NEIGHBORS = 4
# The cascade needs a pixel for each pixel of its window, so a 12-megapixel image is searched as it is.
MAX_PIXELS = 12_600_000
OVERLAP = 0.4


class HaarDetector:
    """`Detector` around ``haarcascade_frontalface_default.xml``, which comes with OpenCV."""

    name = NAME
    certain = CERTAIN

    def __init__(self) -> None:
        self._cascade = cv2.CascadeClassifier(
            os.path.join(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")
        )

    def detect(self, image: np.ndarray) -> list[Face]:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = gray.shape
        scale = min(1.0, (MAX_PIXELS / gray.size) ** 0.5)
        if scale < 1:
            size = max(1, int(width * scale)), max(1, int(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        found, _, weights = self._cascade.detectMultiScale3(
            gray, scaleFactor=1.1, minNeighbors=MIN_NEIGHBORS, minSize=(MIN_SIDE, MIN_SIDE), outputRejectLevels=True
        )
        boxes = np.reshape(found, (-1, 4)).astype(np.float64) / scale
        weights = np.reshape(weights, -1)
        good = weights >= MIN_WEIGHT
        boxes, weights = boxes[good], weights[good]
        keep = suppress(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), weights, OVERLAP, of_smaller=True)
        return ranked([Face(tuple(boxes[i].tolist()), float(weights[i]), None, NAME) for i in keep], CERTAIN)
