"""Finds the labels that another prepared data set has for the same images."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from data_helper import PreparedSplit, open_split, prepared_splits
from files import UserError
from reading.image_digests import image_digests

_NONE = -1


@dataclasses.dataclass(frozen=True)
class SecondLabels:
    """The labels of another data set for the images of a split.

    Attributes:
        dataset: the other data set.
        labels: int64 (N,), codes of the split's classes; -1 where the other data set has no label to use.
        left_out: why images have none: the reason to their number.
    """

    dataset: str
    labels: np.ndarray
    left_out: dict[str, int]

    @property
    def usable(self) -> np.ndarray:
        """The images that have a second label, bool (N,)."""
        return self.labels != _NONE

    @property
    def digest(self) -> str:
        """The SHA-256 of the labels, 64 hexadecimal digits."""
        return hashlib.sha256(self.labels.tobytes()).hexdigest()


def find_second_labels(data_dir: str, dataset: str, split: PreparedSplit) -> SecondLabels:
    """The labels that any prepared split of another data set has for the images of ``split``.

    Two images are the same when their pixels are (`image_digests.image_digest`); the names of the splits and the order
    of the rows do not matter. Classes are matched by their names. An image has no second label where the other data
    set does not have it, has it with two labels, or has it with a class that the split lacks.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: the other data set.
        split: the images.

    Raises:
        UserError: the data set is the split's own or not prepared, or no image is left to compare.
    """
    if dataset == split.meta["dataset"]:
        raise UserError(f"--also {dataset}: expected another data set than --dataset, received the same")
    names = [name for other, name in prepared_splits(data_dir) if other == dataset]
    others = [open_split(data_dir, dataset, name) for name in names or ["train"]]  # raises where nothing is prepared
    found = _labels_by_image(others)
    codes = {name: code for code, name in enumerate(split.class_names)}
    labels = np.full(len(split), _NONE, np.int64)
    reasons: collections.Counter[str] = collections.Counter()
    for row, image in enumerate(image_digests(split.rows, split.name)):
        given = found.get(image, frozenset())
        name = next(iter(given), "")
        if len(given) == 1 and name in codes:
            labels[row] = codes[name]
        elif len(given) == 1:
            reasons[f"{name} in {dataset}, which is no class of {split.meta['dataset']}"] += 1
        else:
            reasons[f"with two labels in {dataset}" if given else f"not in {dataset}"] += 1
    second = SecondLabels(dataset, labels, dict(sorted(reasons.items())))
    if not second.usable.any():
        raise UserError(
            f"--also {dataset}: expected images of {split.name} among its {sum(map(len, others)):,}, found none with "
            "the same pixels and a class of the same name; prepare both from the same files (FER-2013's folder form "
            "is JPEG, so its pixels are not those of fer2013.csv)"
        )
    return second


def _labels_by_image(splits: Sequence[PreparedSplit]) -> dict[str, frozenset[str]]:
    """The digest of each image to the names of its labels, more than one where copies differ."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for split in splits:
        for image, label in zip(image_digests(split.rows, split.name), split.labels.tolist(), strict=True):
            found[image].add(split.class_names[label])
    return {image: frozenset(names) for image, names in found.items()}
