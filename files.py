"""Files reach the disk whole or not at all, one writer at a time; failures reach the user as one clear message."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LOCK = ".lock"
_PATIENCE_SECONDS = 0.5  # `is_taken` holds the lock for an instant


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` when the block succeeds.

    The temporary name (``.tmp-<name>``) keeps the suffix, which Keras and NumPy look at, and is the
    same every time, so a killed process leaves at most one behind and the next one overwrites it.
    When the block raises, the temporary file is removed and ``path`` is what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, where the block makes a folder, and renames it when the block succeeds.

    As `whole_file`; a folder at ``path`` is replaced, and there is an instant in between in which neither is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copies a file's bytes, whole or not at all."""
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Holds ``folder`` for this process while the block runs; the lock goes with the process.

    Raises:
        UserError: another process is writing there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        patience = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise UserError(
                        f"{folder}: another process is writing there; wait for it or choose another folder"
                    ) from None
            time.sleep(0.02)
        yield


def is_taken(folder: str | Path) -> bool:
    """Whether a process, this one or another, holds ``folder`` now (`only_writer`)."""
    try:
        with open(Path(folder) / _LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# --- failures


class UserError(Exception):
    """Something the user can put right.

    The message says what is wrong, where, what was expected, what was received and the remedy.
    Every command prints it on one line of standard error and ends with exit code 2.
    """


def run_command(main: Callable[[], None]) -> int:
    """Runs ``main`` and turns a user's mistake into one line on standard error.

    Args:
        main: the command; takes nothing, reads ``sys.argv`` itself.

    Returns:
        The exit code: 0 when ``main`` returned, 2 for a `UserError` or a failing disk, 130 for Ctrl-C.
        Anything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        sys.stderr.close()
        return 0
    except (UserError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 2
    return 0


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full while writing {error.filename or 'a file'}: "
            "nothing half-written was kept; free some space and run the same command again"
        )
    return str(error)
