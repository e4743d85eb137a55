"""train.py for the tests of several devices: a network that compiles in a second, no figures, no TensorFlow.

``python distributed_run.py OPTIONS`` trains; with DIE_AT_EPOCH=N in the environment it dies (SIGKILL)
when epoch N begins. ``python distributed_run.py collectives DEVICES`` prints the exchanges of one step
on so many devices of a CPU as one JSON list of ``[operation, [shape, …], where it comes from]``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import config
import runtime
import train
from distributed import exchange
from files import run_command

EMBEDDINGS, SIZE, CLASSES, BATCH = 2, 8, 7, 16


def tiny_backbone(size, weights):
    import keras

    import cnn_model

    inputs = keras.Input((size, size, 1))
    x = cnn_model._convolution(inputs, 8, strides=2)
    x = cnn_model._convolution(x, 12, separable=True)
    return keras.Model(inputs, x, name="backbone")


def make_small() -> None:
    import numpy as np

    import cnn_model
    import metrics
    import plots
    import trainer

    cnn_model.ARCHITECTURES["tiny"] = cnn_model.Architecture(tiny_backbone, 8, 1, "image")
    plots.save_figures = plots.save_history = lambda *args: None
    metrics.tsne = lambda *args: (np.empty(0, np.int64), np.empty((0, 2), np.float32))
    begin = trainer.EpochOrder.on_epoch_begin

    def begin_or_die(self, epoch, logs=None):
        if epoch + 1 == int(os.environ.get("DIE_AT_EPOCH", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, epoch, logs)

    trainer.EpochOrder.on_epoch_begin = begin_or_die


def collectives(devices: int) -> list[tuple[str, list[str], str]]:
    """The exchanges of the training step that `AdCorreTrainer` compiles, read from XLA's optimised program."""
    import jax
    import keras
    import numpy as np

    import augmentation
    import cnn_model
    import custom_loss
    import trainer
    from distributed.process_group import ProcessGroup
    from training import optimization

    programs = []

    def compile_and_keep(function, **options):
        compiled = jit(function, **options)

        def step(state, data):
            programs.append(compiled.lower(state, data).compile())
            return programs[-1](state, data)

        return step

    with exchange.connected(ProcessGroup(devices)):
        keras.utils.set_random_seed(0)
        model = trainer.AdCorreTrainer(
            cnn_model.build_model("tiny", CLASSES, EMBEDDINGS, SIZE),
            custom_loss.AdCorreLoss(CLASSES, history=50),
            augmentation.Augmentation(config.AugmentConfig(), seed=0),
        )
        model.compile(optimization.make_optimizer(config.OptimizerConfig(), 5, 4), jit_compile=True)
        model.build((None, 16, 16, 1))
        model.optimizer.build(model.trainable_variables)
        from keras.src.backend.jax import trainer as keras_trainer

        jit, keras_trainer.jit = keras_trainer.jit, compile_and_keep
        images = np.zeros((BATCH, 16, 16, 1), np.uint8)
        model.train_on_batch(images, np.arange(BATCH, dtype=np.int32) % CLASSES)
    (program,) = programs
    assert jax.device_count() == devices
    found = []
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    for line in program.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            shapes, name = match.groups()
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append((name, re.findall(r"\w+\[[\d,]*\]", shapes), origin.group(1) if origin else ""))
    return found


def main() -> None:
    sys.modules["tensorflow"] = None  # seconds to import
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    runtime.choose_backend("jax")
    make_small()
    if sys.argv[1] == "collectives":
        print(json.dumps(collectives(int(sys.argv[2]))))
    else:
        train.main()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
