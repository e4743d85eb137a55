"""The forms of layers that are exported compute what the layers compute."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras

import cnn_model
from model_files.serving import plain_layers, serving_network


def outputs(network, pixels):
    return {name: np.asarray(value) for name, value in network(pixels, training=False).items()}


@pytest.mark.parametrize(("arch", "size"), [("mini_xcp", 24), ("keras:MobileNet", 32)])
def test_plain_layers_compute_the_same_and_end_with_the_block(arch, size):
    keras.utils.set_random_seed(0)
    network = cnn_model.build_model(arch, num_embeddings=2, embedding_size=8, input_size=size)
    for layer in network._flatten_layers():
        for name in ("moving_mean", "bias"):  # zeros would hide a lost term
            if getattr(layer, name, None) is not None:
                variable = getattr(layer, name)
                variable.assign(keras.random.uniform(variable.shape, -0.2, 0.2))
    serving = serving_network(network, size)
    pixels = np.random.default_rng(0).uniform(0, 255, (3, size, size, 3)).astype(np.float32)
    before = outputs(serving, pixels)
    methods = [layer.call.__qualname__ for layer in serving._flatten_layers()]
    with plain_layers(serving):
        plain = outputs(serving, pixels)
        changed = {layer.name for layer in serving._flatten_layers() if "call" in vars(layer)}
    for name, expected in before.items():
        np.testing.assert_allclose(plain[name], expected, atol=2e-6)
        np.testing.assert_array_equal(outputs(serving, pixels)[name], expected)
    assert {"pixel_input", "embedding_split", "embedding_concatenate"} <= changed
    assert [layer.call.__qualname__ for layer in serving._flatten_layers()] == methods


def test_gray_images_of_another_size_are_resized_as_ever():
    network = cnn_model.build_model("mini_xcp", num_embeddings=2, embedding_size=8, input_size=24)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 30, 20, 1)).astype(np.float32)
    expected = outputs(network, pixels)
    with plain_layers(network):
        np.testing.assert_allclose(outputs(network, pixels)["embeddings"], expected["embeddings"], atol=2e-6)
