"""Saves and loads model files: weights with the description that rebuilds their network.

Our file is a Keras `.weights.h5` plus one JSON attribute on the file's root. Files of `keras.Model.save` load too:
the published Keras 2 files, and our own networks (`published_file`). Loading rebuilds the network from the
description and reads arrays: nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
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
from command_line import option
from config import ModelConfig
from files import UserError, whole_file
from model_files import hub, published_file
from model_files.description import ATTRIBUTE, ModelInfo, NetworkDescription, from_json, to_json
from model_files.published_file import Layer, SavedModel
from model_files.safe_hdf5 import open_hdf5

_LONGEST_REASON = 400  # Keras lists every layer that it could not fill
# Names that Keras makes from a counter, which do not identify a layer.
_COUNTED = re.compile(r"(?:\w+_)?(?:conv2d|normalization|dense)(?:_\d+)?")


def save_model(path: str | Path, network: keras.Model, info: ModelInfo) -> None:
    """Writes the network's weights and description, whole or not at all.

    Args:
        path: must end with ``.weights.h5``.
        network: what `build_network` made from ``info.network``.

    Raises:
        UserError: another ending.
        OSError: the disk refused.
    """
    check_target(path)
    described = to_json(info)
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
            file.attrs[ATTRIBUTE] = described
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
    return _read(hub.local_file(path))[0]


def build_network(described: NetworkDescription, weights: str | None = None, dropout: float = 0.5) -> keras.Model:
    """Builds the network of a description (`cnn_model.build_model`, with the last two arguments of its own)."""
    return cnn_model.build_model(**described.arguments(), weights=weights, dropout=dropout)


def load_model(path: str | Path) -> tuple[keras.Model, ModelInfo]:
    """Rebuilds a file's network and fills it.

    Returns:
        The network (`cnn_model.build_model`) and the file's description.

    Raises:
        UserError: see `read_info`; or arrays that are missing, extra, of another shape, or not finite.
    """
    path = hub.local_file(path)
    info, saved = _read(path)
    network = build_network(info.network)
    _fill(network, path, saved)
    return network, info


def new_network(
    options: ModelConfig, class_names: tuple[str, ...], weights: str | Path | None = None
) -> tuple[keras.Model, NetworkDescription]:
    """Builds the network that a run trains.

    Args:
        options: the network's options.
        class_names: C names, in the order of the logits.
        weights: a model file to start from. It decides the input's range, and its side where ``options`` leave that
            open.

    Returns:
        The network and its description, with input size and range filled in.

    Raises:
        UserError: see `cnn_model.build_model` and `load_model`; or a file of another network than ``options`` want.
    """
    shared = {field.name for field in dataclasses.fields(options)} & {*NetworkDescription.__dataclass_fields__}
    wanted = NetworkDescription(class_names=class_names, **{name: getattr(options, name) for name in shared})
    if weights is None:
        network = build_network(wanted, None if options.pretrained == "none" else options.pretrained, options.dropout)
        return network, _complete(wanted)
    wanted = _started_from(read_info(weights).network, wanted, shared, weights)
    network = build_network(wanted, dropout=options.dropout)
    load_weights(network, weights)
    return network, wanted


def _started_from(
    found: NetworkDescription, wanted: NetworkDescription, options: set[str], path: str | Path
) -> NetworkDescription:
    """The network of a file to start from, which must be the one wanted. Its input's side alone may change."""
    for name in sorted(options - {"input_size"}):
        want, has = getattr(wanted, name), getattr(found, name)
        if want is not None and want != has:
            raise UserError(f"{path}: expected {option(name)} {want}, found {has}; use {option(name)} {has}")
    if len(found.class_names) != len(wanted.class_names):
        raise UserError(
            f"{path}: expected a network of {len(wanted.class_names)} classes, as the data set has "
            f"({', '.join(wanted.class_names)}), found one of {len(found.class_names)}"
        )
    return dataclasses.replace(found, class_names=wanted.class_names, input_size=wanted.input_size or found.input_size)


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Fills an existing network with the arrays of a model file.

    Raises:
        UserError: see `load_model`.
    """
    path = hub.local_file(path)
    _fill(network, path, _read(path)[1])


def describe(path: str | Path) -> dict[str, str]:
    """The facts of a model file, name to text; its arrays are not loaded into a network.

    Raises:
        UserError: see `read_info`.
    """
    path = hub.local_file(path)
    info, saved = _read(path)
    network = info.network
    code = saved.ignored_code if saved else 0
    colour = "RGB" if cnn_model.architecture(network.arch).channels == 3 else "gray"
    return {
        "file": f"{path}, {Path(path).stat().st_size:,} bytes",
        "origin": info.origin,
        "architecture": network.arch,
        "embeddings": f"k = {network.num_embeddings} vectors of d = {network.embedding_size}",
        "classes": f"{len(network.class_names)}: {', '.join(network.class_names)}",
        "input": f"{network.input_size} x {network.input_size} px, {colour}, scaled to "
        f"{cnn_model.SCALINGS[network.scaling][0]}",
        "trained on": info.dataset or "unknown",
        "metrics": _listed(info.metrics) or "unknown",
        "written with": _listed(info.versions) or "unknown",
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
    info = from_json(ModelInfo, text, path) if saved is None else saved.info
    try:
        info.network.check()
        network = _complete(info.network)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({error})") from None
    if network.smallest_size() > Path(path).stat().st_size:  # before anything is built from it
        raise UserError(
            f"{path}: refused: it describes k = {network.num_embeddings} vectors of d = {network.embedding_size} and "
            f"{len(network.class_names)} classes, {network.smallest_size():,} bytes at least, more than the whole file"
        )
    return dataclasses.replace(info, network=network), saved


def _complete(network: NetworkDescription) -> NetworkDescription:
    """The description with the architecture's own input size and range where it leaves them open.

    Raises:
        UserError: an unknown architecture or range.
    """
    plan = cnn_model.architecture(network.arch)
    scaling = network.scaling or plan.scaling
    if scaling not in cnn_model.SCALINGS:
        raise UserError(f"scaling: expected one of {', '.join(cnn_model.SCALINGS)}, received {scaling!r}")
    return dataclasses.replace(network, input_size=network.input_size or plan.input_size, scaling=scaling)


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
    with open_hdf5(weights, str(path)) as file:
        # The file may also hold an optimiser's arrays.
        found = sum(not name.startswith("optimizer/") for name in _datasets(file))
    try:
        with warnings.catch_warnings():  # about missing arrays: an error follows
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
    for variable in network.variables:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(variable))):
            raise UserError(f"{path}: {variable.path} holds numbers that are not finite")


def _fill_in_order(network: keras.Model, layers: tuple[Layer, ...], path: str | Path) -> None:
    """Fills the network layer by layer; nothing is changed before all fit.

    Only the order of the layers, the roles of their arrays and the shapes count: Keras numbers the names of
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
        # Two layers of one shape in each other's place would load unnoticed.
        misplaced = layer.name != name and layer.name in names and not _COUNTED.fullmatch(layer.name)
        if misplaced or found != shapes:
            raise UserError(
                f"{path}: its arrays do not fit a {network.name} network: in place of {name} ({_words(shapes)}) the "
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
