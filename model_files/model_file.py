"""What is in a model file? Saving and loading of weights with the description that rebuilds their network.

Ours is a Keras `.weights.h5` plus one JSON attribute on the file's root. What `keras.Model.save` wrote loads too: the
published Keras 2 files, and our own networks (`published_file`). Loading rebuilds the network from the description
and reads arrays: nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import cnn_model
from datasets.shared.expressions import CLASS_NAMES
from files import UserError, whole_file
from model_files import published_file
from model_files.published_file import Layer, SavedModel
from model_files.safe_hdf5 import open_hdf5

ATTRIBUTE = "ad_corre"
FORMAT_VERSION = 1
_LARGEST_INPUT = 4096
_LONGEST_REASON = 400  # Keras lists every layer that it could not fill
# `cnn_model.PixelInput`'s scalings in words.
_RANGES = {
    "tf": "-1..1",
    "unit": "0..1",
    "caffe": "BGR minus ImageNet's mean",
    "torch": "ImageNet's mean and deviation",
    "image": "each image's own mean and deviation",
    "raw": "0..255",
}
# Names that Keras makes from a counter, which says nothing of a layer's place.
_COUNTED = re.compile(r"(?:\w+_)?(?:conv2d|normalization|dense)(?:_\d+)?")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a file says of its network.

    Attributes:
        arch: see `cnn_model.build_model`, as are the next three.
        class_names: C names, in the order of the logits.
        num_embeddings: k.
        embedding_size: d.
        input_size: side in pixels that the backbone sees.
        scaling: range of the backbone's input (see `cnn_model.PixelInput`); None is the architecture's own.
        dataset: what it was trained on, as ``fer2013/train``; empty when unknown.
        metrics: what was measured on which split, free-form and JSON-ready.
        versions: of what trained it (`runtime.versions`).
        origin: where the arrays come from, in words.
        logit_scale: see `cnn_model.build_model`.
    """

    arch: str
    class_names: tuple[str, ...]
    num_embeddings: int = 7
    embedding_size: int = 256
    input_size: int | None = None
    scaling: str | None = None
    dataset: str = ""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "train.py"
    logit_scale: float = 1.0


def save_model(path: str | Path, network: keras.Model, info: ModelInfo) -> None:
    """Writes the network's weights and description, whole or not at all.

    Args:
        path: must end with ``.weights.h5``.
        network: what `cnn_model.build_model` made from the values in ``info``.

    Raises:
        UserError: another ending.
        OSError: the disk refused.
    """
    check_target(path)
    described = {"format_version": FORMAT_VERSION, **dataclasses.asdict(info)}
    with whole_file(path) as temporary:
        need = 2 * sum(math.prod(variable.shape) * 4 for variable in network.variables) + 1_000_000
        if shutil.disk_usage(temporary.parent).free < need:  # on a full disk HDF5 itself would crash the process
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        network.save_weights(temporary)
        with h5py.File(temporary, "r") as file:
            arrays = {name: dataset[()] for name, dataset in _datasets(file).items()}
        # Keras's file again in HDF5's later layout, whose groups take a tenth of the space.
        with h5py.File(content := io.BytesIO(), "w", libver="latest") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs[ATTRIBUTE] = json.dumps(described)
        temporary.write_bytes(content.getbuffer())


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Every array of a file, not read yet, by its full name."""
    found = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def check_target(path: str | Path) -> None:
    """Refuses a name that Keras would not write weights to."""
    if not str(path).endswith(".weights.h5"):
        raise UserError(f"{path}: expected a name that ends with .weights.h5")


def read_info(path: str | Path) -> ModelInfo:
    """Reads a model file's description alone.

    Raises:
        UserError: missing, of another format, damaged, or not safe to read (`safe_hdf5.open_hdf5`).
    """
    return _read(path)[0]


def load_model(path: str | Path) -> tuple[keras.Model, ModelInfo]:
    """Rebuilds a file's network and fills it.

    Returns:
        The network (`cnn_model.build_model`) and the file's description.

    Raises:
        UserError: see `read_info`; or arrays that are missing, extra, of another shape, or not finite.
    """
    info, saved = _read(path)
    network = cnn_model.build_model(
        info.arch,
        num_classes=len(info.class_names),
        num_embeddings=info.num_embeddings,
        embedding_size=info.embedding_size,
        input_size=info.input_size,
        scaling=info.scaling,
        logit_scale=info.logit_scale,
    )
    _fill(network, path, saved)
    return network, info


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Fills a network that is there with the arrays of a model file.

    Raises:
        UserError: see `load_model`.
    """
    _fill(network, path, _read(path)[1])


def describe(path: str | Path) -> dict[str, str]:
    """What a model file is, as names and words; its arrays are not loaded into a network.

    Raises:
        UserError: see `read_info`.
    """
    info, saved = _read(path)
    plan = cnn_model.architecture(info.arch)
    size = info.input_size or plan.input_size
    code = saved.ignored_code if saved else 0
    return {
        "file": f"{path}, {Path(path).stat().st_size:,} bytes",
        "origin": info.origin,
        "architecture": info.arch,
        "embeddings": f"k = {info.num_embeddings} vectors of d = {info.embedding_size}",
        "classes": f"{len(info.class_names)}: {', '.join(info.class_names)}",
        "input": f"{size} x {size} px, {'RGB' if plan.channels == 3 else 'gray'}, scaled to "
        f"{_RANGES.get(info.scaling or plan.scaling, info.scaling or plan.scaling)}",
        "trained on": info.dataset or "not said",
        "metrics": _listed(info.metrics) or "not said",
        "written with": _listed(info.versions) or "not said",
        "code": f"{code} Lambda layers, ignored: nothing in them was run" if code else "none",
    }


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _read(path: str | Path) -> tuple[ModelInfo, SavedModel | None]:
    """The description, and for a file that `keras.Model.save` wrote what it was taken from."""
    text = None
    if not published_file.is_archive(path):
        with open_hdf5(path) as file:
            text = file.attrs.get(ATTRIBUTE)
            if text is None and not published_file.is_saved_model(file):
                raise UserError(
                    f"{path}: no description of its network (attribute {ATTRIBUTE!r}); expected a file that train.py "
                    "wrote, a published one or one of Model.save"
                )
    saved = published_file.read_saved_model(path) if text is None else None
    info = _parse(text, path) if saved is None else _info_of(saved, path)
    _check_plausible(info, path)
    return info, saved


def _parse(text: Any, path: str | Path) -> ModelInfo:
    try:
        values = json.loads(text)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format version {FORMAT_VERSION}")
        return ModelInfo(**{**values, "class_names": tuple(values["class_names"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({error})") from None


def _info_of(saved: SavedModel, path: str | Path) -> ModelInfo:
    """The seven or eight classes of a published network, or of one of ours, are the canonical ones."""
    if saved.num_classes not in (7, 8):
        raise UserError(f"{path}: expected a network of 7 or 8 classes, found {saved.num_classes}")
    return ModelInfo(
        arch=saved.arch,
        class_names=CLASS_NAMES[: saved.num_classes],
        num_embeddings=saved.num_embeddings,
        embedding_size=saved.embedding_size,
        input_size=saved.input_size,
        scaling=saved.scaling,
        logit_scale=saved.logit_scale,
        dataset=saved.dataset,
        metrics=saved.metrics,
        versions={"keras": saved.keras_version} if saved.keras_version else {},
        origin=saved.origin,
    )


def _check_plausible(info: ModelInfo, path: str | Path) -> None:
    """Refuses a description of another type or size than a network has, before anything is built from it."""
    expected = {
        "arch": isinstance(info.arch, str),
        "class_names": all(isinstance(name, str) for name in info.class_names) and len(info.class_names) >= 2,
        "num_embeddings": type(info.num_embeddings) is int and info.num_embeddings >= 1,
        "embedding_size": type(info.embedding_size) is int and info.embedding_size >= 3,
        "input_size": info.input_size is None
        or (type(info.input_size) is int and 1 <= info.input_size <= _LARGEST_INPUT),
        "scaling": info.scaling is None or info.scaling in cnn_model.SCALINGS,
        "logit_scale": type(info.logit_scale) in (int, float) and 0 < info.logit_scale < math.inf,
        "metrics": isinstance(info.metrics, dict),
        "versions": isinstance(info.versions, dict),
    }
    if wrong := [name for name, fine in expected.items() if not fine]:
        raise UserError(
            f"{path}: cannot read the description of its network ({wrong[0]} is {getattr(info, wrong[0])!r})"
        )
    classifier = 2 * info.num_embeddings * info.embedding_size * len(info.class_names)  # bytes of half precision
    if classifier > Path(path).stat().st_size:
        raise UserError(
            f"{path}: refused: it describes k = {info.num_embeddings} vectors of d = {info.embedding_size} and "
            f"{len(info.class_names)} classes, {classifier:,} bytes at least, more than the whole file"
        )


# Arrays into a network


def _fill(network: keras.Model, path: str | Path, saved: SavedModel | None) -> None:
    if saved is None:
        _fill_from_weights_file(network, path, path)
    elif saved.layers is None:
        with published_file.archive_weights(path) as unpacked:
            _fill_from_weights_file(network, unpacked, path)
    else:
        _fill_in_order(network, saved.layers, path)


def _fill_from_weights_file(network: keras.Model, weights: Path | str, path: str | Path) -> None:
    """Fills the network from Keras 3's own layout; ``path`` is what messages call the file."""
    expected = _names_in_file(network)
    with open_hdf5(weights, str(path)) as file:
        found = _datasets(file)
        shapes = {name: dataset.shape for name, dataset in found.items()}
        fits = shapes == {name: tuple(variable.shape) for name, variable in expected.items()}
        for name, variable in expected.items() if fits else ():
            variable.assign(found[name][()])
    if not fits:  # the names of another Keras, an optimiser's arrays beside them, or an error that Keras puts in words
        _fill_by_keras(network, weights, path, sum(not name.startswith("optimizer/") for name in shapes))
    for variable in network.variables:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(variable))):
            raise UserError(f"{path}: {variable.path} holds numbers that are not finite")


def _names_in_file(network: keras.Model, folder: str = "") -> dict[str, keras.Variable]:
    """Each array's name in the file that Keras 3 writes; reading by them spares `load_weights`'s search."""
    names, layers_of_class = {}, collections.Counter()
    for layer in network.layers:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        number = layers_of_class[kind]
        layers_of_class[kind] += 1
        place = f"{folder}layers/{kind}_{number}/" if number else f"{folder}layers/{kind}/"
        if isinstance(layer, keras.Model):
            names |= _names_in_file(layer, place)
        else:
            names |= {f"{place}vars/{i}": variable for i, variable in enumerate(layer.weights)}
    return names


def _fill_by_keras(network: keras.Model, weights: Path | str, path: str | Path, found: int) -> None:
    try:
        with warnings.catch_warnings():  # of what is missing: an error follows
            warnings.simplefilter("ignore", UserWarning)
            network.load_weights(weights)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(f"{path}: its arrays do not fit a {network.name} network ({reason})") from None
    if found != len(network.weights):
        raise UserError(
            f"{path}: its arrays do not fit a {network.name} network (expected {len(network.weights)}, found {found}: "
            "it has extra ones)"
        )


def _fill_in_order(network: keras.Model, layers: tuple[Layer, ...], path: str | Path) -> None:
    """Fills the network layer by layer; nothing is changed before all fit.

    Only the order of the layers, what their arrays are, and the shapes count: Keras numbers the names of
    Xception's shortcut layers by what else the process had built.
    """
    expected = _layers_of(network)
    names = [name for name, _ in expected]
    if len(expected) != len(layers):
        lost = [name for name in names if not _COUNTED.fullmatch(name) and name not in {found.name for found in layers}]
        raise UserError(
            f"{path}: its arrays do not fit a {network.name} network: expected {len(expected)} layers with arrays, "
            f"found {len(layers)}" + (f"; missing {', '.join(lost[:3])}" if lost else "")
        )
    for (name, variables), layer in zip(expected, layers, strict=True):
        shapes = {role: tuple(variable.shape) for role, variable in variables.items()}
        found = {role: array.shape for role, array in layer.arrays.items()}
        # Two layers of one shape in each other's place would load without a word.
        misplaced = layer.name != name and layer.name in names and not _COUNTED.fullmatch(layer.name)
        if misplaced or found != shapes:
            raise UserError(
                f"{path}: its arrays do not fit a {network.name} network: where {name} stands ({_words(shapes)}) the "
                f"file has {layer.name} ({_words(found)})"
            )
    for (_, variables), layer in zip(expected, layers, strict=True):
        for role, variable in variables.items():
            variable.assign(layer.arrays[role])


def _layers_of(network: keras.Model) -> list[tuple[str, dict[str, keras.Variable]]]:
    """The network's layers with arrays, backbone first: name, then what each array is to the variable."""
    backbone = network.get_layer("backbone")
    head = itertools.chain(network.get_layer("embedding_dense").weights, network.get_layer("logits").weights)
    layers: dict[str, dict[str, keras.Variable]] = {}
    for variable in itertools.chain(backbone.trainable_weights, backbone.non_trainable_weights, head):
        name, _, role = variable.path.rpartition("/")
        layers.setdefault(name, {})[role] = variable
    return list(layers.items())


def _words(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{role} {shape}" for role, shape in shapes.items())
