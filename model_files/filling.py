"""Puts a file's arrays into a network, after a comparison of all shapes."""

from __future__ import annotations

import itertools
import re
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import keras
import numpy as np

import cnn_model
from files import UserError
from model_files.description import NetworkDescription
from model_files.published_file import Layer
from model_files.safe_hdf5 import write_arrays

_LONGEST_REASON = 400  # Keras lists every layer that it could not fill
# Names that Keras makes from a counter, which do not identify a layer.
_COUNTED = re.compile(r"(?:\w+_)?(?:conv2d|normalization|dense)(?:_\d+)?")
_USUAL_WIDTH = 16_384  # k * d up to which a head takes little memory on any backbone; the default is 1,792

Shape = tuple[int, ...]


def check_head(network: NetworkDescription, shapes: Collection[Shape], path: str | Path) -> None:
    """Compares the two kernels whose size the description decides, before a network is built from it.

    Args:
        network: the description, with its input size.
        shapes: those of the file's arrays.
        path: what messages call the file.

    Raises:
        UserError: no array of such a shape.
    """
    width = network.num_embeddings * network.embedding_size
    if width > _USUAL_WIDTH:  # a file could hold one short row; so the backbone alone gives the number of rows
        features = cnn_model.architecture(network.arch).build(network.input_size, None).output_shape[-1]
        there = (features, width) in shapes
    else:
        features = "F"
        there = any(len(shape) == 2 and shape[1] == width for shape in shapes)
    if not there or (width, len(network.class_names)) not in shapes:
        raise UserError(
            f"{path}: its arrays do not fit a {network.arch} network of k = {network.num_embeddings}, d = "
            f"{network.embedding_size} and {len(network.class_names)} classes: expected kernels ({features}, {width}) "
            f"and ({width}, {len(network.class_names)}), at least one of which it does not hold"
        )


def fill(network: keras.Model, arrays: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Fills the network with arrays by their names in Keras 3's own layout.

    Args:
        network: the network.
        arrays: numbers of any precision; they become that of the network.
        path: what messages call the file.

    Raises:
        UserError: arrays that are missing, extra, of another shape, or not finite.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about missing arrays: an error follows
        # Keras knows the names and reads files only. This one holds what was looked through, and nothing else.
        write_arrays(Path(folder) / "checked.weights.h5", arrays)
        try:
            network.load_weights(Path(folder) / "checked.weights.h5")
        except (ValueError, LookupError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise UserError(f"{path}: its arrays do not fit a {network.name} network ({reason})") from None
    if len(arrays) != len(network.weights):
        raise UserError(
            f"{path}: its arrays do not fit a {network.name} network (expected {len(network.weights)}, found "
            f"{len(arrays)}: it has extra ones)"
        )
    for variable in network.variables:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(variable))):
            raise UserError(f"{path}: {variable.path} holds numbers that are not finite")


def fill_in_order(network: keras.Model, layers: tuple[Layer, ...], path: str | Path) -> None:
    """Fills the network layer by layer; nothing is changed before all fit.

    Only the order of the layers, the roles of their arrays and the shapes count: Keras numbers the names of
    Xception's shortcut layers by what else the process had built.

    Raises:
        UserError: layers or arrays that are missing, extra or of another shape.
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


def _words(shapes: dict[str, Shape]) -> str:
    return ", ".join(f"{role} {shape}" for role, shape in shapes.items())
