"""Runs an exported TensorFlow Lite file with LiteRT and NumPy alone; no Keras, no TensorFlow."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from files import UserError
from model_files import lite_check
from model_files.exported_network import ExportedNetwork, checked_info, local_file
from reading.text import printable


class LiteNetwork(ExportedNetwork):
    """A TensorFlow Lite file that `python test.py export` wrote, ready to run on one core of the CPU.

    TensorFlow's own interpreter is not used: importing it takes seconds, and it runs TensorFlow's operations too, some
    of which write files.

    Args:
        path: the file.
        gpu: without effect; every exported network has it.
        checked: the file was tried already (`lite_check.check_file`), or we have just written it.

    Raises:
        UserError: no LiteRT here; or the file is missing, damaged, not one of ours, or a network that does not give
            probabilities within the limits of time and memory.
    """

    def __init__(self, path: str | Path, gpu: bool = True, checked: bool = False):
        path = local_file(path, "ai_edge_litert", "ai-edge-litert")
        super().__init__(path, gpu)
        if not checked:
            lite_check.check_file(path)
        try:
            self._runner = lite_check.open_runner(path)
            inputs = lite_check.shapes(self._runner.get_input_details())
            outputs = lite_check.shapes(self._runner.get_output_details())
        except UserError:
            raise
        except Exception as error:  # LiteRT's exceptions have no common class but this
            reason = printable(" ".join(str(error).split()), 400)
            raise UserError(
                f"{path}: expected a TensorFlow Lite file, found one that cannot be used ({reason})"
            ) from None
        self.info = checked_info(path, lite_check.read_info(path), inputs, outputs)
        self._turn = threading.Lock()  # an interpreter runs one batch at a time

    def _outputs(self, pixels: np.ndarray) -> list[np.ndarray]:
        with self._turn:
            outputs = self._runner(pixels=pixels)
            return [outputs["probabilities"], outputs["embeddings"]]
