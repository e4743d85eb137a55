"""Cuts a file into parts with a manifest, for places that limit the size of a file, and joins them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from files import UserError, read_json, whole_file, write_json

MANIFEST = "weights.parts.json"
_PART = "weights.part"
# The names that files had before; their manifests have the same form.
_MANIFESTS = (MANIFEST, "weights.f16.json")
_NAME = re.compile(r"[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a manifest says of a part, or of the whole file."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, values: Any, name: str = "") -> _Piece:
        """Reads one from JSON; TypeError or KeyError where that is not one."""
        piece = cls(name or values["name"], values["bytes"], values["sha256"])
        if type(piece.bytes) is not int or not _SHA256.fullmatch(piece.sha256):
            raise TypeError
        if not name and not _NAME.fullmatch(piece.name):  # a manifest reaches into no other folder
            raise TypeError
        return piece

    def check(self, content: bytes, path: Path) -> None:
        """Refuses a content of another length or digest."""
        if len(content) != self.bytes:
            raise UserError(f"{path}: expected {self.bytes:,} bytes, found {len(content):,}; get it again")
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise UserError(f"{path}: expected SHA-256 {self.sha256}, found {found}; get it again")


def is_in_parts(path: str | Path) -> bool:
    """Whether a path is a folder, or has the ending of a manifest."""
    return Path(path).is_dir() or Path(path).suffix == ".json"


def split(path: str | Path, folder: str | Path, part_bytes: int) -> list[Path]:
    """Cuts a file into ``weights.part00``, ``weights.part01`` and so on, and writes their manifest last.

    Parts that are in the folder are replaced, and none of them stay. `cat weights.part*` joins them too.

    Args:
        path: the file.
        folder: where the parts go; it is made.
        part_bytes: the most bytes in a part.

    Returns:
        The parts.
    """
    folder = Path(folder)
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    for old in folder.glob(f"{_PART}[0-9]*"):
        old.unlink()
    content = memoryview(Path(path).read_bytes())
    starts = range(0, len(content), part_bytes)
    digits = max(2, len(str(len(starts) - 1)))
    listed = []
    for number, start in enumerate(starts):
        part = content[start : start + part_bytes]
        name = f"{_PART}{number:0{digits}d}"
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(part)
        listed.append(_described(part, name=name))
    write_json(folder / MANIFEST, {**_described(content), "parts": listed})
    return [folder / part["name"] for part in listed]


def _described(content: memoryview, **name: str) -> dict[str, Any]:
    return {**name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def join(source: str | Path, target: str | Path) -> None:
    """Puts the parts of a file together, whole or not at all.

    Args:
        source: the manifest, or the folder with it.
        target: the file to write.

    Raises:
        UserError: the manifest or a part is missing or damaged, or of another content than the manifest says.
    """
    path = _manifest(Path(source))
    values = read_json(path)
    try:
        whole, pieces = _Piece.of(values, str(path)), [_Piece.of(part) for part in values["parts"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: expected a manifest of parts (bytes, sha256, parts of name, bytes and sha256), found "
            "something else; get it again"
        ) from None
    if sum(piece.bytes for piece in pieces) != whole.bytes:
        raise UserError(f"{path}: expected parts of {whole.bytes:,} bytes in all, found another sum; get it again")
    digest = hashlib.sha256()
    with whole_file(target) as temporary:
        with open(temporary, "wb") as file:
            for piece in pieces:
                part = path.parent / piece.name
                content = _read(part, piece.bytes)
                piece.check(content, part)
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != whole.sha256:
            raise UserError(
                f"{path}: the parts together: expected SHA-256 {whole.sha256}, found {digest.hexdigest()}; get it again"
            )


def _read(part: Path, size: int) -> bytes:
    """A part's content; one byte more than ``size`` where it is longer."""
    if not part.is_file():
        raise UserError(f"{part}: this part is missing; get it again")
    with open(part, "rb") as file:
        return file.read(min(size, part.stat().st_size) + 1)


def _manifest(source: Path) -> Path:
    if not source.is_dir():
        found = [source] if source.is_file() else []
    else:
        found = [source / name for name in _MANIFESTS if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: expected a manifest, or a folder with {MANIFEST}, found none; get it again")
    return found[0]
