"""Trains a tiny network for a few steps on one Keras backend; run by ``test_backends.py`` in a process of its own.

``KERAS_BACKEND=jax python backend_steps.py OUTPUTS.npz``: a process has one Keras backend.
"""

from __future__ import annotations

import dataclasses
import sys

import keras
import numpy as np
from keras import layers

import augmentation
import cnn_model
import custom_loss
import runtime
import trainer as training
from config import AugmentConfig, OptimizerConfig
from data_helper import PreparedSplit
from dataset_class import Batches
from training import optimization

SIDE, NUM_CLASSES, K, D = 16, 7, 2, 8
LABELS = np.array([0, 0, 1, 2, 3, 3, 3, 6, 6, 1, 0, 5], np.int32)  # no image of class 4
HISTORY = 20  # predictions: the second batch of 12 overruns it
RATE, DECAY, STEPS = 1e-3, 0.05, 2
LOSSES = {"ad_corre": 0.0, "two_views": 5.0}  # name to the weight of the erasing-attention consistency


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), SIDE, SIDE, 1), np.uint8)


def _backbone(size: int, weights: str | None) -> keras.Model:
    """A convolution and a separable one of 8 filters, each with our batch normalisation."""
    inputs = keras.Input((size, size, 1))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(cnn_model.BatchNorm(momentum=0.95)(x))
    x = layers.SeparableConv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(cnn_model.BatchNorm(momentum=0.95)(x))
    return keras.Model(inputs, x, name="backbone")


def _draw(variable: keras.Variable, rng: np.random.Generator) -> np.ndarray:
    """First values of a variable. NumPy draws them, because each backend's own initializers draw others."""
    x = rng.normal(size=variable.shape).astype(np.float32)
    if variable.name in ("gamma", "beta", "bias"):
        return 0.1 * x + (variable.name == "gamma")
    return x * np.float32(np.sqrt(2 / np.prod(variable.shape[:-1])))


def make_trainer(
    dropout: float,
    augment: bool,
    average: float | None = None,
    resident: tuple[np.ndarray, ...] = (),
    w_eac: float = 0.0,
) -> training.AdCorreTrainer:
    """A compiled trainer with the full loss and AdamW, and with mixup where it has the second view of ``w_eac``."""
    cnn_model.ARCHITECTURES["tiny"] = dataclasses.replace(cnn_model.ARCHITECTURES["mini_xcp"], build=_backbone)
    network = cnn_model.build_model("tiny", NUM_CLASSES, K, D, input_size=SIDE, dropout=dropout)
    model = training.AdCorreTrainer(
        network,
        custom_loss.AdCorreLoss(NUM_CLASSES, history=HISTORY, label_smoothing=0.1, w_eac=w_eac),
        augmentation.Augmentation(AugmentConfig(augment=augment), seed=1),
        mixup=augmentation.Mixup(0.2, seed=2) if augment and w_eac else None,
        average=optimization.MovingAverage(network, average) if average else None,
        batch_size=len(LABELS),
    )
    if resident:
        model.keep_on_device(*resident)
    config = OptimizerConfig(learning_rate=RATE, schedule="constant", weight_decay=DECAY)
    model.compile(optimization.make_optimizer(config, STEPS, 1), jit_compile=runtime.jit_compile())
    model.build((None, SIDE, SIDE, 1))
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign(_draw(variable, rng))
    return model


def _arrays(variables) -> list[tuple[str, np.ndarray]]:
    """Name and values of each variable. Keras numbers layers and optimizers by what the process has built before."""
    return [(f"{i:03d} {variable.name}", keras.ops.convert_to_numpy(variable)) for i, variable in enumerate(variables)]


def random_step() -> dict[str, np.ndarray]:
    """One step of ``fit`` with augmentation and dropout: the weights before and after, and the state after.

    The classifier starts at 0, where cross-entropy has no gradient in the embeddings: what lies before them moves by
    the discriminators alone.
    """
    model = make_trainer(dropout=0.5, augment=True)
    classifier = model.network.get_layer("logits")
    classifier.set_weights([0 * array for array in classifier.get_weights()])
    weights = model.network.trainable_variables
    outputs = {f"before/{name}": array for name, array in _arrays(weights)}
    model.fit(images(), LABELS, batch_size=len(LABELS), epochs=1, shuffle=False, verbose=0)
    outputs |= {f"after/{name}": array for name, array in _arrays(weights)}
    return outputs | {f"state/{name}": array for name, array in _arrays([*model.variables, *model.optimizer.variables])}


def plain_steps(w_eac: float) -> dict[str, np.ndarray]:
    """Steps without augmentation and dropout: the terms of each step, and the state after the last."""
    model = make_trainer(dropout=0.0, augment=False, w_eac=w_eac)
    outputs = {}
    for step in range(STEPS):
        model.reset_metrics()
        terms = model.train_on_batch(images(), LABELS, return_dict=True)
        outputs |= {f"terms/{name} of step {step + 1}": np.float64(value) for name, value in terms.items()}
    outputs |= {f"weights/{name}": array for name, array in _arrays(model.network.trainable_variables)}
    outputs |= {f"statistics/{name}": array for name, array in _arrays(model.network.non_trainable_variables)}
    outputs |= {f"optimizer/{name}": array for name, array in _arrays(model.optimizer.variables)}
    return outputs | {"history": keras.ops.convert_to_numpy(model.loss_layer.history_h2)}


def split(count: int, name: str) -> PreparedSplit:
    """Random images in memory, with labels that repeat."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, SIDE, SIDE, 1), np.uint8)
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    meta = {"dataset": "noise", "split": name, "class_names": names, "num_images": count}
    return PreparedSplit(pixels, np.arange(count) % NUM_CLASSES, meta, None, None)


def two_epochs(steps_per_call: int, w_eac: float) -> dict[str, np.ndarray]:
    """The state and the logs after two epochs of 4 steps; 0 steps per call reads batches from outside the device."""
    keras.utils.set_random_seed(5)
    train, val = split(4 * len(LABELS), "train"), split(15, "val")
    resident = steps_per_call > 0
    on_device = (train.images, val.images) if resident else ()
    model = make_trainer(dropout=0.5, augment=True, average=0.9, resident=on_device, w_eac=w_eac)
    shared = {"batch_size": len(LABELS), "seed": 5, "resident": resident}
    engine = training.Engine(model, Batches(train, **shared), Batches(val, **shared, training=False))
    for batches in (engine.train, engine.validation):
        batches.steps_per_call = steps_per_call or 1
    history = keras.callbacks.History()
    engine.fit(2, [history])
    if resident and keras.backend.backend() == "jax":
        check_program(model, engine.train[0])
    logs = {f"logs/{name}": np.float64(values) for name, values in history.history.items()}
    # By number, because the optimizer's names contain those that Keras counts.
    return {f"state/{name[:3]}": array for name, array in _arrays(model.state_variables())} | logs


def check_program(model: training.AdCorreTrainer, data: tuple[np.ndarray, np.ndarray]) -> None:
    """The images are an argument of the training step that JAX lowers, and no constant in it."""
    import jax

    variables = (
        *(model.trainable_variables, model.non_trainable_variables),
        *(model.optimizer.variables, model.metrics_variables),
    )
    text = jax.jit(model.train_step).lower([[v.value for v in each] for each in variables], data).as_text()
    size = f"tensor<{4 * len(LABELS)}x{SIDE}x{SIDE}x1xui8>"
    assert any(size in line for line in text.splitlines() if "func.func public @main" in line)
    assert not [line for line in text.splitlines() if "constant" in line and size in line]


def main() -> None:
    outputs = {f"random/{name}": array for name, array in random_step().items()}
    for loss, w_eac in LOSSES.items():
        outputs |= {f"{loss}/plain/{name}": array for name, array in plain_steps(w_eac).items()}
        for steps_per_call in (0, 32) if w_eac else (0, 1, 32):
            found = two_epochs(steps_per_call, w_eac)
            outputs |= {f"{loss}/{steps_per_call}/{name}": array for name, array in found.items()}
    np.savez(sys.argv[1], backend=keras.backend.backend(), **outputs)


if __name__ == "__main__":
    main()
