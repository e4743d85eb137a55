"""Reads and writes HDF5 files of arrays: nothing outside of them is read, and no damage ends our process.

A file that we wrote begins with a block of 512 bytes (HDF5's "user block", which every HDF5 reader skips). It holds the
SHA-256 of all that follows, which is compared before the HDF5 library sees a byte. The digest protects from damage, not
from intent: anyone can compute one for a file that aborts the library. Therefore every HDF5 file, ours too, is read in
a child process (`hdf5_content`). That takes a quarter of a second on two busy cores, whatever the file's size; to
trust some of our files would save little of that, and needs a record of which ones nobody else could have written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from files import UserError, no_such_file, sha256, whole_file
from model_files import hdf5_content
from model_files.hdf5_content import INFLATION, Damaged, Refused
from reading.text import printable

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BLOCK = 512  # bytes; the smallest that HDF5 allows
_TITLE = b"Ad-Corre, HDF5. SHA-256 of what follows these 512 bytes:\n"
_LONGEST_HEADER = 1 << 28
_SECONDS = 60.0  # for the child process, beside one for each of the next
_BYTES_PER_SECOND = 5_000_000


@dataclasses.dataclass(frozen=True)
class Content:
    """What an HDF5 file holds.

    Attributes:
        arrays: numbers, by full name (``layers/dense/vars/0``).
        groups: the attributes of every group, by full name; the root's name is empty. Text, a number or a list of
            these each; other attributes are left out.
        has_digest: whether the file is one that `write_arrays` wrote.
    """

    arrays: dict[str, np.ndarray]
    groups: dict[str, dict[str, Any]]
    has_digest: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        """The root's attributes."""
        return self.groups[""]


def read_arrays(
    path: str | Path,
    name: str = "",
    *,
    kind: str = "weights file",
    remedy: str = "get it again",
    without: Sequence[str] = (),
) -> Content:
    """Reads an HDF5 file's arrays and its groups' attributes.

    Args:
        path: the file.
        name: what messages call it; empty is ``path``.
        kind: what messages say that the file should be.
        remedy: what messages advise when the file is damaged.
        without: names of groups in the root that are looked through neither for arrays nor for attributes.

    Raises:
        UserError: missing, no HDF5, cut off, damaged, or of another content than its digest names; a link or an array
            that reaches into another file; an array that is not numbers; arrays larger than the file can hold; groups
            too deep or too many; or reading took too long.
    """
    path, name = Path(path), name or str(path)
    if not path.is_file():
        raise no_such_file(path, kind, name)
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
    ours = head.startswith(_TITLE)
    try:
        if ours and head != _first_block(sha256(path, skip=_BLOCK)):
            raise Damaged("its SHA-256 is not the one that it names, or another program changed it")
        if ours or head.startswith(_SIGNATURE):  # HDF5 allows a later place, behind a zip archive or a page
            return dataclasses.replace(_read_in_child(path, without), has_digest=ours)
    except Refused as refusal:
        raise UserError(f"{name}: {printable(refusal)}") from None
    except Damaged as damage:
        raise UserError(f"{name}: the HDF5 file is damaged ({printable(damage, 300)}); {remedy}") from None
    raise UserError(f"{name}: expected an HDF5 {kind}, found {head[:8]!r}... instead")


def write_arrays(
    path: str | Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any] | None = None
) -> None:
    """Writes an HDF5 file with its digest, whole or not at all.

    Args:
        path: the file.
        arrays: numbers, by full name; slashes make groups.
        attributes: text or numbers for the root.

    Raises:
        OSError: the disk refused.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(to_bytes(arrays, attributes))


def to_bytes(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any] | None = None) -> memoryview:
    """The bytes of the file that `write_arrays` writes; equal content gives equal bytes."""
    # In memory, because on a full disk HDF5 itself would crash the process. HDF5's first layout of groups (h5py's
    # default): the later one has dense link storage, in which most flipped bits abort the library.
    with h5py.File(content := io.BytesIO(), "w", userblock_size=_BLOCK) as file:
        for name, array in arrays.items():
            file[name] = array
        for name, value in (attributes or {}).items():
            file.attrs[name] = value
    data = content.getbuffer()
    seal(data)
    return data


def seal(data: memoryview) -> None:
    """Fills the first block of a file's bytes with the digest of the others."""
    data[:_BLOCK] = _first_block(hashlib.sha256(data[_BLOCK:]).hexdigest())


def _first_block(digest: str) -> bytes:
    return (_TITLE + digest.encode() + b"\n").ljust(_BLOCK, b"\0")


# The child process that reads


class _Cut(Exception):
    """The child ended, or sent something else, before all was here."""


def _read_in_child(path: Path, without: Sequence[str]) -> Content:
    size = path.stat().st_size
    seconds = _SECONDS + size / _BYTES_PER_SECOND
    process = subprocess.Popen(
        [sys.executable, hdf5_content.__file__, str(path), *without],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads would reserve memory
    )
    late = threading.Event()
    timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
    timer.daemon = True
    timer.start()
    try:
        with process:
            try:
                content = _receive(process.stdout, INFLATION * size)
            except (_Cut, ValueError, TypeError, KeyError, RecursionError):
                content = None
                process.stdout.close()
            errors = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
    finally:
        timer.cancel()
        process.kill()  # does nothing to one that has ended
    if content is not None and process.returncode == 0:
        return content
    if late.is_set():
        raise Refused(f"refused: reading it took more than {seconds:.0f} seconds")
    code = process.returncode
    if errors and code in (hdf5_content.REFUSED, hdf5_content.DAMAGED):
        raise (Refused if code == hdf5_content.REFUSED else Damaged)(json.loads(errors[-1]))
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise Damaged(f"the process that read it ended with {ended}{f': {errors[-1]}' if errors and code == 1 else ''}")


def _receive(stream: BinaryIO, limit: int) -> Content:
    """What `hdf5_content.main` sends, of at most ``limit`` bytes in arrays."""
    length = int.from_bytes(_exactly(stream, bytearray(8)), "little")
    if length > _LONGEST_HEADER:
        raise _Cut
    header = json.loads(bytes(_exactly(stream, bytearray(length))))
    described = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in header["arrays"]]
    if sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in described) > limit:
        raise _Cut
    arrays = {}
    for name, dtype, shape in described:
        arrays[name] = np.empty(shape, dtype.newbyteorder("="))
        _exactly(stream, arrays[name].reshape(-1).view(np.uint8))
    return Content(arrays, header["groups"])


def _exactly(stream: BinaryIO, buffer: bytearray | np.ndarray) -> bytearray | np.ndarray:
    """Fills a buffer from a stream."""
    if stream.readinto(memoryview(buffer)) != len(buffer):  # a buffered stream reads on until it is full
        raise _Cut
    return buffer
