"""The three networks of MTCNN in OpenCV: weights of the package ``mtcnn``, without its TensorFlow.

The package builds its networks with Keras and imports TensorFlow when it is imported: three seconds and 400 MB, also
where faces are recognised through ONNX Runtime alone. Its weights are plain arrays. They are written here as an ONNX
graph in memory, which OpenCV runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np

from files import UserError

# Layers of each network (Zhang et al., 2016): a convolution's kernel comes with its weights, "pool" has the kernel and
# the padding. The stride is 1 for convolutions and 2 for pooling. The dense layers are convolutions over the whole map.
LAYERS = {
    "pnet": ("conv", ("pool", 2, "SAME_UPPER"), "conv", "conv"),
    "rnet": ("conv", ("pool", 3, "SAME_UPPER"), "conv", ("pool", 3, "VALID"), "conv", "dense"),
    "onet": (
        *("conv", ("pool", 3, "SAME_UPPER"), "conv", ("pool", 3, "VALID")),
        *("conv", ("pool", 2, "SAME_UPPER"), "conv", "dense"),
    ),
}
HEADS = {"pnet": ("offsets", "faces"), "rnet": ("offsets", "faces"), "onet": ("offsets", "landmarks", "faces")}


def load(name: str) -> cv2.dnn.Net:
    """Builds one network.

    Args:
        name: ``pnet``, ``rnet`` or ``onet``.

    Returns:
        A network with input float32 (N, 3, H, W) RGB in -1..1 and the outputs of `HEADS`, (N, C, H', W'), where
        H' and W' are 1 for patches of 24 (``rnet``) and 48 pixels (``onet``). "faces" holds two probabilities, the
        second one that of a face.

    Raises:
        UserError: the package is not installed.
    """
    return cv2.dnn.readNetFromONNX(np.frombuffer(_onnx(name, _weights(name)), np.uint8))


def _weights(name: str) -> list[np.ndarray]:
    package = importlib.util.find_spec("mtcnn")  # finds it without importing it, and so TensorFlow
    if package is None or not package.submodule_search_locations:
        raise UserError("the detector mtcnn needs the package mtcnn: pip install 'mtcnn>=1.0,<2', or choose haar")
    import joblib

    return joblib.load(Path(package.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4")


def _onnx(name: str, weights: list[np.ndarray]) -> bytes:
    """The network as the bytes of an ONNX file; ``weights`` in Keras's order and layout."""
    graph, left, x, channels = _Graph(), iter(weights), "image", 3
    for layer in LAYERS[name]:
        if isinstance(layer, tuple):
            _, size, padding = layer
            x = graph.add("MaxPool", x, kernel_shape=[size, size], strides=[2, 2], auto_pad=padding)
            continue
        kernel = _kernel(next(left), channels)
        x = graph.add("Conv", x, kernel, next(left))
        x = graph.add("PRelu", x, next(left).reshape(-1, 1, 1))
        channels = len(kernel)
    for head in HEADS[name]:
        output = "logits" if head == "faces" else head
        graph.add("Conv", x, _kernel(next(left), channels), next(left), name=output)
    graph.add("Softmax", "logits", name="faces", axis=1)
    return graph.model(HEADS[name])


def _kernel(weights: np.ndarray, channels: int) -> np.ndarray:
    """Keras's kernel of a convolution (H, W, C, D) or a dense layer (N, D) as (D, C, H, W)."""
    if weights.ndim == 4:
        return weights.transpose(3, 2, 0, 1)
    side = round((len(weights) / channels) ** 0.5)  # the package flattens (width, height, channel)
    return weights.reshape(side, side, channels, -1).transpose(3, 2, 1, 0)


class _Graph:
    """Writes an ONNX graph in protobuf's wire format; the field numbers are those of onnx.proto."""

    def __init__(self) -> None:
        self._nodes, self._arrays = b"", b""
        self._count = 0

    def add(self, op: str, x: str, *arrays: np.ndarray, name: str = "", **attributes: int | str | list[int]) -> str:
        """Adds a node behind ``x`` with constant inputs; returns its output's name."""
        self._count += 1
        name = name or f"{op.lower()}{self._count}"
        inputs = [x]
        for i, array in enumerate(arrays):
            inputs.append(f"{name}.{i}")
            dims = b"".join(_number(1, size) for size in array.shape)
            data = np.ascontiguousarray(array, "<f4").tobytes()
            self._arrays += _bytes(5, dims + _number(2, 1) + _text(8, inputs[-1]) + _bytes(9, data))
        node = b"".join(_text(1, value) for value in inputs) + _text(2, name) + _text(3, name) + _text(4, op)
        self._nodes += _bytes(1, node + b"".join(_attribute(key, value) for key, value in attributes.items()))
        return name

    def model(self, outputs: tuple[str, ...]) -> bytes:
        graph = self._nodes + _text(2, "mtcnn") + self._arrays
        graph += _bytes(11, _value("image", ("n", 3, "h", "w"))) + b"".join(_bytes(12, _value(o, ())) for o in outputs)
        return _number(1, 8) + _bytes(7, graph) + _bytes(8, _text(1, "") + _number(2, 13))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _attribute(name: str, value: int | str | list[int]) -> bytes:
    if isinstance(value, int):
        body = _number(3, value) + _number(20, 2)
    elif isinstance(value, str):
        body = _text(4, value) + _number(20, 3)
    else:
        body = b"".join(_number(8, v) for v in value) + _number(20, 7)
    return _bytes(5, _text(1, name) + body)


def _value(name: str, shape: tuple[int | str, ...]) -> bytes:
    dims = b"".join(_bytes(1, _number(1, s) if isinstance(s, int) else _text(2, s)) for s in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, 1) + _bytes(2, dims)))
