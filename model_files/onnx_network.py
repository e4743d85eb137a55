"""How does an exported ONNX file recognise? ONNX Runtime and NumPy alone; no Keras, no TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError

ATTRIBUTE = "ad_corre"  # the key under which every exported file keeps its description
FORMAT_VERSION = 1
_LARGEST_INPUT = 4096
_LONGEST_REASON = 400


@dataclasses.dataclass(frozen=True)
class ExportInfo:
    """What an exported file says of its network (`model_file.ModelInfo` without what only a rebuilding needs).

    Attributes:
        class_names: C names, in the order of the probabilities.
        input_size: side of the input in pixels.
        arch: see `cnn_model.build_model`.
        dataset: what it was trained on, as ``fer2013/train``; empty when unknown.
        origin: where the arrays come from, in words.
    """

    class_names: tuple[str, ...]
    input_size: int
    arch: str = ""
    dataset: str = ""
    origin: str = ""

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})


def parse_info(text: str | None, path: str | Path) -> ExportInfo:
    """The description from an exported file's JSON.

    Args:
        text: what `ExportInfo.to_json` wrote; None where the file has no such entry.
        path: what messages call the file.

    Raises:
        UserError: no description, of another version, or implausible.
    """
    if text is None:
        raise UserError(
            f"{path}: no description of its network ({ATTRIBUTE!r}); expected a file that `python test.py export` wrote"
        )
    try:
        values = json.loads(text)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format version {FORMAT_VERSION}")
        info = ExportInfo(**{**values, "class_names": tuple(values["class_names"])})
        if len(info.class_names) < 2 or not all(isinstance(name, str) for name in info.class_names):
            raise ValueError(f"class_names is {info.class_names!r}")
        if type(info.input_size) is not int or not 1 <= info.input_size <= _LARGEST_INPUT:
            raise ValueError(f"input_size is {info.input_size!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({error})") from None
    return info


class OnnxNetwork:
    """An ONNX file that `python test.py export` wrote, ready to run.

    Args:
        path: the file.
        gpu: use a GPU where ONNX Runtime has one; False keeps off it.

    Attributes:
        info: the file's description.

    Raises:
        UserError: no ONNX Runtime here; or the file is missing, damaged or not one of ours.
    """

    def __init__(self, path: str | Path, gpu: bool = True):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such weights file")
        if importlib.util.find_spec("onnxruntime") is None:
            raise UserError(f"{path}: onnxruntime, which runs it, is not installed here; run: pip install onnxruntime")
        import onnxruntime

        usable = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if gpu else ("CPUExecutionProvider",)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they come back as exceptions too
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[name for name in wanted if name in usable]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise UserError(f"{path}: expected an ONNX file, found one that cannot be read ({reason})") from None
        self.info = parse_info(self._session.get_modelmeta().custom_metadata_map.get(ATTRIBUTE), path)
        self._check_signature(path)

    def _check_signature(self, path: str | Path) -> None:
        size, classes = self.info.input_size, len(self.info.class_names)
        inputs = {item.name: item.shape[1:] for item in self._session.get_inputs()}
        outputs = {item.name: item.shape[1:] for item in self._session.get_outputs()}
        expected = {"pixels": [size, size, 3]}, [classes]
        if (inputs, outputs.get("probabilities")) != expected or set(outputs) != {"probabilities", "embeddings"}:
            raise UserError(
                f"{path}: expected pixels (N, {size}, {size}, 3) in, probabilities (N, {classes}) and embeddings out, "
                f"found {_words(inputs)} in, {_words(outputs)} out"
            )

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One batch.

        Args:
            pixels: float32 (B, H, W, 3) RGB in 0..255, H and W the network's `ExportInfo.input_size`.

        Returns:
            Float32 probabilities (B, C) and embeddings (B, k, d).
        """
        probabilities, embeddings = self._session.run(["probabilities", "embeddings"], {"pixels": pixels})
        return probabilities, embeddings

    def predict(self, images: np.ndarray, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Every image, a batch at a time, as `evaluation.predict` does with Keras.

        Args:
            images: uint8 or float (N, H, W, 3) RGB in 0..255 of the network's size, N at least 1.
            batch_size: images a batch.

        Returns:
            Float32 probabilities (N, C) and embeddings (N, k, d).

        Raises:
            UserError: no batch size.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, received {batch_size}")
        starts = range(0, len(images), batch_size)
        parts = [self.run(np.asarray(images[start : start + batch_size], np.float32)) for start in starts]
        probabilities, embeddings = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return probabilities, embeddings


def _words(shapes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {('N', *shape)}" for name, shape in shapes.items())
