"""Opens HDF5 files safely: refuses truncated or damaged ones, links to other files, and arrays larger than the file.

An HDF5 file can point at other files (external links, external storage, virtual data sets) and declare arrays far
larger than itself. A model file does neither, so all of that is refused before any array is read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import h5py

from files import UserError

# How many times its own size a file may declare in arrays. Trained weights compress to half at best, so 16 is generous.
INFLATION = 16


@contextlib.contextmanager
def open_hdf5(path: str | Path, name: str = "") -> Iterator[h5py.File]:
    """Opens an HDF5 file for reading, after a look at every link and every array's header.

    Args:
        path: the file.
        name: what messages call it; empty is ``path``.

    Raises:
        UserError: missing, no HDF5, cut off or damaged; a link or an array that reaches into another file; an array
            that is not numbers, or arrays larger than the file can hold. Also when reading fails while the file is
            open.
    """
    path, name = Path(path), name or str(path)
    if not path.is_file():
        raise UserError(f"{name}: no such weights file")
    if not h5py.is_hdf5(path):
        with open(path, "rb") as raw:
            head = raw.read(8)
        raise UserError(f"{name}: expected an HDF5 weights file (.weights.h5), found {head!r}... instead")
    try:
        with h5py.File(path, "r") as file:  # HDF5 itself refuses a file that was cut off, with both sizes
            _look_through(file, path.stat().st_size, name)
            yield file
    # h5py raises the library's errors as any of these.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: the HDF5 file is damaged ({reason}); get it again") from None


def _look_through(file: h5py.File, size: int, name: str) -> None:
    """Visits every link and every array's header; follows nothing that leads out of the file."""
    declared = 0
    groups, seen = [file["/"]], set()
    while groups:
        group = groups.pop()
        for key in group:
            place = f"{group.name.rstrip('/')}/{key}"
            _check_link(group, key, place, name)
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:  # one object under two names: a ring of groups would never end
                raise UserError(f"{name}: {place} is a second name of another object; refused: no model file has any")
            seen.add(address)
            if isinstance(item, h5py.Group):
                groups.append(item)
            else:
                declared += _declared_bytes(item, place, name)
            if declared > INFLATION * size:
                raise UserError(
                    f"{name}: refused: up to {place} its arrays declare {declared:,} bytes, more than "
                    f"{INFLATION} times the file's {size:,}"
                )


def _check_link(group: h5py.Group, key: str, place: str, name: str) -> None:
    try:
        link = group.get(key, getlink=True)
    except TypeError:  # a kind of link that h5py does not know
        link = None
    if isinstance(link, h5py.ExternalLink):
        raise UserError(f"{name}: {place} is an external link to {link.filename}; refused: nothing outside is read")
    if isinstance(link, h5py.SoftLink):
        raise UserError(f"{name}: {place} is a soft link to {link.path}; refused: no model file has any")
    if not isinstance(link, h5py.HardLink):
        raise UserError(f"{name}: {place} is a link of an unknown kind; refused")


def _declared_bytes(item: h5py.Dataset, place: str, name: str) -> int:
    """The bytes that reading an array would take."""
    if not isinstance(item, h5py.Dataset):
        raise UserError(f"{name}: {place} is neither a group nor an array; refused: no model file has any")
    if item.is_virtual:
        raise UserError(f"{name}: {place} is a virtual data set; refused: nothing outside the file is read")
    if item.external:
        elsewhere = item.external[0][0]
        raise UserError(f"{name}: {place} is stored in {elsewhere}; refused: nothing outside the file is read")
    if item.dtype.kind not in "fiu" or item.shape is None:
        raise UserError(f"{name}: {place}: expected an array of numbers, found {item.dtype} {item.shape}")
    return math.prod(item.shape) * item.dtype.itemsize
