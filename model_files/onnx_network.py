"""Runs an exported ONNX file with ONNX Runtime and NumPy alone; no Keras, no TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from files import UserError
from model_files import onnx_check
from model_files.description import ATTRIBUTE
from model_files.exported_network import ExportedNetwork, checked_info, local_file
from reading.text import printable


class OnnxNetwork(ExportedNetwork):
    """An ONNX file that `python test.py export` wrote, ready to run.

    Args:
        path: the file.
        gpu: use a GPU where ONNX Runtime has one; False uses the CPU.
        checked: the file was tried already (`onnx_check.check_file`), or we have just written it.

    Raises:
        UserError: no ONNX Runtime here; or the file is missing, damaged, not one of ours, or a network that does not
            give probabilities within the limits of time and memory.
    """

    def __init__(self, path: str | Path, gpu: bool = True, checked: bool = False):
        path = local_file(path, "onnxruntime", "onnxruntime")
        super().__init__(path, gpu)
        # Read at the import. Otherwise ONNX Runtime 1.32 sends events to Microsoft.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

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
        for item in (*self._session.get_inputs(), *self._session.get_outputs()):
            if item.type != "tensor(float)":
                raise UserError(f"{path}: {printable(item.name, 80)}: expected tensor(float), found {item.type}")
        try:
            text = self._session.get_modelmeta().custom_metadata_map.get(ATTRIBUTE)
        except UnicodeDecodeError:
            text = None
        inputs = {item.name: item.shape[1:] for item in self._session.get_inputs()}
        outputs = {item.name: item.shape[1:] for item in self._session.get_outputs()}
        self.info = checked_info(path, text, inputs, outputs)

    def _outputs(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._session.run(["probabilities", "embeddings"], {"pixels": pixels})
