"""Measures a training step, whether it waits for data, and the cost of the Ad-Corre loss.

``python benchmarks/train_step.py [--backend jax]`` compares, for mini_xcp at 48 px and xcp at 96 px:

- ``fit`` with batches from memory-mapped files and the same step on a batch in memory;
- a step with the full loss and a step with cross-entropy alone.

The two sides of a ratio take turns in one process, and the median counts. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import runtime
from datasets import CLASS_NAMES
from files import run_command

CE_ALONE = {"w_fd": 0.0, "w_md": 0.0, "w_ed": 0.0}
CASES = (("mini_xcp", 48, 128), ("xcp", 96, 32))  # architecture, side in pixels, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--steps", type=int, default=24, help="measured steps per side")
    options = parser.parse_args()
    runtime.choose_backend(options.backend)
    import evaluation

    rows = []
    print(f"{'':<16}{'step ms':>9}{'images/s':>10}{'fit/memory':>12}{'ad-corre/ce':>13}")
    for arch, size, batch_size in CASES:
        row = measure(arch, size, batch_size, options.steps)
        rows.append(row)
        print(
            f"{arch + ' ' + str(size) + ' px':<16}{1e3 * row['step_s']:>9.1f}{batch_size / row['step_s']:>10.0f}"
            f"{row['fit_over_memory']:>12.3f}{row['ad_corre_over_ce']:>13.3f}"
        )
    print(json.dumps({"rows": rows, "steps": options.steps, "commit": evaluation.commit(), **runtime.versions()}))


def measure(arch: str, size: int, batch_size: int, steps: int) -> dict:
    """One row: seconds per step, throughput of fit / of the step in memory, time of Ad-Corre / of cross-entropy."""
    import keras

    from dataset_class import Batches

    ad_corre, ce = make_trainer(arch, size, {}), make_trainer(arch, size, CE_ALONE)
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(write_split(folder, size, batch_size * 12), batch_size, seed=0)
        in_memory = [keras.ops.convert_to_tensor(array) for array in batches[0]]
        clock = step_clock()
        times = {"ad_corre": [], "ce": [], "fit": []}
        while len(times["fit"]) < steps or len(times["ce"]) < steps:
            ad_corre.fit(batches, shuffle=False, verbose=0, callbacks=[clock])
            times["fit"] += clock.seconds
            for _ in range(len(batches)):
                times["ad_corre"].append(seconds(lambda: ad_corre.train_on_batch(*in_memory)))
                times["ce"].append(seconds(lambda: ce.train_on_batch(*in_memory)))
            if clock.warming_up:  # the first round compiled
                clock.warming_up = False
                times = {"ad_corre": [], "ce": [], "fit": []}
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "arch": arch,
        "size": size,
        "batch_size": batch_size,
        "step_s": median["ad_corre"],
        "fit_over_memory": median["ad_corre"] / median["fit"],
        "ad_corre_over_ce": median["ad_corre"] / median["ce"],
    }


def make_trainer(
    arch: str,
    size: int,
    loss_options: dict,
    precision: str | None = None,
    augment: bool = True,
    optimizer: str | None = None,
    steps_per_execution: int = 1,
):
    """A compiled trainer as in train.py, except for what the arguments change."""
    import augmentation
    import cnn_model
    import custom_loss
    import trainer

    runtime.set_up(0, precision)
    model = trainer.AdCorreTrainer(
        cnn_model.build_model(arch, input_size=size),
        custom_loss.AdCorreLoss(7, **loss_options),
        augmentation.Augmentation(config.AugmentConfig(augment=augment), seed=0),
    )
    model.compile(
        optimizer=optimizer or trainer.make_optimizer(config.OptimizerConfig(), 100, 1),
        jit_compile=runtime.jit_compile(),
        steps_per_execution=steps_per_execution,
    )
    return model


def write_split(folder: str, size: int, num_images: int):
    """A memory-mapped split of random pixels."""
    from data_helper import open_split
    from datasets.shared.split_writer import SplitWriter

    rng = np.random.default_rng(0)
    names = CLASS_NAMES[:7]
    shape = (size, size, 3)
    with SplitWriter(folder, "synthetic", "train", num_images, shape, names, sources=[], options={}) as writer:
        for i in range(num_images):
            writer.add(rng.integers(0, 256, shape, np.uint8), i % 7)
    return open_split(folder, "synthetic", "train")


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def step_clock():
    """A callback that records the seconds between the ends of successive steps of one `fit`."""
    import keras

    class Clock(keras.callbacks.Callback):
        warming_up = True

        def on_epoch_begin(self, epoch, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

        @property
        def seconds(self):
            return list(np.diff(self.ends))

    return Clock()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
