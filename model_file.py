"""What is in an `.h5`? Saving and loading of weights with the description that rebuilds their network.

A model file is a Keras `.weights.h5` plus one JSON attribute on the file's root. Loading rebuilds the
network from the description and reads arrays: nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import cnn_model
from errors import UserError
from files import whole_file

ATTRIBUTE = "ad_corre"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a file says of its network.

    Attributes:
        arch: see `cnn_model.build_model`, as are the next three.
        class_names: C names, in the order of the logits.
        num_embeddings: k.
        embedding_size: d.
        input_size: side in pixels that the backbone sees.
        dataset: what it was trained on, as ``fer2013/train``; empty when unknown.
        metrics: what was measured on which split, free-form and JSON-ready.
        versions: of what trained it (`runtime.versions`).
    """

    arch: str
    class_names: tuple[str, ...]
    num_embeddings: int = 7
    embedding_size: int = 256
    input_size: int | None = None
    dataset: str = ""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def save_model(path: str | Path, network: keras.Model, info: ModelInfo) -> None:
    """Writes the network's weights and description, whole or not at all.

    Args:
        path: must end with ``.weights.h5``.
        network: what `cnn_model.build_model` made from the values in ``info``.

    Raises:
        UserError: another ending.
        OSError: the disk refused.
    """
    if not str(path).endswith(".weights.h5"):
        raise UserError(f"{path}: expected a name that ends with .weights.h5")
    described = {"format_version": FORMAT_VERSION, **dataclasses.asdict(info)}
    with whole_file(path) as temporary:
        need = 2 * sum(math.prod(variable.shape) * 4 for variable in network.variables) + 1_000_000
        if shutil.disk_usage(temporary.parent).free < need:  # on a full disk HDF5 itself would crash the process
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        network.save_weights(temporary)
        with h5py.File(temporary, "r") as file:
            arrays = _arrays(file)
        # Keras's file again in HDF5's later layout, whose groups take a tenth of the space.
        with h5py.File(content := io.BytesIO(), "w", libver="latest") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs[ATTRIBUTE] = json.dumps(described)
        temporary.write_bytes(content.getbuffer())


def _arrays(file: h5py.File) -> dict[str, np.ndarray]:
    """Every array of a file by its full name."""
    arrays = {}
    file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def read_info(path: str | Path) -> ModelInfo:
    """Reads a model file's description alone.

    Raises:
        UserError: missing, no HDF5, or HDF5 without a description.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if not h5py.is_hdf5(path):
        raise UserError(
            f"{path}: expected an HDF5 weights file (.weights.h5), found {path.read_bytes()[:8]!r}... instead"
        )
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get(ATTRIBUTE)
    except OSError as error:
        raise UserError(f"{path}: the HDF5 file is damaged ({error}); get it again") from None
    if text is None:
        raise UserError(
            f"{path}: no description of its network (attribute {ATTRIBUTE!r}); expected a file that train.py wrote"
        )
    try:
        values = dict(json.loads(text))
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format version {FORMAT_VERSION}")
        for name in ("num_embeddings", "embedding_size"):
            values[name] = int(values[name])
        return ModelInfo(**{**values, "class_names": tuple(values["class_names"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({error})") from None


def load_model(path: str | Path) -> tuple[keras.Model, ModelInfo]:
    """Rebuilds a file's network and fills it.

    Returns:
        The network (`cnn_model.build_model`) and the file's description.

    Raises:
        UserError: see `read_info`; or arrays that are missing, of another shape, or not finite.
    """
    info = read_info(path)
    network = cnn_model.build_model(
        info.arch,
        num_classes=len(info.class_names),
        num_embeddings=info.num_embeddings,
        embedding_size=info.embedding_size,
        input_size=info.input_size,
    )
    load_weights(network, path)
    return network, info


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Fills a network that is there with the arrays of a model file.

    Raises:
        UserError: arrays that are missing, of another shape, or not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Keras's own words on what the error below says
            network.load_weights(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path}: its arrays do not fit a {network.name} network ({reason})") from None
    for variable in network.variables:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(variable))):
            raise UserError(f"{path}: {variable.path} holds numbers that are not finite")
