"""``test.py evaluate`` of several model files or data sets: opens them, measures every pair, writes the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

import evaluation
from data_helper import open_split
from files import UserError, sha256
from measuring import matrix
from measuring.matrix import Model
from measuring.views import Views
from model_files import hub, model_file


class MatrixOptions(Protocol):
    """The options that are used here; those of `test.EvaluateCommand`."""

    weights: Sequence[str]
    data_dir: str
    split: str
    run_dir: str | None
    batch_size: int
    seed: int


def measure_matrix(options: MatrixOptions, names: Sequence[str], views: Views) -> dict[str, Any]:
    """Measures every model file on every data set, writes and prints the matrix.

    Args:
        options: of the command.
        names: the data sets.
        views: see `evaluation.predict`.

    Returns:
        What ``matrix.json`` holds: `matrix.measure`, and ``commit`` (`evaluation.commit`).

    Raises:
        UserError: the same data set or the same model file twice, data that is not prepared, a folder of a training
            run; or see `matrix.measure` and `model_file.load_model`.
    """
    if len(set(names)) < len(names):
        raise UserError(f"--dataset: expected every data set once, received {', '.join(names)}")
    splits = [open_split(options.data_dir, name, options.split) for name in names]
    models = open_models(options.weights, options.batch_size, views)
    folder = options.run_dir or matrix.default_folder(models, splits, options.split, views, options.seed)
    evaluation.check_free(folder)
    result = {**matrix.measure(models, splits, views, options.seed), "commit": evaluation.commit()}
    matrix.write(result, folder)
    print(matrix.format_table(result))
    print(f"\nwrote {folder}/")
    return result


def open_models(weights: Sequence[str], batch_size: int, views: Views) -> list[Model]:
    """Reads the descriptions of model files; their networks are built later, one at a time.

    Raises:
        UserError: the same file twice, under one name or two; or see `model_file.read_info`.
    """
    models, seen = [], {}
    for path in weights:
        info = model_file.read_info(path)
        digest = sha256(hub.local_file(path))
        if digest in seen:
            what = f"{path} twice" if seen[digest] == path else f"the same bytes in {seen[digest]} and {path}"
            raise UserError(f"--weights: expected every model once, received {what}")
        seen[digest] = path
        load = partial(_load, path, batch_size, views)
        models.append(Model(path, digest, info.network.class_names, info.dataset, info.metrics.get("split"), load))
    return models


def _load(path: str, batch_size: int, views: Views) -> Callable[[Any], np.ndarray]:
    network, _ = model_file.load_model(path)
    return lambda images: evaluation.predict(network, images, batch_size, views)[0]
