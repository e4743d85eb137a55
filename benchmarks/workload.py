"""What the benchmarks of training share: random data, a trainer for one step, and `train.py`'s own ``fit``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import config
import runtime
from data_helper import PreparedSplit, open_split
from datasets import CLASS_NAMES
from datasets.shared.split_writer import SplitWriter

NUM_CLASSES = 7
CROSS_ENTROPY = {"w_fd": 0.0, "w_md": 0.0, "w_ed": 0.0}  # loss options that leave only cross-entropy
_POOL = 256  # different random images of a split; more would only take longer to draw


def write_split(folder: str | Path, shape: tuple[int, int, int], num_images: int, name: str = "synthetic"):
    """Prepares a split ``train`` of random pixels, (H, W, C) each, and opens it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (min(num_images, _POOL), *shape), np.uint8)
    names = CLASS_NAMES[:NUM_CLASSES]
    with SplitWriter(folder, name, "train", num_images, shape, names, sources=[], options={}) as writer:
        for i in range(num_images):
            writer.add(images[i % len(images)], i % NUM_CLASSES)
    return open_split(folder, name, "train")


def make_batch(size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels uint8 (B, size, size, 3), and labels int32 (B,)."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    return pixels, np.arange(batch_size, dtype=np.int32) % NUM_CLASSES


def make_trainer(
    arch: str,
    size: int,
    loss_options: dict[str, float],
    augment: bool = True,
    optimizer: str | None = None,
):
    """A compiled trainer as in train.py, except for what the arguments change."""
    import augmentation
    import cnn_model
    import custom_loss
    import trainer
    from training import optimization

    runtime.set_up(0)
    model = trainer.AdCorreTrainer(
        cnn_model.build_model(arch, input_size=size),
        custom_loss.AdCorreLoss(NUM_CLASSES, **loss_options),
        augmentation.Augmentation(config.AugmentConfig(augment=augment), seed=0),
    )
    model.compile(
        optimizer=optimizer or optimization.make_optimizer(config.OptimizerConfig(), 100, 1),
        jit_compile=runtime.jit_compile(),
    )
    return model


def make_fit(settings: config.TrainConfig, train: PreparedSplit) -> Callable[[int], list[float]]:
    """`train.py`'s own training on a split, without validation, saving and report.

    Returns:
        ``fit_seconds(epochs)``, which trains so many epochs and returns the seconds of each. The weights go on from
        call to call; the first call compiles.
    """
    import experiment
    import trainer

    runtime.set_up(settings.seed, settings.precision)
    few = settings.batch_size  # the engine wants images to measure; nothing is measured here
    measured = dataclasses.replace(train, images=train.images[:few], labels=train.labels[:few], votes=None)
    engine, _ = experiment.make_engine(settings, {"train": train, settings.select_on: measured})

    def fit_seconds(epochs: int) -> list[float]:
        clock = epoch_clock()
        callbacks = [trainer.EpochOrder(engine.train), trainer.StopAtNaN(engine.train), clock]
        engine.model.fit(engine.train, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
        return clock.seconds

    return fit_seconds


def epoch_clock() -> Any:
    """A callback that records the ``seconds`` of each epoch of one `fit`."""
    import keras

    class Clock(keras.callbacks.Callback):
        async_safe = True  # it looks at no value, so the steps need not wait for it

        def on_train_begin(self, logs=None):
            self.seconds = []

        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds.append(time.perf_counter() - self.started)

    return Clock()


def step_clock() -> Any:
    """A callback that records the ``seconds`` between the ends of successive steps of one `fit`."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

        @property
        def seconds(self):
            return list(np.diff(self.ends))

    return Clock()
