"""How does a release become our prepared format? Whole or not at all, from a file, a folder or a zip; no Keras.

A prepared split is the folder ``<data_dir>/<dataset>/<split>`` with ``images.npy`` (uint8 (N, H, W, C), C 1 gray
or 3 RGB), ``labels.npy`` (int64 (N,)) and ``meta.json``. A reader (one module a data set, see `fer2013`) looks at
a source and returns a `Release`; `write_release` writes its splits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from errors import UserError
from files import only_writer, read_json, sha256, whole_file, write_json

FORMAT_VERSION = 1

# --- the prepared format --------------------------------------------------------------------------------------------


def split_dir(data_dir: str | Path, dataset: str, split: str) -> Path:
    """The folder of a prepared split."""
    return Path(data_dir) / dataset / split


class SplitWriter:
    """Streams labelled images into a prepared split that appears whole or not at all.

    As a context manager it writes one split alone; `published_together` does several. Everything is written into
    ``<data_dir>/<dataset>/.tmp-<split>`` and moved into place when the block ends without an error; until
    then, and after an error, an earlier split of that name stays as it was.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        split: ``train``, ``val`` or ``test``.
        num_images: N, how many images will be added; 1 or more.
        image_shape: (H, W, C) of every image.
        class_names: a name a class, in the order of the codes.
        sources: the files read, each as ``{"name", "bytes", "sha256"}``.
        options: what else decided the content, JSON-ready.
    """

    def __init__(
        self,
        data_dir: str | Path,
        dataset: str,
        split: str,
        num_images: int,
        image_shape: Sequence[int],
        class_names: Sequence[str],
        sources: Sequence[dict[str, Any]],
        options: dict[str, Any],
    ):
        if num_images < 1:
            raise ValueError(f"num_images: expected 1 or more, received {num_images}")
        self.folder = split_dir(data_dir, dataset, split)
        self.meta: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "dataset": dataset,
            "split": split,
            "num_images": num_images,
            "image_shape": list(image_shape),
            "class_names": list(class_names),
            "class_counts": [0] * len(class_names),
            "sources": list(sources),
            "options": dict(options),
        }
        # Two levels deep, so that nobody who looks for <dataset>/<split>/meta.json finds an unfinished one.
        self._stage = self.folder.with_name(f".tmp-{split}")
        self._new, self._old = self._stage / "new", self._stage / "old"
        self._labels: list[int] = []

    def add(self, image: np.ndarray, label: int) -> None:
        """Appends one image.

        Args:
            image: uint8, of the announced shape.
            label: 0 <= label < number of classes.
        """
        if image.dtype != np.uint8 or list(image.shape) != self.meta["image_shape"]:
            raise ValueError(f"expected uint8 {self.meta['image_shape']}, received {image.dtype} {list(image.shape)}")
        if not 0 <= label < len(self.meta["class_names"]):
            raise ValueError(f"expected a label 0..{len(self.meta['class_names']) - 1}, received {label}")
        self._images.write(image.tobytes())
        self._labels.append(int(label))

    def __enter__(self) -> SplitWriter:
        self._alone = published_together([self])
        self._alone.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._alone.__exit__(*error)

    def _start(self) -> None:
        self._clean()  # what a killed preparation left
        self._new.mkdir(parents=True)
        # Written in order, not memory-mapped: a full disk is an OSError here and would be a SIGBUS there.
        self._images = open(self._new / "images.npy", "wb")  # noqa: SIM115 - open as long as the writer is
        shape = (self.meta["num_images"], *self.meta["image_shape"])
        np.lib.format.write_array_header_1_0(self._images, {"descr": "|u1", "fortran_order": False, "shape": shape})

    def _finish(self) -> None:
        if len(self._labels) != self.meta["num_images"]:
            raise UserError(
                f"{self.folder}: expected {self.meta['num_images']:,} images, received {len(self._labels):,}; "
                "did the source change while it was read? Nothing was written, run the command again"
            )
        self._images.flush()
        os.fsync(self._images.fileno())
        self._images.close()
        with whole_file(self._new / "labels.npy") as path:
            np.save(path, np.array(self._labels, np.int64))
        self.meta["class_counts"] = np.bincount(self._labels, minlength=len(self.meta["class_names"])).tolist()
        write_json(self._new / "meta.json", self.meta)

    def _publish(self) -> None:
        if self.folder.exists():
            self.folder.rename(self._old)
        self._new.rename(self.folder)

    def _clean(self) -> None:
        if self._old.exists() and not self.folder.exists():  # killed between the two renames of `_publish`
            self._old.rename(self.folder)
        if hasattr(self, "_images"):
            with contextlib.suppress(OSError):  # on a full disk closing fails again
                self._images.close()
        shutil.rmtree(self._stage, ignore_errors=True)


@contextlib.contextmanager
def published_together(writers: Sequence[SplitWriter]) -> Iterator[None]:
    """Starts the writers of one data set and publishes their splits when the block succeeds: all or none of them.

    Raises:
        UserError: another process is writing the data set, or a writer did not get the images it announced.
    """
    folder = writers[0].folder.parent
    with only_writer(folder):
        try:
            for writer in writers:
                writer._start()
            yield
            for writer in writers:
                writer._finish()
            for writer in writers:
                writer._publish()
        except OSError as error:
            error.filename = error.filename or str(folder)
            raise
        finally:
            for writer in writers:
                writer._clean()


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


@dataclasses.dataclass(frozen=True)
class Release:
    """What a reader found in a source.

    Attributes:
        counts: split -> number of images; splits that the source lacks are absent.
        examples: (split, image uint8 of `image_shape`, canonical label), as many as counted; iterated once.
        image_shape: (H, W, C) of every image.
        class_names: a name a class, in the order of the codes.
        sources: the files read, each as `file_identity` describes it.
        options: what else decided the content, JSON-ready.
    """

    counts: dict[str, int]
    examples: Iterable[tuple[str, np.ndarray, int]]
    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    sources: list[dict[str, Any]]
    options: dict[str, Any]


def write_release(data_dir: str | Path, dataset: str, release: Release) -> dict[str, dict[str, Any]]:
    """Writes the splits of a release, all or none of them.

    Returns:
        Split -> the content of its `meta.json`. An earlier split that the release lacks stays as it was.

    Raises:
        UserError: what the reader finds wrong on the way, or another process is writing this data set.
    """
    shared = (release.image_shape, release.class_names, release.sources, release.options)
    writers = {split: SplitWriter(data_dir, dataset, split, count, *shared) for split, count in release.counts.items()}
    with published_together(list(writers.values())):
        for split, image, label in release.examples:
            writers[split].add(image, label)
    return {split: writer.meta for split, writer in writers.items()}


# --- sources --------------------------------------------------------------------------------------------------------


class SourceFiles:
    """The files of a folder or a zip, read where they are: a zip is never unpacked.

    Args:
        path: the folder or zip.
        patterns: which files of a folder count (`Path.glob`); of a zip all do, whatever folder they lie in.

    Attributes:
        names: the files' relative names, with ``/``, sorted.

    Raises:
        UserError: the zip is damaged, encrypted, or holds names that point outside of it.
    """

    def __init__(self, path: Path, patterns: Sequence[str]):
        self.path = path
        if path.is_dir():
            self._zip = None
            found = (file for pattern in patterns for file in path.glob(pattern))
            self.names = sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
        else:
            with damaged_zip(path):
                self._zip = _open_zip(path)
            self.names = sorted({self._checked(entry).filename for entry in self._zip.infolist() if not entry.is_dir()})

    def _checked(self, entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
            raise UserError(
                f"{self.path}: expected names inside the zip, found {entry.filename!r}, which points outside of it; "
                "do not use this file, download the release again"
            )
        if entry.flag_bits & 1:
            raise UserError(f"{self.path}: {entry.filename} is encrypted; expected a zip without a password")
        return entry

    def open(self, name: str) -> BinaryIO:
        """Opens one file for reading; of a damaged zip, opening and reading raise what `damaged_zip` knows."""
        return open(self.path / name, "rb") if self._zip is None else self._zip.open(name)

    def read(self, name: str) -> bytes:
        """One file's bytes.

        Raises:
            UserError: the zip is damaged there.
        """
        with damaged_zip(self.path), self.open(name) as file:
            return file.read()

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        """What `file_identity` says of a zip; for a folder, number and bytes of the files named.

        A folder's ``sha256`` is over ``<name> NUL <size> NUL <bytes>`` of each, in the order given.
        """
        if self._zip is not None:
            return file_identity(self.path)
        digest, size = hashlib.sha256(), 0
        for name in names:
            data = self.read(name)
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            size += len(data)
        return {"name": self.path.resolve().name, "files": len(names), "bytes": size, "sha256": digest.hexdigest()}


def file_identity(path: Path) -> dict[str, Any]:
    """A file's ``name``, ``bytes`` and ``sha256``, for `meta.json`."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except UnicodeDecodeError as error:  # of a damaged name
        raise zipfile.BadZipFile(str(error)) from None


@contextlib.contextmanager
def damaged_zip(path: Path) -> Iterator[None]:
    """Turns what `zipfile` raises for a damaged file into a `UserError`."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a damaged offset before the start
            raise
        raise UserError(f"{path}: the zip is cut off or damaged ({error}); download it again") from None
