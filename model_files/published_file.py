"""Reads files that `keras.Model.save` wrote: the published models of the paper's authors, and our own networks.

The published files are full Keras 2 models: an Xception or ResNet50, k Dense embeddings, Lambda layers
holding Python bytecode, a softmax. Only arrays are taken from them, by the order of their layers. The
configuration beside them is read as JSON, for the input's side and the number of ignored layers; no layer is
built and no code is run from it.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import cnn_model
from datasets import CLASS_NAMES
from files import UserError
from model_files.description import ModelInfo, NetworkDescription
from model_files.hdf5_content import INFLATION
from model_files.safe_hdf5 import Content, read_arrays

# The shape of the first kernel distinguishes the published code's two backbones.
_BACKBONES = {(3, 3, 3, 32): "xcp", (7, 7, 3, 64): "resnet"}
# The published files' names: data set and accuracy.
_PUBLISHED_NAME = re.compile(r"(affectnet|rafdb|fer2013)_(\d{4})\b", re.IGNORECASE)
_SMALL = 1 << 24  # limit in bytes for text members, which can compress very strongly
_FULL = "model_weights"  # the group of a full model's file that holds its layers
OPTIMIZERS = ("optimizer", "optimizer_weights")  # groups of arrays that no network needs
_ARCHIVE_WEIGHTS = "model.weights.h5"
# What zipfile and its decompressors raise for damaged archives.
_ZIP_FAILURES = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's arrays.

    Attributes:
        name: as the file has it.
        arrays: what each is (``kernel``, ``gamma``, ``moving_mean``, ...) to the array, floats, all finite.
    """

    name: str
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What was taken from a model file: its arrays in order, or by name.

    Attributes:
        info: the description of its network. The data set and its accuracy are known as far as the file's name
            gives them.
        ignored_code: number of Lambda layers in its configuration.
        layers: for a file in Keras 2's layout, the backbone's layers with arrays in the order of the network, then
            ``embedding_dense`` (kernel (F, k * d)) and ``logits`` (kernel (k * d, C)); else None.
        arrays: for a file in Keras 3's layout, the arrays by name; else empty.
        path: what messages call the file.
    """

    info: ModelInfo
    ignored_code: int = 0
    layers: tuple[Layer, ...] | None = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: str | Path = ""

    def all_arrays(self) -> list[np.ndarray]:
        """Every array of the network."""
        return [*self.arrays.values(), *(array for layer in self.layers or () for array in layer.arrays.values())]


def is_archive(path: str | Path) -> bool:
    """Whether the file begins as a zip does, which Keras's `.keras` files are."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_saved_model(content: Content) -> bool:
    """Whether an HDF5 file has the layout of `Model.save` or of Keras 2's `save_weights`."""
    return _FULL in content.groups or any(name in content.attributes for name in ("layer_names", "layer_names0"))


def read_saved_model(path: str | Path) -> SavedModel:
    """Reads a full-model ``.h5`` file, a weights-only ``.h5`` file of Keras 2, or a ``.keras`` archive of our own.

    Raises:
        UserError: see `safe_hdf5.read_arrays`; arrays that are missing, extra, mis-shaped or not finite; a network
            that neither the published code nor ours makes.
    """
    return read_archive(path) if is_archive(path) else saved_model(read_arrays(path, without=OPTIMIZERS), path)


def saved_model(content: Content, path: str | Path) -> SavedModel:
    """As `read_saved_model`, from the content of an HDF5 file."""
    full = _FULL in content.groups
    layers = _read_layers(content, _FULL if full else "", path)
    attributes = {**content.attributes, **content.groups[_FULL if full else ""]}
    version = _text(attributes.get("keras_version", ""), "keras_version", path)
    text = content.attributes.get("model_config")
    settings = {} if text is None else _parse(_text(text, "model_config", path), "model_config", path)
    if _find(settings, "name", "pixel_input"):
        return dataclasses.replace(_own_network(settings, path, version, "full model"), layers=tuple(layers))
    kind = "full model" if full else "weights"
    return _published(layers, settings, f"published code, Keras {version or 2} {kind}", version, path)


# The layers of an HDF5 file


def _read_layers(content: Content, top: str, path: str | Path) -> list[Layer]:
    """Every layer with arrays in the group ``top``, in the order in which the file lists them.

    A nested model counts as its layers: its list has all trainable arrays before the others.
    """
    layers: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    prefix = f"{top}/" if top else ""
    read = set()
    for group_name in _names(content, top, "layer_names", path):
        group = f"{prefix}{group_name}"
        if group not in content.groups:
            raise UserError(f"{path}: layer {group_name} is missing")
        for array_name in _names(content, group, "weight_names", path):
            array = content.arrays.get(f"{group}/{array_name}")
            if array is None:
                raise UserError(f"{path}: array {array_name} of layer {group_name} is missing")
            read.add(f"{group}/{array_name}")
            layer, _, role = array_name.removesuffix(":0").rpartition("/")
            arrays = layers.setdefault((group_name, layer or group_name), {})
            if role in arrays:
                raise UserError(f"{path}: layer {group_name} lists the array {array_name} twice")
            arrays[role] = _finite(array, array_name, path)
    # Arrays that no layer lists: a file that was tampered with, or of another program.
    if extra := sorted({name for name in content.arrays if name.startswith(prefix)} - read):
        raise UserError(f"{path}: {len(extra)} extra arrays that no layer lists: /{', /'.join(extra[:3])}")
    return [Layer(name, arrays) for (_, name), arrays in layers.items()]


def _names(content: Content, group: str, attribute: str, path: str | Path) -> list[str]:
    """A list of names in an attribute, which Keras spreads over numbered attributes when it is long."""
    attributes = content.groups[group]
    if attribute in attributes:
        parts = [attributes[attribute]]
    else:
        parts = []
        while (part := f"{attribute}{len(parts)}") in attributes:
            parts.append(attributes[part])
        if not parts:
            raise UserError(f"{path}: /{group} does not list its arrays (attribute {attribute!r} is missing)")
    names = [name for part in parts for name in (part if isinstance(part, list) else [part])]
    return [_text(name, attribute, path) for name in names]


def _text(value: Any, attribute: str, path: str | Path) -> str:
    try:
        (value + "").encode("utf-8")  # bytes that are not UTF-8 are lone surrogates here
    except (UnicodeError, TypeError):
        kind = "bytes that are not UTF-8" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{path}: attribute {attribute!r}: expected text, found {kind}") from None
    return value


def _finite(array: np.ndarray, name: str, path: str | Path) -> np.ndarray:
    if array.dtype.kind != "f":
        raise UserError(f"{path}: {name}: expected floats, found {array.dtype}")
    if not np.all(np.isfinite(array)):
        raise UserError(f"{path}: {name} holds numbers that are not finite")
    return array


# The published networks


def _published(
    layers: list[Layer], settings: dict[str, Any], origin: str, keras_version: str, path: str | Path
) -> SavedModel:
    """Backbone, k embedding layers and the classifier, distinguished by the ranks of their kernels."""
    head_length = 0
    while head_length < len(layers) and _rank(layers[-1 - head_length]) == 2:
        head_length += 1
    backbone, head = layers[: len(layers) - head_length], layers[len(layers) - head_length :]
    first = next((layer.arrays["kernel"].shape for layer in backbone if "kernel" in layer.arrays), None)
    if first not in _BACKBONES or head_length < 2:
        raise UserError(
            f"{path}: expected a network of the published code (Xception or ResNet50, k Dense embeddings, a Dense "
            f"classifier), found {len(backbone)} layers that begin with a kernel of shape {first}, then "
            f"{head_length} Dense layers"
        )
    embedding, classifier = _fused_head(head[:-1], head[-1], path)
    named = _PUBLISHED_NAME.match(Path(path).name)
    network = NetworkDescription(
        arch=_BACKBONES[first],
        class_names=_class_names(classifier.arrays["bias"].size, path),
        num_embeddings=len(head) - 1,
        embedding_size=embedding.arrays["bias"].size // (len(head) - 1),
        input_size=_input_side(settings),
        scaling="unit",
    )
    info = ModelInfo(
        network,
        dataset=named[1].lower() if named else "",
        metrics={"accuracy": int(named[2]) / 10000, "source": "the file's name"} if named else {},
        versions=_versions(keras_version),
        origin=origin,
    )
    return SavedModel(info, _find(settings, "class_name", "Lambda"), (*backbone, embedding, classifier))


def _class_names(num_classes: int, path: str | Path) -> tuple[str, ...]:
    """The seven or eight classes of a network that does not name them are the canonical ones."""
    if num_classes not in (7, 8):
        raise UserError(f"{path}: expected a network of 7 or 8 classes, found {num_classes}")
    return CLASS_NAMES[:num_classes]


def _versions(keras_version: str) -> dict[str, str]:
    return {"keras": keras_version} if keras_version else {}


def _rank(layer: Layer) -> int:
    return layer.arrays["kernel"].ndim if "kernel" in layer.arrays else 0


def _fused_head(embeddings: list[Layer], classifier: Layer, path: str | Path) -> tuple[Layer, Layer]:
    """The k embedding layers as one, side by side in the file's order, and the classifier."""
    features, size = embeddings[0].arrays["kernel"].shape
    for layer in embeddings:
        _expect_shapes(layer, {"kernel": (features, size), "bias": (size,)}, path)
    rows, classes = len(embeddings) * size, classifier.arrays["kernel"].shape[1]
    _expect_shapes(classifier, {"kernel": (rows, classes), "bias": (classes,)}, path)
    fused = {role: np.concatenate([layer.arrays[role] for layer in embeddings], axis=-1) for role in ("kernel", "bias")}
    return Layer("embedding_dense", fused), Layer("logits", classifier.arrays)


def _expect_shapes(layer: Layer, expected: dict[str, tuple[int, ...]], path: str | Path) -> None:
    found = {role: array.shape for role, array in layer.arrays.items()}
    if found != expected:
        raise UserError(f"{path}: layer {layer.name}: expected {_shapes(expected)}, found {_shapes(found)}")


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{role} {shape}" for role, shape in shapes.items()) or "no arrays"


def _input_side(settings: dict[str, Any]) -> int | None:
    """The side that the configuration gives its first input."""
    for layer in _nodes(settings):
        if layer.get("class_name") == "InputLayer" and isinstance(layer.get("config"), dict):
            shape = layer["config"].get("batch_input_shape") or layer["config"].get("batch_shape")
            if isinstance(shape, list) and len(shape) == 4 and isinstance(shape[1], int):
                return shape[1]
    return None


# Our own networks


def read_archive(path: str | Path) -> SavedModel:
    """Reads a ``.keras`` archive of our own; its parts are read once.

    Raises:
        UserError: see `read_saved_model`.
    """
    settings = _parse(_member(path, "config.json").decode("utf-8", "replace"), "config.json", path)
    metadata = _parse(_member(path, "metadata.json").decode("utf-8", "replace"), "metadata.json", path)
    saved = _own_network(settings, path, str(metadata.get("keras_version", "")), ".keras archive")
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / _ARCHIVE_WEIGHTS
        unpacked.write_bytes(_member(path, _ARCHIVE_WEIGHTS))
        return dataclasses.replace(saved, arrays=read_arrays(unpacked, str(path), without=OPTIMIZERS).arrays)


def _own_network(settings: dict[str, Any], path: str | Path, version: str, kind: str) -> SavedModel:
    """The description of a network that `cnn_model.build_model` made, from the configuration of its layers."""
    try:
        arguments = cnn_model.arguments_of(settings.get("config"))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: expected a network that train.py made (layers pixel_input, embedding_split, logits), "
            "found another one"
        ) from None
    network = NetworkDescription(class_names=_class_names(arguments.pop("num_classes"), path), **arguments)
    info = ModelInfo(network, versions=_versions(version), origin=f"train.py, Keras {version} {kind}")
    return SavedModel(info, _find(settings, "class_name", "Lambda"))


def _member(path: str | Path, name: str) -> bytes:
    """One file of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (number := archive.namelist().count(name)) != 1:
                raise UserError(f"{path}: expected a Keras archive with {name}, found a zip with {number} of that name")
            info = archive.getinfo(name)
            size = Path(path).stat().st_size
            if info.file_size > max(INFLATION * size, _SMALL):
                raise UserError(
                    f"{path}: refused: {name} unpacks to {info.file_size:,} bytes, more than {INFLATION} times the "
                    f"file's {size:,}"
                )
            return archive.read(info)
    except _ZIP_FAILURES as error:
        raise UserError(f"{path}: the archive is damaged ({error}); get it again") from None


# JSON as data


def _parse(text: str, what: str, path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read its {what} ({error})") from None
    return values


def _nodes(values: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value, outer before inner, earlier before later."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += reversed(list(value.values()))
        elif isinstance(value, list):
            waiting += reversed(value)


def _find(values: Any, name: str, wanted: str) -> int:
    """How many objects in a JSON value have the entry ``name: wanted``."""
    return sum(node.get(name) == wanted for node in _nodes(values))
