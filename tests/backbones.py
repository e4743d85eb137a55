"""Builds, trains, saves, loads and exports networks of keras.applications.

``PYTHONPATH=. python tests/backbones.py [NAME ...]``

Without names all that ``keras:<Name>`` offers, one after the other: minutes each for the largest. Prints one line per
network; the exit code is 1 if one fails.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import keras
import numpy as np

import cnn_model
import custom_loss
import evaluation
import trainer
from config import OptimizerConfig
from datasets import CLASS_NAMES
from files import UserError
from model_files import model_file
from model_files.description import NetworkDescription
from model_files.export import export_network
from training import optimization

_SIZES = (32, 64, 96, 128, 224)  # the first that the backbone takes


def build(name: str) -> tuple[keras.Model, NetworkDescription]:
    """The network of the smallest size that its backbone takes."""
    for size in _SIZES:
        described = NetworkDescription(f"keras:{name}", CLASS_NAMES[:7], 2, 8, size)
        try:
            return model_file.build_network(described), described
        except UserError:
            if size == _SIZES[-1]:
                raise
    raise AssertionError


def try_out(name: str, folder: Path) -> str:
    """Takes one network through its life; returns what was measured.

    Raises:
        Exception: what went wrong.
    """
    network, described = build(name)
    size = described.input_size
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    model = trainer.AdCorreTrainer(network, custom_loss.AdCorreLoss(7, history=20), batch_size=2)
    model.compile(optimization.make_optimizer(OptimizerConfig(), 10, 1), jit_compile=False)
    model.build((None, size, size, 3))
    model.optimizer.build(model.trainable_variables)
    measured = model.train_on_batch(images, np.array([0, 1]), return_dict=True)
    assert all(np.isfinite(value) for value in measured.values()), measured

    info = model_file.ModelInfo(described)
    path = folder / f"{name}.weights.h5"
    model_file.save_model(path, network, info)
    loaded, _ = model_file.load_model(path)
    for before, after in zip(evaluation.predict(network, images), evaluation.predict(loaded, images), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-6)
    differences = export_network(loaded, info, folder / f"{name}.onnx", "onnx")
    found = ", ".join(f"{value:.1e} in the {output}" for output, value in differences.items())
    return f"{size} px, {network.count_params():,} parameters, ONNX differs by {found}"


def main(names: list[str]) -> int:
    failed = 0
    for name in names or cnn_model.keras_names():
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name}: {try_out(name, Path(folder))}", flush=True)
            except Exception:
                failed = 1
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
        keras.backend.clear_session()
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
