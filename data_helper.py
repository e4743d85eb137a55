"""Opens prepared data sets; no Keras.

A prepared split is the folder ``<data_dir>/<dataset>/<split>`` with ``images.npy`` (uint8 (N, H, W, C), C 1 gray
or 3 RGB), ``labels.npy`` (int64 (N,)), ``meta.json`` and, where several people labelled each image, ``votes.npy``
(float32 (N, classes), the distribution of their votes). The readers in `datasets` write it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from files import UserError, only_writer, read_json, write_json

FORMAT_VERSION = 1
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_BLOCK_BYTES = 1 << 20


def split_dir(data_dir: str | Path, dataset: str, split: str) -> Path:
    """The folder of a prepared split."""
    return Path(data_dir) / dataset / split


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split of a prepared data set, its pixels memory-mapped.

    Attributes:
        images: uint8 (N, H, W, C), C 1 (gray) or 3 (RGB), read from disk as it is indexed.
        labels: int64 (N,), codes 0 <= label < num_classes.
        meta: the content of `meta.json`.
        votes: float32 (N, num_classes), rows sum to 1 and are largest at the label; None for a data set without.
        folder: where the split was opened; None for arrays that are not on disk.
    """

    images: np.ndarray
    labels: np.ndarray
    meta: dict[str, Any]
    votes: np.ndarray | None = None
    folder: Path | None = None

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
        """Images per class, int64 (num_classes,)."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the pixels, labels and votes, 64 hexadecimal digits (`content_digest`).

        `meta.json` keeps it. For a split that was prepared before digests existed it is computed here, with a
        progress bar where that takes more than a second, and added to `meta.json` if the folder can be written.

        Raises:
            UserError: the digest has to be computed, and the split was prepared again since it was opened.
        """
        if "digest" in self.meta:
            return self.meta["digest"]
        digest = content_digest(self.images.shape, _sha256(self.images, self.name), self.labels, self.votes)
        if self.folder is not None:
            _add_digest(self.folder, self.meta, digest)
        return digest


def content_digest(
    image_shape: Sequence[int], images_sha256: str, labels: np.ndarray, votes: np.ndarray | None = None
) -> str:
    """SHA-256 of what a prepared split holds, 64 hexadecimal digits.

    Args:
        image_shape: (N, H, W, C).
        images_sha256: SHA-256 of the pixels, row by row, in hexadecimal digits.
        labels: int64 (N,).
        votes: float32 (N, classes), or None.
    """
    parts = [["images", list(image_shape), images_sha256]]
    for name, array in (("labels", labels), ("votes", votes)):
        if array is not None:
            # Little-endian, so that every machine gets the same digest.
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            parts.append([name, list(array.shape), hashlib.sha256(data).hexdigest()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sha256(images: np.ndarray, name: str) -> str:
    """SHA-256 of the pixels, with a progress bar; memory stays bounded."""
    digest = hashlib.sha256()
    # delay: a bar for less than a second would only be noise.
    with tqdm(total=images.nbytes, desc=f"digest of {name}", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for block in _blocks(images):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _blocks(images: np.ndarray) -> Iterator[bytes]:
    if not isinstance(images, np.memmap):
        yield from (np.ascontiguousarray(image).tobytes() for image in images)
        return
    # Read, not indexed: pages of a memory map that were read once count as this process's memory.
    with open(images.filename, "rb") as file:
        file.seek(images.offset)
        while block := file.read(_BLOCK_BYTES):
            yield block


def _add_digest(folder: Path, meta: dict[str, Any], digest: str) -> None:
    """Adds the digest to `meta.json`, unless the folder is read-only or another process is writing there."""
    found = read_json(folder / "meta.json")
    if {**found, "digest": None} != {**meta, "digest": None}:
        raise UserError(f"{folder}: was prepared again while its digest was computed; run the same command again")
    with contextlib.suppress(OSError, UserError), only_writer(folder.parent):
        if read_json(folder / "meta.json") == meta:
            write_json(folder / "meta.json", {**meta, "digest": digest})


def prepared_splits(data_dir: str | Path) -> list[tuple[str, str]]:
    """The (data set, split) pairs prepared below ``data_dir``, sorted."""
    return sorted(path.parent.parts[-2:] for path in Path(data_dir).glob("*/*/meta.json"))


def open_split(data_dir: str | Path, dataset: str, split: str) -> PreparedSplit:
    """Opens a prepared split and checks that its files belong together.

    A split that was prepared before `meta.json` kept a digest is opened like any other (`PreparedSplit.digest`).

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
    if not re.fullmatch("[0-9a-f]{64}", str(meta.get("digest", "0" * 64))):
        raise UserError(
            f"{folder}/meta.json: expected a digest of 64 hexadecimal digits, found {str(meta['digest'])[:80]!r}; "
            "prepare the data set again"
        )
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
    return PreparedSplit(images, labels, meta, _open_votes(folder / "votes.npy", labels, num_classes), folder)


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
