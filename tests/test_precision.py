"""The mixed precision policies and XLA train as float32 does, on a network that compiles at once.

`test_custom_loss` and `test_baseline_losses` test that the loss computes half-precision inputs in float32.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import read_state, write_split
from keras import layers

import augmentation
import cnn_model
import config
import custom_loss
import experiment
import runtime
import trainer as training
from training import optimization
from training.run_state import read_history

POLICIES = ("mixed_bfloat16", "mixed_float16")
LABELS = np.arange(14, dtype=np.int32) % 7


def tiny_backbone(size: int, weights: str | None) -> keras.Model:
    pixels = keras.Input((size, size, 1))
    x = layers.Conv2D(4, 3, strides=2, use_bias=False)(pixels)
    x = layers.ReLU()(cnn_model.BatchNorm(momentum=0.9)(x))
    return keras.Model(pixels, layers.SeparableConv2D(8, 3)(x), name="backbone")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """mini_xcp is another network here; the policy is float32 again afterwards."""
    plan = cnn_model.Architecture(tiny_backbone, 12, 1, "image")
    monkeypatch.setitem(cnn_model.ARCHITECTURES, "mini_xcp", plan)
    yield
    keras.config.set_dtype_policy("float32")


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (len(LABELS), 12, 12, 1), np.uint8)


def make_trainer(policy: str, dropout: float = 0.5, jit_compile: bool = False) -> training.AdCorreTrainer:
    runtime.set_up(0, policy)
    model = training.AdCorreTrainer(
        cnn_model.build_model("mini_xcp", num_embeddings=2, embedding_size=8, dropout=dropout),
        custom_loss.AdCorreLoss(7, history=20),
        augmentation.Augmentation(config.AugmentConfig(), seed=0),
    )
    model.compile(optimization.make_optimizer(config.OptimizerConfig(warmup_epochs=0), 10, 1), jit_compile=jit_compile)
    return model


@pytest.mark.parametrize("policy", POLICIES)
def test_a_half_precision_network_has_a_float32_loss(policy):
    """The convolutions compute in half precision; the outputs, the loss of them and the weights are float32."""
    full, model = make_trainer("float32", dropout=0.0), make_trainer(policy, dropout=0.0)
    half = policy.removeprefix("mixed_")
    assert {layer.compute_dtype for layer in model.network.get_layer("backbone").layers} == {half}
    assert model.network.get_layer("embedding_dense").compute_dtype == half
    outputs = model.network(images(), training=True)
    assert {name: value.dtype.name for name, value in outputs.items()} == dict.fromkeys(outputs, "float32")
    values = custom_loss.AdCorreLoss(7, history=20)(LABELS, outputs["logits"], outputs["embeddings"], training=True)
    loss = model.compute_loss(images(), LABELS, outputs)
    assert loss.dtype == "float32"
    np.testing.assert_array_equal(loss, values["loss"])
    # The same first weights in float32: equal to the few bits of half precision, but not more.
    expected = full.compute_loss(images(), LABELS, full.network(images(), training=True))
    assert float(loss) == pytest.approx(float(expected), rel=2**-6)
    assert float(loss) != float(expected)
    logs = model.train_on_batch(images(), LABELS, return_dict=True)
    assert all(np.isfinite(value) for value in logs.values())
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}


@pytest.mark.slow
def test_a_stopped_run_of_float16_goes_on_with_its_loss_scale(tmp_path, monkeypatch):
    """The optimiser that scales the loss counts its steps, 2 an epoch, from where it stopped.

    It also holds the averaged weights and the moments, inside another optimiser. The first steps may be left out, until
    the scale fits.
    """
    for split in ("train", "val"):
        # Not the one-coloured pictures: of nothing come embeddings of length 0, whose gradients float16 cannot hold.
        write_split(tmp_path, LABELS, split=split, shape=(12, 12, 1), images=images())
    monkeypatch.setattr(experiment, "_report", lambda *args: {})  # tested elsewhere, and slow
    settings = config.TrainConfig(
        data_dir=str(tmp_path),
        run_dir=str(tmp_path / "run"),
        epochs=3,
        batch_size=7,
        precision="mixed_float16",
        model=config.ModelConfig(num_embeddings=2, embedding_size=8),
        optimizer=config.OptimizerConfig(average=0.9, warmup_epochs=0),
    )
    with monkeypatch.context() as stopped:
        stopped.setattr(training.EpochOrder, "on_epoch_begin", stop_at_the_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            experiment.train_and_evaluate(settings)
    scale, steps, updates = scaling(tmp_path / "run")
    assert 0 < updates <= 4 and steps > 0 and scale < 2**16
    experiment.train_and_evaluate(settings)
    assert scaling(tmp_path / "run") == (scale, steps + 2, updates + 2)
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [1, 2, 3]


def scaling(folder) -> tuple[float, int, int]:
    """Loss scale, steps since it was last changed, and updates of the weights, as the saved state has them."""
    values = {name.split("/")[-1]: array for name, array in read_state(folder).items()}
    return float(values["dynamic_scale"]), int(values["step_counter"]), int(values["iteration"])


def stop_at_the_third_epoch(callback, epoch, logs=None):
    if epoch == 2:
        raise KeyboardInterrupt
    callback.batches.epoch = epoch


@pytest.mark.slow
def test_xla_trains_as_tensorflows_own_kernels_do(monkeypatch):
    """The whole step: three losses and the weights after them, to float32 rounding.

    Without what is random, because XLA draws other numbers; `test_cnn_model` compiles the augmentation.
    """
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)  # the same operations on both sides
    found = []
    for xla in (False, True):
        model = make_trainer("float32", dropout=0.0, jit_compile=xla)
        model.augmentation = None
        losses = [model.train_on_batch(images(step), LABELS, return_dict=True)["loss"] for step in range(3)]
        found.append((losses, [np.array(weight) for weight in model.trainable_variables]))
    (losses, weights), (xla_losses, xla_weights) = found
    np.testing.assert_allclose(xla_losses, losses, rtol=1e-5)
    for weight, xla_weight, variable in zip(weights, xla_weights, model.trainable_variables, strict=True):
        np.testing.assert_allclose(xla_weight, weight, rtol=1e-3, atol=1e-4, err_msg=variable.path)
