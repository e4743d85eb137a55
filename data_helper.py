"""How does an official release become our prepared format? Readers, label maps and integrity checks; no Keras.

A prepared split is the folder ``<data_dir>/<dataset>/<split>`` with ``images.npy`` (uint8 (N, H, W, C), C 1 gray
or 3 RGB), ``labels.npy`` (int64 (N,)) and ``meta.json``. `SplitWriter` writes one. A reader turns a release into
a `Release`: how many images each split has, and then the images with canonical labels, one by one.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from config import ANGER, CLASS_NAMES, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from errors import UserError
from files import only_writer, sha256, whole_file, write_json
from images import decode_image

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
        np.lib.format.write_array_header_1_0(
            self._images, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        )

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


# --- sources --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Release:
    """What a reader found in a source.

    Attributes:
        counts: split -> number of images; splits that the source lacks are absent.
        examples: (split, image uint8 (H, W, C), canonical label), as many as counted; may be iterated once.
        sources: what was read, for `meta.json`.
        form: the form of the release, for `meta.json`.
    """

    counts: dict[str, int]
    examples: Iterable[tuple[str, np.ndarray, int]]
    sources: list[dict[str, Any]]
    form: str


class _Files:
    """The files of a folder or of a zip, by their relative names in sorted order; a zip is never unpacked."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self._zip = None
            found = (file for pattern in ("*.csv", "train/*/*", "test/*/*") for file in path.glob(pattern))
            self.names = sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
        else:
            with _damaged_zip(path):
                self._zip = zipfile.ZipFile(path)
            for entry in self._zip.infolist():
                self._check(entry)
            self.names = sorted({entry.filename for entry in self._zip.infolist() if not entry.is_dir()})

    def _check(self, entry: zipfile.ZipInfo) -> None:
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or re.match("[A-Za-z]:", entry.filename):
            raise UserError(
                f"{self.path}: expected names inside the zip, found {entry.filename!r}, which points outside of it; "
                "do not use this file, download the release again"
            )
        if entry.flag_bits & 1:
            raise UserError(f"{self.path}: {entry.filename} is encrypted; expected a zip without a password")

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb") if self._zip is None else self._zip.open(name)

    def read(self, name: str) -> bytes:
        with _damaged_zip(self.path), self.open(name) as file:
            return file.read()

    def identity(self) -> dict[str, Any]:
        """Name, bytes and SHA-256 of a zip; of a folder over each file's "<relative name>\\0<size>\\0<bytes>", sorted."""
        if self._zip is not None:
            return _identity(self.path)
        digest, size = hashlib.sha256(), 0
        for name in self.names:
            data = self.read(name)
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            size += len(data)
        name = self.path.resolve().name
        return {"name": name, "files": len(self.names), "bytes": size, "sha256": digest.hexdigest()}


def _identity(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def _damaged_zip(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{path}: the zip is cut off or damaged ({error}); download it again") from None


# --- FER-2013 -------------------------------------------------------------------------------------------------------

FER2013_SIDE = 48
FER2013_CODES = (ANGER, DISGUST, FEAR, HAPPY, SAD, SURPRISE, NEUTRAL)  # of the CSV's code 0..6
FER2013_FOLDERS = {  # by name: in alphabetical order the folders are not in the order of the codes
    "angry": ANGER,
    "disgust": DISGUST,
    "fear": FEAR,
    "happy": HAPPY,
    "sad": SAD,
    "surprise": SURPRISE,
    "neutral": NEUTRAL,
}
FER2013_SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
# Images a class in the official release, in the order of `CLASS_NAMES`.
FER2013_COUNTS = {
    "train": [4965, 7215, 4830, 3171, 4097, 436, 3995],
    "val": [607, 895, 653, 415, 496, 56, 467],
    "test": [626, 879, 594, 416, 528, 55, 491],
}
_FER2013_FORMS = (
    "expected fer2013.csv, icml_face_data.csv or train.csv, a folder or zip that holds one of them, or a folder or "
    "zip with train/<class>/Training_*.jpg and test/<class>/{PublicTest,PrivateTest}_*.jpg"
)
_FER2013_CSVS = ("fer2013.csv", "icml_face_data.csv", "train.csv")  # the more complete first
_FER2013_FOLDER_FILE = re.compile(r"(?:^|/)(train|test)/([^/]+)/([^/]+)$")
_FER2013_USAGES = {"train": ("Training",), "test": ("PublicTest", "PrivateTest")}
_PIXELS = {str(value): value for value in range(256)}


def prepare_fer2013(source: str | Path, data_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Prepares FER-2013 from any form of the official release, with a progress bar.

    Args:
        source: ``fer2013.csv``, ``icml_face_data.csv``, ``train.csv``, the folder form, or a zip or folder of these.
        data_dir: folder of the prepared data sets; writes ``fer2013/{train,val,test}``, uint8 (N, 48, 48, 1).

    Returns:
        Split -> its meta; a split that the source lacks is absent, and an earlier one of that name stays.

    Raises:
        UserError: the source is missing, of no known form, or damaged; what was prepared earlier is untouched.
    """
    release = _read_fer2013(Path(source))
    writers = {
        split: SplitWriter(
            data_dir,
            "fer2013",
            split,
            count,
            (FER2013_SIDE, FER2013_SIDE, 1),
            CLASS_NAMES[: len(FER2013_CODES)],
            release.sources,
            {"form": release.form},
        )
        for split, count in release.counts.items()
    }
    total = sum(release.counts.values())
    with published_together(list(writers.values())):
        for split, image, label in tqdm(release.examples, "preparing fer2013", total, unit="image", disable=None):
            writers[split].add(image, label)
    return {split: writer.meta for split, writer in writers.items()}


def _read_fer2013(source: Path) -> Release:
    """Finds out which form a source has and reads that."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; {_FER2013_FORMS}")
    if source.is_file() and not _is_zip(source):
        return _read_fer2013_csv(lambda: open(source, "rb"), str(source), [_identity(source)])
    files = _Files(source)
    by_name = {PurePosixPath(name).name: name for name in reversed(files.names) if not _is_hidden(name)}
    for csv_name in _FER2013_CSVS:
        if csv_name in by_name:
            name = by_name[csv_name]
            sources = [_identity(source / name if source.is_dir() else source)]
            return _read_fer2013_csv(functools.partial(files.open, name), f"{source}/{name}", sources)
    pictures = [name for name in files.names if _FER2013_FOLDER_FILE.search(name) and not _is_hidden(name)]
    if pictures:
        return _read_fer2013_folders(files, pictures)
    if "test.csv" in by_name:
        raise _no_labels(f"{source}/{by_name['test.csv']}")
    found = ", ".join(files.names[:3]) or "no files"
    found = ", ".join(sorted(file.name for file in source.iterdir())[:3]) if source.is_dir() else found
    raise UserError(f"{source}: no FER-2013 in it (found {found or 'nothing'}); {_FER2013_FORMS}")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK" or path.suffix.lower() == ".zip"


def _is_hidden(name: str) -> bool:
    """True for what a file manager leaves behind (``.DS_Store``, ``__MACOSX/``)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _no_labels(where: str) -> UserError:
    return UserError(
        f"{where}: this file has pixels but no labels; the same pictures with labels are in fer2013.csv and in "
        "icml_face_data.csv (Usage PublicTest and PrivateTest): give one of those"
    )
