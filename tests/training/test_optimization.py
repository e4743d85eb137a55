"""The optimiser's schedule, its accumulation, and the moving average of the weights."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
from conftest import small_trainer

from config import OptimizerConfig
from training import optimization


def rate_at(optimizer, step: int) -> float:
    optimizer.build([keras.Variable(np.zeros(1, "float32"))])
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def test_cosine_warms_up_linearly_and_falls_to_zero():
    """10 steps an epoch, 2 of 6 epochs warm-up: 0.5 at step 20, half of it halfway down (step 40), 0 at step 60."""
    optimizer = optimization.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=2), 10, 6)
    found = [rate_at(optimizer, step) for step in (0, 5, 20, 30, 40, 60)]
    quarter = 0.25 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(found, [0, 0.125, 0.5, quarter, 0.25, 0], atol=1e-7)


def test_cosine_without_warm_up_starts_at_the_peak():
    optimizer = optimization.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=0), 10, 1)
    assert rate_at(optimizer, 0) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_run_still_trains():
    optimizer = optimization.make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_epochs=9), 4, 1)
    assert 0 < rate_at(optimizer, 2) < 0.5


def test_inverse_time_is_the_published_decay():
    """Keras 2's Adam(decay=d): rate / (1 + d * step); 0.001 / (1 + 1e-5 * 50000) = 0.001 / 1.5."""
    optimizer = optimization.make_optimizer(
        OptimizerConfig(optimizer="adam", learning_rate=1e-3, schedule="inverse_time", decay=1e-5), 10, 1
    )
    assert rate_at(optimizer, 50_000) == pytest.approx(1e-3 / 1.5)


def test_weight_decay_spares_biases_and_batch_norm():
    optimizer = optimization.make_optimizer(
        OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant"), 1, 1
    )
    names = ("kernel", "bias", "gamma", "beta")
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in names]
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros(2) for _ in names], variables)
    changed = [name for name, variable in zip(names, variables, strict=True) if float(variable[0]) != 1.0]
    assert changed == ["kernel"]


def test_sgd_has_nesterov_momentum_and_decays_by_the_rate():
    """v <- 0.9 v - rate g; w <- w (1 - rate decay) + 0.9 v - rate g (Sutskever et al. 2013)."""
    options = OptimizerConfig(optimizer="sgd", learning_rate=0.1, weight_decay=0.5, schedule="constant")
    optimizer = optimization.make_optimizer(options, 1, 1)
    variable = keras.Variable(np.ones(1, "float32"), name="kernel")
    optimizer.build([variable])
    weight, velocity = 1.0, 0.0
    for gradient in (0.3, -0.2, 0.7):
        optimizer.apply([gradient * keras.ops.ones(1)], [variable])
        velocity = 0.9 * velocity - 0.1 * gradient
        weight = weight * (1 - 0.1 * 0.5) + 0.9 * velocity - 0.1 * gradient
        assert float(variable[0]) == pytest.approx(weight, rel=1e-5)


def test_accumulated_gradients_are_averaged_before_one_update():
    """SGD would move by rate * mean; Adam's first update depends on the mean's sign alone, so (1, -3) moves up."""
    optimizer = optimization.make_optimizer(
        OptimizerConfig(optimizer="adam", learning_rate=0.1, schedule="constant", accumulate=2), 1, 1
    )
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones(1)], [variable])
    assert float(variable[0]) == 0.0
    optimizer.apply([-3 * keras.ops.ones(1)], [variable])
    assert float(variable[0]) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_gradients_left_over_at_the_end_of_the_run_are_applied(schedule):
    """Two epochs of 5 batches, 4 per update: means of batches 1-4, then 5 and 1-3, and at the end of 4-5."""
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    pixels = keras.Input((3,))
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Model(pixels, layer(pixels))
    options = {"optimizer": "adam", "learning_rate": 0.1, "schedule": schedule, "warmup_epochs": 0}
    optimizer = optimization.make_optimizer(OptimizerConfig(**options, accumulate=4), 5, 2)
    rates = [rate_at(optimization.make_optimizer(OptimizerConfig(**options), 5, 2), step) for step in (3, 7, 9)]
    model.compile(optimizer, loss=lambda y, predicted: predicted, jit_compile=False)  # the gradient is the input
    measured = FirstWeight()
    callbacks = [optimization.LastUpdate(epochs=2), measured]
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
    np.testing.assert_allclose(measured.measured[-1], np.asarray(weight), rtol=1e-5)


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


def test_the_cosine_has_keras_values_and_its_length_can_change():
    optimizer = optimization.make_optimizer(OptimizerConfig(learning_rate=0.3, warmup_epochs=1.5), 10, 6)
    for total in (60, 35):
        optimization.set_length(optimizer, total)
        keras_schedule = keras.optimizers.schedules.CosineDecay(
            0.0, decay_steps=total - 15, warmup_target=0.3, warmup_steps=15
        )
        for step in range(total + 2):
            found = float(optimizer._learning_rate(step))
            assert found == pytest.approx(float(keras_schedule(step)), rel=1e-5, abs=1e-7)


def test_the_average_of_weights_and_statistics_is_what_is_measured_and_saved():
    """After step t: `a <- m a + (1 - m) w`, `m = min(0.5, (t + 1) / (t + 10))`; the first weights start it."""
    model = small_trainer(config=OptimizerConfig(learning_rate=0.01, warmup_epochs=0), average=0.5)
    images = np.random.default_rng(0).integers(0, 256, (70, 24, 24, 1), np.uint8)
    labels = np.arange(70, dtype=np.int32) % 7
    places = [
        next(i for i, w in enumerate(model.network.weights) if w.path.endswith(end))
        for end in ("kernel", "moving_variance")
    ]
    watch = Weights(places)
    expected = watch.now(model.network)
    model.fit(
        images, labels, batch_size=14, epochs=3, validation_data=(images, labels), validation_batch_size=70, verbose=0,
        callbacks=[optimization.AveragedWeights(model.average), watch], shuffle=False,
    )  # fmt: skip
    for step, weights in enumerate(watch.steps):
        keep = min(0.5, (step + 1) / (step + 10))
        expected = [keep * a + (1 - keep) * w for a, w in zip(expected, weights, strict=True)]
        if step % 5 == 4:
            for found, wanted in zip(watch.measured[step // 5], expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
            for found, wanted in zip(watch.kept[step // 5], weights, strict=True):
                np.testing.assert_array_equal(found, wanted, "training goes on from its own weights")
    saved = optimization.saved_weights(model.network, model.average)
    np.testing.assert_allclose(saved[places[0]], expected[0], rtol=1e-5, atol=1e-7)
    before = watch.now(model.network)
    kept = model.average.put_in_place()
    np.testing.assert_allclose(watch.now(model.network)[1], expected[1], rtol=1e-5, atol=1e-7)
    model.average.put_back(kept)
    for left, right in zip(watch.now(model.network), before, strict=True):
        np.testing.assert_array_equal(left, right)


class Weights(keras.callbacks.Callback):
    """Notes some weights of the network after each step, in each validation, and after the validation."""

    def __init__(self, places):
        super().__init__()
        self.places = places
        self.steps, self.measured, self.kept = [], [], []

    def now(self, network):
        return [np.array(network.weights[place]).copy() for place in self.places]

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self.now(self.model.network))

    def on_test_batch_begin(self, batch, logs=None):
        self.measured.append(self.now(self.model.network))

    def on_epoch_end(self, epoch, logs=None):
        self.kept.append(self.now(self.model.network))


def test_a_short_run_is_measured_as_well_with_the_average_as_without():
    """Statistics and weights that lag far behind would leave the averaged network at chance."""
    keras.utils.set_random_seed(0)
    model = small_trainer(
        config=OptimizerConfig(learning_rate=3e-3, warmup_epochs=0, schedule="constant"), average=0.999
    )
    labels = np.arange(70, dtype=np.int32) % 7
    images = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (7, 6, 6, 1), np.uint8), 4, 1), 4, 2)[labels]
    model.fit(images, labels, batch_size=14, epochs=20, verbose=0)
    plain = model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]
    model.average.put_in_place()
    averaged = model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]
    assert averaged >= plain - 0.05 and averaged > 0.9
