"""Fetches a model file into the user's cache folder, whole and checked, or not at all."""

from __future__ import annotations

import dataclasses
import sys
import urllib.error
import urllib.request
from pathlib import Path

from files import UserError, cache_folder, sha256, whole_file

TIMEOUT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A published file, pinned by its bytes.

    Attributes:
        name: its name in the cache folder.
        url: where it is fetched.
        size: in bytes.
        sha256: 64 hexadecimal digits.
    """

    name: str
    url: str
    size: int
    sha256: str


def fetch(model: ModelFile, option: str) -> Path:
    """The path of a model file in the cache folder, fetched when it is not there or damaged.

    Args:
        model: which one.
        option: the option that names such a file instead, for the message.

    Raises:
        UserError: no network, or the server sent something else; nothing is kept then.
    """
    path = cache_folder() / model.name
    if path.is_file() and _is(model, path):
        return path
    print(f"fetching {model.name} ({model.size:,} bytes) into {path.parent}", file=sys.stderr)
    remedy = f"fetch {model.url} yourself and name the file with {option}"
    try:
        with whole_file(path) as temporary:
            with urllib.request.urlopen(model.url, timeout=TIMEOUT_SECONDS) as answer:
                # One byte more than expected is enough to see that it is another file.
                temporary.write_bytes(answer.read(model.size + 1))
            if not _is(model, temporary):
                size = temporary.stat().st_size
                found = f"more than {model.size:,}" if size > model.size else f"{size:,}"
                raise UserError(
                    f"{model.url}: expected {model.size:,} bytes with SHA-256 {model.sha256}, received {found} bytes "
                    f"with {sha256(temporary)}; nothing was kept; {remedy}"
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"{model.url}: cannot be fetched ({getattr(error, 'reason', error)}); {remedy}") from None
    return path


def _is(model: ModelFile, path: Path) -> bool:
    return path.stat().st_size == model.size and sha256(path) == model.sha256
