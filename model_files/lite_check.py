"""Opens a TensorFlow Lite file with LiteRT, and tries one in another process first (`exported_check`); no Keras."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from model_files import exported_check
from model_files.description import ATTRIBUTE
from reading import limits

INFO_NAME = f"{ATTRIBUTE}.json"
SECONDS = 60  # for loading and the first two batches
_SIGNATURE = "serving_default"
_NAMES = ["embeddings", "probabilities"]


def check_file(path: str | Path) -> None:
    """Loads and runs a TensorFlow Lite file in another process; see `exported_check.check_file`."""
    exported_check.check_file(path, "model_files.lite_check", "a TensorFlow Lite file", SECONDS)


def open_runner(path: str | Path, threads: int | None = None) -> Any:
    """LiteRT's runner of a file's signature: ``runner(pixels=...)`` returns the outputs by name.

    Args:
        path: the file.
        threads: None is LiteRT's choice, one thread.

    Raises:
        UserError: the file is too large.
        ValueError: it is no TensorFlow Lite file, or has no such signature.
    """
    from ai_edge_litert.interpreter import Interpreter

    data = limits.read_bytes(path, limits.EXPORTED_BYTES, "a TensorFlow Lite file")
    with runtime.notices_hidden():
        interpreter = Interpreter(model_content=data, num_threads=threads)
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner(_SIGNATURE)
    return runner


def shapes(details: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """The shapes of a runner's inputs or outputs by name, without the first axis.

    Args:
        details: what ``get_input_details`` or ``get_output_details`` returns.

    Raises:
        ValueError: one is not float32.
    """
    for name, item in details.items():
        if item["dtype"] is not np.float32:
            raise ValueError(f"{name}: expected float32, found {np.dtype(item['dtype']).name}")
    return {name: [int(size) for size in item["shape_signature"][1:]] for name, item in details.items()}


def read_info(path: str | Path) -> bytes | None:
    """The description behind the model, in the form of TFLite Metadata; None where there is none.

    Raises:
        UserError: it is too large.
    """
    try:
        with zipfile.ZipFile(path) as behind, behind.open(INFO_NAME) as file:
            text = file.read(limits.JSON_BYTES + 1)
    except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, NotImplementedError, ValueError):
        return None
    limits.check_size(len(text), limits.JSON_BYTES, path, "a description")
    return text


def _attempt(path: str) -> None:
    runner = open_runner(path)
    inputs = shapes(runner.get_input_details())
    if list(inputs) != ["pixels"] or sorted(runner.get_output_details()) != _NAMES or len(inputs["pixels"]) != 3:
        return  # `LiteNetwork` names what differs

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        outputs = runner(pixels=pixels)
        return [outputs["probabilities"], outputs["embeddings"]]

    exported_check.try_batches(run, tuple(max(size, 1) for size in inputs["pixels"]))


if __name__ == "__main__":
    exported_check.try_file(sys.argv[1], _attempt)
