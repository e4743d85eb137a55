"""What do the losses beside Ad-Corre give on JAX? Run by ``test_rivals.py`` in a process of its own.

``KERAS_BACKEND=jax python jax_baselines.py INPUTS.npz OUTPUTS.npz``: a process has one Keras backend.
"""

from __future__ import annotations

import sys

import keras
import numpy as np

from baseline_losses import CenterLoss, supervised_contrastive, triplet_semihard

NUM_CLASSES = 5
# Loss: (embeddings (B, k, d), labels (B,)) -> scalar
LOSSES = {"supervised_contrastive": supervised_contrastive, "triplet_semihard": triplet_semihard}


def loss_outputs(inputs, names) -> dict[str, np.ndarray]:
    """Value and gradient of every loss for every named batch."""
    import jax

    @jax.jit  # both losses at once: one compilation a shape
    def values_and_gradients(embeddings, labels):
        return {loss: jax.value_and_grad(function)(embeddings, labels) for loss, function in LOSSES.items()}

    outputs = {}
    for name in names:
        results = values_and_gradients(inputs[f"{name}/embeddings"], inputs[f"{name}/labels"])
        for loss, (value, gradient) in results.items():
            outputs[f"{name}/{loss}"], outputs[f"{name}/{loss}/embeddings"] = value, gradient
    return outputs


def center_outputs(inputs, num_steps) -> dict[str, np.ndarray]:
    """Loss, gradient and centers after every training step, then one evaluation."""
    import jax

    _, k, d = inputs["step0/embeddings"].shape
    layer = CenterLoss(NUM_CLASSES, k, d)
    # Keras wants one call before `stateless_call`; an evaluation leaves the centers as they are.
    layer(inputs["step0/labels"], inputs["step0/embeddings"], training=False)

    def loss(e, y, state, training):
        return layer.stateless_call([], state, y, e, training=training)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    state, outputs = [variable.value for variable in layer.non_trainable_variables], {}
    for number in range(num_steps):
        e, y = inputs[f"step{number}/embeddings"], inputs[f"step{number}/labels"]
        (value, state), gradient = step(e, y, state, number < num_steps - 1)
        outputs[f"step{number}/loss"], outputs[f"step{number}/embeddings"] = value, gradient
        (outputs[f"step{number}/centers"],) = state
    return outputs


def main() -> None:
    if keras.backend.backend() != "jax":
        sys.exit(f"expected the JAX backend, received {keras.backend.backend()}")
    with np.load(sys.argv[1], allow_pickle=False) as file:
        inputs = dict(file)
    names = sorted({key.split("/")[0] for key in inputs})
    steps = [name for name in names if name.startswith("step")]
    outputs = loss_outputs(inputs, [name for name in names if name not in steps])
    outputs |= center_outputs(inputs, len(steps))
    if "tensorflow" in sys.modules:
        sys.exit("expected no TensorFlow in the JAX process, but something imported it")
    np.savez(sys.argv[2], **outputs)


if __name__ == "__main__":
    main()
