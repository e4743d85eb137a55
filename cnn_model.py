"""The network: input scaling, backbones and the k-vector embedding head."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers, ops

import runtime
from files import UserError

# Of the batch statistics: about 20 steps. Keras's networks remember 100 to 1,000, made for ImageNet's epochs; a short
# run would be measured with the statistics of its first weights.
_MOMENTUM = 0.95
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what OpenCV's gray conversion uses too


def _caffe(x):
    return x[..., ::-1] - ops.convert_to_tensor((103.939, 116.779, 123.68), "float32")


def _torch(x):
    mean = ops.convert_to_tensor((0.485, 0.456, 0.406), "float32")
    deviation = ops.convert_to_tensor((0.229, 0.224, 0.225), "float32")
    return (x / 255 - mean) / deviation


def _image(x):
    """Removes each image's brightness and contrast; + 1 avoids division by zero for an image of one colour."""
    mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
    return (x - mean) * ops.rsqrt(variance + 1)


# Name of an input range to its description and the function that makes it from float32 pixels in 0..255.
SCALINGS: dict[str, tuple[str, Callable]] = {
    "tf": ("-1..1", lambda x: x / 127.5 - 1),
    "unit": ("0..1", lambda x: x / 255),
    "caffe": ("BGR minus ImageNet's mean", _caffe),
    "torch": ("ImageNet's mean and deviation", _torch),
    "image": ("each image's own mean and deviation", _image),
    "raw": ("0..255", lambda x: x),
}


@keras.saving.register_keras_serializable("adcorre")
class PixelInput(layers.Layer):
    """Turns raw pixels into a backbone's input: its side, its channels, its range.

    An axis that shrinks is averaged over area, one that grows is interpolated linearly, as in `images.resize_image`: so
    a network sees in training what it sees when it recognises.

    Args:
        size: side of the network's input in pixels.
        channels: 1 (colour becomes luma) or 3 (gray is repeated).
        scaling: the range, a name of `SCALINGS`.
    """

    def __init__(self, size: int, channels: int, scaling: str, **kwargs):
        super().__init__(**{**kwargs, "autocast": False})  # 128..255 in bfloat16 would be steps of 1
        self.size, self.channels, self.scaling = size, channels, scaling

    def call(self, pixels):
        """Float or uint8 (B, H, W, 1 or 3) in 0..255 to (B, size, size, channels) in the layer's compute type."""
        x = ops.cast(pixels, "float32")
        if self.channels == 3 or x.shape[-1] != 1:
            shape = ops.shape(x)
            x = ops.broadcast_to(x, (*shape[:-1], 3))
        if self.channels == 1 and x.shape[-1] == 3:
            x = ops.sum(x * ops.convert_to_tensor(LUMA, "float32"), axis=-1, keepdims=True)
        if any(side is None or side > self.size for side in x.shape[1:3]):
            x = _averaged(x, self.size)
        if x.shape[1:3] != (self.size, self.size):
            x = ops.image.resize(x, (self.size, self.size), interpolation="bilinear", data_format="channels_last")
        return ops.cast(SCALINGS[self.scaling][1](x), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size, self.size, self.channels)

    def get_config(self):
        return {**super().get_config(), "size": self.size, "channels": self.channels, "scaling": self.scaling}


def _averaged(x, most: int):
    """Averages float32 (B, H, W, C) over area to sides of at most ``most``: two products of matrices."""
    (_, height, width, _), channels = ops.shape(x), x.shape[-1]
    rows, columns = _area_shares(height, most), _area_shares(width, most)
    # (W, C) in one axis, so that a product has no side of 3: the shares once for each channel.
    each = ops.transpose(columns)[:, None, :, None] * ops.eye(channels)[None, :, None, :]
    x = ops.matmul(rows, ops.reshape(x, (-1, height, width * channels)))
    x = ops.matmul(x, ops.reshape(each, (width * channels, -1)))
    return ops.reshape(x, (-1, *(ops.shape(shares)[0] for shares in (rows, columns)), channels))


def _area_shares(given, most: int):
    """Each output pixel's shares of the input pixels whose area it covers.

    Args:
        given: pixels of the input axis: an int, or an int32 scalar where TensorFlow knows it only when the step runs.
        most: pixels that the output axis has at most.

    Returns:
        float32 (min(given, most), given), rows that sum to 1.
    """
    wanted = min(given, most) if isinstance(given, int) else ops.minimum(given, most)
    side = ops.cast(given, "float32") / ops.cast(wanted, "float32")
    starts = ops.cast(ops.arange(wanted), "float32")[:, None] * side
    pixels = ops.cast(ops.arange(given), "float32")
    covered = ops.minimum(starts + side, pixels + 1) - ops.maximum(starts, pixels)
    return ops.maximum(covered, 0) / side


@keras.saving.register_keras_serializable("adcorre")
class UnitVectors(layers.Layer):
    """Scales vectors to length 1: `x * rsqrt(max(sum(x^2), eps))`, so that a zero vector stays 0 with finite gradients.

    (`keras.layers.UnitNormalization` gives NaN gradients for a zero row on JAX.) Computes in float32.
    """

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, x):
        return x * ops.rsqrt(ops.maximum(ops.sum(x * x, axis=-1, keepdims=True), 1e-12))


@keras.saving.register_keras_serializable("adcorre")
class CalibratedLogits(layers.Layer):
    """`calibration.Calibration.logits` as a layer: float32 (B, C) to float32 (B, C)."""

    def __init__(self, temperature: float, exponent: float, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.temperature, self.exponent = temperature, exponent

    def call(self, logits):
        below = ops.max(logits, axis=-1, keepdims=True) - logits
        return -ops.power(below, self.exponent) / self.temperature

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature, "exponent": self.exponent}


@keras.saving.register_keras_serializable("adcorre")
class BatchNorm(layers.BatchNormalization):
    """Keras's layer of the last axis, in one kernel while training where the backend has one."""

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable and runtime.has_fused_batch_norm()):
            return super().call(inputs, training=training, mask=mask)
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        outputs, mean, variance = runtime.fused_batch_norm(inputs, gamma, beta, self.epsilon)
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + ops.cast(now, moving.dtype) * (1 - self.momentum))
        return outputs


def _convolution(x, filters, size=3, strides=1, separable=False, activate=True):
    """Convolution, batch normalisation, ReLU."""
    layer = layers.SeparableConv2D if separable else layers.Conv2D
    x = layer(filters, size, strides=strides, padding="same", use_bias=False)(x)
    x = BatchNorm(momentum=_MOMENTUM)(x)
    return layers.ReLU()(x) if activate else x


def _residual(x, separable):
    """Two convolutions beside the identity; separable ones with squeeze-and-excitation (Hu et al. 2018)."""
    channels = x.shape[-1]
    y = _convolution(x, channels, separable=separable)
    y = _convolution(y, channels, separable=separable, activate=False)
    if separable:
        share = layers.GlobalAveragePooling2D(keepdims=True)(y)
        share = layers.Dense(channels // 16, activation="relu")(share)
        y = layers.Multiply()([y, layers.Dense(channels, activation="sigmoid")(share)])
    return layers.ReLU()(layers.Add()([x, y]))


def _mini_xception(size: int, weights: str | None) -> keras.Model:
    """Our small network for CPUs, notebooks and browsers: 48 px to (B, 6, 6, 128).

    The first layer halves the side, since most of the time would be spent where the image is large. Plain convolutions
    follow, which run near the cores' matrix-product rate, and separable residual blocks at 6 x 6, where a depthwise
    convolution is not yet all memory traffic (docs/performance.md).
    """
    if weights is not None:
        raise UserError(f"mini_xcp: expected no pretrained backbone (there is none), received {weights!r}")
    inputs = x = keras.Input((size, size, 1))
    x = _convolution(x, 32, size=5, strides=2)
    x = _convolution(x, 64, strides=2)
    x = _residual(x, separable=False)
    x = _convolution(x, 128, strides=2)
    x = _residual(x, separable=True)
    x = _residual(x, separable=True)
    return keras.Model(inputs, x, name="backbone")


def _application(name: str) -> Callable[[int, str | None], keras.Model]:
    """The builder of a `keras.applications` backbone up to its last feature map."""

    def build(size: int, weights: str | None) -> keras.Model:
        # EfficientNetV2 looks its blocks up by its name.
        own_name = {} if name.startswith("EfficientNetV2") else {"name": "backbone"}
        try:
            backbone = getattr(keras.applications, name)(
                include_top=False, weights=weights, input_shape=(size, size, 3), **own_name
            )
        except ValueError as error:  # a size the backbone cannot take
            raise UserError(f"{name}: {error} (received size {size}, weights {weights!r})") from None
        except Exception as error:
            if weights is None:
                raise
            raise UserError(
                f"{name}: cannot get its {weights} weights ({error}); train with --pretrained none"
            ) from None
        backbone.name = "backbone"
        for layer in backbone._flatten_layers():
            if isinstance(layer, layers.BatchNormalization):
                layer.momentum = min(layer.momentum, _MOMENTUM)
        return backbone

    return build


def _application_scaling(name: str) -> str:
    """The input range a `keras.applications` network was made for (its module's ``preprocess_input``)."""
    if name.startswith(("ConvNeXt", "EfficientNet", "MobileNetV3")):
        return "raw"  # they scale inside
    if name.startswith("DenseNet"):
        return "torch"
    if name.startswith("VGG") or (name.startswith("ResNet") and not name.endswith("V2")):
        return "caffe"
    return "tf"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a backbone, and its input.

    Attributes:
        build: makes the backbone from its input size and the name of its first weights (or None).
        input_size: side in pixels by default.
        channels: 1 or 3.
        scaling: see `PixelInput`.
    """

    build: Callable[[int, str | None], keras.Model]
    input_size: int
    channels: int
    scaling: str


ARCHITECTURES = {
    "mini_xcp": Architecture(_mini_xception, 48, 1, "image"),
    "xcp": Architecture(_application("Xception"), 224, 3, "tf"),
    "resnet": Architecture(_application("ResNet50"), 224, 3, "caffe"),
}


def keras_names() -> list[str]:
    """The names of `keras.applications` that ``keras:<Name>`` offers (``tests/backbones.py`` tries them out)."""
    return sorted(name for name in dir(keras.applications) if name[0].isupper())


def architecture(arch: str) -> Architecture:
    """Looks up ``mini_xcp``, ``xcp``, ``resnet`` or ``keras:<Name>``.

    Raises:
        UserError: an unknown name; the message lists the choices.
    """
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    name = arch.removeprefix("keras:")
    known = keras_names()
    if arch.startswith("keras:") and name in known:
        return Architecture(_application(name), 224, 3, _application_scaling(name))
    raise UserError(
        f"arch: expected one of {', '.join(ARCHITECTURES)} or keras:<Name> with a name of {', '.join(known)}; "
        f"received {arch!r}"
    )


def build_model(
    arch: str,
    num_classes: int = 7,
    num_embeddings: int = 7,
    embedding_size: int = 256,
    input_size: int | None = None,
    weights: str | None = None,
    dropout: float = 0.5,
    scaling: str | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    exponent: float = 1.0,
) -> keras.Model:
    """Builds a network with the k-vector embedding head.

    Global average pooling, k x Dense(d) (one fused Dense and a reshape), each vector L2-normalised,
    concatenation, dropout, Dense(C).

    Args:
        arch: ``mini_xcp``, ``xcp`` (Xception up to block14_sepconv2_act), ``resnet`` (ResNet50) or ``keras:<Name>``.
        num_classes: C.
        num_embeddings: k.
        embedding_size: d.
        input_size: side in pixels that the backbone sees; None takes the architecture's own.
        weights: ``"imagenet"`` or a Keras backbone weights file for the backbone's first weights; None draws them.
        dropout: share of the concatenated embeddings dropped in training, 0..1.
        scaling: the range of the backbone's input (see `PixelInput`); None takes the architecture's own.
        logit_scale: factor of the concatenated unit vectors before the classifier: the inverse of a temperature.
        temperature: of the calibration of the logits (`calibration.Calibration`).
        exponent: of the same.

    Returns:
        A model of raw pixels (B, H, W, 1 or 3), 0..255, RGB, any H and W (resized inside), with outputs
        ``{"logits": float32 (B, C), "embeddings": float32 (B, k, d)}``, embeddings of length 1.

    Raises:
        UserError: an unknown architecture or scaling, a size it cannot take, weights that cannot be loaded, a count
            below 1.
    """
    for name, value, least in (
        ("num_classes", num_classes, 2),
        ("num_embeddings", num_embeddings, 1),
        ("embedding_size", embedding_size, 3),  # of two numbers every correlation is 1 or -1
        ("input_size", input_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: expected {least} or more, received {value}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: expected 0 <= share < 1, received {dropout}")
    if scaling not in (None, *SCALINGS):
        raise UserError(f"scaling: expected one of {', '.join(SCALINGS)}, received {scaling!r}")
    plan = architecture(arch)
    size = input_size or plan.input_size
    pixels = keras.Input((None, None, None), name="pixels")
    x = PixelInput(size, plan.channels, scaling or plan.scaling, name="pixel_input")(pixels)
    x = plan.build(size, weights)(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(num_embeddings * embedding_size, name="embedding_dense")(x)
    x = layers.Reshape((num_embeddings, embedding_size), name="embedding_split")(x)
    embeddings = UnitVectors(name="embeddings")(x)
    x = layers.Flatten(name="embedding_concatenate")(embeddings)
    if logit_scale != 1:
        x = layers.Rescaling(logit_scale, name="logit_scale")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    logits = layers.Dense(num_classes, dtype="float32", name="logits")(x)
    if (temperature, exponent) != (1, 1):
        logits = CalibratedLogits(temperature, exponent, name="calibration")(logits)
    network = keras.Model(pixels, {"logits": logits, "embeddings": embeddings}, name=arch.replace(":", "_"))
    network.jit_compile = runtime.jit_compile()  # `predict` would take XLA, slow on a CPU
    return network


def arguments_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `build_model`: its arguments, from the configuration of the network that it made.

    Args:
        settings: what `keras.Model.get_config` returns, or the same as read from a file's JSON. Nothing is made of it.

    Returns:
        The arguments that a file must keep: all but ``weights`` and ``dropout``.

    Raises:
        KeyError, TypeError, ValueError: the configuration of another network.
    """
    parts = {layer["name"]: layer["config"] for layer in settings["layers"]}
    num_embeddings, embedding_size = parts["embedding_split"]["target_shape"]
    return {
        "arch": re.sub("^keras_", "keras:", settings["name"]),
        "num_classes": parts["logits"]["units"],
        "num_embeddings": num_embeddings,
        "embedding_size": embedding_size,
        "input_size": parts["pixel_input"]["size"],
        "scaling": parts["pixel_input"]["scaling"],
        "logit_scale": parts.get("logit_scale", {"scale": 1.0})["scale"],
        **{name: parts.get("calibration", {}).get(name, 1.0) for name in ("temperature", "exponent")},
    }
