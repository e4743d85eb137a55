"""Runs an exported ONNX file with ONNX Runtime and NumPy alone; no Keras, no TensorFlow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError
from model_files import hub
from model_files.description import ATTRIBUTE, ExportInfo, from_json

_LONGEST_REASON = 400


class OnnxNetwork:
    """An ONNX file that `python test.py export` wrote, ready to run.

    Args:
        path: the file.
        gpu: use a GPU where ONNX Runtime has one; False uses the CPU.

    Attributes:
        info: the file's description.

    Raises:
        UserError: no ONNX Runtime here; or the file is missing, damaged or not one of ours.
    """

    def __init__(self, path: str | Path, gpu: bool = True):
        path = hub.local_file(path)
        if not Path(path).is_file():
            raise UserError(f"{path}: no such weights file")
        if importlib.util.find_spec("onnxruntime") is None:
            raise UserError(f"{path}: onnxruntime, which runs it, is not installed here; run: pip install onnxruntime")
        import onnxruntime

        self._arguments = str(Path(path).absolute()), gpu
        usable = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider") if gpu else ("CPUExecutionProvider",)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they come back as exceptions too
        # Threads that wait for the next call at full load take the cores from what runs in between (a video's frames).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[name for name in wanted if name in usable]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise UserError(f"{path}: expected an ONNX file, found one that cannot be read ({reason})") from None
        self.info = self._read_info(path)

    def __reduce__(self) -> tuple:
        """Pickles the file's path, because ONNX Runtime's sessions cannot be pickled; the file must still be there."""
        return OnnxNetwork, self._arguments

    def _read_info(self, path: str | Path) -> ExportInfo:
        """The description, which must be that of the inputs and outputs."""
        inputs = {item.name: item.shape[1:] for item in self._session.get_inputs()}
        outputs = {item.name: item.shape[1:] for item in self._session.get_outputs()}
        text = self._session.get_modelmeta().custom_metadata_map.get(ATTRIBUTE)
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
            Float32 probabilities (B, C) and embeddings (B, k, d).
        """
        probabilities, embeddings = self._session.run(["probabilities", "embeddings"], {"pixels": pixels})
        return probabilities, embeddings

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
    return ", ".join(f"{name} {('N', *shape)}" for name, shape in shapes.items())
