"""The training step, the optimiser, and the callbacks that save a run's state and show its progress.

`AdCorreTrainer` is the Keras model that ``fit`` trains: augmentation, network and loss. `RunState` keeps the
whole state of a run on disk; the other callbacks order the batches, show the progress and stop at NaN.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
from keras import ops
from tqdm import tqdm

from augmentation import Mixup, blend
from config import OptimizerConfig
from custom_loss import AdCorreLoss, majority
from dataset_class import Batches
from distributed import exchange
from files import UserError, whole_file, write_text


class AdCorreTrainer(keras.Model):
    """Augmentation, network and Ad-Corre loss as one Keras model; its targets are labels or votes.

    Args:
        network: raw pixels to ``{"logits", "embeddings"}`` (`cnn_model.build_model`).
        loss_layer: the loss that is minimised.
        augmentation: a layer of raw pixels, active in training; None changes nothing.
        mixup: blends images and targets in training; None blends none.
    """

    def __init__(
        self,
        network: keras.Model,
        loss_layer: AdCorreLoss,
        augmentation: keras.layers.Layer | None = None,
        mixup: Mixup | None = None,
    ):
        super().__init__(name="ad_corre_trainer")
        self.network = network
        self.loss_layer = loss_layer
        self.augmentation = augmentation
        self.mixup = mixup
        self.total = keras.metrics.Mean(name="total")
        self.term_means = [keras.metrics.Mean(name=term) for term in loss_layer.terms]
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def build(self, input_shape):
        """Does nothing: the parts have built their own variables."""

    def call(self, pixels, training=False):
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, training=training)
        if self.mixup is None or not training:
            return self.network(pixels, training=training)
        pixels, shares = self.mixup(pixels)
        return {**self.network(pixels, training=training), "shares": shares}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y_pred = _with_targets(y, y_pred)
        if "shares" in y_pred:
            votes = y if len(y.shape) == 2 else ops.one_hot(y, self.loss_layer.num_classes, dtype="float32")
            y = blend(votes, y_pred["shares"])
        values = self.loss_layer(y, y_pred["logits"], y_pred["embeddings"], training=training)
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


def make_optimizer(config: OptimizerConfig, steps_per_epoch: int, epochs: int) -> keras.optimizers.Optimizer:
    """The optimiser with its learning-rate schedule.

    Args:
        config: optimiser, schedule and rates.
        steps_per_epoch: batches per epoch; the schedule counts batches, also while gradients accumulate.
        epochs: length of the whole run.
    """
    if config.schedule == "cosine":
        warmup = min(round(config.warmup_epochs * steps_per_epoch), steps_per_epoch * epochs - 1)
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else config.learning_rate,
            decay_steps=steps_per_epoch * epochs - warmup,
            warmup_target=config.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    elif config.schedule == "inverse_time":
        rate = keras.optimizers.schedules.InverseTimeDecay(config.learning_rate, decay_steps=1, decay_rate=config.decay)
    else:
        rate = config.learning_rate
    shared = {"gradient_accumulation_steps": config.accumulate if config.accumulate > 1 else None}
    if config.average:
        shared |= {"use_ema": True, "ema_momentum": config.average}
    if config.optimizer == "adam":
        return keras.optimizers.Adam(rate, **shared)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay, **shared)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


# Not a `keras.callbacks.SwapEMAWeights`: on TensorFlow that swaps by sums and differences, which rounds the weights.
class AveragedWeights(keras.callbacks.Callback):
    """Exchanges the weights for the optimiser's moving averages while these are measured or saved."""

    def on_test_begin(self, logs=None):
        self._swap()

    def on_test_end(self, logs=None):
        self._swap()

    @contextlib.contextmanager
    def in_place(self):
        """Keeps the averages in the model while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        averages = _inner(self.model.optimizer)._model_variables_moving_average
        for weight, average in zip(self.model.trainable_variables, averages, strict=True):
            value = ops.convert_to_numpy(weight).copy()
            weight.assign(average)
            average.assign(value)


class LastUpdate(keras.callbacks.Callback):
    """Applies the gradients that are left over when the run's steps are no multiple of ``accumulate``.

    Between epochs Keras goes on accumulating, so only the end of the run has a rest: less than ``accumulate``
    batches, whose mean is applied at the last step's learning rate, before the last validation. It must stand before
    `AveragedWeights`, which exchanges the weights at the same moment.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self.is_last = epoch + 1 == self.params["epochs"]

    def on_test_begin(self, logs=None):
        optimizer = _inner(self.model.optimizer)
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


def _inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimiser itself, where mixed_float16 wraps it in one that scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


class EpochOrder(keras.callbacks.Callback):
    """Sets the epoch of the training batches, because (seed, epoch) decides their order."""

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch


class EpochLines(keras.callbacks.Callback):
    """Prints one line per epoch, at most 80 columns wide; a terminal shows a bar within the epoch.

    Args:
        state: the run's state, which holds the line's numbers: place this callback behind it.
        shown: False prints nothing; True in one process of a group.
    """

    async_safe = True  # Keras then runs it beside the steps and never waits for the device

    def __init__(self, state: RunState, shown: bool = True):
        super().__init__()
        self.state = state
        self.shown = shown
        self.bar: tqdm | None = None

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.params["epochs"]
        self.title = f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"
        self.bar = tqdm(
            total=self.params["steps"],
            desc=self.title,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
            dynamic_ncols=True,
            leave=False,
            disable=None if self.shown else True,  # None: only on a terminal
        )
        self.drawn = 0.0

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self.drawn > 0.5:
            self.bar.set_postfix_str(_bar_text(logs), refresh=False)
            self.drawn = time.monotonic()
        self.bar.update(batch + 1 - self.bar.n)

    def on_epoch_end(self, epoch, logs=None):
        self.close()
        if self.shown:
            row = self.state.history[-1]
            print(epoch_line(self.title, row, is_best=self.state.best() is row), flush=True)

    def close(self) -> None:
        """Takes the bar off the terminal, so that a message does not follow it on its line."""
        if self.bar:
            self.bar.close()


def epoch_line(title: str, row: dict[str, float], is_best: bool) -> str:
    """``epoch 3/12  train: loss 14.23, 35.1%  val: loss 12.35, 40.2%  12.3 s  best``.

    Args:
        title: of the epoch.
        row: of the history; its loss and accuracy with and without ``val_``, and its seconds.
        is_best: whether the epoch is the best so far.
    """
    parts = [title]
    for name, prefix in (("train", ""), ("val", "val_")):
        parts.append(f"{name}: loss {_four_digits(row[prefix + 'loss'])}, {row[prefix + 'accuracy']:5.1%}")
    seconds = row["seconds"]
    parts.append(f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s")
    return "  ".join(parts + ["best"] * is_best)


def _four_digits(value: float) -> str:
    return f"{value:#.4g}" if abs(value) < 1_000 else f"{value:.0f}"


def _bar_text(logs: dict[str, float]) -> str:
    terms = [f"{name} {value:.3g}" for name, value in logs.items() if name not in ("loss", "accuracy")]
    return f"loss {_four_digits(logs['loss'])}, {logs['accuracy']:.1%} ({' '.join(terms)})"


class StopAtNaN(keras.callbacks.Callback):
    """Stops the run at a loss that is not finite and names the step; files saved before stay."""

    async_safe = True

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The logs are means over the epoch so far: the first one that is not finite comes from this step.
        self._check(logs["loss"], f"step {batch + 1} of epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs.get("val_loss", 0.0), f"the validation after epoch {epoch + 1}")

    def _check(self, loss: float, place: str) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at {place}; the weights of the epochs before are kept. "
                "Try a smaller --learning-rate, or --precision float32"
            )


class RunState(keras.callbacks.Callback):
    """Saves all that a run needs to continue after a kill as if it had not been interrupted.

    `state.h5` holds every variable of the model (weights, batch-norm statistics, the confusion history, the
    states of the dropout and augmentation generators) and of the optimiser (moments, step), with the epoch
    and the history; it is written whole or not at all after each epoch. The order of the batches needs no
    state (`dataset_class.Batches`). `history.csv` repeats the history as a table.

    Args:
        folder: the run's folder.
        monitor: the history's column whose highest value marks the best epoch.
        save_best: called with the history's row of a new best epoch, before the state is written: a process killed
            between the two repeats the epoch and writes the same best weights again.
        writes: whether this process writes the files; True in one process of a group.
    """

    def __init__(
        self, folder: str | Path, monitor: str, save_best: Callable[[dict[str, float]], None], writes: bool = True
    ):
        super().__init__()
        self.writes = writes
        self.path = Path(folder) / "state.h5"
        self.monitor = monitor
        self.save_best = save_best
        self.history: list[dict[str, float]] = []

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def best(self) -> dict[str, float] | None:
        """The history's row of the best epoch so far (the first of equals); None before the first epoch."""
        return max(self.history, key=lambda row: row[self.monitor], default=None)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        best = self.best()
        row = {
            "epoch": epoch + 1,
            **logs,
            "learning_rate": float(ops.convert_to_numpy(self.model.optimizer.learning_rate)),
        }
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.history.append(row)
        if best is None or row[self.monitor] > best[self.monitor]:
            self.save_best(row)
        if self.writes:
            self._save()

    def _variables(self, model: keras.Model) -> list[Any]:
        return [*model.variables, *model.optimizer.variables]

    def _save(self) -> None:
        # In memory first: on a full disk HDF5 itself would crash the process.
        with h5py.File(content := io.BytesIO(), "w") as file:
            for i, variable in enumerate(self._variables(self.model)):
                dataset = file.create_dataset(f"{i:05d}", data=ops.convert_to_numpy(variable))
                dataset.attrs["path"] = variable.path
            file.attrs["history"] = json.dumps(self.history)
        with whole_file(self.path) as temporary:
            temporary.write_bytes(content.getbuffer())
        table = io.StringIO()
        writer = csv.DictWriter(table, self.history[0])
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.path.with_name("history.csv"), table.getvalue())

    def restore(self, model: keras.Model) -> None:
        """Loads the saved state, if there is one, into a compiled, built model and its built optimiser.

        Raises:
            UserError: the file is damaged, or of another network or optimiser.
        """
        if not self.path.exists():
            return
        variables = self._variables(model)
        try:
            with h5py.File(self.path, "r") as file:
                arrays = [file[name][()] for name in sorted(file)]
                self.history = json.loads(file.attrs["history"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path}: the state is damaged ({error}); delete the folder to start again") from None
        if [tuple(array.shape) for array in arrays] != [tuple(variable.shape) for variable in variables]:
            raise UserError(
                f"{self.path}: expected {len(variables)} arrays of this network and optimiser, found {len(arrays)} "
                "others; choose another --run-dir"
            )
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """The rows of a run's `history.csv`, one per epoch."""
    with open(Path(folder) / "history.csv", newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
