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
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, Field
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from files import UserError, only_writer, write_json
from reading.arrays import Rows, open_array
from reading.json_files import OPEN, read_json
from reading.text import check_class_names

FORMAT_VERSION = 1
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_BLOCK_BYTES = 1 << 20
_VERIFIED_BYTES = 2**28  # up to so many bytes of pixels `open_split` compares the content with its digest

# --- the content of meta.json

_Count = Annotated[int, Field(ge=0, le=2**40)]
_Positive = Annotated[int, Field(ge=1, le=2**40)]
_Side = Annotated[int, Field(ge=1, le=2**16)]
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _checked_names(names: list[str]) -> list[str]:
    check_class_names(names)
    return names


def _checked_shape(shape: list[int]) -> list[int]:
    if shape[2] not in (1, 3):
        raise ValueError(f"expected 1 (gray) or 3 (RGB) channels, found {shape[2]}")
    return shape


class SkippedImage(TypedDict):
    """An image that could not be read."""

    __pydantic_config__ = OPEN
    name: str
    reason: str


class Preparation(TypedDict):
    """What identifies a preparation from image files (`datasets.shared.release`)."""

    __pydantic_config__ = OPEN
    sha256: str
    pictures: _Count
    splits: list[Split]


class DroppedDuplicates(TypedDict):
    """What `datasets.shared.duplicates.drop_from_train` dropped."""

    __pydantic_config__ = OPEN
    compared_with: list[str]
    method: str
    distance: int | None
    count: _Count
    class_counts: list[_Count]
    rows: list[_Count]


class MetaOptions(TypedDict):
    """The options that decided a split's content, and what they left out."""

    __pydantic_config__ = OPEN
    form: NotRequired[str]
    left_out: NotRequired[dict[str, dict[str, _Count]]]
    pictures_without_annotation: NotRequired[_Count]
    dropped_duplicates: NotRequired[list[DroppedDuplicates]]


class Meta(TypedDict):
    """The content of `meta.json`."""

    __pydantic_config__ = OPEN
    format_version: Literal[1]
    dataset: _Name
    split: Split
    num_images: _Positive
    image_shape: Annotated[list[_Side], Field(min_length=3, max_length=3), AfterValidator(_checked_shape)]
    class_names: Annotated[list[str], Field(min_length=1, max_length=1000), AfterValidator(_checked_names)]
    class_counts: list[_Count]
    sources: list[dict[str, Any]]
    options: MetaOptions
    digest: NotRequired[_Sha256]
    skipped: NotRequired[list[SkippedImage]]
    preparation: NotRequired[Preparation]


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a prepared split, as a `Meta`.

    Raises:
        UserError: missing, no JSON, of another version, or of other types than `Meta`.
    """
    try:
        return read_json(folder / "meta.json", Meta)
    except UserError as error:
        raise UserError(f"{error}; prepare the data set again") from None


# --- a split


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
        digest = self.computed_digest()
        if self.folder is not None:
            _add_digest(self.folder, self.meta, digest)
        return digest

    def computed_digest(self) -> str:
        """As `digest`, computed from the files as they are now; reads all pixels."""
        return content_digest(self.images.shape, _sha256(self.images, self.name), self.labels, self.votes)

    def verify(self) -> None:
        """Checks that pixels, labels and votes are those that `meta.json` names; reads all pixels.

        Raises:
            UserError: they are others.
        """
        if self.meta.get("digest", "") not in ("", self.computed_digest()):
            raise UserError(
                f"{self.folder or self.name}: the pixels, labels or votes are not those that meta.json names "
                f"(digest {self.meta['digest'][:8]}...): a file was changed or damaged; prepare the data set again"
            )

    @functools.cached_property
    def rows(self) -> np.ndarray | Rows:
        """The images as `arrays.Rows`: read from the file row by row, an error when it is cut meanwhile.

        Of images that are no memory map of a whole file, the images themselves.
        """
        return Rows(self.images) if _is_whole_file(self.images) else self.images


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
    if not _is_whole_file(images):
        yield from (np.ascontiguousarray(image).tobytes() for image in images)
        return
    # Read, not indexed: pages of a memory map that were read once count as this process's memory.
    rows, at_a_time = Rows(images), max(1, _BLOCK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), at_a_time):
        yield rows[start : start + at_a_time].tobytes()


def _is_whole_file(images: np.ndarray) -> bool:
    """Whether an array is a memory map of a whole file, no part or copy of one."""
    return isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap) and images.flags.c_contiguous


def _add_digest(folder: Path, meta: dict[str, Any], digest: str) -> None:
    """Adds the digest to `meta.json`, unless the folder is read-only or another process is writing there."""
    found = read_meta(folder)
    if {**found, "digest": None} != {**meta, "digest": None}:
        raise UserError(f"{folder}: was prepared again while its digest was computed; run the same command again")
    with contextlib.suppress(OSError, UserError), only_writer(folder.parent):
        if read_meta(folder) == meta:
            write_json(folder / "meta.json", {**meta, "digest": digest})


def prepared_splits(data_dir: str | Path) -> list[tuple[str, str]]:
    """The (data set, split) pairs prepared below ``data_dir``, sorted."""
    return sorted(path.parent.parts[-2:] for path in Path(data_dir).glob("*/*/meta.json"))


def open_split(data_dir: str | Path, dataset: str, split: str) -> PreparedSplit:
    """Opens a prepared split and checks that its files belong together.

    A split that was prepared before `meta.json` kept a digest is opened like any other (`PreparedSplit.digest`).

    Files that are not of the type, shape and length that `meta.json` says are refused. Up to 256 MiB of pixels are
    compared with the digest too; for larger ones see `PreparedSplit.verify`.

    Raises:
        UserError: not prepared, or a file is truncated, of another type, length, format or content.
    """
    folder = split_dir(data_dir, dataset, split)
    if not (folder / "meta.json").is_file():
        prepared = prepared_splits(data_dir)
        found = ", ".join("/".join(pair) for pair in prepared) or "nothing"
        if any(name == dataset for name, _ in prepared):
            raise UserError(_lacks_part(data_dir, dataset, split, prepared))
        source = "" if dataset == "synthetic" else " --source PATH"
        raise UserError(
            f"{dataset}/{split} is not prepared in {data_dir} (found: {found}); "
            f"run: python prepare_data.py {dataset}{source} --data-dir {data_dir}"
        )
    meta = read_meta(folder)
    count, shape = meta["num_images"], meta["image_shape"]
    images = open_array(folder / "images.npy", np.uint8, (count, *shape), mapped=True)
    labels = open_array(folder / "labels.npy", np.int64, (count,))
    num_classes = len(meta["class_names"])
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{folder}/labels.npy: expected codes 0..{num_classes - 1}, found {labels[outside[0]]} "
            f"at row {outside[0]}; prepare the data set again"
        )
    counts = np.bincount(labels, minlength=num_classes).tolist()
    if counts != meta["class_counts"]:
        raise UserError(
            f"{folder}/labels.npy: expected {meta['class_counts']} labels per class, as meta.json says, found "
            f"{counts}; prepare the data set again"
        )
    split = PreparedSplit(images, labels, meta, _open_votes(folder / "votes.npy", labels, num_classes), folder)
    if images.nbytes <= _VERIFIED_BYTES:
        split.verify()
    return split


def _lacks_part(data_dir: str | Path, dataset: str, split: str, prepared: Sequence[tuple[str, str]]) -> str:
    """The message for a split that the prepared source did not have: the same command again would not make it."""
    remedy = f"prepare {dataset} again from a source that has it"
    if split == "val":
        remedy = (
            "prepare it again with --val-share 0.1, which holds it out of train (where the data set has that option)"
        )
        remedy += ", or train with --select-on test" if (dataset, "test") in prepared else ""
    found = ", ".join("/".join(pair) for pair in prepared)
    return f"{dataset}/{split} is not prepared in {data_dir}: the source had no such part (found: {found}); {remedy}"


def _open_votes(path: Path, labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    if not path.exists():
        return None
    votes = open_array(path, np.float32, (len(labels), num_classes))
    largest = votes[np.arange(len(labels)), labels] == votes.max(axis=1)
    wrong = np.flatnonzero(~(largest & (votes >= 0).all(axis=1) & (abs(votes.sum(axis=1) - 1) < 1e-5)))
    if len(wrong):
        raise UserError(
            f"{path}: expected shares of the votes that sum to 1 and are largest at the label, found "
            f"{votes[wrong[0]].tolist()} for label {labels[wrong[0]]} at row {wrong[0]}; prepare the data set again"
        )
    return votes
