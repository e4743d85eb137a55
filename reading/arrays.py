"""Reads .npy and .npz files strictly: nothing is unpickled, and the header must fit the file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files import UserError
from reading import limits
from reading.text import printable

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
_KINDS = "biufUS"  # numbers and text; no Python objects, no records
# What numpy.save writes. "L" marks whole numbers in files that Python 2 wrote on Windows.
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?[a-zA-Z][0-9]{0,6})',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(([0-9L,\s]{0,400})\),?\s*\}\s*"
)
_RECORDS_OR_OBJECTS = re.compile(r"'descr':\s*(?:\[|'[<>|=]?[OV])")

Shape = tuple[int | None, ...]  # None: any length


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a .npy file.

    Attributes:
        shape: of the array; its product may be larger than what the file holds.
        dtype: of the array: numbers, bool or text.
        fortran_order: whether the first axis varies fastest.
        offset: bytes before the data.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a whole file with this header."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> Header:
    """Reads the header of a .npy file from its start; no part of it is evaluated.

    Raises:
        ValueError: no .npy file of format version 1 or 2, cut off, or not an array of plain numbers or text.
    """
    start = file.read(8)
    if not start.startswith(_MAGIC) or len(start) < 8:
        raise ValueError(f"no .npy file: it begins with {start[:6]!r}")
    version = start[6], start[7]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy format version {version[0]}.{version[1]}")
    width, form = (2, "<H") if version == (1, 0) else (4, "<I")
    length = file.read(width)
    if len(length) < width:
        raise ValueError("the file is cut off in its header")
    (count,) = struct.unpack(form, length)
    if count > _LONGEST_HEADER:
        raise ValueError(f"a header of {count:,} bytes, expected at most {_LONGEST_HEADER:,}")
    text = file.read(count)
    if len(text) < count:
        raise ValueError("the file is cut off in its header")
    return _parsed(text.decode("latin1"), len(start) + width + count)


def _parsed(text: str, offset: int) -> Header:
    found = _HEADER.fullmatch(text)
    if found is None:
        kind = "Python objects (a pickle) or records" if _RECORDS_OR_OBJECTS.search(text) else "a damaged header"
        raise ValueError(f"{kind}: {printable(text.strip(), 80)}")
    descr, fortran_order, axes = found.groups()
    try:
        dtype = np.dtype(descr)
        shape = tuple(int(axis.strip().removesuffix("L")) for axis in axes.split(",") if axis.strip())
    except (TypeError, ValueError) as error:
        raise ValueError(f"a damaged header: {printable(error, 80)}") from None
    if dtype.kind not in _KINDS or dtype.itemsize == 0 or len(shape) > 8 or any(axis >= 2**48 for axis in shape):
        what = "Python objects (a pickle)" if dtype.hasobject else f"{dtype} of shape {shape}"
        raise ValueError(what)
    return Header(shape, dtype, fortran_order == "True", offset)


def open_array(path: str | Path, dtype: type, shape: Shape, *, mapped: bool = False) -> np.ndarray:
    """Opens a .npy file that must hold an array of a known type and shape in C order.

    Args:
        path: the file.
        dtype: expected type, in this machine's byte order.
        shape: expected shape; None for an axis of any length.
        mapped: memory-map the data, read-only, instead of reading it. Indexing a map ends the process with SIGBUS when
            the file is cut meanwhile; `Rows` reads the same rows and raises instead.

    Raises:
        UserError: the file is missing, no whole .npy file of plain numbers, or of another type, shape or order.
    """
    try:
        with open(os.fspath(path), "rb") as file:  # a str: numpy.memmap keeps no other name
            header = read_header(file)
            size = os.fstat(file.fileno()).st_size
            _check(header, np.dtype(dtype), shape, size)
            if mapped:
                return np.memmap(file, header.dtype, "r", header.offset, header.shape)
            data = file.read(header.num_bytes - header.offset)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; prepare the data set again") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; prepare the data set again") from None
    return np.frombuffer(data, header.dtype).reshape(header.shape)


def _check(header: Header, dtype: np.dtype, shape: Shape, size: int) -> None:
    same = len(header.shape) == len(shape) and all(
        expected in (None, axis) for expected, axis in zip(shape, header.shape, strict=True)
    )
    order = "Fortran order" if header.fortran_order else "C order"
    if header.dtype != dtype or not same or header.fortran_order:
        raise ValueError(
            f"expected {dtype} {_words(shape)} in C order, found {header.dtype} {_words(header.shape)} in {order}"
        )
    if size != header.num_bytes:
        raise ValueError(
            f"not a whole .npy file: expected {header.num_bytes:,} bytes for {header.dtype} {_words(header.shape)}, "
            f"found {size:,}"
        )


def _words(shape: Shape) -> str:
    return f"({', '.join('any' if axis is None else f'{axis}' for axis in shape)})"


class Rows:
    """Rows of a memory-mapped array, read from its file into memory of our own; several threads may ask at a time.

    A page fault of a memory map reads the disk's whole read-ahead (8 MB on some) for one image, counts as memory of
    the process, and ends the process (SIGBUS) when the file was cut since it was opened. This reads what is asked for,
    and raises.

    Args:
        mapped: a memory map of a whole file in C order (`open_array`).

    Attributes:
        shape, dtype: the array's.
    """

    def __init__(self, mapped: np.memmap):
        self.shape, self.dtype = mapped.shape, mapped.dtype
        self._offset = mapped.offset
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._file = open(mapped.filename, "rb", buffering=0)  # noqa: SIM115 - open as long as this is
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Iterable[int] | np.ndarray) -> np.ndarray:
        """The rows as an array of our own: one row for an int, otherwise (B, ...).

        Raises:
            UserError: the file has become shorter.
            IndexError: there is no such row.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._consecutive(start, max(0, stop - start))
            rows = range(start, stop, step)
        elif isinstance(rows, (int, np.integer)):
            return self[[int(rows)]][0]
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for row, place in zip(rows.tolist(), found, strict=True):
            if not -len(self) <= row < len(self):
                raise IndexError(f"expected a row below {len(self)}, received {row}")
            self._fill(place, row % len(self))
        return found

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _consecutive(self, start: int, count: int) -> np.ndarray:
        found = np.empty((count, *self.shape[1:]), self.dtype)
        self._fill(found, start)
        return found

    def _fill(self, place: np.ndarray, row: int) -> None:
        """Fills C-contiguous memory from row ``row`` on."""
        view, start = memoryview(place.reshape(-1).view(np.uint8)), self._offset + row * self._row_bytes
        done = 0
        while done < len(view):
            count = self._read(view[done:], start + done)
            if not count:
                raise UserError(
                    f"{self._file.name}: ends before row {row + done // self._row_bytes}; it was cut since it was "
                    "opened: prepare the data set again"
                )
            done += count

    def _read(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._lock:  # Windows has no reading at a place
            self._file.seek(start)
            return self._file.readinto(view)


def read_npz(path: str | Path, arrays: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Reads named arrays of a .npz file.

    Args:
        path: the file.
        arrays: name -> (kinds, axes): the letters of the kinds of dtype that it may have (``i`` int, ``f`` float, as
            `numpy.dtype.kind`) and its number of axes.

    Returns:
        name -> array, in this machine's byte order; floats are finite.

    Raises:
        UserError: the file is damaged, an array is missing, of another kind, not finite, or larger than
            `limits.PREDICTIONS_BYTES`.
    """
    if Path(path).exists() and not Path(path).is_file():  # of a device zipfile would read without end
        raise UserError(f"{path}: expected a .npz file, found a folder, a pipe or a device")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _member(archive, name, *form) for name, form in arrays.items()}
    except FileNotFoundError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # zipfile lets through errors of zlib, struct and others for a damaged file
        raise UserError(f"{path}: expected a whole .npz file, found a damaged one ({printable(error, 200)})") from None


def _member(archive: zipfile.ZipFile, name: str, kinds: str, axes: int) -> np.ndarray:
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"expected an array {name!r}, found none")
    with archive.open(f"{name}.npy") as file:
        header = read_header(file)
        if header.dtype.kind not in kinds or len(header.shape) != axes:
            raise UserError(
                f"{name}: expected {axes} axes of kind {kinds}, found {header.dtype} {_words(header.shape)}"
            )
        size = header.num_bytes - header.offset
        limits.check_size(size, limits.PREDICTIONS_BYTES, name, "an array")
        data = file.read(size + 1)
    if len(data) != size:
        raise UserError(f"{name}: expected {size:,} bytes of data, found {len(data):,} or more; the file is cut off")
    order = "F" if header.fortran_order else "C"
    array = np.frombuffer(data, header.dtype).reshape(header.shape, order=order).astype(header.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{name}: expected finite numbers, found NaN or infinity")
    return array
