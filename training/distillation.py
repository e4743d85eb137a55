"""Distillation (Hinton et al. 2015): a teacher's probabilities of the training images, blended into the targets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np

from command_line import Range
from config import Backend, DatasetName
from data_helper import PreparedSplit, Split, open_split
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError, whole_file
from reading.arrays import read_npz

_ARRAYS = {"probabilities": ("f", 2), "digest": ("U", 0), "class_names": ("U", 1)}


@dataclasses.dataclass(frozen=True)
class TeachConfig:
    """Writes the mean probabilities of one or more models on a split, as a file for train.py --teacher."""

    weights: tuple[str, ...]
    """Model files of the teachers, as for evaluate."""
    output: str = "teacher.npz"
    """File to write (.npz)."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set that the student will train on."""
    split: Split = "train"
    """Its split."""
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 256
    """Images per batch; the result depends on it by rounding only."""
    backend: Backend = "tensorflow"
    """What Keras computes with; the results are the same to rounding."""
    debug: bool = False
    """Show tracebacks."""


def teach(settings: TeachConfig) -> None:
    """Writes the calibrated probabilities of the teachers, each the mean over an image and its mirror image.

    The .npz file holds ``probabilities`` float32 (N, C), in the split's order, ``digest`` (of the split) and
    ``class_names`` (C,).

    Raises:
        UserError: no teachers, another ending than .npz, other classes, or a file that cannot be read.
    """
    if not settings.weights:
        raise UserError("--weights: expected one or more model files, received none")
    if not settings.output.endswith(".npz"):
        raise UserError(f"--output {settings.output}: expected a name that ends with .npz")
    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    split.verify()
    mean = np.zeros((len(split), split.num_classes))
    for weights in settings.weights:
        mean += _predicted(weights, split, settings.batch_size, GROUP_OF_ONE) / len(settings.weights)
        print(f"{weights}: predicted {len(split):,} images", flush=True)
    with whole_file(settings.output) as temporary:
        np.savez_compressed(
            temporary,
            probabilities=mean.astype(np.float32),
            digest=np.array(split.digest),
            class_names=np.array(split.class_names),
        )
    right = np.mean(mean.argmax(axis=1) == split.labels)
    print(f"wrote {settings.output}: the label is the likeliest class of {right:.2%} of {split.name}")


def blended_targets(
    train: PreparedSplit, teacher: str, share: float, soft_labels: bool, group: ProcessGroup = GROUP_OF_ONE
) -> PreparedSplit:
    """The split with targets that blend its labels (or votes) with a teacher's probabilities.

    `target = (1 - share) known + share predicted`, float32 (N, C).

    Args:
        train: the split.
        teacher: a model file, whose calibrated probabilities are the mean over an image and its mirror image, or a
            file of `teach`.
        share: of the teacher, 0..1.
        soft_labels: whether the votes are what is known, instead of the labels.
        group: the processes that share the images.

    Raises:
        UserError: a teacher of other classes or of other images.
    """
    is_stored = str(teacher).endswith(".npz")
    predicted = _stored(teacher, train) if is_stored else _predicted(teacher, train, 256, group)
    known = train.votes if soft_labels else np.eye(train.num_classes, dtype=np.float32)[train.labels]
    return dataclasses.replace(train, votes=(1 - np.float32(share)) * known + np.float32(share) * predicted)


def _predicted(teacher: str, split: PreparedSplit, batch_size: int, group: ProcessGroup) -> np.ndarray:
    import evaluation
    from model_files import model_file

    network, info = model_file.load_model(teacher)
    _check_classes(teacher, info.network.class_names, split)
    return evaluation.predict(network, split.rows, batch_size, views="flip", group=group)[0]


def _stored(path: str | Path, split: PreparedSplit) -> np.ndarray:
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
