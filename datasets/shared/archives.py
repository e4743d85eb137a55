"""Reads the files of a release from a folder, a zip or a tar, without unpacking anything."""

from __future__ import annotations

import bisect
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from files import UserError, sha256
from reading import limits
from reading.text import printable

EDGE = 1 << 20  # an archive's stamp hashes this many bytes at its start and at its end
_READ = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and LZMA cannot be unpacked in bounded memory
_FILE_MANAGERS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "lost+found"}
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_TO_UNPACK = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}


class SourceFiles:
    """The files of a folder, a zip or a tar; any number of threads may read them at a time.

    Args:
        path: the folder, zip or tar. A compressed tar is refused: it can be read only from its beginning.
        patterns: which files of a folder count (`glob`, ``**`` is any depth); of an archive all do, whatever
            folder they lie in.

    Raises:
        UserError: missing, of another kind, damaged, encrypted, compressed in a way that Python cannot read, or it
            holds a name twice, a name that points outside of it, or more than `limits.ARCHIVE_MEMBERS` files.
    """

    def __init__(self, path: str | Path, patterns: Sequence[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{path}: no such file or folder; expected a folder, a zip or a tar")
        self._files: _Folder | _Zip | _Tar
        if self.path.is_dir():
            self._files = _Folder(self.path, patterns)
        elif not self.path.is_file():  # a pipe that nobody writes to would be waited for
            raise UserError(f"{path}: expected a folder, a zip or a tar, found a pipe or a device")
        elif is_zip(self.path):
            self._files = _Zip(self.path)
        else:
            self._files = _Tar(self.path)

    @property
    def names(self) -> list[str]:
        """The files' relative names, with ``/``, sorted, without what file managers leave (`is_leftover`)."""
        return [name for name in self._files.names if not is_leftover(name)]

    def open(self, name: str, limit: int = limits.TABLE_BYTES) -> BinaryIO:
        """Opens one file for reading.

        Raises:
            UserError: here and while reading: the archive is damaged there, or the file has more than ``limit`` bytes.
        """
        with damaged(self.path):
            file = self._files.open(name)
        return bounded(file, self.path, name, limit)

    def read(self, name: str, limit: int = limits.IMAGE_BYTES) -> bytes:
        """One file's bytes.

        Raises:
            UserError: the archive is damaged there, or the file has more than ``limit`` bytes.
        """
        with self.open(name, limit) as file:
            return file.read()

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        """`file_identity` of an archive; for a folder, number and bytes of the files named.

        A folder's ``sha256`` is over ``<name> NUL <size> NUL <bytes>`` of each, in the order given.
        """
        if self.path.is_file():
            return file_identity(self.path)
        digest, size = hashlib.sha256(), 0
        for name in names:
            data = self.read(name)
            digest.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
            size += len(data)
        return {
            "name": printable(self.path.resolve().name),
            "files": len(names),
            "bytes": size,
            "sha256": digest.hexdigest(),
        }

    def stamp(self) -> dict[str, Any]:
        """Tells in seconds whether a source is the same as before, where `identity` would read all of it.

        Returns:
            For a folder its ``name``, ``files``, ``bytes``, ``listing_sha256`` over ``<name> NUL <size> NUL`` of each
            file, and ``times_sha256`` over their modification times. For an archive its ``name``, ``bytes``,
            ``edges_sha256`` over its first and last mebibyte, and ``modified_ns``. A copy of the source keeps
            all but the last of them.
        """
        return self._files.stamp()


def bounded(
    file: BinaryIO, path: Path, name: str, limit: int = limits.TABLE_BYTES, kind: str = "zip"
) -> io.BufferedReader:
    """A reader of another file up to a limit, which turns what a damaged archive raises into a `UserError`.

    Args:
        file: opened for reading.
        path: the archive's, for messages.
        name: the file's, for messages.
        limit: bytes that may be read.
        kind: what the archive is, for messages.
    """
    return io.BufferedReader(_Bounded(file, path, name, limit, kind), 1 << 16)


class _Bounded(io.RawIOBase):
    def __init__(self, file: BinaryIO, path: Path, name: str, limit: int, kind: str):
        self._file, self._path, self._name, self._limit, self._kind = file, path, name, limit, kind
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with damaged(self._path, self._kind):
            count = self._file.readinto(buffer)
        self._done += count
        limits.check_size(self._done, self._limit, f"{self._path}: {printable(self._name)}", "a file")
        return count

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()


class _Folder:
    def __init__(self, path: Path, patterns: Sequence[str]):
        self.path = path
        _check_listed(path, patterns)
        found = {name for pattern in patterns for name in glob.iglob(pattern, root_dir=path, recursive=True)}
        self.names: list[str] = []
        self._sizes: list[int] = []
        self._times: list[int] = []
        for name in sorted(found):
            status = os.stat(f"{path}/{name}")
            if stat.S_ISREG(status.st_mode):
                self.names.append(name)
                self._sizes.append(status.st_size)
                self._times.append(status.st_mtime_ns)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb", buffering=0)

    def stamp(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for name, size in zip(self.names, self._sizes, strict=True):
            listing.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return {
            "name": printable(self.path.resolve().name),
            "files": len(self.names),
            "bytes": sum(self._sizes),
            "listing_sha256": listing.hexdigest(),
            "times_sha256": hashlib.sha256(np.array(self._times, "<i8").tobytes()).hexdigest(),
        }


def _check_listed(path: Path, patterns: Sequence[str]) -> None:
    """Refuses a folder that we may not list: glob passes over it, and its images would be missing in silence.

    Not of ``**``, which is used where a table says which images there are.
    """
    split = [pattern.split("/") for pattern in patterns if "**" not in pattern]
    parents = {"/".join([*parts[:depth], ""]) for parts in split for depth in range(1, len(parts))}
    for name in ("", *(name for parent in parents for name in glob.iglob(parent, root_dir=path))):
        if not os.access(path / name, os.R_OK | os.X_OK) and not is_leftover(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / name))


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        with damaged(path):
            self._zip = zipfile.ZipFile(path)
            entries = [self._checked(entry) for entry in self._zip.infolist() if not entry.is_dir()]
        self.names = _once(path, (entry.filename for entry in entries))

    def _checked(self, entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
        check_inside(self.path, entry.filename)
        name = printable(entry.filename)
        if entry.flag_bits & 1:
            raise UserError(f"{self.path}: {name} is encrypted; expected a zip without a password")
        if entry.compress_type not in _READ and not is_leftover(entry.filename):
            method = zipfile.compressor_names.get(entry.compress_type, f"method {entry.compress_type}")
            raise UserError(
                f"{self.path}: {name} is compressed with {method}, which cannot be read here; expected Deflate or no "
                "compression: unpack the zip (7-Zip and unzip can) and give the folder"
            )
        return entry

    def open(self, name: str) -> BinaryIO:
        return self._zip.open(name)

    def stamp(self) -> dict[str, Any]:
        return archive_stamp(self.path)


class _Tar:
    """Its index, 40 microseconds a file, is made when it is first asked for: the stamp does without."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            head = file.read(512)
        for magic, command in _COMPRESSED.items():
            if head.startswith(magic):
                raise UserError(
                    f"{path}: expected a folder, a zip or a plain tar; a compressed one can be read only from its "
                    f"beginning: run {command} on it and give the file that it leaves (a .tar is not unpacked)"
                )
        for magic, kind in _TO_UNPACK.items():
            if head.startswith(magic):
                raise UserError(f"{path}: expected a folder, a zip or a tar, found a {kind} archive: unpack it first")
        self._index: tuple[list[str], np.ndarray] | None = None

    @property
    def names(self) -> list[str]:
        return self._indexed()[0]

    def open(self, name: str) -> BinaryIO:
        names, places = self._indexed()
        row = bisect.bisect_left(names, name)
        if row == len(names) or names[row] != name:
            raise FileNotFoundError(errno.ENOENT, "no such file in the tar", f"{self.path}/{name}")
        offset, size = places[row].tolist()
        return _Part(self.path, offset, size)

    def _indexed(self) -> tuple[list[str], np.ndarray]:
        if self._index is None:
            members = list(_tar_members(self.path))
            names, places = _once(self.path, (name for name, _ in members)), dict(members)
            self._index = names, np.array([places[name] for name in names], np.int64).reshape(-1, 2)
        return self._index

    def stamp(self) -> dict[str, Any]:
        return archive_stamp(self.path)


class _Part(io.RawIOBase):
    """A part of a file, opened on its own, so that any number of threads may read."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this is
        self._file.seek(offset)
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left])
        if not count and self._left and len(buffer):
            raise EOFError(f"{self._left:,} bytes are missing at its end")
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _once(path: Path, names: Iterator[str]) -> list[str]:
    """The names, sorted; refuses one that is there twice, because readers differ in which of the two they take."""
    found = sorted(names)
    if len(found) > limits.ARCHIVE_MEMBERS:
        raise UserError(f"{path}: expected at most {limits.ARCHIVE_MEMBERS:,} files, found {len(found):,}")
    for name, following in itertools.pairwise(found):
        if name == following:
            raise UserError(f"{path}: expected every file once, found {printable(name)} twice; download it again")
    return found


def is_leftover(name: str) -> bool:
    """Whether file managers leave such a file behind: ``.DS_Store``, ``__MACOSX/``, ``Thumbs.db``, ``desktop.ini``."""
    return any(part.startswith(".") or part.lower() in _FILE_MANAGERS for part in name.split("/"))


def _tar_members(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and place and bytes of the content, of each file in a tar."""
    try:
        with damaged(path, "tar"), tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise tarfile keeps a kilobyte per file
                if member.issym() or member.islnk():  # passed over, a part of the images would be missing
                    raise UserError(
                        f"{path}: {printable(member.name)} is a link, which is not followed in a tar; unpack it and "
                        "give the folder, or make it with tar --dereference --hard-dereference"
                    )
                if member.isreg():
                    name = member.name.removeprefix("./")
                    check_inside(path, name)
                    if member.issparse():
                        raise UserError(
                            f"{path}: {printable(name)} is a sparse file; expected a tar made without --sparse"
                        )
                    yield name, (member.offset_data, member.size)
            # tarfile takes anything that is no header as the end; the real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: expected a folder, a zip or a tar, or the tar is cut off or damaged ({printable(error, 200)}); "
            "download it again"
        ) from None


def check_inside(path: Path, name: str) -> None:
    """Refuses the name of an archive's member that is absolute or goes up."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(
            f"{path}: expected names inside the archive, found {printable(repr(name), 200)}, which points outside of "
            "it; do not use this file, download the release again"
        )


def file_identity(path: Path) -> dict[str, Any]:
    """A file's ``name``, ``bytes`` and ``sha256``, for `meta.json`."""
    return {"name": printable(path.name), "bytes": path.stat().st_size, "sha256": sha256(path)}


def archive_stamp(path: Path) -> dict[str, Any]:
    """`SourceFiles.stamp` of a file."""
    status = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(EDGE))
        file.seek(max(0, status.st_size - EDGE))
        digest.update(file.read(EDGE))
    return {
        "name": printable(path.name),
        "bytes": status.st_size,
        "edges_sha256": digest.hexdigest(),
        "modified_ns": status.st_mtime_ns,
    }


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK" or path.suffix.lower() == ".zip"


@contextlib.contextmanager
def damaged(path: Path, kind: str = "zip") -> Iterator[None]:
    """Turns whatever Python's archive readers raise for a damaged file into a `UserError`.

    That is zlib.error, EOFError, IndexError, struct.error, RecursionError, MemoryError and more. An OSError with
    another number than EINVAL (a seek before the start) is the disk's and passes.
    """
    try:
        yield
    except (UserError, tarfile.TarError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = printable(error, 200) or type(error).__name__
        raise UserError(f"{path}: the {kind} is cut off or damaged ({reason}); download it again") from None
