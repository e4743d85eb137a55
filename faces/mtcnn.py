"""MTCNN: a cascade of three networks that finds faces of every size, with five landmarks.

Zhang, Zhang, Li and Qiao, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks", IEEE
Signal Processing Letters 23 (2016). The weights are those of the package ``mtcnn``; the cascade around them is written
here so that time and memory are bounded for any image: the package copies a large image once per scale, and its
suppression of overlaps compares all pairs at once.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from faces import mtcnn_networks
from faces.face import Face, ranked, suppress

NAME = "mtcnn"
CERTAIN = 0.95

MIN_FACE = 20  # pixels
CELL = 12  # side of what the first network sees; it looks at every second pixel
SCALE_STEP = 0.709
# The finest scale has at most this many pixels, so that a 24-pixel face in a 12-megapixel image is still found.
MAX_PIXELS = 3_100_000
BAND_PIXELS = 250_000  # the first network goes through a scale in bands of rows, which bounds its memory
MAX_CANDIDATES = 600  # per scale; the most probable stay
BATCH = 256

PNET_SCORE, RNET_SCORE, ONET_SCORE = 0.6, 0.7, 0.9
# float32 of a pixel value v is (v - MEAN) / RANGE
MEAN, RANGE = 127.5, 128.0


class MtcnnDetector:
    """`Detector` that needs the package ``mtcnn``; it imports neither TensorFlow nor Keras."""

    name = NAME
    certain = CERTAIN

    def __init__(self) -> None:
        self._pnet, self._rnet, self._onet = map(mtcnn_networks.load, ("pnet", "rnet", "onet"))

    def detect(self, image: np.ndarray) -> list[Face]:
        halves = _halves(image)
        boxes = self._propose(halves)
        boxes = self._refine(halves, boxes)
        boxes, scores, landmarks = self._finish(halves, boxes)
        found = []
        for (x1, y1, x2, y2), score, points in zip(boxes.tolist(), scores.tolist(), landmarks, strict=True):
            found.append(Face((x1, y1, x2 - x1, y2 - y1), score, points.astype(np.float32), NAME))
        return ranked(found, CERTAIN)

    def _propose(self, halves: list[np.ndarray]) -> np.ndarray:
        """First network: square candidates float (N, 4) from all scales."""
        height, width = halves[0].shape[:2]
        scale = min(CELL / MIN_FACE, math.sqrt(MAX_PIXELS / (height * width)))
        boxes, scores = [np.empty((0, 4))], [np.empty(0)]
        while min(height, width) * scale >= CELL:
            found, probability = self._scan(_resized(halves, scale))
            keep = suppress(found, probability, 0.5)
            boxes.append(found[keep] / scale)
            scores.append(probability[keep])
            scale *= SCALE_STEP
        boxes, scores = np.concatenate(boxes), np.concatenate(scores)
        return _square(boxes[suppress(boxes, scores, 0.7)])

    def _scan(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs the first network over one scale: boxes (N, 4) in its pixels and probabilities (N,)."""
        height, width = image.shape[:2]
        rows = max(CELL, BAND_PIXELS // width // 2 * 2)  # even, because the network looks at every second row
        boxes, scores = [], []
        for top in range(0, height - CELL + 1, rows):
            # A cell reaches CELL - 1 rows below its own, so bands overlap by as much.
            band = image[top : top + rows + CELL - 2]
            offsets, probability = _run(self._pnet, "pnet", band[None])
            y, x = np.nonzero(probability[0, 1] > PNET_SCORE)
            corner = np.stack([2 * x + 1, 2 * y + top + 1, 2 * x + CELL, 2 * y + top + CELL], axis=1)
            boxes.append(corner + offsets[0, :, y, x] * (CELL - 1))
            scores.append(probability[0, 1, y, x])
        boxes, scores = np.concatenate(boxes), np.concatenate(scores)
        best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
        return boxes[best], scores[best]

    def _refine(self, halves: list[np.ndarray], boxes: np.ndarray) -> np.ndarray:
        """Second network: fewer and better candidates, square again."""
        offsets, probability = _run(self._rnet, "rnet", _patches(halves, boxes, 24))
        scores = probability[:, 1, 0, 0]
        boxes = _moved(boxes, offsets)
        good = scores > RNET_SCORE
        boxes, scores = boxes[good], scores[good]
        return _square(boxes[suppress(boxes, scores, 0.7)])

    def _finish(self, halves: list[np.ndarray], boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Third network: boxes (N, 4), probabilities (N,) and landmarks (N, 5, 2)."""
        offsets, points, probability = _run(self._onet, "onet", _patches(halves, boxes, 48))
        scores = probability[:, 1, 0, 0]
        size = (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]
        landmarks = points.reshape(-1, 2, 5).transpose(0, 2, 1) * size + boxes[:, None, :2] - 1  # x1..x5, y1..y5
        boxes = _moved(boxes, offsets)
        good = np.flatnonzero(scores > ONET_SCORE)
        good = good[suppress(boxes[good], scores[good], 0.7, of_smaller=True)]
        good = good[suppress(boxes[good], scores[good], 0.4)]
        return boxes[good], scores[good], landmarks[good]


def _run(net: cv2.dnn.Net, name: str, images: np.ndarray) -> list[np.ndarray]:
    """The outputs of a network for uint8 images (N, H, W, 3), in batches."""
    batches = []
    for start in range(0, len(images), BATCH):
        blob = cv2.dnn.blobFromImages(list(images[start : start + BATCH]), 1 / RANGE, mean=(MEAN,) * 3)
        net.setInput(blob)
        batches.append([np.copy(out) for out in net.forward(mtcnn_networks.HEADS[name])])
    if not batches:
        channels = {"offsets": 4, "landmarks": 10, "faces": 2}
        return [np.empty((0, channels[head], 1, 1), np.float32) for head in mtcnn_networks.HEADS[name]]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def _halves(image: np.ndarray) -> list[np.ndarray]:
    """The image and its halves, quarters and so on: what is shrunk from the nearest one has no aliasing."""
    halves = [image]
    while min(halves[-1].shape[:2]) >= 2 * CELL:
        height, width = halves[-1].shape[:2]
        halves.append(cv2.resize(halves[-1], ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA))
    return halves


def _resized(halves: list[np.ndarray], scale: float) -> np.ndarray:
    height, width = halves[0].shape[:2]
    source = halves[min(len(halves) - 1, max(0, math.floor(-math.log2(scale))))]
    size = max(CELL, round(width * scale)), max(CELL, round(height * scale))
    return cv2.resize(source, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _patches(halves: list[np.ndarray], boxes: np.ndarray, side: int) -> np.ndarray:
    """Cuts out squares as uint8 (N, side, side, 3); mid gray beyond the border, as when the networks were trained."""
    patches = np.empty((len(boxes), side, side, 3), np.uint8)
    height, width = halves[0].shape[:2]
    for patch, (x1, y1, x2, _) in zip(patches, boxes, strict=True):
        level = min(len(halves) - 1, max(0, math.floor(math.log2(max(x2 - x1, 1) / side))))
        source = halves[level]
        across, down = source.shape[1] / width, source.shape[0] / height
        left, top, step = x1 * across, y1 * down, (x2 - x1) / (side - 1)
        # warpAffine takes no image of more than 32,767 pixels a side: only the part that is needed goes there.
        x0, y0 = (min(max(0, math.floor(v) - 2), n - 1) for v, n in ((left, source.shape[1]), (top, source.shape[0])))
        part = source[y0 : y0 + math.ceil(step * side * down) + 5, x0 : x0 + math.ceil(step * side * across) + 5]
        matrix = np.array([[step * across, 0, left - x0], [0, step * down, top - y0]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(part, matrix, (side, side), patch, flags, cv2.BORDER_CONSTANT, (128, 128, 128))
    return patches


def _moved(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) moved by a network's offsets (N, 4, 1, 1), which are shares of their sides."""
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets[..., 0, 0] * np.tile(size, 2)


def _square(boxes: np.ndarray) -> np.ndarray:
    """The smallest squares around boxes (N, 4), with the same centres."""
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.hstack([center - half, center + half])
