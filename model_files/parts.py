"""Cuts a file into parts with a manifest, for places that limit the size of a file, and joins them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from files import UserError, whole_file, write_json
from reading.json_files import OPEN, read_json

MANIFEST = "weights.parts.json"
_PREFIX = "weights.part"
# The names that files had before; their manifests have the same form.
_MANIFESTS = (MANIFEST, "weights.f16.json")


class _Whole(TypedDict):
    """What a manifest says of the whole file, or of a part."""

    __pydantic_config__ = OPEN
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(_Whole):
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # a manifest reaches into no other folder


class _Manifest(_Whole):
    parts: list[_Part]


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
    for old in folder.glob(f"{_PREFIX}[0-9]*"):
        old.unlink()
    content = memoryview(Path(path).read_bytes())
    starts = range(0, len(content), part_bytes)
    digits = max(2, len(str(len(starts) - 1)))
    listed = []
    for number, start in enumerate(starts):
        part = content[start : start + part_bytes]
        name = f"{_PREFIX}{number:0{digits}d}"
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
    try:
        whole = read_json(path, _Manifest)
    except UserError as error:
        raise UserError(f"{error}: expected a manifest of parts; get it again") from None
    if sum(part["bytes"] for part in whole["parts"]) != whole["bytes"]:
        raise UserError(f"{path}: expected parts of {whole['bytes']:,} bytes in all, found another sum; get it again")
    digest = hashlib.sha256()
    with whole_file(target) as temporary:
        with open(temporary, "wb") as file:
            for part in whole["parts"]:
                content = _read(path.parent / part["name"], part)
                digest.update(content)
                file.write(content)
        if (found := digest.hexdigest()) != whole["sha256"]:
            raise UserError(
                f"{path}: the parts together: expected SHA-256 {whole['sha256']}, found {found}; get it again"
            )


def _read(path: Path, part: _Part) -> bytes:
    """A part's content, of the length and digest that the manifest gives it."""
    if not path.is_file():
        raise UserError(f"{path}: this part is missing; get it again")
    if (size := path.stat().st_size) != part["bytes"]:
        raise UserError(f"{path}: expected {part['bytes']:,} bytes, found {size:,}; get it again")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != part["sha256"]:
        raise UserError(f"{path}: expected SHA-256 {part['sha256']}, found {found}; get it again")
    return content


def _manifest(source: Path) -> Path:
    if not source.is_dir():
        found = [source] if source.is_file() else []
    else:
        found = [source / name for name in _MANIFESTS if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: expected a manifest, or a folder with {MANIFEST}, found none; get it again")
    return found[0]
