"""Reads what an HDF5 file holds, after a look at every link and header; as a program, in a process of its own.

An HDF5 file can point at other files (external links, external storage, virtual data sets) and declare arrays far
larger than itself. A model file does neither, so all of that is refused before any array is read. One flipped bit can
also abort the process inside the HDF5 library. Therefore `safe_hdf5` reads a file in a child process, which is this
module as a program. It imports h5py and NumPy alone, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import h5py
import numpy as np

# How many times its own size a file may declare in arrays. Trained weights compress to half at best, so 16 is generous.
INFLATION = 16
DEEPEST = 32  # groups inside each other; Keras's files have less than ten
MOST_OBJECTS = 50_000  # groups and arrays; the largest networks of keras.applications have some thousands
REFUSED, DAMAGED = 3, 4  # the program's exit codes
_BASE_MEMORY = 1 << 28  # bytes beside those of the arrays
# What h5py and NumPy raise for damaged files.
FAILURES = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, MemoryError)

Groups = dict[str, dict[str, Any]]


class Refused(Exception):
    """A file that holds what no model file holds."""


class Damaged(Exception):
    """A file that cannot be read."""


def look_through(file: h5py.File, size: int, without: Iterable[str] = ()) -> tuple[dict[str, h5py.Dataset], Groups]:
    """Visits every link, every header and every group's attributes; follows nothing that leads out of the file.

    Args:
        file: the open file.
        size: its bytes.
        without: names of groups in the root that are left out of the result.

    Returns:
        The arrays, not read yet, and the groups' attributes, both by full name without the first slash. The root
        group's name is empty.

    Raises:
        Refused: a link or an array that reaches into another file, an array that is not numbers, arrays larger than
            the file can hold, groups too deep or too many.
    """
    root = file["/"]
    arrays, groups, seen, declared = {}, {"": _attributes(root)}, set(), 0
    waiting = [(root, "", 0)]
    while waiting:
        group, prefix, depth = waiting.pop()
        for key in group:
            name = f"{prefix}{key}"
            _check_link(group, key, name)
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:  # one object under two names: a ring of groups would never end
                raise Refused(f"/{name} is a second name of another object; refused: no model file has any")
            seen.add(address)
            if len(seen) > MOST_OBJECTS or depth == DEEPEST:
                raise Refused(
                    f"refused: at /{name} more than {MOST_OBJECTS:,} groups and arrays, or more than {DEEPEST} groups "
                    "inside each other"
                )
            left_out = not prefix and key in without
            if isinstance(item, h5py.Group):
                waiting += [] if left_out else [(item, f"{name}/", depth + 1)]
                groups |= {} if left_out else {name: _attributes(item)}
                continue
            declared += _declared_bytes(item, name)
            if declared > INFLATION * size:
                raise Refused(
                    f"refused: up to /{name} its arrays declare {declared:,} bytes, more than {INFLATION} times the "
                    f"file's {size:,}"
                )
            arrays[name] = item
    return arrays, groups


def _check_link(group: h5py.Group, key: str, name: str) -> None:
    try:
        link = group.get(key, getlink=True)
    except TypeError:  # a kind of link that h5py does not know
        link = None
    if isinstance(link, h5py.ExternalLink):
        raise Refused(f"/{name} is an external link to {link.filename}; refused: nothing outside is read")
    if isinstance(link, h5py.SoftLink):
        raise Refused(f"/{name} is a soft link to {link.path}; refused: no model file has any")
    if not isinstance(link, h5py.HardLink):
        raise Refused(f"/{name} is a link of an unknown kind; refused")


def _declared_bytes(item: h5py.Dataset, name: str) -> int:
    """The bytes that reading an array would take, or one of its chunks, which can be larger than the array."""
    if not isinstance(item, h5py.Dataset):
        raise Refused(f"/{name} is neither a group nor an array; refused: no model file has any")
    if item.is_virtual:
        raise Refused(f"/{name} is a virtual data set; refused: nothing outside the file is read")
    if item.external:
        elsewhere = item.external[0][0]
        raise Refused(f"/{name} is stored in {elsewhere}; refused: nothing outside the file is read")
    if item.dtype.kind not in "fiu" or item.dtype.itemsize > 8 or item.shape is None:
        raise Refused(f"/{name}: expected an array of numbers, found {item.dtype} {item.shape}")
    return max(math.prod(item.shape), math.prod(item.chunks or ())) * item.dtype.itemsize


def _attributes(group: h5py.Group) -> dict[str, Any]:
    """A group's attributes that are text, numbers or lists of these."""
    values = {name: _plain(group.attrs[name]) for name in group.attrs}
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """An attribute's value as JSON has it; bytes that are not UTF-8 become lone surrogates, as in h5py's own texts."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.ravel().tolist()] if value.dtype.kind in "fiubSUO" else None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, (str, int, float)) else None


def read(dataset: h5py.Dataset) -> np.ndarray:
    """An array in this machine's byte order."""
    array = np.asarray(dataset[()])
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


# The child process


def main() -> int:
    """Sends a file's content to standard output: the header's length (8 bytes), the header as JSON, the arrays' bytes.

    Arguments: the file, then names of groups to leave out. The reason of a failure is the last line of standard error.
    """
    _, path, *without = sys.argv
    size = os.path.getsize(path)
    _limit_memory(size)
    try:
        with h5py.File(path, "r") as file:  # HDF5 itself refuses a file that was cut off, with both sizes
            arrays, groups = look_through(file, size, without)
            header = {"arrays": [[name, item.dtype.str, item.shape] for name, item in arrays.items()], "groups": groups}
            _send(sys.stdout.buffer, json.dumps(header).encode(), map(read, arrays.values()))
    except Refused as refusal:
        code, reason = REFUSED, str(refusal)
    except FAILURES as error:
        code, reason = DAMAGED, reason_of(error)
    else:
        return 0
    print(json.dumps(reason), file=sys.stderr)
    return code


def reason_of(error: Exception) -> str:
    """What a failure of the library says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _send(stream: BinaryIO, header: bytes, arrays: Iterator[np.ndarray]) -> None:
    stream.write(len(header).to_bytes(8, "little"))
    stream.write(header)
    for array in arrays:
        stream.write(array.reshape(-1).view(np.uint8))
    stream.flush()


def _limit_memory(size: int) -> None:
    """Lets this process allocate what an honest file of ``size`` bytes can need; Linux alone enforces it."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = used + _BASE_MEMORY + 2 * INFLATION * size
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


if __name__ == "__main__":
    sys.exit(main())
