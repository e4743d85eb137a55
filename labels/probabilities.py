"""Class probabilities of a split: of model files, of a file of test.py teach, or out of fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_helper import PreparedSplit
from files import UserError
from reading.arrays import Rows
from reading.text import printable
from training import distillation
from training.left_out import folds_of, parse_fold

_IN_SAMPLE = (
    "networks that were trained on these images doubt too few of their labels, because they learnt many by heart; "
    "train.py --fold and --folds give probabilities of unseen images (docs/labels.md)"
)


def split_probabilities(
    split: PreparedSplit, weights: Sequence[str], stored: str | None, folds: bool, batch_size: int = 256
) -> np.ndarray:
    """The class probabilities of every image, float (N, C); prints where they are not those of unseen images.

    Args:
        split: the images.
        weights: model files, whose mean is taken; with ``folds`` see `out_of_fold_probabilities`.
        stored: a file of ``test.py teach`` instead.
        folds: whether each model file predicts the images that it was not trained on.
        batch_size: images per batch.

    Raises:
        UserError: no or two sources, or files that do not fit the split.
    """
    if bool(weights) == bool(stored):
        raise UserError(f"suspects: expected --weights or --probabilities, received {'both' if stored else 'none'}")
    if folds and len(weights) < 2:
        raise UserError(f"--folds: expected two or more model files after --weights, received {len(weights)}")
    if folds:
        return out_of_fold_probabilities(weights, split, batch_size)
    if split.meta["split"] == "train":
        print(f"note: {_IN_SAMPLE}")
    if stored:
        return distillation.stored_probabilities(stored, split)
    return distillation.mean_probabilities(weights, split, batch_size)


def out_of_fold_probabilities(weights: Sequence[str], split: PreparedSplit, batch_size: int = 256) -> np.ndarray:
    """Each image's calibrated probabilities by the network that ``train.py --fold`` trained without its fold.

    Args:
        weights: the model files of ``--fold 1/N`` to ``--fold N/N``, in any order; a line is printed for each.
        split: the images that they were trained on.
        batch_size: images per batch.

    Returns:
        float32 (N, C), each the mean over an image and its mirror image.

    Raises:
        UserError: a file that was trained on other data or without ``--fold``, or a fold that is missing or is there
            twice.
    """
    import evaluation
    from model_files import model_file

    folds = folds_of(split, len(weights))
    found: dict[int, np.ndarray] = {}
    probabilities = np.empty((len(split), split.num_classes), np.float32)
    for path in weights:
        network, info = model_file.load_model(path)
        evaluation.check_classes(network, split, info.network.class_names)
        stored = str(info.metrics.get("fold"))
        expected = f"a model of train.py --fold I/{len(weights)} on {split.name} (one of each fold)"
        if info.dataset != split.name or stored == "None":
            raise UserError(f"{path}: expected {expected}, found one of {info.dataset or 'unknown data'}, no fold")
        number, total = parse_fold(stored)
        if total != len(weights) or number in found:
            raise UserError(f"{path}: expected {expected}, found fold {stored}{' again' if number in found else ''}")
        found[number] = rows = np.flatnonzero(folds == number)
        if len(rows):
            part = _Part(split.rows, rows)
            probabilities[rows] = evaluation.predict(network, part, batch_size, views="flip")[0]
        print(f"{printable(path)}: predicted the {len(rows):,} images of fold {stored}", flush=True)
    return probabilities


class _Part:
    """Some rows of images, read as they are asked for."""

    def __init__(self, images: np.ndarray | Rows, rows: np.ndarray):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._images[self._rows[index]]
