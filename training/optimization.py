"""The optimiser, its schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

import runtime
from config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps_per_epoch: int, epochs: int) -> keras.optimizers.Optimizer:
    """The optimiser with its learning-rate schedule.

    Args:
        config: optimiser, schedule and rates.
        steps_per_epoch: batches per epoch; the schedule counts batches, also while gradients accumulate.
        epochs: length of the whole run; `set_length` changes it.
    """
    rate: float | keras.optimizers.schedules.LearningRateSchedule = config.learning_rate
    if config.schedule == "cosine":
        rate = Cosine(config.learning_rate, config.warmup_epochs * steps_per_epoch)
    elif config.schedule == "inverse_time":
        rate = keras.optimizers.schedules.InverseTimeDecay(config.learning_rate, decay_steps=1, decay_rate=config.decay)
    shared = {"gradient_accumulation_steps": config.accumulate if config.accumulate > 1 else None}
    if config.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate, **shared)
    else:
        shared["weight_decay"] = config.weight_decay
        if config.optimizer == "sgd":
            optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, **shared)
        else:
            optimizer = keras.optimizers.AdamW(rate, **shared)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if isinstance(rate, Cosine):
        # A variable of the optimiser: part of the state, and no constant of the compiled step.
        rate.total = optimizer.add_variable((), keras.initializers.Constant(1), "int32", name="schedule_steps")
    set_length(optimizer, steps_per_epoch * epochs)
    return optimizer


def set_length(optimizer: keras.optimizers.Optimizer, steps: int) -> None:
    """Makes the schedule end after ``steps`` batches; a compiled step need not be compiled again."""
    schedule = inner(optimizer)._learning_rate
    if isinstance(schedule, Cosine):
        schedule.total.assign(steps)


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimiser itself, where mixed_float16 wraps it in one that scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly from 0 to the peak, then falls to 0 as half a cosine (Loshchilov and Hutter 2017).

    `keras.optimizers.schedules.CosineDecay` has the same values, but a length that cannot change.

    Args:
        peak: the largest rate.
        warmup: steps of the rise, which is cut to end before the schedule does.

    Attributes:
        total: steps of the schedule, an int32 variable that `make_optimizer` sets.
    """

    def __init__(self, peak: float, warmup: float):
        self.peak, self.warmup = peak, round(warmup)

    def __call__(self, step):
        """The rate of a step, int () from 0, as float32 ()."""
        step, total = ops.cast(step, "float32"), ops.cast(self.total, "float32")
        warmup = ops.minimum(float(self.warmup), total - 1)
        done = ops.clip((step - warmup) / ops.maximum(total - warmup, 1.0), 0.0, 1.0)
        falling = 0.5 * (1 + ops.cos(math.pi * done))
        return self.peak * ops.where(step < warmup, step / ops.maximum(warmup, 1.0), falling)


class LastUpdate(keras.callbacks.Callback):
    """Applies the gradients that are left over when the run's steps are no multiple of ``accumulate``.

    Between epochs Keras goes on accumulating, so only the end of the run has a rest: less than ``accumulate``
    batches, whose mean is applied at the last step's learning rate, before the last validation. It must stand before
    `AveragedWeights`, which exchanges the weights at the same moment.

    Args:
        epochs: of the whole run.
    """

    def __init__(self, epochs: int):
        super().__init__()
        self.epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.is_last = epoch + 1 == self.epochs

    def on_test_begin(self, logs=None):
        optimizer = inner(self.model.optimizer)
        wanted = optimizer.gradient_accumulation_steps
        steps = int(optimizer._iterations)  # batches; `iterations` counts updates
        if not (self.is_last and wanted and steps % wanted):
            return
        for gradient in optimizer._accumulated_gradients:
            gradient.assign(gradient * (wanted / (steps % wanted)))  # Keras divides the sum by `wanted`
        optimizer._iterations.assign(steps - 1)
        schedule, last = optimizer._learning_rate, float(optimizer.learning_rate)
        optimizer._learning_rate = lambda: last
        optimizer._iterations.assign(steps - steps % wanted + wanted - 1)  # where Keras makes the next update
        try:
            variables = self.model.trainable_variables
            optimizer.apply([ops.zeros(v.shape, v.dtype) for v in variables], variables)
        finally:
            optimizer._learning_rate = schedule
            optimizer._iterations.assign(steps)


class MovingAverage(keras.layers.Layer):
    """Keeps a moving average of a network's weights and batch statistics.

    After step t the average is `a <- m a + (1 - m) w` with `m = min(decay, (t + 1) / (t + 10))`, t from 0: a young
    average forgets the first weights quickly. The last step's weights are blended in when the average is read, or when
    the next step begins. Keras's own average (``use_ema``) leaves the batch statistics out, which then belong to other
    weights, and does not start young.

    Args:
        network: whose ``weights`` are averaged.
        decay: the largest `m`, 0..1.
    """

    def __init__(self, network: keras.Model, decay: float):
        super().__init__(name="moving_average", dtype="float32")  # so that mixed precision does not round the weights
        self._weights_now = lambda: network.weights  # a list would be tracked as this layer's own
        self._blend = runtime.compiled(lambda *tensors: _blended(decay, *tensors))
        self.decay = decay
        self.steps = self.add_weight((), "zeros", "int32", trainable=False, name="steps")
        self.averages = [
            self.add_weight(w.shape, "zeros", "float32", trainable=False, name=f"average_{i:03d}")
            for i, w in enumerate(network.weights)
        ]
        self.built = True

    def call(self, inputs):
        """Returns the inputs of a training step as they are, and takes the weights that the step begins with."""
        weights = [ops.stop_gradient(ops.convert_to_tensor(w)) for w in self._weights_now()]
        averages = [ops.convert_to_tensor(average) for average in self.averages]
        for average, value in zip(self.averages, _blended(self.decay, self.steps, averages, weights), strict=True):
            average.assign(value)
        self.steps.assign(self.steps + 1)
        return inputs

    def values(self) -> list:
        """The averages after the steps so far, in the order of ``network.weights``."""
        step, averages, weights = (
            [ops.convert_to_tensor(v) for v in each] for each in ([self.steps], self.averages, self._weights_now())
        )
        return self._blend(step[0], averages, weights)

    def put_in_place(self) -> list:
        """Puts the averages into the network; returns the weights for `put_back`."""
        kept = runtime.device_copies(self._weights_now())
        self.put_back(self.values())
        return kept

    def put_back(self, values: list) -> None:
        """Gives the network's weights these values."""
        for weight, value in zip(self._weights_now(), values, strict=True):
            weight.assign(value)


def _blended(decay: float, steps, averages: list, weights: list) -> list:
    step = ops.cast(steps, "float32")
    keep = ops.minimum(decay, step / (step + 9))  # 0 before the first step
    return [keep * average + (1 - keep) * w for average, w in zip(averages, weights, strict=True)]


class AveragedWeights(keras.callbacks.Callback):
    """Puts the average into the network while it is measured."""

    def __init__(self, average: MovingAverage):
        super().__init__()
        self.average = average

    def on_test_begin(self, logs=None):
        self.kept = self.average.put_in_place()

    def on_test_end(self, logs=None):
        self.average.put_back(self.kept)
        self.kept = []


def saved_weights(network: keras.Model, average: MovingAverage | None) -> list[np.ndarray]:
    """Copies of what is saved of a network, in the order of ``network.weights``: its weights, or their averages."""
    return runtime.host_copies(average.values() if average else network.weights)
