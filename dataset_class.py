"""How do prepared files become batches? Memory-mapped reading, order by (seed, epoch), balanced sampling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from data_helper import FORMAT_VERSION, split_dir
from errors import UserError
from files import read_json


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split of a prepared data set, its pixels memory-mapped.

    Attributes:
        images: uint8 (N, H, W, C), C 1 (gray) or 3 (RGB), read from disk as it is indexed.
        labels: int64 (N,), codes 0 <= label < num_classes.
        meta: what `meta.json` says.
    """

    images: np.ndarray
    labels: np.ndarray
    meta: dict[str, Any]

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
    """Opens a prepared split and checks that its three files belong together.

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
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder}/meta.json: expected format version {FORMAT_VERSION}, found {meta.get('format_version')}; "
            "prepare the data set again"
        )
    images = _open_array(folder / "images.npy", np.uint8, 4, mmap_mode="r")
    labels = _open_array(folder / "labels.npy", np.int64, 1)
    if not len(images) == len(labels) == meta["num_images"]:
        raise UserError(
            f"{folder}: images.npy holds {len(images)} images, labels.npy {len(labels)} labels and meta.json says "
            f"{meta['num_images']}; prepare the data set again"
        )
    num_classes = len(meta["class_names"])
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{folder}/labels.npy: expected codes 0..{num_classes - 1}, found {labels[outside[0]]} "
            f"at row {outside[0]}; prepare the data set again"
        )
    return PreparedSplit(images, labels, meta)


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


class Batches(keras.utils.PyDataset):
    """Batches of a prepared split, in an order that (seed, epoch) alone decides.

    Set `epoch` before an epoch begins; the same (seed, epoch) gives the same batches in any process,
    which is what lets a killed run resume to the same weights. Hand it to ``fit`` with ``shuffle=False``.

    Args:
        split: the images and labels.
        batch_size: images a batch.
        seed: of the order; None keeps the file's order and the short last batch (evaluation).
            With a seed the last batch is left out when it is short, so that every step has one shape;
            each epoch leaves out other images.
        balanced: draw every class that is there equally often (with repetition); an epoch keeps its length.
    """

    def __init__(self, split: PreparedSplit, batch_size: int, *, seed: int | None = None, balanced: bool = False):
        super().__init__()
        self.split = split
        self.batch_size = min(batch_size, len(split)) if seed is not None else batch_size
        self.seed = seed
        self.balanced = balanced
        self.epoch = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (self.seed is None and rest > 0)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch ``index`` of this epoch: uint8 images (B, H, W, C) and int32 labels (B,)."""
        rows = self.order()[index * self.batch_size : (index + 1) * self.batch_size]
        return self.split.images[rows], self.split.labels[rows].astype(np.int32)

    def order(self) -> np.ndarray:
        """The rows of this epoch in the order they are seen, int64 (N,)."""
        if self._order[0] != self.epoch:
            self._order = (self.epoch, self._draw_order())
        return self._order[1]

    def _draw_order(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.split))
        rng = np.random.default_rng((self.seed, self.epoch))
        if not self.balanced:
            return rng.permutation(len(self.split))
        counts = self.split.class_counts
        share = np.where(counts > 0, 1.0 / np.maximum(counts, 1), 0.0)[self.split.labels]
        return rng.choice(len(self.split), size=len(self.split), p=share / share.sum())
