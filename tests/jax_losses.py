"""The loss terms and the layer on JAX, run by ``test_custom_loss_jax.py`` in a process of its own.

``KERAS_BACKEND=jax python jax_losses.py INPUTS.npz OUTPUTS.npz``: a process has one Keras backend.
"""

from __future__ import annotations

import sys

import keras
import numpy as np

from baseline_losses import attention_consistency, attention_maps, supervised_contrastive, triplet_semihard
from cnn_model import UnitVectors
from custom_loss import (
    AdCorreLoss,
    cross_entropy,
    embedding_discriminator,
    feature_discriminator,
    mean_discriminator,
)

NUM_CLASSES, HISTORY = 5, 12
LARGE_BATCH = 2048
VOTES = (0.6 * np.eye(NUM_CLASSES) + 0.4 * np.eye(NUM_CLASSES)[::-1]).astype(np.float32)  # on an image of each label


def consistency(embeddings):
    """The mean consistency of the embeddings, taken as feature maps of k x 2 places, with those in another order."""
    k, channels = embeddings.shape[1], embeddings.shape[2] // 2
    rng = np.random.default_rng(3)
    shapes = (channels, 2, 4), (2, 4), (2, 4, NUM_CLASSES)
    head = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    features = keras.ops.reshape(embeddings, (-1, k, 2, channels))
    return keras.ops.mean(
        attention_consistency(attention_maps(features, *head), attention_maps(features[:, ::-1], *head))
    )


# Term: (embeddings (B, k, d), logits (B, C), labels (B,), recall (C,)) -> scalar
TERMS = {
    "fd": lambda e, z, y, recall: feature_discriminator(e, y),
    "fd_adaptive": lambda e, z, y, recall: feature_discriminator(e, y, recall),
    "md": lambda e, z, y, recall: mean_discriminator(e, y, NUM_CLASSES),
    "ed": lambda e, z, y, recall: embedding_discriminator(e),
    "ce": lambda e, z, y, recall: cross_entropy(y, z, label_smoothing=0.1),
    "ce_votes": lambda e, z, y, recall: cross_entropy(keras.ops.take(VOTES, y, axis=0), z, label_smoothing=0.1),
    "supcon": lambda e, z, y, recall: supervised_contrastive(e, y),
    "triplet": lambda e, z, y, recall: triplet_semihard(e, y),
    "consistency": lambda e, z, y, recall: consistency(e),
    # No term, but the layer before them: its gradient at a zero vector is finite on JAX too.
    "unit_vectors": lambda e, z, y, recall: keras.ops.sum(UnitVectors()(e)[..., 0]),
}


def make_layer() -> AdCorreLoss:
    """With the one baseline that has a state."""
    return AdCorreLoss(NUM_CLASSES, history=HISTORY, w_fd=2.0, w_center=0.5, embedding_shape=(3, 16))


def term_outputs(inputs, names) -> dict[str, np.ndarray]:
    """Value and gradients of every term for every named batch."""
    import jax

    @jax.jit  # all terms at once: one compilation per shape
    def values_and_gradients(*arrays):
        return {term: jax.value_and_grad(function, argnums=(0, 1))(*arrays) for term, function in TERMS.items()}

    outputs = {}
    for name in names:
        arrays = [inputs[f"{name}/{part}"] for part in ("embeddings", "logits", "labels")]
        for term, (value, gradients) in values_and_gradients(*arrays, inputs["recall"]).items():
            outputs[f"{name}/{term}"] = value
            outputs[f"{name}/{term}/embeddings"], outputs[f"{name}/{term}/logits"] = gradients
    return outputs


def temporary_bytes() -> dict[str, np.ndarray]:
    """What the compiled FD and its gradient take besides inputs and outputs, for `LARGE_BATCH` faces."""
    import jax

    shapes = jax.ShapeDtypeStruct((LARGE_BATCH, 2, 8), "float32"), jax.ShapeDtypeStruct((LARGE_BATCH,), "int32")
    recall, outputs = np.linspace(0, 1, NUM_CLASSES, dtype=np.float32), {}
    for name, arguments in (("fd", ()), ("fd_adaptive", (recall,))):
        step = jax.value_and_grad(lambda e, y, arguments=arguments: feature_discriminator(e, y, *arguments))
        outputs[f"{name}/temporary"] = jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    return outputs


def layer_outputs(inputs, num_steps) -> dict[str, np.ndarray]:
    """Terms, gradients, history, centers and recall after every training step, then one evaluation."""
    import jax

    layer = make_layer()
    # Keras wants one call before `stateless_call`; an evaluation leaves the history as it is.
    layer(*(inputs[f"step0/{part}"] for part in ("labels", "logits", "embeddings")), training=False)

    def loss(e, z, y, state, training):
        terms, state = layer.stateless_call([], state, y, z, e, training=training)
        return terms["loss"], (terms, state)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=4)
    state, outputs = [variable.value for variable in layer.non_trainable_variables], {}
    for number in range(num_steps):
        training = number < num_steps - 1
        e, z, y = (inputs[f"step{number}/{part}"] for part in ("embeddings", "logits", "labels"))
        (_, (terms, state)), gradients = step(e, z, y, state, training)
        outputs.update({f"step{number}/{term}": value for term, value in terms.items()})
        outputs[f"step{number}/embeddings"], outputs[f"step{number}/logits"] = gradients
        for variable, value in zip(layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        outputs[f"step{number}/recall"] = layer.class_recall()
        outputs[f"step{number}/history"] = np.array(layer.history_h2)
        (outputs[f"step{number}/centers"],) = layer.layers_by_term["center"].get_weights()
    return outputs


def main() -> None:
    if keras.backend.backend() != "jax":
        sys.exit(f"expected the JAX backend, received {keras.backend.backend()}")
    with np.load(sys.argv[1], allow_pickle=False) as file:
        inputs = dict(file)
    names = sorted({key.split("/")[0] for key in inputs if "/" in key})
    steps = [name for name in names if name.startswith("step")]
    outputs = term_outputs(inputs, [name for name in names if name not in steps])
    outputs |= layer_outputs(inputs, len(steps))
    outputs |= temporary_bytes()
    if "tensorflow" in sys.modules:
        sys.exit("expected no TensorFlow in the JAX process, but something imported it")
    np.savez(sys.argv[2], **outputs)


if __name__ == "__main__":
    main()
