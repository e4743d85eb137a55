"""The network that is exported, and its layers in forms that converters write well."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

import cnn_model


def serving_network(network: keras.Model, size: int) -> keras.Model:
    """The network to export: of one image size, with probabilities in place of logits."""
    pixels = keras.Input((size, size, 3), dtype="float32", name="pixels")
    outputs = network(pixels, training=False)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(outputs["logits"])
    return keras.Model(pixels, {"probabilities": probabilities, "embeddings": outputs["embeddings"]}, name="serving")


@contextlib.contextmanager
def plain_layers(serving: keras.Model) -> Iterator[None]:
    """While the block runs, a network computes the same, up to rounding, with fewer operations.

    Keras asks for the batch size wherever it reshapes, and a converter writes each question as four or five operations
    on tiny tensors. With one face at a time, these took a third of ONNX Runtime's time (docs/performance.md).
    """
    forms = ((keras.layers.Dense, _dense), (keras.layers.Reshape, _reshape), (keras.layers.Flatten, _reshape))
    changes = [
        (layer, "call", form(layer))
        for layer in serving._flatten_layers()
        for kind, form in (*forms, (cnn_model.PixelInput, _pixel_input))
        if isinstance(layer, kind)
    ]
    with _changed(changes):
        yield


def _dense(layer: keras.layers.Dense) -> Callable:
    """Of squeeze-and-excitation's (B, 1, 1, C), a 1 x 1 convolution, which needs no reshaping."""
    usual = layer.call

    def call(inputs, training=None):
        if len(inputs.shape) != 4:
            return usual(inputs)
        outputs = ops.conv(inputs, layer.kernel[None, None], data_format="channels_last")
        outputs = outputs if layer.bias is None else outputs + layer.bias
        return layer.activation(outputs)

    return call


def _reshape(layer: keras.layers.Layer) -> Callable:
    return lambda inputs: ops.reshape(inputs, (-1, *layer.compute_output_shape(inputs.shape)[1:]))


def _pixel_input(layer: cnn_model.PixelInput) -> Callable:
    """Of RGB of the network's size nothing is repeated or resized, and luma is one 1 x 1 convolution."""
    usual = layer.call

    def call(pixels):
        if tuple(pixels.shape[1:]) != (layer.size, layer.size, 3):
            return usual(pixels)
        x = ops.cast(pixels, "float32")
        if layer.channels == 1:
            luma = np.reshape(np.float32(cnn_model.LUMA), (1, 1, 3, 1))
            x = ops.conv(x, luma, data_format="channels_last")
        return ops.cast(cnn_model.SCALINGS[layer.scaling][1](x), layer.compute_dtype)

    return call


@contextlib.contextmanager
def onnx_layers(serving: keras.Model) -> Iterator[None]:
    """While the block runs, a network computes the same with operations that the ONNX converter knows."""
    import tensorflow as tf

    changes = []
    for layer in serving._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):  # EfficientNet: its tensors would become inputs
            changes += [(layer, name, np.array(getattr(layer, name))) for name in ("mean", "variance")]
        elif getattr(layer, "activation", None) is keras.activations.gelu:  # ConvNeXt: TensorFlow's has Erfc
            changes.append((layer, "activation", _gelu))
    # ConvNeXt: a grouped convolution is a function of its own, which XLA compiles.
    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with _changed(changes):
            yield
    finally:
        tf.config.run_functions_eagerly(eagerly)


def _gelu(x):
    return 0.5 * x * (1 + ops.erf(x / math.sqrt(2)))


@contextlib.contextmanager
def _changed(changes: list[tuple[keras.layers.Layer, str, Any]]) -> Iterator[None]:
    """Sets attributes of layers, and puts back what was there; a method of the class is uncovered again."""
    before = [(layer, name, vars(layer).get(name)) for layer, name, _ in changes]
    try:
        for layer, name, value in changes:
            setattr(layer, name, value)
        yield
    finally:
        for layer, name, value in before:
            if name == "call" and value is None:
                delattr(layer, name)
            else:
                setattr(layer, name, value)
