"""What all exported networks that we run have in common; no Keras, no TensorFlow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError, no_such_file
from model_files import exported_check, hub
from model_files.description import ATTRIBUTE, ExportInfo, from_json
from reading.text import printable


class ExportedNetwork:
    """An exported file, ready to run. A subclass sets `info` and has `_outputs`.

    Attributes:
        info: the file's description.
    """

    info: ExportInfo

    def __init__(self, path: str | Path, gpu: bool):
        self._arguments = str(Path(path).absolute()), gpu

    def __reduce__(self) -> tuple:
        """Pickles the file's path, because the runtimes' objects cannot be pickled; the file must still be there."""
        return type(self), (*self._arguments, True)

    def _outputs(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Probabilities and embeddings of a batch; may raise any exception."""
        raise NotImplementedError

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
            return exported_check.checked(self._outputs(pixels), len(pixels), len(self.info.network.class_names))
        except Exception as error:  # the runtimes' exceptions have no common class but this
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


def local_file(path: str | Path, module: str, package: str) -> Path:
    """The file on this machine; refuses one that is missing, or that nothing here can run.

    Args:
        path: a path or ``hf://...`` (`hub.local_file`).
        module: what runs the file.
        package: the name under which pip finds it.
    """
    path = Path(hub.local_file(path))
    if not path.is_file():
        raise no_such_file(path, "weights file")
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{path}: {package}, which runs it, is not installed here; run: pip install {package}")
    return path


def checked_info(
    path: str | Path, text: Any, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]
) -> ExportInfo:
    """A file's description, if it is that of its inputs and outputs.

    Args:
        path: the file.
        text: the description, JSON; None where the file has none.
        inputs: shapes by name, without the first axis.
        outputs: the same.

    Raises:
        UserError: no description, or another one.
    """
    if text is None:
        raise UserError(
            f"{path}: no description of its network ({ATTRIBUTE!r}); expected a file that `python test.py export` wrote"
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


def _words(shapes: dict[str, Any]) -> str:
    return ", ".join(printable(f"{name} {('N', *shape)}", 200) for name, shape in shapes.items())
