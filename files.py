"""Writes files whole or not at all, one writer at a time, and reports failures as one clear message."""

from __future__ import annotations

import _thread
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from reading.text import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".lock"
_PATIENCE_SECONDS = 0.5  # because `is_taken` holds the lock for an instant
_PROBE_SECONDS = 0.05  # because two processes may ask `is_taken` at the same time
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_STALE_SECONDS = 24 * 3600.0  # older temporary files are abandoned, on whichever machine they were written
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{8})\.([0-9]+)\.[0-9a-f]{8}-(.+)")  # host, process, name


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` when the block succeeds.

    The temporary name (``.tmp-<host>.<process>.<random>-<name>``) keeps the suffix, because Keras and NumPy look at
    it, and belongs to this call only, so two writers never share a file. When the block raises, the temporary file is
    removed and ``path`` is what it was before. A killed process leaves its temporary file; the next writer of ``path``
    removes it (if that is on another machine, after a day).
    """
    with _temporary(path) as temporary:
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except OSError as error:
            if str(error.filename) in ("None", str(temporary)):  # nobody has asked for the temporary name
                error.filename = str(path)
            raise


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, where the block makes a folder, and renames it when the block succeeds.

    As `whole_file`; a folder at ``path`` is replaced, and there is an instant in between in which neither is there.
    """
    with _temporary(path) as temporary, _temporary(path) as old:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _sync(file)
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, old)
            try:
                os.replace(temporary, path)
                return
            except OSError:
                if not temporary.exists() or not Path(path).exists():
                    if old.exists():
                        os.replace(old, path)
                    raise
                _remove(old)  # another process put its folder there in the meantime: replace that


@contextlib.contextmanager
def _temporary(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` that no other call gets; what is there when the block ends is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = path.with_name(f".tmp-{_host()}.{os.getpid()}.{secrets.token_hex(4)}-{_shortened(path.name)}")
    try:
        yield temporary
    finally:
        _remove(temporary)


def _shortened(name: str) -> str:
    """A long name as a digest and its end, because a temporary name is longer and 255 bytes are the most."""
    return name if len(os.fsencode(name)) <= 200 else f"{zlib.crc32(os.fsencode(name)):08x}{name[-40:]}"


def _remove_stale(path: Path) -> None:
    """Removes the temporary files of ``path`` that dead processes have left."""
    for entry in os.scandir(path.parent):
        found = _TEMPORARY.fullmatch(entry.name)
        if found and found[3] == _shortened(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process removes it as well
                if _is_stale(entry, found[1], int(found[2])):
                    _remove(Path(entry.path))


def _is_stale(entry: os.DirEntry[str], host: str, process: int) -> bool:
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS:
        return True
    if host != _host() or os.name == "nt":  # on Windows signal 0 would stop the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process of another user
        return False
    return False


def _host() -> str:
    """This machine, 8 hexadecimal digits: a process number is valid on its own machine only."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def sha256(path: str | Path, skip: int = 0) -> str:
    """The SHA-256 of a file's bytes after the first ``skip``, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(skip)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def no_such_file(path: str | Path, kind: str, name: str = "") -> UserError:
    """The error about a path that is no file.

    Args:
        path: the path.
        kind: what was expected, such as "weights file".
        name: what the message calls the path; empty is ``path``.
    """
    if Path(path).is_dir():
        return UserError(f"{name or path}: expected a {kind}, found a folder; name a file in it")
    return UserError(f"{name or path}: no such {kind}")


def cache_folder() -> Path:
    """The folder for what can be fetched again; ``AD_CORRE_CACHE`` overrides the system's rule."""
    if folder := os.environ.get("AD_CORRE_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ad-corre"


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Holds ``folder`` for this process while the block runs; the lock ends with the process, even if it is killed.

    Folders that this makes are removed when the block raises and has left nothing in them.

    Raises:
        UserError: another process is writing there, or the file system has no locks.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _acquired(folder, _PATIENCE_SECONDS)
        if held is None:
            raise UserError(f"{folder}: another process is writing there; wait for it or choose another folder")
        with held:
            yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process has come to use the folder
            if made and {path.name for path in folder.iterdir()} <= {_LOCK}:
                (folder / _LOCK).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise


def is_taken(folder: str | Path) -> bool:
    """Whether a process, this one or another, holds ``folder`` now (`only_writer`).

    Raises:
        UserError: the file system has no locks.
    """
    if not Path(folder).is_dir():
        return False
    if not (Path(folder) / _LOCK).exists():  # never held, or the file was removed
        held = _acquired_folder(Path(folder), _PROBE_SECONDS)
    else:
        try:
            held = _acquired(Path(folder), _PROBE_SECONDS)
        except PermissionError:  # a folder that we may only read
            return False
    if held is not None:
        held.close()
    return held is None


def _acquired(folder: Path, seconds: float) -> contextlib.ExitStack | None:
    """The folder's locks, held until the stack is closed; None when another one holds one of them for so long.

    The lock of the file `.lock` works on network disks too. The one of the folder itself stays when somebody removes
    that file under a running process.
    """
    # No soft lock: it would outlive a process that is killed on another machine.
    lock = filelock.FileLock(folder / _LOCK, thread_local=False, fallback_to_soft=False)
    with contextlib.ExitStack() as held:
        try:
            lock.acquire(timeout=seconds, poll_interval=0.01)
        except filelock.Timeout:
            return None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"{folder}: the file system has no file locks ({error}), which keep two processes from writing there; "
                "choose a folder on a local disk, or have the network disk mounted with locks"
            ) from None
        held.callback(lock.release)
        same = _acquired_folder(folder, seconds)
        if same is None:
            return None
        held.push(same)
        return held.pop_all()


def _acquired_folder(folder: Path, seconds: float) -> contextlib.ExitStack | None:
    """The lock of the folder itself, as `_acquired`; nothing is held where folders cannot be locked.

    Windows is such a place: there a file that is open cannot be removed. NFS is another.
    """
    held = contextlib.ExitStack()
    if fcntl is None:
        return held
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return held
    held.callback(os.close, opened)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > deadline:
                held.close()
                return None
            time.sleep(0.01)
        except OSError:
            held.close()
            return contextlib.ExitStack()


# --- failures


_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_LONGEST_MESSAGE = 4_000  # characters; lists of images are longer than most


class UserError(Exception):
    """A mistake that the user can correct.

    The message says what is wrong, where, what was expected, what was received and the remedy.
    Every command prints it on one line of standard error and ends with exit code 2. What it quotes of files and their
    names is made printable (`text.printable`).
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _LONGEST_MESSAGE)


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived: what is cleaned up after Ctrl-C is cleaned up after it too."""


def run_command(main: Callable[[], None]) -> int:
    """Runs ``main`` and turns a user's mistake into one line on standard error.

    What standard output cannot encode (the name of a file that is not UTF-8, or a character that is not in a Windows
    code page) is printed as its escape code.

    SIGTERM, which schedulers and `reproduce.py` send, stops ``main`` as Ctrl-C does; a second one ends the process.

    Args:
        main: the command; takes nothing, reads ``sys.argv`` itself.

    Returns:
        The exit code: 0 when ``main`` returned, 2 for a `UserError` or a failing disk, 130 for Ctrl-C, 143 for SIGTERM.
        Anything else is a bug of ours and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none; what no terminal can show is no failure
            stream.reconfigure(errors="backslashreplace")
    with _sigterm_raises() as arrived:
        try:
            main()
        except KeyboardInterrupt as error:
            if arrived or isinstance(error, Terminated):
                print("\nstopped by SIGTERM; the same command goes on", file=sys.stderr)
                return 128 + signal.SIGTERM
            print("\nstopped by Ctrl-C", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output went away (`... | head`)
            sys.stderr.close()
            return 0
        except (UserError, OSError) as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            print(f"error: {_message(error)}", file=sys.stderr)
            return 2
    return 0


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[list[int]]:
    """Raises `Terminated` in the block at the first SIGTERM; yields the signals that have arrived.

    Where somebody else has taken the signal, or in a thread that cannot, nothing changes.
    """
    arrived: list[int] = []

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        arrived.append(number)
        raise Terminated

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield arrived
        return

    def ignored(unraisable):
        """Stops again, a moment later, where Python had to drop the exception: in a destructor or a callback of gc."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return shown(unraisable)
        number = signal.SIGINT
        if issubclass(unraisable.exc_type, Terminated):
            number = signal.SIGTERM
            signal.signal(number, stop)
        later = threading.Timer(0.1, _thread.interrupt_main, [number])
        later.daemon = True
        later.start()

    signal.signal(signal.SIGTERM, stop)
    shown, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = shown


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full while writing {error.filename or 'a file'}: "
            "nothing half-written was kept; free some space and run the same command again"
        )
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and error.strerror:
        path = Path(os.fsdecode(error.filename))
        path = path.parent if path.name == _LOCK else path  # nobody asked for the lock's file
        remedy = "; get access to it, or choose another place" if error.errno in _NO_ACCESS else ""
        return printable(f"{path}: {error.strerror}{remedy}")
    return printable(error)
