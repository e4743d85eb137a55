"""The optimiser's schedule and accumulation, and the saved state."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import augmentation
import cnn_model
import custom_loss
import trainer as training
from config import AugmentConfig, OptimizerConfig
from files import UserError


def rate_at(optimizer, step: int) -> float:
    optimizer.build([keras.Variable(np.zeros(1, "float32"))])
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def test_cosine_warms_up_linearly_and_falls_to_zero():
    """10 steps an epoch, 2 of 6 epochs warm-up: 0.5 at step 20, half of it halfway down (step 40), 0 at step 60."""
    optimizer = training.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=2), 10, 6)
    found = [rate_at(optimizer, step) for step in (0, 5, 20, 30, 40, 60)]
    quarter = 0.25 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(found, [0, 0.125, 0.5, quarter, 0.25, 0], atol=1e-7)


def test_cosine_without_warm_up_starts_at_the_peak():
    optimizer = training.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=0), 10, 1)
    assert rate_at(optimizer, 0) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_run_still_trains():
    optimizer = training.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=9), 4, 1)
    assert 0 < rate_at(optimizer, 2) < 0.5


def test_inverse_time_is_the_published_decay():
    """Keras 2's Adam(decay=d): rate / (1 + d * step); 0.001 / (1 + 1e-5 * 50000) = 0.001 / 1.5."""
    optimizer = training.make_optimizer(
        OptimizerConfig(optimizer="adam", learning_rate=1e-3, schedule="inverse_time", decay=1e-5), 10, 1
    )
    assert rate_at(optimizer, 50_000) == pytest.approx(1e-3 / 1.5)


def test_weight_decay_spares_biases_and_batch_norm():
    optimizer = training.make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant"), 1, 1)
    names = ("kernel", "bias", "gamma", "beta")
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in names]
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros(2) for _ in names], variables)
    changed = [name for name, variable in zip(names, variables, strict=True) if float(variable[0]) != 1.0]
    assert changed == ["kernel"]


def test_accumulated_gradients_are_averaged_before_one_update():
    """SGD would move by rate * mean; Adam's first update depends on the mean's sign alone, so (1, -3) moves up."""
    optimizer = training.make_optimizer(
        OptimizerConfig(optimizer="adam", learning_rate=0.1, schedule="constant", accumulate=2), 1, 1
    )
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones(1)], [variable])
    assert float(variable[0]) == 0.0
    optimizer.apply([-3 * keras.ops.ones(1)], [variable])
    assert float(variable[0]) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("average", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_gradients_left_over_at_the_end_of_the_run_are_applied(schedule, average):
    """Two epochs of 5 batches, 4 per update: means of batches 1-4, then 5 and 1-3, and at the end of 4-5."""
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    pixels = keras.Input((3,))
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Model(pixels, layer(pixels))
    options = {"optimizer": "adam", "learning_rate": 0.1, "schedule": schedule, "warmup_epochs": 0}
    optimizer = training.make_optimizer(OptimizerConfig(**options, accumulate=4, average=average), 5, 2)
    rates = [rate_at(training.make_optimizer(OptimizerConfig(**options), 5, 2), step) for step in (3, 7, 9)]
    model.compile(optimizer, loss=lambda y, predicted: predicted, jit_compile=False)  # the gradient is the input
    measured = FirstWeight()
    callbacks = [training.LastUpdate(), *([training.AveragedWeights()] if average else []), measured]
    rows = (inputs, np.zeros(5))
    model.fit(*rows, batch_size=1, epochs=2, shuffle=False, validation_data=rows, verbose=0, callbacks=callbacks)

    plain = keras.optimizers.Adam(0.1)
    weight = keras.Variable(np.zeros((3, 1), "float32"))
    groups = ([0, 1, 2, 3], [4, 0, 1, 2], [3, 4])
    for rate, group in zip(rates, groups, strict=True):
        plain.learning_rate = rate
        plain.apply([keras.ops.convert_to_tensor(inputs[group].mean(axis=0)[:, None])], [weight])
    assert int(optimizer._iterations) == 10
    assert not any(np.any(gradient) for gradient in optimizer._accumulated_gradients)
    expected = np.asarray(weight)
    if average:
        mean = measured.steps[3]  # until the first update Keras keeps no mean
        for step in (*measured.steps[4:], expected):
            mean = (mean + step) / 2
        expected = mean
    np.testing.assert_allclose(measured.measured[-1], expected, rtol=1e-5)


class FirstWeight(keras.callbacks.Callback):
    """Notes one weight after each step, in each validation, and at the end of each epoch, after the validation."""

    def __init__(self):
        super().__init__()
        self.steps, self.measured, self.kept = [], [], []

    def _now(self):
        return np.array(self.model.trainable_variables[0]).copy()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self._now())

    def on_test_batch_begin(self, batch, logs=None):
        self.measured.append(self._now())

    def on_epoch_end(self, epoch, logs=None):
        self.kept.append(self._now())


def test_the_average_of_the_weights_is_what_is_measured_and_saved():
    """average <- 0.5 average + 0.5 weight after every step but the first, which starts it."""
    model = small_trainer(config=OptimizerConfig(learning_rate=0.01, warmup_epochs=0, average=0.5))
    images = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 1), np.uint8)
    labels = np.arange(14, dtype=np.int32) % 7
    watch, averaged = FirstWeight(), training.AveragedWeights()
    model.fit(
        images, labels, batch_size=7, epochs=2, validation_data=(images, labels), validation_batch_size=14, verbose=0,
        callbacks=[averaged, watch],
    )  # fmt: skip
    average = (watch.steps[0] + watch.steps[1]) / 2
    np.testing.assert_allclose(watch.measured[0], average, rtol=1e-5, atol=1e-7)
    for weight in watch.steps[2:]:
        average = (average + weight) / 2
    np.testing.assert_allclose(watch.measured[1], average, rtol=1e-5, atol=1e-7)
    assert not np.allclose(watch.steps[1], watch.measured[0], rtol=1e-3)
    np.testing.assert_array_equal(watch.kept, [watch.steps[1], watch.steps[3]], "training goes on from its own weights")
    before = np.array(model.trainable_variables[0]).copy()
    with averaged.in_place():
        np.testing.assert_allclose(model.trainable_variables[0], average, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(model.trainable_variables[0], before)


def small_trainer(embedding_size=8, config=OptimizerConfig()):  # noqa: B008 - frozen
    model = training.AdCorreTrainer(
        cnn_model.build_model("mini_xcp", num_embeddings=2, embedding_size=embedding_size, input_size=24),
        custom_loss.AdCorreLoss(7, history=20),
        augmentation.Augmentation(AugmentConfig(), seed=0),
    )
    model.compile(training.make_optimizer(config, 10, 1), jit_compile=False)
    model.build((None, 24, 24, 1))
    model.optimizer.build(model.trainable_variables)
    return model


def test_the_losses_of_an_epoch_are_means_over_its_images():
    """Batches of 7 and 2 images: each batch's mean counts by its size."""
    model = training.AdCorreTrainer(keras.layers.Identity(), custom_loss.AdCorreLoss(7))
    rng, batches = np.random.default_rng(0), []
    for size in (7, 2):
        labels = keras.ops.arange(size, dtype="int32")
        shapes = {"logits": (size, 7), "embeddings": (size, 2, 4)}
        outputs = {name: keras.ops.convert_to_tensor(rng.normal(size=s), "float32") for name, s in shapes.items()}
        model.compute_loss(y=labels, y_pred=outputs, training=False)
        batches.append(model.loss_layer(labels, **outputs, training=False))
    for name, mean in {"loss": model.total, **{mean.name: mean for mean in model.term_means}}.items():
        large, small = (float(values[name]) for values in batches)
        assert float(mean.result()) == pytest.approx((7 * large + 2 * small) / 9, rel=1e-6), name
        assert large != pytest.approx(small, rel=1e-3), name


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    stop = training.StopAtNaN()
    stop.on_epoch_begin(1)
    stop.on_train_batch_end(2, {"loss": 1e30})
    with pytest.raises(UserError, match=f"{loss} at step 3 of epoch 2"):
        stop.on_train_batch_end(2, {"loss": loss})
    stop.on_epoch_end(1, {"loss": 1.0})
    with pytest.raises(UserError, match=f"{loss} at the validation after epoch 2"):
        stop.on_epoch_end(1, {"loss": 1.0, "val_loss": loss})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after three epochs, its saved state, and the epochs that were the best so far."""
    model = small_trainer()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (28, 24, 24, 1), np.uint8), np.arange(28, dtype=np.int32) % 7
    best = []
    folder = tmp_path_factory.mktemp("run")
    state = training.RunState(folder, monitor="val_accuracy", save_best=lambda row: best.append(row["epoch"]))
    model.fit(images, labels, batch_size=14, epochs=3, validation_data=(images, labels), verbose=0, callbacks=[state])
    return model, state, best


@pytest.fixture
def saved(trained, tmp_path):
    """`trained`, its files copied into ``tmp_path``."""
    model, state, best = trained
    shutil.copytree(state.path.parent, tmp_path, dirs_exist_ok=True)
    state = copy.copy(state)
    state.path = tmp_path / state.path.name
    return model, state, best


def test_every_random_and_remembered_thing_is_restored(saved, tmp_path):
    model, state, _ = saved
    other = small_trainer()
    restored = training.RunState(tmp_path, monitor="val_accuracy", save_best=print)
    restored.restore(other)
    assert restored.history == state.history
    assert int(other.optimizer.iterations) == 6
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    assert np.all(np.asarray(other.loss_layer.history_h2) >= 0), "28 predictions an epoch fill a history of 20"


def test_the_best_epoch_is_the_first_of_equals():
    saved = []
    state = training.RunState("unused", "val_accuracy", save_best=lambda row: saved.append(row["epoch"]), writes=False)
    state.set_model(small_trainer())
    for epoch, score in enumerate((0.5, 0.7, 0.7, 0.6)):
        state.on_epoch_begin(epoch)
        state.on_epoch_end(epoch, {"val_accuracy": score})
    assert saved == [1, 2] and state.best()["epoch"] == 2


def test_a_damaged_state_is_refused(saved, tmp_path):
    path = tmp_path / "state.h5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state.h5: the state is damaged"):
        training.RunState(tmp_path, "val_accuracy", print).restore(small_trainer())


def test_the_state_of_another_network_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="choose another --run-dir"):
        training.RunState(tmp_path, "val_accuracy", print).restore(small_trainer(embedding_size=9))


def test_a_failed_save_keeps_the_state_before(saved, tmp_path, monkeypatch):
    _, state, _ = saved
    before = (tmp_path / "state.h5").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        state._save()
    assert (tmp_path / "state.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "state.h5"]


ROW = {"loss": 14.2345, "accuracy": 0.3512, "val_loss": 0.0123456, "val_accuracy": 1.0, "seconds": 12.34}


def test_an_epoch_is_one_line_of_80_columns():
    line = training.epoch_line("epoch  3/12", ROW, is_best=True)
    assert line == "epoch  3/12  train: loss 14.23, 35.1%  val: loss 0.01235, 100.0%  12.3 s  best"
    long = {"loss": 12345.6, "accuracy": 1.0, "val_loss": 999.94, "val_accuracy": 1.0, "seconds": 1234.5}
    assert len(training.epoch_line("epoch 300/300", long, is_best=True)) <= 80


def test_a_log_holds_the_lines_of_the_epochs_and_no_bar(capsys):
    model = small_trainer()
    images, labels = np.zeros((14, 24, 24, 1), np.uint8), np.arange(14, dtype=np.int32) % 7
    state = training.RunState("unused", "val_accuracy", save_best=lambda row: None, writes=False)
    for shown in (True, False):
        model.fit(
            images, labels, batch_size=7, epochs=2, validation_data=(images, labels), verbose=0,
            callbacks=[state, training.EpochLines(state, shown)],
        )  # fmt: skip
        printed = capsys.readouterr()
        assert printed.err == ""
        assert [line[:9] for line in printed.out.splitlines()] == ["epoch 1/2", "epoch 2/2"] * shown
        if shown:
            best = [line.endswith("  best") for line in printed.out.splitlines()]
            scores = [row["val_accuracy"] for row in state.history]
            assert best == [True, scores[1] > scores[0]]
