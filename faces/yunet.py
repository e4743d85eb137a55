"""YuNet: a small network of OpenCV's model zoo for faces of 10 to 300 pixels, with five landmarks.

Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence Research 20 (2023).
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from faces.download import ModelFile, fetch
from faces.face import Face, ranked, suppress
from files import UserError, no_such_file

NAME = "yunet"
CERTAIN = 0.85

MODEL = ModelFile(
    name="face_detection_yunet_2023mar.onnx",
    url="https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/face_detection_yunet/"
    "face_detection_yunet_2023mar.onnx",
    size=232_589,
    sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
)

MIN_SCORE = 0.7
OVERLAP = 0.4
# The finest scale has at most this many pixels. Each further scale has a third of the side of the one before, down to
# the scale at which a face that fills the image has the size that the network was trained on.
MAX_PIXELS = 3_100_000
SCALE_STEP, COARSE_SIDE = 1 / 3, 320


class YunetDetector:
    """`Detector` around `cv2.FaceDetectorYN`.

    Args:
        file: the model file; None fetches it into the user's cache folder when it is not there.

    Raises:
        UserError: the file is missing, is not this model, or cannot be fetched.
    """

    name = NAME
    certain = CERTAIN

    def __init__(self, file: str | Path | None = None) -> None:
        path = fetch(MODEL, "--detector-file") if file is None else Path(file)
        if not path.is_file():
            raise no_such_file(path, f"model file, {MODEL.name} of {MODEL.url}", str(path))
        try:
            self._network = cv2.FaceDetectorYN.create(str(path), "", (COARSE_SIDE, COARSE_SIDE), MIN_SCORE, 0.3, 5000)
        except cv2.error as error:
            raise UserError(f"{path}: OpenCV cannot read it as a YuNet model ({error.err or error})") from None

    def detect(self, image: np.ndarray) -> list[Face]:
        height, width = image.shape[:2]
        rows, scale = [], min(1.0, (MAX_PIXELS / (height * width)) ** 0.5)
        while True:
            rows.append(self._search(image, scale))
            if max(height, width) * scale <= COARSE_SIDE:
                break
            scale *= SCALE_STEP
        rows = np.concatenate(rows)
        corners = np.hstack([rows[:, :2], rows[:, :2] + rows[:, 2:4]])
        found = []
        for i in suppress(corners, rows[:, 14], OVERLAP):
            # YuNet names the sides after the person: its right eye is on the left of the image, as `Face` wants it.
            points = rows[i, 4:14].reshape(5, 2).astype(np.float32)
            found.append(Face(tuple(rows[i, :4].tolist()), float(rows[i, 14]), points, NAME))
        return ranked(found, CERTAIN)

    def _search(self, image: np.ndarray, scale: float) -> np.ndarray:
        """Float64 (N, 15) of one scale in pixels of the image: box, five points, score."""
        height, width = image.shape[:2]
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        self._network.setInputSize(size)
        _, found = self._network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        rows = np.reshape(np.empty((0, 15)) if found is None else found, (-1, 15)).astype(np.float64)
        rows[:, :14] *= np.tile([width / size[0], height / size[1]], 7)
        return rows
