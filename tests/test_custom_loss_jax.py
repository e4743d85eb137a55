"""JAX computes what TensorFlow computes: terms, gradients, and the layer's state step by step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax_losses
import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow  # a process of its own, and its compilations
RECALL = np.array([0.9, 0.0, 0.25, 1.0, 0.6], np.float32)
STEP_SIZES = (5, 9, 9, 30, 5, 9)  # a history of 12 fills, wraps and is overrun; the last step evaluates
PLAIN = ("random", "large")


def draw(size, k, d, seed):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(size, k, d))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return {
        "embeddings": embeddings.astype(np.float32),
        "logits": rng.normal(size=(size, jax_losses.NUM_CLASSES)).astype(np.float32),
        "labels": rng.integers(0, jax_losses.NUM_CLASSES, size).astype(np.int32),
    }


def make_batches() -> dict[str, dict[str, np.ndarray]]:
    batches = {"random": draw(6, 3, 16, 0), "large": draw(48, 7, 128, 1)}
    degenerate = ("one_class", "duplicates", "zeros", "one_zero_vector")
    batches |= {name: draw(6, 3, 16, 2) for name in degenerate}
    batches["one_sample"] = draw(1, 3, 16, 3)
    batches["one_class"]["labels"][:] = 4
    batches["duplicates"]["embeddings"][:] = batches["duplicates"]["embeddings"][0, 0]
    batches["zeros"]["embeddings"][:] = 0
    batches["one_zero_vector"]["embeddings"][2, 1] = 0
    batches["all_different"] = {**draw(5, 3, 16, 4), "labels": np.arange(5, dtype=np.int32)}
    return batches | {f"step{number}": draw(size, 3, 16, 10 + number) for number, size in enumerate(STEP_SIZES)}


BATCHES = make_batches()
TERM_BATCHES = [name for name in BATCHES if not name.startswith("step")]


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory) -> dict[str, np.ndarray]:
    """What the JAX process wrote; its output, if it fails."""
    folder = tmp_path_factory.mktemp("jax")
    arrays = {f"{name}/{part}": array for name, batch in BATCHES.items() for part, array in batch.items()}
    np.savez(folder / "inputs.npz", recall=RECALL, **arrays)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, jax_losses.__file__, str(folder / "inputs.npz"), str(folder / "outputs.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    with np.load(folder / "outputs.npz", allow_pickle=False) as file:
        return dict(file)


def gradients_of(function, embeddings, logits):
    """Result of function(embeddings, logits), whose last item is a scalar, and that scalar's gradients."""
    embeddings, logits = tf.constant(embeddings), tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch([embeddings, logits])
        result = function(embeddings, logits)
    return result, tape.gradient(result["loss"], [embeddings, logits], unconnected_gradients="zero")


def assert_close(jax_array, tensorflow_array, name, floor=0.0):
    """Equal to a millionth of the largest number (`floor`, where that is larger)."""
    tensorflow_array = np.asarray(tensorflow_array)
    assert jax_array.shape == tensorflow_array.shape and jax_array.dtype == tensorflow_array.dtype, name
    assert np.isfinite(jax_array).all() and np.isfinite(tensorflow_array).all(), name
    scale = max(np.abs(tensorflow_array).max(), floor)
    np.testing.assert_allclose(jax_array, tensorflow_array, rtol=0, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("term", jax_losses.TERMS)
def test_term_and_gradients(term, on_jax):
    function = jax_losses.TERMS[term]
    for name in TERM_BATCHES:
        batch = BATCHES[name]
        result, gradients = gradients_of(
            lambda e, z, y=batch["labels"]: {"loss": function(e, z, y, RECALL)}, batch["embeddings"], batch["logits"]
        )
        floor = 0.0 if name in PLAIN else 1.0  # a degenerate batch may have a value of 0
        # The triplet loss is a difference of distances of about 2, and so is its rounding.
        assert_close(on_jax[f"{name}/{term}"], result["loss"], name, 1.0 if term == "triplet" else floor)
        for part, gradient in zip(("embeddings", "logits"), gradients, strict=True):
            assert_close(on_jax[f"{name}/{term}/{part}"], gradient, f"{name}, gradient in the {part}", floor)
        if name in PLAIN:
            assert any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("term", ["fd", "fd_adaptive"])
def test_no_matrix_of_pairs_is_held(term, on_jax):
    """One of bytes would be larger than all that the compiled program takes."""
    assert 0 < on_jax[f"{term}/temporary"] < jax_losses.LARGE_BATCH**2 / 4


def test_layer_over_a_training_and_an_evaluation(on_jax):
    layer, recalls, states = jax_losses.make_layer(), [], []
    for number in range(len(STEP_SIZES)):
        batch, name = BATCHES[f"step{number}"], f"step{number}"
        training = number < len(STEP_SIZES) - 1
        terms, gradients = gradients_of(
            lambda e, z, y=batch["labels"], training=training: layer(y, z, e, training=training),
            batch["embeddings"],
            batch["logits"],
        )
        assert set(terms) == {"loss", "ce", "fd", "md", "ed", "center"}
        for term, value in terms.items():
            assert_close(on_jax[f"{name}/{term}"], value, f"{name}: {term}")
        for part, gradient in zip(("embeddings", "logits"), gradients, strict=True):
            assert_close(on_jax[f"{name}/{part}"], gradient, f"{name}: gradient in the {part}")
        np.testing.assert_array_equal(on_jax[f"{name}/history"], layer.history_h2, err_msg=name)
        (centers,) = layer.layers_by_term["center"].get_weights()
        assert_close(on_jax[f"{name}/centers"], centers, f"{name}: centers")
        states.append(on_jax[f"{name}/centers"])
        np.testing.assert_array_equal(on_jax[f"{name}/recall"], layer.class_recall(), err_msg=name)
        recalls.append(on_jax[f"{name}/recall"])
    for values in (recalls, states):
        assert not np.array_equal(values[0], values[-2])  # training moved them
        np.testing.assert_array_equal(values[-1], values[-2])  # evaluation did not
