"""Writes prepared splits to disk: streamed, whole or not at all, and resumable on request."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from data_helper import FORMAT_VERSION, SkippedImage, content_digest, split_dir
from files import UserError, only_writer, whole_file, write_json, write_text
from reading import limits
from reading.json_files import OPEN, parse_json
from reading.text import printable


class SplitWriter:
    """Streams labelled images into a prepared split that appears whole or not at all.

    As a context manager it writes one split; `published_together` writes several. Everything is written into
    ``<data_dir>/<dataset>/.tmp-<split>`` and moved into place when the block ends without an error; until
    then, and after an error, an earlier split of that name stays as it was.

    With a ``preparation``, an interruption (a kill included) leaves the images so far and a journal of them, and the
    next writer of the same preparation starts from those (`done`).

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        split: ``train``, ``val`` or ``test``.
        num_images: N, number of images that will be added or skipped; 1 or more.
        image_shape: (H, W, C) of every image.
        class_names: one name per class, in the order of the codes.
        sources: the files read, each as ``{"name", "bytes", "sha256"}``.
        options: the other options that decide the content, JSON-ready.
        preparation: identifies this preparation, JSON-ready; None always starts from the beginning.
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
        preparation: dict[str, Any] | None = None,
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
        self.skipped: list[dict[str, str]] = []
        self._labels: list[int] = []
        self._pixels = hashlib.sha256()
        self._arrays: dict[str, np.ndarray] = {}
        # Two levels deep, so that a search for <dataset>/<split>/meta.json finds no unfinished one.
        self._stage = self.folder.with_name(f".tmp-{split}")
        self._new, self._old = self._stage / "new", self._stage / "old"
        self._journal = _Journal(self._stage / "journal.jsonl", preparation) if preparation else None

    @property
    def done(self) -> int:
        """Number of images added or skipped so far, including those of an interrupted preparation."""
        return len(self._labels) + len(self.skipped)

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
        data = image.tobytes()
        self._images.write(data)
        self._pixels.update(data)
        self._labels.append(int(label))

    def skip(self, name: str, reason: str) -> None:
        """Leaves out one announced image."""
        self.skipped.append({"name": printable(name), "reason": printable(reason)})

    def add_array(self, name: str, rows: np.ndarray) -> None:
        """Writes one more array, one row per image, as ``<name>.npy`` beside the labels.

        Args:
            name: any name except ``images`` and ``labels``.
            rows: (N, ...), N the number of images added when the block ends; skipped images have no row.
        """
        if name in ("images", "labels"):
            raise ValueError(f"expected another name than images and labels, received {name!r}")
        self._arrays[name] = rows

    def checkpoint(self) -> None:
        """Saves the work so far against an interruption; for writers with a ``preparation``."""
        self._images.flush()
        os.fsync(self._images.fileno())  # first: the journal must not promise what is not on the disk
        self._journal.append(self._labels, self.skipped)

    def __enter__(self) -> SplitWriter:
        self._alone = published_together([self])
        self._alone.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._alone.__exit__(*error)

    def _start(self) -> None:
        self._restore()
        if self._journal and self._resume():
            return
        self._remove()  # leftovers of a killed preparation
        self._new.mkdir(parents=True)
        # Written in order, not memory-mapped: a full disk is then an OSError and not a SIGBUS.
        self._images = open(self._new / "images.npy", "wb")  # noqa: SIM115 - open as long as the writer is
        self._images.write(self._header(self.meta["num_images"]))
        if self._journal:
            self._journal.begin([], [])

    def _resume(self) -> bool:
        """Takes over the files of an interrupted writer of the same preparation; False when there are none."""
        labels, skipped = self._journal.read()
        path = self._new / "images.npy"
        num_bytes = len(self._header(len(labels))) + len(labels) * int(np.prod(self.meta["image_shape"]))
        plausible = all(0 <= label < len(self.meta["class_names"]) for label in labels)
        whole = len(labels) + len(skipped) <= self.meta["num_images"]
        if not (labels and plausible and whole) or not path.exists() or path.stat().st_size < num_bytes:
            return False
        self._images = open(path, "r+b")  # noqa: SIM115 - open as long as the writer is
        self._images.truncate(num_bytes)
        self._images.seek(len(self._header(len(labels))))
        while block := self._images.read(1 << 20):  # ends at the file's end, where writing goes on
            self._pixels.update(block)
        self._labels, self.skipped = labels, skipped
        self._journal.begin(labels, skipped)
        return True

    def _header(self, num_images: int) -> bytes:
        """The header of images.npy; NumPy pads it, so its length does not depend on the number of images."""
        header = io.BytesIO()
        shape = (num_images, *self.meta["image_shape"])
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return header.getvalue()

    def _finish(self) -> None:
        if self.done != self.meta["num_images"]:
            raise UserError(
                f"{self.folder}: expected {self.meta['num_images']:,} images, received {self.done:,}; "
                "did the source change while it was read? Nothing was written, run the command again"
            )
        if not self._labels:
            first = self.skipped[0]
            raise UserError(
                f"{self.folder}: none of its {self.done:,} images can be read; the first, {first['name']}: "
                f"{first['reason']}"
            )
        if self._journal:
            self.checkpoint()
            self.meta |= {"skipped": self.skipped, "preparation": self._journal.preparation}
        self.meta["num_images"] = len(self._labels)
        self._images.seek(0)
        self._images.write(self._header(len(self._labels)))
        self._images.flush()
        os.fsync(self._images.fileno())
        self._images.close()
        labels = np.array(self._labels, np.int64)
        for name, rows in {"labels": labels, **self._arrays}.items():
            if len(rows) != len(self._labels):
                raise ValueError(f"{name}: expected {len(self._labels)} rows, one per image, received {len(rows)}")
            with whole_file(self._new / f"{name}.npy") as path:
                np.save(path, rows)
        self.meta["class_counts"] = np.bincount(self._labels, minlength=len(self.meta["class_names"])).tolist()
        image_shape = (len(labels), *self.meta["image_shape"])
        self.meta["digest"] = content_digest(image_shape, self._pixels.hexdigest(), labels, self._arrays.get("votes"))
        write_json(self._new / "meta.json", self.meta)

    def _publish(self) -> None:
        if self.folder.exists():
            self.folder.rename(self._old)
        self._new.rename(self.folder)

    def _restore(self) -> None:
        if self._old.exists() and not self.folder.exists():  # killed between the two renames of `_publish`
            self._old.rename(self.folder)

    def _abandon(self) -> None:
        """Leaves an earlier split as it was, and the work so far for the next writer of the same preparation."""
        if not self._journal:
            self._remove()
            return
        self._restore()
        if hasattr(self, "_images"):
            with contextlib.suppress(OSError, ValueError):  # a full disk; images that are complete and closed already
                self.checkpoint()
            self._close()

    def _remove(self) -> None:
        self._restore()
        if hasattr(self, "_images"):
            self._close()
        shutil.rmtree(self._stage, ignore_errors=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # closing fails again on a full disk
            self._images.close()


class _JournalEntry(TypedDict):
    """What one checkpoint adds."""

    __pydantic_config__ = OPEN
    labels: list[int]
    skipped: list[SkippedImage]


class _Journal:
    """The content of an unfinished split: a line that names the preparation, then one line per checkpoint."""

    def __init__(self, path: Path, preparation: dict[str, Any]):
        self.path = path
        self.preparation = preparation
        self._written = (0, 0)  # labels and skipped

    def begin(self, labels: list[int], skipped: list[dict[str, str]]) -> None:
        """Replaces the file, because its last line may be cut off after a kill."""
        lines = ({"preparation": self.preparation}, {"labels": labels, "skipped": skipped})
        write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in lines))
        self._written = len(labels), len(skipped)

    def append(self, labels: list[int], skipped: list[dict[str, str]]) -> None:
        """Adds what is new since the last line."""
        num_labels, num_skipped = self._written
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"labels": labels[num_labels:], "skipped": skipped[num_skipped:]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._written = len(labels), len(skipped)

    def read(self) -> tuple[list[int], list[dict[str, str]]]:
        """The labels and skipped images so far; nothing of another preparation or of a line that is cut off."""
        labels: list[int] = []
        skipped: list[dict[str, str]] = []
        with contextlib.suppress(UserError, FileNotFoundError, UnicodeDecodeError):
            lines = limits.read_bytes(self.path, limits.JSON_BYTES, "a journal").decode().splitlines()
            if lines and parse_json(lines[0], self.path) == {"preparation": self.preparation}:
                for line in lines[1:]:
                    entry = parse_json(line, self.path, _JournalEntry)
                    labels += entry["labels"]
                    skipped += entry["skipped"]
        return labels, skipped


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
        except BaseException as error:
            for writer in writers:
                writer._abandon()
            if isinstance(error, OSError):
                error.filename = error.filename or str(folder)
            raise
        for writer in writers:
            writer._remove()
