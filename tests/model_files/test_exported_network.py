"""What the networks of exported files have in common."""

from __future__ import annotations

import pytest

from files import UserError
from model_files import exported_network
from model_files.lite_network import LiteNetwork
from model_files.onnx_network import OnnxNetwork


@pytest.mark.parametrize(
    "network, ending, runtime",
    [
        (OnnxNetwork, "onnx", "onnxruntime.* not installed here; run: pip install onnxruntime"),
        (LiteNetwork, "tflite", "ai-edge-litert.* not installed here; run: pip install ai-edge-l"),
    ],
)
def test_a_missing_file_and_a_missing_runtime_are_refused(network, ending, runtime, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"none\.{ending}: no such weights file"):
        network(tmp_path / f"none.{ending}")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"")
    monkeypatch.setattr(exported_network.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"a\.{ending}: {runtime}"):
        network(path)
