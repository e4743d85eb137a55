"""Prepared data: what is on disk and how it is opened; no Keras.

A prepared split is the folder ``<data_dir>/<dataset>/<split>`` with ``images.npy`` (uint8 (N, H, W, C), C 1 gray
or 3 RGB), ``labels.npy`` (int64 (N,)), ``meta.json`` and, where several people labelled each image, ``votes.npy``
(float32 (N, classes), how their votes are distributed). `datasets` has the readers that write it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from files import UserError, read_json

FORMAT_VERSION = 1
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_dir(data_dir: str | Path, dataset: str, split: str) -> Path:
    """The folder of a prepared split."""
    return Path(data_dir) / dataset / split


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split of a prepared data set, its pixels memory-mapped.

    Attributes:
        images: uint8 (N, H, W, C), C 1 (gray) or 3 (RGB), read from disk as it is indexed.
        labels: int64 (N,), codes 0 <= label < num_classes.
        meta: what `meta.json` says.
        votes: float32 (N, num_classes), rows sum to 1 and are largest at the label; None for a data set without.
    """

    images: np.ndarray
    labels: np.ndarray
    meta: dict[str, Any]
    votes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """Data set and split, as ``fer2013/val``."""
        return f"{self.meta['dataset']}/{self.meta['split']}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.meta["class_names"])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> np.ndarray:
        """Images a class, int64 (num_classes,)."""
        return np.bincount(self.labels, minlength=self.num_classes)


def prepared_splits(data_dir: str | Path) -> list[tuple[str, str]]:
    """The (data set, split) pairs prepared below ``data_dir``, sorted."""
    return sorted(path.parent.parts[-2:] for path in Path(data_dir).glob("*/*/meta.json"))


def open_split(data_dir: str | Path, dataset: str, split: str) -> PreparedSplit:
    """Opens a prepared split and checks that its files belong together.

    Raises:
        UserError: not prepared, or a file is truncated, of another type, length or format.
    """
    folder = split_dir(data_dir, dataset, split)
    if not (folder / "meta.json").is_file():
        found = ", ".join("/".join(pair) for pair in prepared_splits(data_dir)) or "nothing"
        source = "" if dataset == "synthetic" else " --source PATH"
        raise UserError(
            f"{dataset}/{split} is not prepared in {data_dir} (found: {found}); "
            f"run: python prepare_data.py {dataset}{source} --data-dir {data_dir}"
        )
    meta = read_json(folder / "meta.json")
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}/meta.json: expected format version {FORMAT_VERSION}, found {version}; prepare the data set again"
        )
    if not isinstance(meta.get("class_names"), list):
        raise UserError(f"{folder}/meta.json: the names of the classes are missing; prepare the data set again")
    images = _open_array(folder / "images.npy", np.uint8, 4, mmap_mode="r")
    labels = _open_array(folder / "labels.npy", np.int64, 1)
    if not len(images) == len(labels) == meta.get("num_images"):
        raise UserError(
            f"{folder}: images.npy holds {len(images)} images, labels.npy {len(labels)} labels and meta.json says "
            f"{meta.get('num_images')}; prepare the data set again"
        )
    num_classes = len(meta["class_names"])
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{folder}/labels.npy: expected codes 0..{num_classes - 1}, found {labels[outside[0]]} "
            f"at row {outside[0]}; prepare the data set again"
        )
    return PreparedSplit(images, labels, meta, _open_votes(folder / "votes.npy", labels, num_classes))


def _open_votes(path: Path, labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    if not path.exists():
        return None
    votes = _open_array(path, np.float32, 2, mmap_mode="r")
    if votes.shape != (len(labels), num_classes):
        raise UserError(
            f"{path}: expected the votes of {len(labels)} images for {num_classes} classes, found an array of "
            f"{' x '.join(map(str, votes.shape))}; prepare the data set again"
        )
    largest = votes[np.arange(len(labels)), labels] == votes.max(axis=1)
    wrong = np.flatnonzero(~(largest & (votes >= 0).all(axis=1) & (abs(votes.sum(axis=1) - 1) < 1e-5)))
    if len(wrong):
        raise UserError(
            f"{path}: expected shares of the votes that sum to 1 and are largest at the label, found "
            f"{votes[wrong[0]].tolist()} for label {labels[wrong[0]]} at row {wrong[0]}; prepare the data set again"
        )
    return votes


def _open_array(path: Path, dtype: type, ndim: int, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; prepare the data set again") from None
    except (ValueError, EOFError) as error:  # truncated, an object array, or no .npy at all
        raise UserError(
            f"{path}: not a whole .npy array of plain numbers ({error}); prepare the data set again"
        ) from None
    if array.dtype != dtype or array.ndim != ndim:
        raise UserError(
            f"{path}: expected {np.dtype(dtype)} with {ndim} axes, found {array.dtype} with {array.ndim}; "
            "prepare the data set again"
        )
    return array
