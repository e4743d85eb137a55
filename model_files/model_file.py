"""Saves and loads model files: weights with the description that rebuilds their network.

Our file is a Keras `.weights.h5` plus one JSON attribute on the file's root, behind a block with its digest
(`safe_hdf5`). Files of `keras.Model.save` load too: the published Keras 2 files, and our own networks
(`published_file`). Loading rebuilds the network from the description and reads arrays: nothing in a file is executed
or unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import cnn_model
from command_line import option
from config import ModelConfig
from files import UserError, whole_file
from measuring.calibration import Calibration
from model_files import filling, hub, published_file
from model_files.description import ATTRIBUTE, ModelInfo, NetworkDescription, from_json, to_json
from model_files.published_file import OPTIMIZERS, SavedModel
from model_files.safe_hdf5 import read_arrays, to_bytes


def save_model(path: str | Path, network: keras.Model, info: ModelInfo, half: bool = False) -> None:
    """Writes the network's weights and description, whole or not at all.

    Args:
        path: must end with ``.weights.h5``.
        network: what `build_network` made from ``info.network``.
        half: kernels in float16, in half the space. Vectors (biases, batch-norm statistics) keep float32: they are a
            hundredth of the file, and a variance may lie outside the range of float16.

    Raises:
        UserError: another ending; or numbers in a kernel beyond the range of float16.
        OSError: the disk refused.
    """
    check_target(path)
    described = to_json(info)
    with whole_file(path) as temporary:
        need = 2 * sum(math.prod(variable.shape) * 4 for variable in network.variables) + 1_000_000
        if shutil.disk_usage(temporary.parent).free < need:  # on a full disk HDF5 itself would crash the process
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        network.save_weights(temporary)
        arrays: dict[str, np.ndarray] = {}
        with h5py.File(temporary, "r") as file:
            file.visititems(lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "dtype") else None)
        arrays = {name: _halved(array, name) for name, array in arrays.items()} if half else arrays
        temporary.write_bytes(to_bytes(arrays, {ATTRIBUTE: described}))


def _halved(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim < 2:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.all(np.isfinite(half)):
        raise UserError(
            f"--half: expected numbers up to {np.finfo(np.float16).max:,.0f} in {name}, the range of half precision, "
            f"received {np.abs(array).max():,.0f}; write the file without it"
        )
    return half


def check_target(path: str | Path) -> None:
    """Refuses a name that Keras would not write weights to."""
    if not str(path).endswith(".weights.h5"):
        raise UserError(f"{path}: expected a name that ends with .weights.h5")


def read_info(path: str | Path) -> ModelInfo:
    """Reads a model file's description alone.

    Raises:
        UserError: missing, of another format, damaged, not safe to read (`safe_hdf5.read_arrays`), or without arrays
            of the sizes that the description needs.
    """
    return _read(path).info


def build_network(described: NetworkDescription, weights: str | None = None, dropout: float = 0.5) -> keras.Model:
    """Builds the network of a description (`cnn_model.build_model`, with the last two arguments of its own)."""
    return cnn_model.build_model(**described.arguments(), weights=weights, dropout=dropout)


def load_model(path: str | Path, calibrated: bool = True) -> tuple[keras.Model, ModelInfo]:
    """Rebuilds a file's network and fills it.

    Args:
        path: the model file.
        calibrated: False leaves the file's calibration out: the logits are those of the training.

    Returns:
        The network (`cnn_model.build_model`) and the file's description.

    Raises:
        UserError: see `read_info`; or arrays that are missing, extra, of another shape, or not finite.
    """
    found = _read(path)
    described = found.info.network
    network = build_network(described if calibrated else uncalibrated(described))
    _fill(network, found)
    return network, found.info


def redescribe(path: str | Path, info: ModelInfo) -> None:
    """Replaces the description in a file of `save_model`, whole or not at all; the arrays stay as they are, bit by bit.

    Raises:
        UserError: a file that `save_model` did not write, or one that cannot be read (`read_info`).
        OSError: the disk refused.
    """
    content = None if published_file.is_archive(path) else read_arrays(path)
    if content is None or ATTRIBUTE not in content.attributes:
        raise UserError(f"{path}: expected a file in our own form; write one with: python test.py convert")
    with whole_file(path) as temporary:
        temporary.write_bytes(to_bytes(content.arrays, {ATTRIBUTE: to_json(info)}))


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
    found = _read(weights)
    wanted = _started_from(found.info.network, wanted, shared, weights)
    network = build_network(wanted, dropout=options.dropout)
    _fill(network, found)
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
    size = wanted.input_size or found.input_size
    # The calibration belongs to the weights of before. The training needs plain logits, and is calibrated at its end.
    return uncalibrated(dataclasses.replace(found, class_names=wanted.class_names, input_size=size))


def uncalibrated(network: NetworkDescription) -> NetworkDescription:
    """The description without its calibration."""
    return dataclasses.replace(network, **dataclasses.asdict(Calibration()))


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Fills an existing network with the arrays of a model file.

    Raises:
        UserError: see `load_model`.
    """
    _fill(network, _read(path))


def describe(path: str | Path) -> dict[str, str]:
    """The facts of a model file, name to text; its arrays are not loaded into a network.

    Raises:
        UserError: see `read_info`.
    """
    found = _read(path)
    info, network, code = found.info, found.info.network, found.ignored_code
    path = hub.local_file(path)
    colour = "RGB" if cnn_model.architecture(network.arch).channels == 3 else "gray"
    return {
        "file": f"{path}, {Path(path).stat().st_size:,} bytes",
        "origin": info.origin,
        "architecture": network.arch,
        "embeddings": f"k = {network.num_embeddings} vectors of d = {network.embedding_size}",
        "classes": f"{len(network.class_names)}: {', '.join(network.class_names)}",
        "input": f"{network.input_size} x {network.input_size} px, {colour}, scaled to "
        f"{cnn_model.SCALINGS[network.scaling][0]}",
        "precision": _precision(found),
        "trained on": info.dataset or "unknown",
        "calibration": f"temperature {network.temperature:.4g}, exponent {network.exponent:.4g}, fitted on "
        f"{info.calibrated_on}"
        if info.calibrated_on
        else "none",
        "metrics": _listed(info.metrics) or "unknown",
        "written with": _listed(info.versions) or "unknown",
        "code": f"{code} Lambda layers, ignored: nothing in them was run" if code else "none",
    }


def _precision(saved: SavedModel) -> str:
    kernels = {str(array.dtype) for array in saved.all_arrays() if array.ndim > 1}
    return "half: kernels float16" if kernels == {"float16"} else ", ".join(sorted(kernels))


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _read(path: str | Path) -> SavedModel:
    """The file's description and arrays, whoever wrote it."""
    path = hub.local_file(path)
    if published_file.is_archive(path):
        saved = published_file.read_archive(path)
    else:
        content = read_arrays(path, without=OPTIMIZERS)
        if (text := content.attributes.get(ATTRIBUTE)) is not None:
            saved = SavedModel(from_json(ModelInfo, text, path), arrays=content.arrays)
        elif published_file.is_saved_model(content):
            saved = published_file.saved_model(content, path)
        else:
            raise UserError(
                f"{path}: no description of its network (attribute {ATTRIBUTE!r}); expected a file that train.py "
                "wrote, a published one or one of Model.save"
            )
    try:
        saved.info.network.check()
        network = _complete(saved.info.network)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({error})") from None
    if network.smallest_size() > Path(path).stat().st_size:  # before anything is built from it
        raise UserError(
            f"{path}: refused: it describes k = {network.num_embeddings} vectors of d = {network.embedding_size} and "
            f"{len(network.class_names)} classes, {network.smallest_size():,} bytes at least, more than the whole file"
        )
    filling.check_head(network, {array.shape for array in saved.all_arrays()}, path)
    return dataclasses.replace(saved, path=path, info=dataclasses.replace(saved.info, network=network))


def _fill(network: keras.Model, saved: SavedModel) -> None:
    if saved.layers is None:
        filling.fill(network, saved.arrays, saved.path)
    else:
        filling.fill_in_order(network, saved.layers, saved.path)


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
