"""Quantises exported networks to 8-bit integers, calibrated on training images, and measures what it costs.

Weights have a scale per output channel, activations one per tensor. What would lose accuracy or time stays
in float32: the scaling of the pixels, convolutions of fewer than `SMALLEST_CHANNELS` channels, the unit vectors, the
classifier and the softmax (docs/performance.md has what was tried).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import evaluation
from data_helper import PreparedSplit
from files import UserError
from images import resize_image

SMALLEST_CHANNELS = 4  # of a convolution's input: integer kernels are slower than float ones for 1 or 3
# Of the values of an activation, the share that the integers cover: a rare large value would make all steps coarse.
PERCENTILE = 99.99
_BATCH_SIZE = 256
_CALIBRATION_BATCH = 8  # every activation of so many images is in memory
# ONNX's operations that compute with integers: those with weights, and what stands behind these.
_WEIGHTED, _PASSING, _JOINING = ("Conv", "MatMul", "Gemm"), ("Relu", "Clip", "MaxPool"), ("Add", "Concat")
# The layers of `cnn_model.build_model` around the backbone that stay in float32; the embedding layer does not.
_FLOAT_LAYERS = (
    "pixel_input",
    "embedding_split",
    "embeddings",
    "embedding_concatenate",
    "logit_scale",
    "logits",
    "calibration",
    "probabilities",
)
# A batch of pixels to probabilities and embeddings, see `OnnxNetwork.run`.
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """What a quantised file costs.

    Attributes:
        before: accuracy of the network in float32, 0..1.
        after: that of the file.
        same_label: share of the images with the same label, 0..1.
        cosine: mean cosine similarity of the embedding vectors.
        n: images.
    """

    before: float
    after: float
    same_label: float
    cosine: float
    n: int

    @property
    def points(self) -> float:
        """The change of the accuracy in percentage points; negative for a loss."""
        return 100 * (self.after - self.before)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The data of a quantisation.

    Attributes:
        calibration: uint8 (M, S, S, 3) RGB, S the network's size: they give the activations' ranges.
        split: what the accuracy is measured on.
        source: where the calibration images come from, as ``512 images of fer2013/train``.
        largest_drop: of the accuracy, in percentage points.
    """

    calibration: np.ndarray
    split: PreparedSplit
    source: str
    largest_drop: float = 0.3

    def measure(self, run: Run, network: keras.Model, path: str | Path) -> Accuracies:
        """Runs the network and the file on every image of the split.

        Args:
            run: runs the file.
            network: in float32.
            path: what messages call the file.

        Raises:
            UserError: the accuracy falls by more than `largest_drop`, or an output is not finite.
        """
        found = measure(run, network, self.split, self.calibration.shape[1])
        if round(-found.points, 6) > self.largest_drop:  # 3 of 1,000 images are 0.3 points
            raise UserError(
                f"{path}: the file was not kept: expected an accuracy at most {self.largest_drop:g} points lower in "
                f"8 bits, found {found.before:.2%} before and {found.after:.2%} after ({found.points:+.2f} points, "
                f"{self.split.name}, n = {found.n:,}); try another --format, more --calibration-images, or a larger "
                "--max-drop"
            )
        return found


def calibration_images(split: PreparedSplit, size: int, number: int, seed: int) -> tuple[np.ndarray, str]:
    """Draws images of a split without replacement.

    Args:
        split: the training images.
        size: side of the network's input.
        number: of images; all of the split where it has fewer.
        seed: of the draw.

    Returns:
        The images, uint8 (M, size, size, 3) RGB, and a text that names them (number, split, seed).
    """
    number = min(number, len(split))
    rows = np.sort(np.random.default_rng(seed).choice(len(split), number, replace=False))
    return faces(split, rows, size), f"{number:,} images of {split.name}, seed {seed}"


def faces(split: PreparedSplit, rows: np.ndarray, size: int) -> np.ndarray:
    """Rows of a split as an exported network takes them: uint8 (M, size, size, 3) RGB."""
    images = split.images[rows]
    if images.shape[1:3] != (size, size):
        images = np.stack([resize_image(image, size) for image in images]).reshape(len(images), size, size, -1)
    return np.broadcast_to(images, (*images.shape[:3], 3))


def measure(run: Run, network: keras.Model, split: PreparedSplit, size: int) -> Accuracies:
    """The accuracy of a network and of an exported file of it on the same images.

    Args:
        run: runs the file.
        network: `cnn_model.build_model`.
        split: the images and their labels.
        size: side of the file's input.
    """
    evaluation.check_classes(network, split)
    right_before = right_after = same = cosine = 0.0
    for start in range(0, len(split), _BATCH_SIZE):
        rows = np.arange(start, min(start + _BATCH_SIZE, len(split)))
        pixels = faces(split, rows, size)
        expected, vectors = evaluation.predict(network, pixels, _BATCH_SIZE)
        found, found_vectors = run(pixels.astype(np.float32))
        if not (np.isfinite(found).all() and np.isfinite(found_vectors).all()):
            raise UserError(f"{split.name}: expected finite outputs of the file in 8 bits, found NaN or infinity")
        labels, before, after = split.labels[rows], expected.argmax(axis=1), found.argmax(axis=1)
        right_before += np.sum(before == labels)
        right_after += np.sum(after == labels)
        same += np.sum(before == after)
        lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(found_vectors, axis=-1)
        cosine += np.sum(np.sum(vectors * found_vectors, axis=-1) / np.maximum(lengths, 1e-12), dtype=np.float64)
    n = len(split)
    return Accuracies(
        float(right_before / n), float(right_after / n), float(same / n), float(cosine / n / vectors.shape[1]), n
    )


# ONNX


def quantize_onnx(path: Path, calibration: np.ndarray, **changes: Any) -> None:
    """Replaces an ONNX file by one with 8-bit integers; its metadata stay.

    Weights have 7 bits: x86 processors without VNNI add pairs of 8 x 8-bit products in 16 bits, which would overflow.

    Args:
        path: the file, float32.
        calibration: uint8 (M, S, S, 3).
        changes: other arguments of ``quantize_static``, to try them out.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    properties = {item.key: item.value for item in onnx.load(path).metadata_props}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(folder) / "prepared.onnx"
        # It folds constants and joins MatMul and Add, so that the integers reach more.
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        arguments = dict(
            quant_format=quantization.QuantFormat.QDQ,
            # Ranges are taken of these operations' tensors only: a gate's, all about 0.5, has none that can be divided.
            op_types_to_quantize=[*_WEIGHTED, *_PASSING, *_JOINING],
            nodes_to_quantize=integer_nodes(onnx.load(prepared).graph),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE, "CalibStridedMinMax": 1},
        )
        quantization.quantize_static(str(prepared), str(path), _Batches(calibration), **{**arguments, **changes})
    model = onnx.load(path)
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def integer_nodes(graph) -> list[str]:
    """The names of the nodes of an ONNX graph that compute with integers.

    Convolutions and matrix products with constant weights, but for a convolution of few channels and the last product,
    the classifier; and behind them what passes integers on: ReLU, maxima, concatenations, sums of two branches.
    """
    sizes = {item.name: item.dims for item in graph.initializer}
    classifier = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm")][-1]
    names, integers = [], set()  # integers: the tensors
    for node in graph.node:
        weights = sizes.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "Conv":
            groups = next((item.i for item in node.attribute if item.name == "group"), 1)
            chosen = weights is not None and weights[1] * groups >= SMALLEST_CHANNELS
        elif node.op_type in ("MatMul", "Gemm"):
            chosen = weights is not None and node.name != classifier
        elif node.op_type in _PASSING:
            chosen = node.input[0] in integers
        else:
            chosen = node.op_type in _JOINING and not integers.isdisjoint(node.input)
            chosen = chosen and sizes.keys().isdisjoint(node.input)
        if chosen:
            names.append(node.name)
            integers.update(node.output)
    return names


class _Batches:
    """What ONNX Runtime calls a calibration data reader; one item is one batch."""

    def __init__(self, images: np.ndarray):
        self._images = images
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return -(-len(self._images) // _CALIBRATION_BATCH)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._batches = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, np.ndarray] | None:
        number = next(self._batches, None)
        if number is None:
            return None
        batch = self._images[number * _CALIBRATION_BATCH : (number + 1) * _CALIBRATION_BATCH]
        return {"pixels": batch.astype(np.float32)}


# TensorFlow Lite


def quantized_tflite(folder: str | Path, calibration: np.ndarray, all_layers: bool = False) -> bytes:
    """A TensorFlow Lite model with 8-bit integers inside and float32 inputs and outputs.

    Args:
        folder: a SavedModel of a `serving.serving_network`.
        calibration: uint8 (M, S, S, 3).
        all_layers: let the converter quantise everything that it can, to try it out.
    """
    import tensorflow as tf

    def examples() -> Iterator[list[np.ndarray]]:
        return ([image[None].astype(np.float32)] for image in calibration)

    interpreter = tf.lite.Interpreter(
        model_content=tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert(),
    )
    shapes = {item["name"]: tuple(item["shape"]) for item in interpreter.get_tensor_details()}
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = examples
    # The converter alone quantises everything, the softmax included; its debugger can leave tensors out.
    options = tf.lite.experimental.QuantizationDebugOptions(
        denylisted_nodes=[] if all_layers else float_tensors(shapes)
    )
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=examples, debug_options=options
    )
    return debugger.get_nondebug_quantized_model()


def float_tensors(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of the tensors of a TensorFlow Lite model that stay in float32.

    Args:
        shapes: of all tensors, by name. A name has the scopes of all layers that were joined in an operation.
    """
    scopes = [rf"/{layer}(_\d+)*/" for layer in _FLOAT_LAYERS]
    for name, shape in shapes.items():
        # A kernel is (outputs, height, width, inputs); a depthwise one (1, height, width, channels).
        if name.endswith("/convolution") and len(shape) == 4 and shape[3] < SMALLEST_CHANNELS:
            scopes.append(re.escape(name))
    pattern = re.compile("|".join((*scopes, "^StatefulPartitionedCall")))
    return [name for name in shapes if pattern.search(name)]
