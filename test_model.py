"""Recognise expressions with a trained network: ``from test_model import TestModels``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import runtime
from files import UserError
from images import largest_face, read_image, resize_image
from model_files import onnx_network

DEFAULT_WEIGHTS = Path(__file__).parent / "trained_models" / "fer2013_mini_xcp.weights.h5"


@dataclasses.dataclass(frozen=True)
class Recognition:
    """What a network recognises in one face; a notebook shows the image beside the probabilities.

    Attributes:
        label: the most probable class.
        probabilities: class name to probability, summing to 1.
        embeddings: float32 (k, d), each row of length 1.
        image: uint8 (H, W, 3) RGB, the face that the network saw.
    """

    label: str
    probabilities: dict[str, float]
    embeddings: np.ndarray
    image: np.ndarray

    def _repr_png_(self) -> bytes:
        import plots

        return plots.recognition_png(self.image, self.probabilities)


class TestModels:
    """A trained network, ready to recognise.

    Args:
        h5_address: a model file: one that `train.py` wrote, a published one (``AffectNet_6336.h5``), or a ``.keras``
            or ``.h5`` file that `keras.Model.save` wrote of a network of ours; or an ``.onnx`` file that
            `python test.py export` wrote, which ONNX Runtime runs without Keras. None is the model that comes with the
            project. Nothing in the file is executed.
        GPU: True uses a GPU where there is one; False uses the CPU.

    Raises:
        UserError: the file is missing, damaged or not a model file; an ``.onnx`` file without ONNX Runtime here.

    Example:
        >>> model = TestModels(h5_address="trained_models/fer2013_mini_xcp.weights.h5")
        >>> model.recognize_fer(img_path="examples/astronaut.png").label
        Happy
        'Happy'
    """

    __test__ = False  # pytest: a class of ours, not of tests

    def __init__(self, h5_address: str | Path | None = None, GPU: bool = True):
        if is_onnx(h5_address):
            self.network = onnx_network.OnnxNetwork(h5_address, gpu=GPU)
            self.info = self.network.info
            return
        # Keras is imported late: `--help` stays instant, and the backend can be chosen until here.
        runtime.set_up(gpu=GPU)
        from model_files import model_file

        if GPU and not runtime.has_gpu():
            print("no GPU found: running on the CPU", file=sys.stderr)
        self.network, self.info = model_file.load_model(h5_address or DEFAULT_WEIGHTS)
        self._has_run = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C classes, in the order of the probabilities."""
        return self.info.network.class_names

    @property
    def input_size(self) -> int:
        """Side of the network's input in pixels."""
        return self.info.network.input_size

    def recognize_fer(self, img_path: str | Path, detect_face: bool = True) -> Recognition:
        """Prints and returns the expression in an image.

        Args:
            img_path: any image file that OpenCV reads.
            detect_face: cut out the largest face first; an image that is a face already is used whole.

        Raises:
            UserError: no image there.
        """
        recognition = self.recognize([img_path], detect_face)[0]
        print(recognition.label)
        return recognition

    def recognize(
        self, paths: Sequence[str | Path], detect_face: bool = True, batch_size: int = 64
    ) -> list[Recognition]:
        """The expression in each image, in order (`recognize_fer` for many)."""
        faces = [read_image(path) for path in paths]
        if detect_face:
            faces = [largest_face(face) for face in faces]
        probabilities, embeddings = self.predict(faces, batch_size)
        return [
            Recognition(
                label=self.class_names[int(np.argmax(p))],
                probabilities=dict(zip(self.class_names, p.tolist(), strict=True)),
                embeddings=e,
                image=face,
            )
            for p, e, face in zip(probabilities, embeddings, faces, strict=True)
        ]

    def predict(self, images: np.ndarray | Sequence[np.ndarray], batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and embeddings of faces.

        Args:
            images: uint8 (N, H, W, 3) RGB or (N, H, W, 1) gray; or a sequence of such images (H, W, 3), (H, W, 1) or
                (H, W), each of any size. Each is a face: nothing is cut out.
            batch_size: faces per step; the result does not depend on it.

        Returns:
            Float32 probabilities (N, C), rows summing to 1, and float32 embeddings (N, k, d), vectors of length 1.

        Raises:
            UserError: no images, or one that is not uint8 of such a shape.
        """
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise UserError(f"images: expected an array (N, H, W, 3) or a list of images, received {images.shape}")
        faces = [_as_face(image, self.input_size, i) for i, image in enumerate(images)]
        if not faces:
            raise UserError("images: expected one or more, received none")
        if isinstance(self.network, onnx_network.OnnxNetwork):
            return self.network.predict(np.stack(faces), batch_size)
        import evaluation

        # A first call of one batch is not worth the compilation: most often no others follow.
        compiled = self._has_run or len(faces) > batch_size or not runtime.eager_is_cheap()
        self._has_run = True
        return evaluation.predict(self.network, np.stack(faces), batch_size, compiled=compiled)


def is_onnx(path: str | Path | None) -> bool:
    return str(path).endswith(".onnx")


def _as_face(image: np.ndarray, size: int, index: int) -> np.ndarray:
    """One image as uint8 (size, size, 3)."""
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise UserError(
            f"images[{index}]: expected uint8 (H, W, 3) RGB or (H, W, 1) gray, received {image.dtype} {image.shape}"
        )
    if image.shape[:2] != (size, size):
        image = resize_image(image, size)
    return np.broadcast_to(image, (size, size, 3))
