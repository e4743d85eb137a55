"""The training engine: the step, many of them in one call of the device, and the epochs of a run.

`AdCorreTrainer` is the Keras model that ``fit`` trains: augmentation, network and loss. `Engine` does the epochs of a
run, from wherever it was stopped. All trainings and the benchmarks of training go through it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import keras
import numpy as np
from keras import ops

import runtime
from augmentation import Mixup, blend
from baseline_losses import MirroredViews
from custom_loss import AdCorreLoss, majority
from dataset_class import Batches
from distributed import exchange
from files import UserError
from reading.arrays import Rows
from training.optimization import MovingAverage, set_length

CALL_SECONDS = 1.0  # about the length of a call; the bar, the check for NaN and checkpoints wait for it
_MEASURED_SECONDS = 0.5  # a measurement of the step takes at least this long
_REPORT_SECONDS = 20.0  # allowance of --minutes for the report, beside its pass over the images
RESIDENT_SHARE = 0.4  # of the GPU's free memory; the rest is for the network and its activations
_SLACK = 0.05  # share of --minutes that is kept back


class AdCorreTrainer(keras.Model):
    """Augmentation, network and Ad-Corre loss as one Keras model; its targets are labels or votes.

    Its input is a batch of images, uint8 (B, H, W, C), or, after `keep_on_device`, row numbers of the images, int32:
    one batch (B,), or several batches (S, B), which are steps of one call. Rows of -1 fill up the last of them.

    Args:
        network: raw pixels to ``{"logits", "embeddings"}`` (`cnn_model.build_model`).
        loss_layer: the loss that is minimised. For its term ``eac`` the network also runs on the mirror images.
        augmentation: a layer of raw pixels, active in training; None changes nothing.
        mixup: blends images and targets in training; None blends none.
        average: of the network's weights; None keeps none.
        batch_size: of a training step; None where it varies. TensorFlow compiles other code for a size that it knows,
            whose last bits differ.
    """

    def __init__(
        self,
        network: keras.Model,
        loss_layer: AdCorreLoss,
        augmentation: keras.layers.Layer | None = None,
        mixup: Mixup | None = None,
        average: MovingAverage | None = None,
        batch_size: int | None = None,
    ):
        super().__init__(name="ad_corre_trainer")
        self.network = network
        self.views = MirroredViews(network) if "eac" in loss_layer.terms else None
        self.loss_layer = loss_layer
        self.augmentation = augmentation
        self.mixup = mixup
        self.average = average
        self.batch_size = batch_size
        self.images: dict[str, keras.Variable] = {}  # on the device, "train" and "test"
        self.total = keras.metrics.Mean(name="total")
        self.term_means = [keras.metrics.Mean(name=term) for term in loss_layer.terms]
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def build(self, input_shape):
        """Marks the parts as built, because they have made their own variables: Keras would call them to see that."""
        for part in (self.loss_layer, self.augmentation, self.mixup):
            if part is not None:
                part.built = True

    def keep_on_device(self, train: np.ndarray | Rows, test: np.ndarray | Rows) -> None:
        """Puts the images of both splits, uint8 (N, H, W, C), on every device, as variables that are never saved."""
        for name, images in (("train", train), ("test", test)):
            self.images[name] = self.add_weight(
                images.shape,
                initializer=lambda shape, dtype, images=images: ops.convert_to_tensor(np.asarray(images), dtype),
                dtype="uint8",
                trainable=False,
                name=f"{name}_images",
            )

    def state_variables(self) -> list[keras.Variable]:
        """All that training changes: of the model, its optimiser and the metrics of the epoch so far."""
        images = {id(variable) for variable in self.images.values()}
        own = [variable for variable in self.variables if id(variable) not in images]
        return [*own, *self.optimizer.variables, *self.metrics_variables]

    def call(self, pixels, training=False):
        if self.images and len(pixels.shape) == 1:
            pixels = exchange.split_batch(ops.take(self.images["train" if training else "test"], pixels, axis=0))
        if training and self.average is not None:
            pixels = self.average(pixels)
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, training=training)
        outputs = self.views or self.network
        if self.mixup is None or not training:
            return outputs(pixels, training=training)
        pixels, shares = self.mixup(pixels)
        return {**outputs(pixels, training=training), "shares": shares}

    def train_step(self, *args):
        *state, data = args
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        if len(inputs.shape) == 4 and inputs.shape[0] is None and self.batch_size:
            inputs, targets = (ops.reshape(x, (self.batch_size, *x.shape[1:])) for x in (inputs, targets))
        return self._each_step(super().train_step, *state, (inputs, targets))

    def test_step(self, *args):
        return self._each_step(super().test_step, *args)

    def _each_step(self, step, *args):
        """Takes the steps of one call in one compiled loop. ``args`` are the data, on JAX the state and the data."""
        *state, data = args
        rows, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        if not self.images or len(rows.shape) != 2:
            return step(*args)
        step = runtime.compiled_alike(step)

        def one(i, state):
            changed = step(*state, (rows[i], targets[i]))
            return [tuple(map(list, changed[1]))] if state else state  # JAX: the logs and the new state

        used = ops.sum(ops.cast(rows[:, 0] >= 0, "int32"))
        state = ops.fori_loop(0, used, one, [tuple(map(list, each)) for each in state])
        with keras.StatelessScope(zip(self.metrics_variables, state[0][-1], strict=True) if state else ()):
            logs = self.get_metrics_result()
        return (logs, state[0]) if state else logs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y_pred = _with_targets(y, y_pred)
        if "shares" in y_pred:
            votes = y if len(y.shape) == 2 else ops.one_hot(y, self.loss_layer.num_classes, dtype="float32")
            y = blend(votes, y_pred["shares"])
        used = {name: y_pred[name] for name in ("logits", "embeddings", "consistency") if name in y_pred}
        values = self.loss_layer(y, **used, training=training)
        self.total.update_state(values["loss"], sample_weight=ops.shape(y)[0])
        for mean in self.term_means:
            mean.update_state(values[mean.name], sample_weight=ops.shape(y)[0])
        return values["loss"]

    def get_metrics_result(self):
        result = super().get_metrics_result()
        # Keras's own mean of the loss also counts the images that fill up a batch.
        return {"loss": result.pop("total"), **{name: value for name, value in result.items() if name != "loss"}}

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y_pred = _with_targets(y, y_pred)
        self.accuracy.update_state(majority(y), y_pred["logits"])
        return self.get_metrics_result()


def _with_targets(targets, outputs):
    """The outputs of the images that have targets, whole on every device.

    Every device then computes the loss as one device would, from one exchange of the embeddings, and its gradient
    needs none. Black images at the end, which fill up a short batch of a process group (`Batches`), are left out.
    """
    outputs = exchange.all_gather(outputs)
    size = keras.tree.flatten(targets)[0].shape[0]
    if size is None or size == outputs["logits"].shape[0]:
        return outputs
    return {name: values[:size] for name, values in outputs.items()}


class EpochOrder(keras.callbacks.Callback):
    """Sets the epoch of the training batches, because (seed, epoch) decides their order."""

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch


class StopAtNaN(keras.callbacks.Callback):
    """Stops the run at a loss that is not finite and names the steps; files saved before stay."""

    async_safe = True  # Keras then runs it beside the steps and never waits for the device

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The logs are means over the epoch so far: the first one that is not finite comes from this call.
        first, *others = self.batches.steps_of(batch)
        numbers = f"steps {first + 1} to {others[-1] + 1}" if others else f"step {first + 1}"
        _check_finite(logs["loss"], f"{numbers} of epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        _check_finite(logs.get("val_loss", 0.0), f"the validation after epoch {epoch + 1}")


def _check_finite(loss: float, place: str) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at {place}; what earlier epochs saved is kept. "
            "Try a smaller --learning-rate, or --precision float32"
        )


@dataclasses.dataclass
class Engine:
    """Trains a compiled, built model on one split and measures it on another after every epoch.

    Attributes:
        model: the model.
        train: the training batches.
        validation: the batches that are measured.
    """

    model: AdCorreTrainer
    train: Batches
    validation: Batches

    def fit(
        self, epochs: int, callbacks: Sequence[keras.callbacks.Callback], first_epoch: int = 0, first_step: int = 0
    ) -> None:
        """Trains from a step of an epoch, both counted from 0, to the end of the last epoch.

        Raises:
            UserError: the loss is not finite.
        """
        shared = {"validation_data": self.validation, "shuffle": False, "verbose": 0}  # `Batches` orders them
        shared["callbacks"] = [EpochOrder(self.train), StopAtNaN(self.train), *callbacks]
        if first_step and first_epoch < epochs:
            self.train.first_step = first_step
            self.model.fit(self.train, initial_epoch=first_epoch, epochs=first_epoch + 1, **shared)
            first_epoch += 1
        self.train.first_step = 0
        if first_epoch < epochs:
            self.model.fit(self.train, initial_epoch=first_epoch, epochs=epochs, **shared)

    def choose_steps_per_call(self, step_seconds: float) -> None:
        """Sets how many steps of resident batches a call takes: about `CALL_SECONDS`, at most the epoch."""
        for batches in (self.train, self.validation):
            steps = max(1, round(CALL_SECONDS / step_seconds)) if batches.resident else 1
            batches.steps_per_call = min(steps, batches.steps)

    def seconds_per_step(self) -> float:
        """Measures a training step after its compilation; the model's state stays as it is."""
        order = EpochOrder(self.train)
        with self._unchanged():
            steps = 1
            self._some_steps(steps, order)  # compiles
            while True:
                started = time.monotonic()
                self._some_steps(steps, order)
                # One number for all processes, because each must take the same steps.
                seconds = self.train.group.broadcast(time.monotonic() - started)
                if seconds >= _MEASURED_SECONDS or steps == self.train.steps:
                    return seconds / steps
                steps = min(self.train.steps, max(2 * steps, int(steps * _MEASURED_SECONDS / seconds)))

    def _some_steps(self, steps: int, *callbacks: keras.callbacks.Callback) -> None:
        """Trains on the last ``steps`` batches of the first epoch, in one call where the images are resident."""
        self.train.first_step = self.train.steps - steps
        if self.train.resident:
            self.train.steps_per_call = steps
        self.model.fit(self.train, epochs=1, shuffle=False, verbose=0, callbacks=list(callbacks))
        self.train.first_step = 0

    def seconds_per_validation(self) -> float:
        """Measures a pass over the validation batches after its compilation."""
        with self._unchanged():
            self.model.evaluate(self.validation, verbose=0)
            started = time.monotonic()
            self.model.evaluate(self.validation, verbose=0)
            return time.monotonic() - started

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        values = runtime.host_copies(self.model.state_variables())
        try:
            yield
        finally:
            for variable, value in zip(self.model.state_variables(), values, strict=True):
                variable.assign(value)

    def set_length(self, epochs: int) -> None:
        """Makes the learning rate's schedule end with the last of so many epochs."""
        set_length(self.model.optimizer, epochs * self.train.steps)


def epochs_in(minutes: float, used_s: float, step_s: float, validation_s: float, steps: int) -> int:
    """How many epochs fit into the time, with the report after them.

    `floor((60 minutes (1 - slack) - used - report) / (steps * step + validation))`, `report = 20 s + 2 validations`.

    Args:
        minutes: for the whole run.
        used_s: seconds of them that are gone.
        step_s: seconds per step.
        validation_s: seconds per validation, one after each epoch.
        steps: per epoch.

    Raises:
        UserError: not even one.
    """
    epoch_s = steps * step_s + validation_s
    report_s = _REPORT_SECONDS + 2 * validation_s
    epochs = math.floor((60 * minutes * (1 - _SLACK) - used_s - report_s) / epoch_s)
    if epochs < 1:
        needed = (used_s + report_s + epoch_s) / (1 - _SLACK) / 60
        raise UserError(
            f"--minutes: expected {needed:.1f} or more (one epoch takes {epoch_s:,.0f} s here), received {minutes:g}"
        )
    return epochs


def resident(choice: str, image_bytes: int) -> bool:
    """Whether the images are kept on the device; prints why where it is not obvious.

    Args:
        choice: ``yes``, ``no``, or ``auto``: on a GPU where they take at most 40% of the memory that is free.
        image_bytes: of the training and the validation split.

    Raises:
        UserError: ``yes``, and they are larger than the memory that is free.
    """
    free = None if choice == "no" else runtime.free_gpu_bytes()
    size = f"{image_bytes / 1e6:,.0f} MB of images"
    if choice == "yes" and free is not None and image_bytes > free:
        raise UserError(f"--resident yes: {size} are more than the {free / 1e6:,.0f} MB free on the GPU; use auto")
    if choice == "auto" and free is not None and image_bytes > RESIDENT_SHARE * free:
        print(f"{size} stay outside the GPU: more than {RESIDENT_SHARE:.0%} of its {free / 1e6:,.0f} MB free")
        return False
    return choice == "yes" or free is not None
