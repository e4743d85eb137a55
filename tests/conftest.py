"""What do several test files need? Small prepared splits, a small model file, our commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Before anything imports Keras: the tests run on TensorFlow, whatever a developer's ~/.keras/keras.json says.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

from datasets import CLASS_NAMES

ROOT = Path(__file__).parents[1]


def write_split(
    data_dir, labels, *, split="train", dataset="synthetic", shape=(8, 8, 1), num_classes=7, images=None, votes=None
):
    """Prepares a split of ``images``, or of images filled with their row % 256, so that a batch tells its rows."""
    from datasets.shared.split_writer import SplitWriter

    with SplitWriter(data_dir, dataset, split, len(labels), shape, CLASS_NAMES[:num_classes], [], {}) as writer:
        for i, label in enumerate(labels):
            writer.add(np.full(shape, i % 256, np.uint8) if images is None else images[i], int(label))
        if votes is not None:
            writer.add_array("votes", votes)
    return Path(data_dir) / dataset / split


def run_python(*args, cwd=ROOT, env_changes=None, **options):
    """Runs Python with our modules importable; the finished process with its output as text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env_changes or {})}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )


def read_state(run_dir) -> dict[str, np.ndarray]:
    """The arrays of a run's `state.h5`, by number and path of their variables."""
    import json

    from model_files import safe_hdf5

    content = safe_hdf5.read_arrays(Path(run_dir) / "state.h5")
    paths = json.loads(content.attributes["notes"])["paths"]
    return {f"{name} {path}": content.arrays[name] for name, path in zip(sorted(content.arrays), paths, strict=True)}


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A model file of a mini_xcp with k = 2, d = 8 for 24-pixel faces: quick to build, as good as random."""
    import keras

    from model_files import model_file
    from model_files.description import NetworkDescription

    keras.utils.set_random_seed(7)
    described = NetworkDescription("mini_xcp", CLASS_NAMES[:7], num_embeddings=2, embedding_size=8, input_size=24)
    network = model_file.build_network(described)
    path = tmp_path_factory.mktemp("weights") / "tiny.weights.h5"
    info = model_file.ModelInfo(
        described,
        dataset="synthetic/train",
        metrics={"split": "val", "accuracy": 0.5},
        versions={"keras": keras.__version__},
    )
    model_file.save_model(path, network, info)
    return path


def small_trainer(embedding_size=8, config=None, average=None, images=()):
    """A compiled trainer of a mini_xcp with k = 2 for gray faces of 24 pixels, as a run makes it."""
    import augmentation
    import cnn_model
    import custom_loss
    import trainer
    from config import AugmentConfig, OptimizerConfig
    from training import optimization

    network = cnn_model.build_model("mini_xcp", num_embeddings=2, embedding_size=embedding_size, input_size=24)
    model = trainer.AdCorreTrainer(
        network,
        custom_loss.AdCorreLoss(7, history=20),
        augmentation.Augmentation(AugmentConfig(), seed=0),
        average=optimization.MovingAverage(network, average) if average else None,
        batch_size=14,
    )
    if images:
        model.keep_on_device(*images)
    model.compile(optimization.make_optimizer(config or OptimizerConfig(), 10, 1), jit_compile=False)
    model.build((None, 24, 24, 1))
    model.optimizer.build(model.trainable_variables)
    return model
