"""Every term of the loss trains the whole network; in the published code three of four reach 0 of its variables."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import cnn_model
from custom_loss import cross_entropy, embedding_discriminator, feature_discriminator, mean_discriminator

pytestmark = pytest.mark.slow
NUM_CLASSES = 7
LABELS = np.array([0, 0, 1, 2, 3, 3, 3, 6])


@pytest.fixture(scope="module")
def network():
    return cnn_model.build_model("xcp", num_classes=NUM_CLASSES, input_size=71)


@pytest.fixture(scope="module")
def gradients(network):
    """Term -> {variable's path: gradient, or None where no path leads}."""
    images = np.random.default_rng(0).uniform(0, 255, (len(LABELS), 71, 71, 3)).astype(np.float32)
    with tf.GradientTape(persistent=True) as tape:
        outputs = network(images, training=True)
        embeddings = outputs["embeddings"]
        terms = {
            "fd": feature_discriminator(embeddings, LABELS),
            "fd_adaptive": feature_discriminator(embeddings, LABELS, np.linspace(0, 1, NUM_CLASSES)),
            "md": mean_discriminator(embeddings, LABELS, NUM_CLASSES),
            "ed": embedding_discriminator(embeddings),
            "ce": cross_entropy(LABELS, outputs["logits"]),
        }
    variables = network.trainable_variables
    paths = [variable.path for variable in variables]
    values = [variable.value for variable in variables]
    return {term: dict(zip(paths, tape.gradient(value, values), strict=True)) for term, value in terms.items()}


def reached(gradients):
    """Paths of the variables whose gradient is there, finite and not all zero."""
    there = {path: np.asarray(gradient) for path, gradient in gradients.items() if gradient is not None}
    return {path for path, gradient in there.items() if np.isfinite(gradient).all() and np.any(gradient)}


@pytest.mark.parametrize("term", ["fd", "fd_adaptive", "md", "ed"])
def test_embedding_terms_reach_everything_upstream_of_the_embeddings(term, network, gradients):
    """The final Dense alone turns embeddings into logits: it lies downstream, and no function of them can reach it."""
    classifier = {variable.path for variable in network.get_layer("logits").trainable_variables}
    everything = {variable.path for variable in network.trainable_variables}
    assert len(classifier) == 2 and len(everything) == len(network.trainable_variables) > 100
    assert reached(gradients[term]) == everything - classifier


def test_cross_entropy_reaches_every_variable(network, gradients):
    assert reached(gradients["ce"]) == {variable.path for variable in network.trainable_variables}
