"""Finds faces in images and cuts them out as FER-2013 frames them.

    detector = faces.open_detector("auto")
    found = detector.detect(image)          # uint8 (H, W, 3) RGB -> list of Face, best first
    if faces.is_face_crop(image, found):    # nothing to cut out
        ...
    pixels = faces.crop(image, found[0], align=True, size=48)

Detectors (docs/faces.md has recall and times):

- ``haar``: OpenCV's cascade, always available; frontal upright faces, no landmarks.
- ``mtcnn``: finds more faces with fewer false detections, and five landmarks; its weights are in the package ``mtcnn``.
- ``yunet``: OpenCV's `cv2.FaceDetectorYN`; its file of 230 kB is fetched once into the user's cache folder, or named.
- ``auto``: ``mtcnn`` where its package is installed, else ``haar``. It never fetches anything.

No detector imports TensorFlow or Keras.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

import images as _images  # noqa: F401 - sets OpenCV's environment before OpenCV is imported  # isort: skip
from faces.face import Detector, Face
from faces.framing import angle, crop, is_face_crop, pixel_square, square
from files import UserError

__all__ = [
    "Detector",
    "DetectorName",
    "Face",
    "angle",
    "crop",
    "is_face_crop",
    "open_detector",
    "pixel_square",
    "square",
]

DetectorName = Literal["auto", "haar", "mtcnn", "yunet"]


def open_detector(name: DetectorName = "auto", file: str | Path | None = None) -> Detector:
    """Loads a detector.

    Args:
        name: one of `DetectorName`.
        file: model file of ``yunet``; None takes it from the cache folder, and fetches it when it is not there.

    Returns:
        A detector; its ``name`` says which one "auto" chose.

    Raises:
        UserError: an unknown name; a file for a detector that takes none; the package, the file or the network that it
            needs is missing.
    """
    if name not in get_args(DetectorName):
        raise UserError(f"detector: expected one of {', '.join(get_args(DetectorName))}, received {name!r}")
    if name == "auto":
        name = "mtcnn" if importlib.util.find_spec("mtcnn") else "haar"
    if name == "yunet":
        from faces.yunet import YunetDetector

        return YunetDetector(file)
    if file is not None:
        raise UserError(f"detector file {file}: only yunet takes a file, received it with {name}")
    if name == "mtcnn":
        from faces.mtcnn import MtcnnDetector

        return MtcnnDetector()
    from faces.haar import HaarDetector

    return HaarDetector()
