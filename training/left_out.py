"""Rows of the training split that a training leaves out: those of a list, or those of one fold of several."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data_helper import PreparedSplit
from files import UserError
from reading.image_digests import image_digests
from reading.label_lists import read_list
from reading.text import quoted

_MOST_FOLDS = 100


def kept_rows(train: PreparedSplit, without: str | None, fold: str | None) -> np.ndarray | None:
    """The rows of the training split that take part, int64 (M,), increasing; None when all do. Prints how many do not.

    Args:
        train: the training split.
        without: a list of labels (`label_lists`) whose rows are left out.
        fold: ``I/N``, which leaves out fold I of N (`folds_of`).

    Raises:
        UserError: a list of another split, no such fold, or no image is left.
    """
    if not without and not fold:
        return None
    kept = np.ones(len(train), bool)
    if without:
        kept[listed_rows(without, train)] = False
    if fold:
        number, folds = parse_fold(fold)
        kept &= folds_of(train, folds) != number
    if not kept.any():
        raise UserError(f"{train.name}: no image is left without those of --without and --fold; leave out fewer")
    print(f"{train.name}: {np.sum(~kept):,} of {len(train):,} images are left out of the training")
    return np.flatnonzero(kept)


def listed_rows(path: str, split: PreparedSplit) -> np.ndarray:
    """The rows of a list, int64 (M,), each checked against the image and the label in that row of the split.

    Raises:
        UserError: see `label_lists.read_list`; a row that the split does not have, or whose image or label is another.
    """
    listed = read_list(path)
    rows = [line.row for line in listed]
    if max(rows) >= len(split):
        raise UserError(
            f"{path}: names row {max(rows):,}, but {split.name} has {len(split):,} images; {_remedy(split)}"
        )
    found = image_digests(split.rows, split.name, rows)
    for line, image in zip(listed, found, strict=True):
        label = split.class_names[split.labels[line.row]]
        if (line.image, line.label) != (image, label):
            raise UserError(
                f"{path}: row {line.row} is image {quoted(line.image)} with the label {quoted(line.label)}, but in "
                f"{split.name} it is {quoted(image)} with the label {quoted(label)}; {_remedy(split)}"
            )
    return np.array(rows, np.int64)


def _remedy(split: PreparedSplit) -> str:
    return f"make the list again on {split.name} as it is prepared here"


def parse_fold(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers, 1 <= I <= N.

    Raises:
        UserError: another form, or numbers outside 1 <= I <= N and 2 <= N <= 100.
    """
    found = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text, re.ASCII)
    number, folds = map(int, found.groups()) if found else (0, 0)
    if not (2 <= folds <= _MOST_FOLDS and 1 <= number <= folds):
        raise UserError(
            f"--fold: expected I/N with 1 <= I <= N and N from 2 to {_MOST_FOLDS}, as 1/5, received {text!r}"
        )
    return number, folds


def folds_of(split: PreparedSplit, folds: int) -> np.ndarray:
    """The fold of each image, int64 (N,), 1..folds: its digest modulo the number of folds.

    The pixels alone decide it, so that exact copies of an image are in one fold, whatever their labels are: a copy in
    another fold would teach the network the answer.
    """
    return _fold_of_digests(image_digests(split.rows, split.name), folds)


def _fold_of_digests(digests: Sequence[str], folds: int) -> np.ndarray:
    return np.array([int(digest, 16) % folds + 1 for digest in digests], np.int64)
