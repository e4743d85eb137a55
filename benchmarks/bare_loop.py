"""A training loop without Keras's ``fit`` around it: the yardstick for what the engine costs.

The same work per step as `train.py` (augmentation, network, loss, AdamW at a constant rate) on random data that is
resident on the device, with many steps per call. No metrics, no averages, no logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import augmentation
import config
import custom_loss
import runtime
from files import UserError
from model_files import model_file


class Parts:
    """Network, augmentation, loss and optimiser of a run, all their variables made.

    Args:
        settings: the options of the run; mixup is left out.
        class_names: of the data.
        loss_options: replace some of the loss's own.
    """

    def __init__(self, settings: config.TrainConfig, class_names: tuple[str, ...], loss_options: dict[str, float]):
        import keras

        self.network, _ = model_file.new_network(settings.model, class_names)
        self.augmentation = augmentation.Augmentation(settings.augmentation, seed=settings.seed)
        self.loss = custom_loss.AdCorreLoss(len(class_names), label_smoothing=0.1, **loss_options)
        for layer in (self.augmentation, self.loss):
            layer.built = True  # they made their variables at once, and `stateless_call` asks
        self.optimizer = keras.optimizers.AdamW(settings.optimizer.learning_rate, settings.optimizer.weight_decay)
        self.optimizer.build(self.network.trainable_variables)


class JaxLoop:
    """The loop on JAX: ``loop(steps)`` takes that many steps and returns when they are done.

    Args:
        parts: whose values it starts from; they stay as they are.
        pixels: uint8 (N, H, W, C).
        labels: int (N,).
        batch_size: images per step; N or less.
        in_one_call: compile all steps of a call as one program. On a CPU, where XLA runs the convolutions of a loop on
            one core and slowly, one program per step is the faster loop.

    Attributes:
        stages: seconds of ``trace`` (Python), ``lower`` (to StableHLO) and ``compile`` (XLA).
    """

    def __init__(self, parts: Parts, pixels: np.ndarray, labels: np.ndarray, batch_size: int, in_one_call: bool):
        import jax
        import jax.numpy as jnp

        network, augment, loss, optimizer = parts.network, parts.augmentation, parts.loss, parts.optimizer

        def values(variables):
            return [jnp.array(variable.value) for variable in variables]  # copies: the loop donates its state

        self.state = {
            "weights": values(network.trainable_variables),
            "statistics": values(network.non_trainable_variables),
            "augmentation": values(augment.non_trainable_variables),
            "loss": values(loss.non_trainable_variables),
            "optimizer": values(optimizer.variables),
            "step": jnp.zeros((), jnp.int32),
        }
        self.data = jax.device_put((np.asarray(pixels), np.asarray(labels, np.int32)))

        def one_step(state, images, targets):
            images, augmented = augment.stateless_call([], state["augmentation"], images, training=True)

            def total(weights):
                outputs, statistics = network.stateless_call(weights, state["statistics"], images, training=True)
                answers = outputs["logits"], outputs["embeddings"]
                terms, history = loss.stateless_call([], state["loss"], targets, *answers, training=True)
                return terms["loss"], (statistics, history)

            gradients, (statistics, history) = jax.grad(total, has_aux=True)(state["weights"])
            weights, moments = optimizer.stateless_apply(state["optimizer"], gradients, state["weights"])
            return {
                "weights": weights,
                "statistics": statistics,
                "augmentation": augmented,
                "loss": history,
                "optimizer": moments,
                "step": state["step"] + 1,
            }

        def draw_order(state):
            key = jax.random.fold_in(jax.random.key(0), state["step"])
            return jax.random.permutation(key, len(labels))

        def next_step(state, order, pixels, labels):
            start = state["step"] % (len(labels) // batch_size) * batch_size
            rows = jax.lax.dynamic_slice(order, (start,), (batch_size,))
            return one_step(state, pixels[rows], labels[rows])

        def many_steps(state, steps, *data):
            order = draw_order(state)
            return jax.lax.fori_loop(0, steps, lambda _, state: next_step(state, order, *data), state)

        self.stages: dict[str, float] = {}
        if in_one_call:
            program = self._compiled(many_steps, np.int32(1))

            def loop(state, steps):
                return program(state, np.int32(steps), *self.data)
        else:
            draw = jax.jit(draw_order)
            program = self._compiled(next_step, draw(self.state))

            def loop(state, steps):
                order = draw(state)
                for _ in range(steps):
                    state = program(state, order, *self.data)
                return state

        self._loop = loop

    def _compiled(self, function: Callable, argument: Any) -> Callable:
        import jax

        traced = self._timed(
            "trace", lambda: jax.jit(function, donate_argnums=0).trace(self.state, argument, *self.data)
        )
        lowered = self._timed("lower", traced.lower)
        return self._timed("compile", lowered.compile)

    def _timed(self, stage: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = run()
        self.stages[stage] = time.perf_counter() - start
        return done

    def __call__(self, steps: int) -> None:
        import jax

        self.state = jax.block_until_ready(self._loop(self.state, steps))


class TensorFlowLoop:
    """The loop on TensorFlow; the arguments are those of `JaxLoop`, but the variables of ``parts`` change."""

    def __init__(self, parts: Parts, pixels: np.ndarray, labels: np.ndarray, batch_size: int):
        import tensorflow as tf

        images, targets = tf.constant(np.asarray(pixels)), tf.constant(np.asarray(labels, np.int32))
        weights = parts.network.trainable_weights

        @tf.function(jit_compile=runtime.jit_compile())
        def many_steps(steps):
            for _ in tf.range(steps):
                # Draws each batch anew: an order of the epoch would have to be carried through the loop.
                rows = tf.random.uniform((batch_size,), 0, len(labels), tf.int32)
                batch = parts.augmentation(tf.gather(images, rows), training=True)
                with tf.GradientTape() as tape:
                    outputs = parts.network(batch, training=True)
                    answers = outputs["logits"], outputs["embeddings"]
                    total = parts.loss(tf.gather(targets, rows), *answers, training=True)["loss"]
                parts.optimizer.apply(tape.gradient(total, weights), weights)
            return parts.optimizer.iterations

        self._program = many_steps

    def __call__(self, steps: int) -> None:
        self._program(np.int32(steps)).numpy()


def make_loop(parts: Parts, pixels: np.ndarray, labels: np.ndarray, batch_size: int) -> JaxLoop | TensorFlowLoop:
    """The loop of Keras's backend, in its fastest form on this device.

    Raises:
        UserError: the backend is PyTorch, for which there is none.
    """
    import keras

    if keras.backend.backend() == "jax":
        return JaxLoop(parts, pixels, labels, batch_size, in_one_call=runtime.has_gpu())
    if keras.backend.backend() == "tensorflow":
        return TensorFlowLoop(parts, pixels, labels, batch_size)
    raise UserError("--fit: expected --backend tensorflow or jax, received torch")
