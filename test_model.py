"""Recognise expressions with a trained network: ``from test_model import TestModels``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

import faces
import runtime
from files import UserError
from images import resize_image
from measuring.views import VIEWS, Views
from model_files import lite_network, onnx_network
from model_files.exported_network import ExportedNetwork
from recognition import ImageResult, Recognition, Results, results
from recognition.inputs import ImageInput, Inputs, copy_of, from_array, from_pil, is_one, is_pil, open_inputs, unusable

if TYPE_CHECKING:
    from explain import Explanation

# Images whose faces wait for the network: bounds the wait for a result where few images have a face.
_MOST_WAITING = 256
DEFAULT_WEIGHTS = Path(__file__).parent / "trained_models" / "fer2013_mini_xcp.weights.h5"


class TestModels:
    """A trained network, ready to recognise.

    Args:
        h5_address: a model file: one that `train.py` wrote, a published one (``AffectNet_6336.h5``), or a ``.keras``
            or ``.h5`` file that `keras.Model.save` wrote of a network of ours; or an ``.onnx`` or
            ``.tflite`` file that `python test.py export` wrote, which ONNX Runtime or LiteRT runs without Keras.
            ``hf://owner/repo/file.weights.h5`` fetches a file from the Hugging Face Hub once (`model_files.hub`). None
            is the model that comes with the project. Nothing in the file is executed.
        GPU: True uses a GPU where there is one; False uses the CPU.
        detector: what finds the faces: ``auto``, ``haar``, ``mtcnn`` or ``yunet`` (docs/faces.md).
        detector_file: model file of ``yunet``; see `faces.open_detector`.
        views: average the probabilities over views of each face: ``none``, ``flip`` or ``ten-crop`` (`views.VIEWS`).

    Raises:
        UserError: the file is missing, damaged or not a model file; an exported file without its runtime here;
            or what `faces.open_detector` refuses.

    Example:
        >>> model = TestModels(h5_address="trained_models/fer2013_mini_xcp.weights.h5")
        >>> model.recognize_fer(img_path="examples/astronaut.png").label
        Happy
        'Happy'
    """

    __test__ = False  # pytest: a class of ours, not of tests

    def __init__(
        self,
        h5_address: str | Path | None = None,
        GPU: bool = True,
        detector: faces.DetectorName = "auto",
        detector_file: str | Path | None = None,
        views: Views = "none",
    ):
        if views not in tuple(VIEWS):
            raise UserError(f"views: expected one of {', '.join(VIEWS)}, received {views!r}")
        if h5_address is not None and not isinstance(h5_address, (str, Path)):
            raise UserError(f"h5_address: expected the path of a model file, received {type(h5_address).__name__}")
        self.views = views
        self._detector_choice = detector, detector_file
        self._detector: faces.Detector | None = faces.open_detector(detector, detector_file)
        if is_exported(h5_address):
            kind = onnx_network.OnnxNetwork if str(h5_address).endswith(".onnx") else lite_network.LiteNetwork
            self.network = kind(h5_address, gpu=GPU)
            self.info = self.network.info
            return
        # Keras is imported late: `--help` stays instant, and the backend can be chosen until here.
        runtime.set_up(gpu=GPU)
        from model_files import model_file

        if GPU and not runtime.has_gpu():
            print("no GPU found: running on the CPU", file=sys.stderr)
        self.network, self.info = model_file.load_model(DEFAULT_WEIGHTS if h5_address is None else h5_address)
        self._has_run = False
        self._process = os.getpid()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C classes, in the order of the probabilities."""
        return self.info.network.class_names

    @property
    def input_size(self) -> int:
        """Side of the network's input in pixels."""
        return self.info.network.input_size

    @property
    def detector(self) -> faces.Detector:
        """What finds the faces. It is not pickled, but opened again."""
        if self._detector is None:
            self._detector = faces.open_detector(*self._detector_choice)
        return self._detector

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_detector": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def recognize_fer(
        self, img_path: Any, detect_face: bool = True, require_face: bool = False, bgr: bool = False
    ) -> Recognition | None:
        """Prints the expression of the best face in an image, or "no face found", and returns the face.

        Args:
            img_path: one image: a path, the bytes of a file, a PIL image or an array (`open_inputs`).
            detect_face: find the face first; an image that is a face crop already is used whole. False uses every
                image whole.
            require_face: refuse an image without a face.
            bgr: an array has OpenCV's order of channels.

        Returns:
            The best face (`faces.face.ranked`), None when there is none.

        Raises:
            UserError: no image, more than one, or with ``require_face`` no face.
        """
        inputs = open_inputs(img_path)
        if not inputs.is_single:
            raise UserError("recognize_fer: expected one image, received several or a folder; use recognize for these")
        (result,) = self._stream(inputs, detect_face, require_face, False, bgr, 1)
        if result.error is not None:
            raise UserError(result.error)
        print(result.label or "no face found")
        return result.best

    def recognize(
        self,
        images: Any,
        detect_face: bool = True,
        require_face: bool = False,
        align: bool = False,
        bgr: bool = False,
        batch_size: int = 64,
    ) -> Results:
        """Every face in each image, in order.

        An image that cannot be read costs only its own result, which has an ``error``; one that was given alone, not
        in a list, raises. A progress bar is shown after a second.

        Args:
            images: see `open_inputs`.
            detect_face: see `recognize_fer`.
            require_face: refuse an image without a face.
            align: turn the eyes level (docs/faces.md).
            bgr: arrays have OpenCV's order of channels.
            batch_size: faces per step of the network; the result does not depend on it.

        Raises:
            UserError: no images, or objects that are none; with ``require_face`` an image without a face.
        """
        inputs = open_inputs(images)
        results = Results(self._stream(inputs, detect_face, require_face, align, bgr, batch_size), self.class_names)
        if inputs.is_single and results[0].error is not None:
            raise UserError(results[0].error)
        return results

    def stream(
        self,
        images: Any,
        detect_face: bool = True,
        require_face: bool = False,
        align: bool = False,
        bgr: bool = False,
        batch_size: int = 64,
    ) -> Iterator[ImageResult]:
        """As `recognize`, but gives each image's result as soon as its batch of faces is done."""
        return self._stream(open_inputs(images), detect_face, require_face, align, bgr, batch_size)

    def _stream(
        self, inputs: Inputs, detect_face: bool, require_face: bool, align: bool, bgr: bool, batch_size: int
    ) -> Iterator[ImageResult]:
        _check_batch_size(batch_size)
        waiting: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        for item in tqdm(
            inputs.images, total=inputs.count, unit="image", delay=1, leave=False, disable=not _is_watched()
        ):
            result, found = self._find(item, detect_face, align, bgr)
            if require_face and not found and "error" not in result:
                raise UserError(f"{item.name}: no face found")
            waiting.append((result, found))
            if sum(len(found) for _, found in waiting) >= batch_size or len(waiting) >= _MOST_WAITING:
                yield from self._recognized(waiting, batch_size)
                waiting = []
        yield from self._recognized(waiting, batch_size)

    def _find(
        self, item: ImageInput, detect_face: bool, align: bool, bgr: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The fields of an `ImageResult` without its faces, and those of each face without the network's part."""
        try:
            image = item.read(bgr)
        except UserError as error:
            if not item.is_file:
                raise
            return {"name": item.name, "size": (0, 0), "error": str(error)}, []
        height, width = image.shape[:2]
        result = {"name": item.name, "size": (width, height), "source": copy_of(item.source, image)}
        found = self.detector.detect(image) if detect_face else []
        if not detect_face or faces.is_face_crop(image, found):
            face = results.kept(image, self.input_size)
            return result, [{"image": face, "box": (0, 0, width, height)}]
        cut = []
        for face in found:
            pixels = results.kept(faces.crop(image, face, align), self.input_size)
            x, y, side = faces.pixel_square(face)
            landmarks = {"score": face.score, "landmarks": face.landmarks}
            cut.append({"image": pixels, "box": (x, y, side, side), **landmarks})
        return result, cut

    def _recognized(
        self, waiting: list[tuple[dict[str, Any], list[dict[str, Any]]]], batch_size: int
    ) -> Iterator[ImageResult]:
        """Runs the network on the faces of some images."""
        pixels = [face["image"] for _, found in waiting for face in found]
        outputs = zip(*self.predict(pixels, batch_size), strict=True) if pixels else iter(())
        for result, found in waiting:
            yield ImageResult(faces=[self._named(face, *next(outputs)) for face in found], **result)

    def _named(self, face: dict[str, Any], probabilities: np.ndarray, embeddings: np.ndarray) -> Recognition:
        label = self.class_names[int(np.argmax(probabilities))]
        named = dict(zip(self.class_names, probabilities.tolist(), strict=True))
        return Recognition(label, named, embeddings.copy(), **face)

    def explain(self, found: Recognition | Iterable[Recognition]) -> Explanation:
        """Which parts of the faces support their labels (`explain.maps`).

        Args:
            found: one face or several, of this model.

        Raises:
            UserError: no face, or something else; or an exported model, which has no feature maps.
        """
        self.check_explains()
        found = list(found) if isinstance(found, Iterable) else [found]
        if not found:
            raise UserError("explain: expected one face or more, received none")
        if others := [type(face).__name__ for face in found if not isinstance(face, Recognition)]:
            raise UserError(f"explain: expected faces (the faces of what recognize returns), received {others[0]}")
        import explain

        return explain.maps(self.network, np.stack([_as_face(face.image, self.input_size, 0) for face in found]))

    def check_explains(self) -> None:
        """Refuses, before anything is computed, a model that `explain` cannot explain."""
        if isinstance(self.network, ExportedNetwork):
            raise UserError(
                "explain: an exported file (.onnx, .tflite) has no feature maps; use the weights file it was made from"
            )

    def predict(self, images: np.ndarray | Sequence[np.ndarray], batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and embeddings of faces.

        Args:
            images: uint8 (N, H, W, 3) RGB, (N, H, W, 1) or (N, H, W) gray; one image (H, W, 3), (H, W, 4) with
                transparency, (H, W, 1) or (H, W); or a sequence of such images or of PIL images, each of any size. Each
                is a face: nothing is cut out.
            batch_size: faces per step; the result does not depend on it.

        Returns:
            Float32 probabilities (N, C), rows summing to 1, and float32 embeddings (N, k, d), vectors of length 1.

        Raises:
            UserError: no images, or one that is not uint8 of such a shape; outputs that are not finite; or a process
                that was forked from the one that loaded the network, where it would wait for ever.
        """
        _check_batch_size(batch_size)
        pixels = [_as_face(image, self.input_size, i) for i, image in enumerate(_as_list(images))]
        if not pixels:
            raise UserError("images: expected one or more, received none")
        if isinstance(self.network, ExportedNetwork):
            return self._predict_exported(np.stack(pixels), batch_size)
        if self._process != os.getpid():
            raise UserError(
                "predict: this process was forked from the one that loaded the network, whose threads it lacks: "
                "it would wait for ever; load the model in each process, or start them with "
                "multiprocessing.get_context('spawn')"
            )
        import evaluation

        # A first call of one batch is not worth the compilation: most often no others follow.
        compiled = self._has_run or len(pixels) > batch_size or not runtime.eager_is_cheap()
        self._has_run = True
        return evaluation.predict(self.network, np.stack(pixels), batch_size, self.views, compiled)

    def _predict_exported(self, pixels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        probabilities, embeddings = self.network.predict(pixels, batch_size)
        if self.views == "none":
            return probabilities, embeddings
        total = np.zeros_like(probabilities)
        for view in VIEWS[self.views]:
            # An exported network takes one size only, so crops are resized here.
            seen = [_as_face(image, self.input_size, i) for i, image in enumerate(view(pixels))]
            total += self.network.predict(np.stack(seen), batch_size)[0]
        return total / len(VIEWS[self.views]), embeddings


def is_exported(path: str | Path | None) -> bool:
    """Whether a model file needs no Keras."""
    return str(path).endswith((".onnx", ".tflite"))


def _check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise UserError(f"batch_size: expected a whole number, 1 or more, received {batch_size!r}")


def _is_watched() -> bool:
    """Whether somebody sees standard error: a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _as_list(images: Any) -> Iterable[Any]:
    """The images of `TestModels.predict`'s argument."""
    if isinstance(images, (str, bytes, Path)):
        raise UserError(
            f"images: predict takes arrays of faces, received {type(images).__name__}; use recognize for files"
        )
    if is_one(images):
        return [images]
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) == 3 and shape[-1] < 5:
        return [images]  # the pixels of one image, no stack of gray ones: `from_array` refuses it
    if not isinstance(images, Iterable):
        raise UserError(f"images: {unusable(images)}")
    return images


def _as_face(image: Any, size: int, index: int) -> np.ndarray:
    """One image as uint8 (size, size, 3)."""
    name = f"images[{index}]"
    if image is None or isinstance(image, (str, bytes, Path)):
        raise UserError(f"{name}: expected an array, received {type(image).__name__}; recognize takes files")
    pixels = from_pil(image, name) if is_pil(image) else from_array(image, name)
    return pixels if pixels.shape[:2] == (size, size) else resize_image(pixels, size)
