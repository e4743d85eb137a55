"""Reads the files of a release from a folder, a zip or a tar, without unpacking anything."""

from __future__ import annotations

import bisect
import contextlib
import errno
import glob
import hashlib
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from files import UserError, sha256

EDGE = 1 << 20  # an archive's stamp hashes this many bytes at its start and at its end
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class SourceFiles:
    """The files of a folder, a zip or a tar; any number of threads may read them at a time.

    Args:
        path: the folder, zip or tar. A compressed tar is refused: it can be read only from its beginning.
        patterns: which files of a folder count (`glob`, ``**`` is any depth); of an archive all do, whatever
            folder they lie in.

    Raises:
        UserError: missing, of another kind, damaged, encrypted, or it holds names that point outside of it.
    """

    def __init__(self, path: str | Path, patterns: Sequence[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{path}: no such file or folder; expected a folder, a zip or a tar")
        self._files: _Folder | _Zip | _Tar
        if self.path.is_dir():
            self._files = _Folder(self.path, patterns)
        elif is_zip(self.path):
            self._files = _Zip(self.path)
        else:
            self._files = _Tar(self.path)

    @property
    def names(self) -> list[str]:
        """The files' relative names, with ``/``, sorted."""
        return self._files.names

    def open(self, name: str) -> BinaryIO:
        """Opens one file for reading; of a damaged zip, both raise what `damaged_zip` translates."""
        return self._files.open(name)

    def read(self, name: str) -> bytes:
        """One file's bytes.

        Raises:
            UserError: the archive is damaged there.
        """
        with damaged_zip(self.path), self.open(name) as file:
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
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            size += len(data)
        return {"name": self.path.resolve().name, "files": len(names), "bytes": size, "sha256": digest.hexdigest()}

    def stamp(self) -> dict[str, Any]:
        """Tells in seconds whether a source is the same as before, where `identity` would read all of it.

        Returns:
            For a folder its ``name``, ``files``, ``bytes``, ``listing_sha256`` over ``<name> NUL <size> NUL`` of each
            file, and ``times_sha256`` over their modification times. For an archive its ``name``, ``bytes``,
            ``edges_sha256`` over its first and last mebibyte, and ``modified_ns``. A copy of the source keeps
            all but the last of them.
        """
        return self._files.stamp()


class _Folder:
    def __init__(self, path: Path, patterns: Sequence[str]):
        self.path = path
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
        return open(self.path / name, "rb")

    def stamp(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for name, size in zip(self.names, self._sizes, strict=True):
            listing.update(f"{name}\0{size}\0".encode())
        return {
            "name": self.path.resolve().name,
            "files": len(self.names),
            "bytes": sum(self._sizes),
            "listing_sha256": listing.hexdigest(),
            "times_sha256": hashlib.sha256(np.array(self._times, "<i8").tobytes()).hexdigest(),
        }


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        with damaged_zip(path):
            self._zip = _open_zip(path)
        self.names = sorted({self._checked(entry).filename for entry in self._zip.infolist() if not entry.is_dir()})

    def _checked(self, entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
        check_inside(self.path, entry.filename)
        if entry.flag_bits & 1:
            raise UserError(f"{self.path}: {entry.filename} is encrypted; expected a zip without a password")
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
                    f"beginning: run {command} on it and give the .tar that it leaves (that one is not unpacked)"
                )
        self._file = open(path, "rb")  # noqa: SIM115 - open as long as this is
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
        return io.BytesIO(os.pread(self._file.fileno(), size, offset))

    def _indexed(self) -> tuple[list[str], np.ndarray]:
        if self._index is None:
            places = dict(_tar_members(self.path))
            names = sorted(places)
            self._index = names, np.array([places[name] for name in names], np.int64).reshape(-1, 2)
        return self._index

    def stamp(self) -> dict[str, Any]:
        return archive_stamp(self.path)


def _tar_members(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and place and bytes of the content, of each file in a tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise tarfile keeps a kilobyte per file
                if member.isreg():
                    name = member.name.removeprefix("./")
                    check_inside(path, name)
                    if member.issparse():
                        raise UserError(f"{path}: {name} is a sparse file; expected a tar made without --sparse")
                    yield name, (member.offset_data, member.size)
            # tarfile takes anything that is no header as the end; the real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: expected a folder, a zip or a tar, or the tar is cut off or damaged ({error}); download it again"
        ) from None


def check_inside(path: Path, name: str) -> None:
    """Refuses the name of an archive's member that is absolute or goes up."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(
            f"{path}: expected names inside the archive, found {name!r}, which points outside of it; "
            "do not use this file, download the release again"
        )


def file_identity(path: Path) -> dict[str, Any]:
    """A file's ``name``, ``bytes`` and ``sha256``, for `meta.json`."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def archive_stamp(path: Path) -> dict[str, Any]:
    """`SourceFiles.stamp` of a file."""
    status = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(EDGE))
        file.seek(max(0, status.st_size - EDGE))
        digest.update(file.read(EDGE))
    return {
        "name": path.name,
        "bytes": status.st_size,
        "edges_sha256": digest.hexdigest(),
        "modified_ns": status.st_mtime_ns,
    }


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK" or path.suffix.lower() == ".zip"


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except UnicodeDecodeError as error:  # of a damaged name
        raise zipfile.BadZipFile(str(error)) from None


@contextlib.contextmanager
def damaged_zip(path: Path) -> Iterator[None]:
    """Turns the errors that `zipfile` raises for a damaged file into a `UserError`."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a damaged offset before the start
            raise
        raise UserError(f"{path}: the zip is cut off or damaged ({error}); download it again") from None
