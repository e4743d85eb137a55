"""Distillation (Hinton et al. 2015): a teacher's probabilities of the training images, blended into the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_helper import PreparedSplit
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError, whole_file
from reading.arrays import read_npz
from reading.text import printable

_ARRAYS = {"probabilities": ("f", 2), "digest": ("U", 0), "class_names": ("U", 1)}


def write_teacher(path: str, weights: Sequence[str], split: PreparedSplit, batch_size: int = 256) -> None:
    """Writes the calibrated probabilities of the teachers, each the mean over an image and its mirror image.

    The .npz file holds ``probabilities`` float32 (N, C), their mean, in the split's order, ``digest`` (of the split)
    and ``class_names`` (C,).

    Args:
        path: the file to write (.npz).
        weights: the teachers' model files.
        split: the images.
        batch_size: images per batch.

    Raises:
        UserError: no teachers, another ending than .npz, other classes, or a file that cannot be read.
    """
    if not weights:
        raise UserError("--weights: expected one or more model files, received none")
    if not path.endswith(".npz"):
        raise UserError(f"--output {path}: expected a name that ends with .npz")
    split.verify()
    mean = mean_probabilities(weights, split, batch_size)
    with whole_file(path) as temporary:
        np.savez_compressed(
            temporary,
            probabilities=mean.astype(np.float32),
            digest=np.array(split.digest),
            class_names=np.array(split.class_names),
        )
    right = np.mean(mean.argmax(axis=1) == split.labels)
    print(f"wrote {path}: the label is the likeliest class of {right:.2%} of {split.name}")


def mean_probabilities(weights: Sequence[str], split: PreparedSplit, batch_size: int = 256) -> np.ndarray:
    """The mean of the models' calibrated probabilities, each the mean over an image and its mirror image.

    Args:
        weights: one or more model files; a line is printed for each.
        split: the images.
        batch_size: images per batch.

    Returns:
        float64 (N, C).

    Raises:
        UserError: other classes, or a file that cannot be read.
    """
    mean = np.zeros((len(split), split.num_classes))
    for each in weights:
        mean += _predicted(each, split, batch_size, GROUP_OF_ONE) / len(weights)
        print(f"{printable(each)}: predicted {len(split):,} images", flush=True)
    return mean


def blended_targets(
    train: PreparedSplit, teacher: str, share: float, soft_labels: bool, group: ProcessGroup = GROUP_OF_ONE
) -> PreparedSplit:
    """The split with targets that blend its labels (or votes) with a teacher's probabilities.

    `target = (1 - share) known + share predicted`, float32 (N, C).

    Args:
        train: the split.
        teacher: a model file, whose calibrated probabilities are the mean over an image and its mirror image, or a
            file of `write_teacher`.
        share: of the teacher, 0..1.
        soft_labels: whether the votes are what is known, instead of the labels.
        group: the processes that share the images.

    Raises:
        UserError: a teacher of other classes or of other images.
    """
    is_stored = str(teacher).endswith(".npz")
    predicted = stored_probabilities(teacher, train) if is_stored else _predicted(teacher, train, 256, group)
    known = train.votes if soft_labels else np.eye(train.num_classes, dtype=np.float32)[train.labels]
    return dataclasses.replace(train, votes=(1 - np.float32(share)) * known + np.float32(share) * predicted)


def _predicted(teacher: str, split: PreparedSplit, batch_size: int, group: ProcessGroup) -> np.ndarray:
    import evaluation
    from model_files import model_file

    network, info = model_file.load_model(teacher)
    _check_classes(teacher, info.network.class_names, split)
    return evaluation.predict(network, split.rows, batch_size, views="flip", group=group)[0]


def stored_probabilities(path: str | Path, split: PreparedSplit) -> np.ndarray:
    """The probabilities that `write_teacher` wrote, float32 (N, C).

    Raises:
        UserError: no such file, or one of other classes or images.
    """
    found = read_npz(path, _ARRAYS)
    _check_classes(path, found["class_names"].tolist(), split)
    probabilities = found["probabilities"].astype(np.float32)
    if str(found["digest"]) != split.digest or probabilities.shape != (len(split), split.num_classes):
        raise UserError(
            f"{path}: expected probabilities of {split.name} as it is prepared here, found those of other images; "
            "make them again with test.py teach"
        )
    if (probabilities < 0).any() or abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise UserError(f"{path}: expected probabilities that sum to 1, found others; make them again")
    return probabilities


def _check_classes(teacher: str | Path, found: list[str] | tuple[str, ...], split: PreparedSplit) -> None:
    if tuple(found) != tuple(split.class_names):
        raise UserError(
            f"{teacher}: expected a teacher of the classes {', '.join(split.class_names)}, found one of "
            f"{', '.join(found)}"
        )
