"""Runs an exported ONNX file with ONNX Runtime and NumPy alone; no Keras, no TensorFlow."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError, no_such_file
from model_files import hub, onnx_check
from model_files.description import ATTRIBUTE, ExportInfo, from_json
from reading.text import printable


class OnnxNetwork:
    """An ONNX file that `python test.py export` wrote, ready to run.

    Args:
        path: the file.
        gpu: use a GPU where ONNX Runtime has one; False uses the CPU.
        checked: the file was tried already (`onnx_check.check_file`), or we have just written it.

    Attributes:
        info: the file's description.

    Raises:
        UserError: no ONNX Runtime here; or the file is missing, damaged, not one of ours, or a network that does not
            give probabilities within the limits of time and memory.
    """

    def __init__(self, path: str | Path, gpu: bool = True, checked: bool = False):
        path = hub.local_file(path)
        if not Path(path).is_file():
            raise no_such_file(path, "weights file")
        if importlib.util.find_spec("onnxruntime") is None:
            raise UserError(f"{path}: onnxruntime, which runs it, is not installed here; run: pip install onnxruntime")
        # Read at the import. Otherwise ONNX Runtime 1.32 sends events to Microsoft.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        self._arguments = str(Path(path).absolute()), gpu
        if not checked:
            onnx_check.check_file(path)
        usable = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if gpu else ("CPUExecutionProvider",)
        try:
            self._session = onnx_check.open_session(path, [name for name in wanted if name in usable])
        except UserError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            reason = printable(" ".join(str(error).split()), 400)
            raise UserError(f"{path}: expected an ONNX file, found one that cannot be read ({reason})") from None
        self.info = self._read_info(path)

    def __reduce__(self) -> tuple:
        """Pickles the file's path, because ONNX Runtime's sessions cannot be pickled; the file must still be there."""
        return OnnxNetwork, (*self._arguments, True)

    def _read_info(self, path: str | Path) -> ExportInfo:
        """The description, which must be that of the inputs and outputs."""
        inputs = {item.name: item.shape[1:] for item in self._session.get_inputs()}
        outputs = {item.name: item.shape[1:] for item in self._session.get_outputs()}
        for item in (*self._session.get_inputs(), *self._session.get_outputs()):
            if item.type != "tensor(float)":
                raise UserError(f"{path}: {printable(item.name, 80)}: expected tensor(float), found {item.type}")
        try:
            text = self._session.get_modelmeta().custom_metadata_map.get(ATTRIBUTE)
        except UnicodeDecodeError:
            text = None
        if text is None:
            raise UserError(
                f"{path}: no description of its network ({ATTRIBUTE!r}); expected a file that `python test.py export` "
                "wrote"
            )
        # Older exports do not name k and d.
        shape = dict(zip(("num_embeddings", "embedding_size"), outputs.get("embeddings", ()), strict=False))
        info = from_json(ExportInfo, text, path, **shape)
        size, classes = info.network.input_size, len(info.network.class_names)
        embeddings = [info.network.num_embeddings, info.network.embedding_size]
        if inputs != {"pixels": [size, size, 3]} or outputs != {"probabilities": [classes], "embeddings": embeddings}:
            raise UserError(
                f"{path}: expected pixels (N, {size}, {size}, 3) in, probabilities (N, {classes}) and embeddings "
                f"{('N', *embeddings)} out, found {_words(inputs)} in, {_words(outputs)} out"
            )
        return info

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One batch.

        Args:
            pixels: float32 (B, H, W, 3) RGB in 0..255, H and W the network's input size.

        Returns:
            Float32 probabilities (B, C), rows sum to 1, and embeddings (B, k, d).

        Raises:
            UserError: the network gives something else, or cannot be run.
        """
        try:
            outputs = self._session.run(["probabilities", "embeddings"], {"pixels": pixels})
            return onnx_check.checked(outputs, len(pixels), len(self.info.network.class_names))
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            reason = printable(" ".join(str(error).split()), 400)
            raise UserError(f"{self._arguments[0]}: {reason}") from None

    def predict(self, images: np.ndarray, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Runs every image, in batches, as `evaluation.predict` does with Keras.

        Args:
            images: uint8 or float (N, H, W, 3) RGB in 0..255 of the network's size, N at least 1.
            batch_size: images per batch.

        Returns:
            Float32 probabilities (N, C) and embeddings (N, k, d).

        Raises:
            UserError: a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, received {batch_size}")
        starts = range(0, len(images), batch_size)
        parts = [self.run(np.asarray(images[start : start + batch_size], np.float32)) for start in starts]
        probabilities, embeddings = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return probabilities, embeddings


def _words(shapes: dict[str, Any]) -> str:
    return ", ".join(printable(f"{name} {('N', *shape)}", 200) for name, shape in shapes.items())
