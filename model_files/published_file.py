"""Reads files that `keras.Model.save` wrote: the published models of the paper's authors, and our own networks.

The published files are full Keras 2 models: an Xception or ResNet50, k Dense embeddings, Lambda layers
holding Python bytecode, a softmax. Only arrays are taken from them, by the order of their layers. The
configuration beside them is read as JSON, for the input's side and the number of ignored layers; no layer is
built and no code is run from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import cnn_model
from datasets import CLASS_NAMES
from files import UserError
from model_files.description import ModelInfo, NetworkDescription
from model_files.safe_hdf5 import INFLATION, open_hdf5

# The shape of the first kernel distinguishes the published code's two backbones.
_BACKBONES = {(3, 3, 3, 32): "xcp", (7, 7, 3, 64): "resnet"}
# The published files' names: data set and accuracy.
_PUBLISHED_NAME = re.compile(r"(affectnet|rafdb|fer2013)_(\d{4})\b", re.IGNORECASE)
_SMALL = 1 << 24  # limit in bytes for text members, which can compress very strongly
_ARCHIVE_WEIGHTS = "model.weights.h5"


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
    """What was taken from the file.

    Attributes:
        info: the description of its network. The data set and its accuracy are known as far as the file's name
            gives them.
        ignored_code: number of Lambda layers in its configuration.
        layers: the backbone's layers with arrays in the order of the network, then ``embedding_dense`` (kernel
            (F, k * d)) and ``logits`` (kernel (k * d, C)); None in a `.keras` archive, whose arrays
            `archive_weights` unpacks.
    """

    info: ModelInfo
    ignored_code: int = 0
    layers: tuple[Layer, ...] | None = None


def is_archive(path: str | Path) -> bool:
    """Whether the file begins as a zip does, which Keras's `.keras` files are."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_saved_model(file: h5py.File) -> bool:
    """Whether an open HDF5 file has the layout of `Model.save` or of Keras 2's `save_weights`."""
    return "model_weights" in file or any(name in file.attrs for name in ("layer_names", "layer_names0"))


def read_saved_model(path: str | Path) -> SavedModel:
    """Reads a full-model ``.h5`` file, a weights-only ``.h5`` file of Keras 2, or a ``.keras`` archive of our own.

    Raises:
        UserError: see `safe_hdf5.open_hdf5`; arrays that are missing, extra, mis-shaped or not finite; a network
            that neither the published code nor ours makes.
    """
    if is_archive(path):
        return _read_archive(path)
    with open_hdf5(path) as file:
        full = isinstance(file.get("model_weights"), h5py.Group)
        weights = file["model_weights"] if full else file
        layers = _read_layers(weights, path)
        version = _text(weights.attrs.get("keras_version", file.attrs.get("keras_version", "")), "keras_version", path)
        text = file.attrs.get("model_config")
    settings = {} if text is None else _parse(_text(text, "model_config", path), "model_config", path)
    if _find(settings, "name", "pixel_input"):
        return dataclasses.replace(_own_network(settings, path, version, "full model"), layers=tuple(layers))
    kind = "full model" if full else "weights"
    return _published(layers, settings, f"published code, Keras {version or 2} {kind}", version, path)


@contextlib.contextmanager
def archive_weights(path: str | Path) -> Iterator[Path]:
    """Unpacks the arrays of a ``.keras`` archive, as a ``.weights.h5`` file that is there while the block runs.

    Raises:
        UserError: no such member, or a damaged one; see `safe_hdf5.open_hdf5`.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / _ARCHIVE_WEIGHTS
        unpacked.write_bytes(_member(path, _ARCHIVE_WEIGHTS))
        yield unpacked


# The layers of an HDF5 file


def _read_layers(weights: h5py.Group, path: str | Path) -> list[Layer]:
    """Every layer with arrays, in the order in which the file lists them.

    A nested model counts as its layers: its list has all trainable arrays before the others.
    """
    layers: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    read = set()
    for group_name in _names(weights, "layer_names", path):
        group = weights.get(group_name)
        if not isinstance(group, h5py.Group):
            raise UserError(f"{path}: layer {group_name} is missing")
        for array_name in _names(group, "weight_names", path):
            array = group.get(array_name)
            if not isinstance(array, h5py.Dataset):
                raise UserError(f"{path}: array {array_name} of layer {group_name} is missing")
            read.add(array.name)
            layer, _, role = array_name.removesuffix(":0").rpartition("/")
            arrays = layers.setdefault((group_name, layer or group_name), {})
            if role in arrays:
                raise UserError(f"{path}: layer {group_name} lists the array {array_name} twice")
            arrays[role] = _finite(array, array_name, path)
    _refuse_extra(weights, read, path)
    return [Layer(name, arrays) for (_, name), arrays in layers.items()]


def _names(group: h5py.Group, attribute: str, path: str | Path) -> list[str]:
    """A list of names in an attribute, which Keras spreads over numbered attributes when it is long."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts = []
        while (part := f"{attribute}{len(parts)}") in group.attrs:
            parts.append(group.attrs[part])
        if not parts:
            raise UserError(f"{path}: {group.name} does not list its arrays (attribute {attribute!r} is missing)")
    return [_text(name, attribute, path) for part in parts for name in np.ravel(part)]


def _text(value: Any, attribute: str, path: str | Path) -> str:
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value + ""
        text.encode("utf-8")  # h5py gives other bytes as lone surrogates
    except (UnicodeError, TypeError):
        raise UserError(f"{path}: attribute {attribute!r}: expected text, found {type(value).__name__}") from None
    return text


def _finite(array: h5py.Dataset, name: str, path: str | Path) -> np.ndarray:
    if array.dtype.kind != "f":
        raise UserError(f"{path}: {name}: expected floats, found {array.dtype}")
    values = np.asarray(array[()])
    if not np.all(np.isfinite(values)):
        raise UserError(f"{path}: {name} holds numbers that are not finite")
    return values


def _refuse_extra(weights: h5py.Group, read: set[str], path: str | Path) -> None:
    """Arrays that no layer lists: a file that was tampered with, or of another program."""
    there = []
    weights.visititems(lambda _, item: there.append(item.name) if isinstance(item, h5py.Dataset) else None)
    if extra := sorted(set(there) - read):
        raise UserError(f"{path}: {len(extra)} extra arrays that no layer lists: {', '.join(extra[:3])}")


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


def _read_archive(path: str | Path) -> SavedModel:
    settings = _parse(_member(path, "config.json").decode("utf-8", "replace"), "config.json", path)
    metadata = _parse(_member(path, "metadata.json").decode("utf-8", "replace"), "metadata.json", path)
    return _own_network(settings, path, str(metadata.get("keras_version", "")), ".keras archive")


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
            info = archive.getinfo(name)
            size = Path(path).stat().st_size
            if info.file_size > max(INFLATION * size, _SMALL):
                raise UserError(
                    f"{path}: refused: {name} unpacks to {info.file_size:,} bytes, more than {INFLATION} times the "
                    f"file's {size:,}"
                )
            return archive.read(info)
    except KeyError:
        raise UserError(f"{path}: expected a Keras archive with {name}, found a zip without it") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
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
