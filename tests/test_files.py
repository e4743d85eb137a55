"""Tests of files: a file is whole or absent after any failure, a folder has one writer, a failure is one clear line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import files
from files import UserError, run_command

KILL_HERE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start_python(program: str, *args: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)], env=environment, text=True, **options)


# Whole files


def test_a_file_is_replaced_at_the_end_only(tmp_path):
    path = tmp_path / "a" / "file.weights.h5"
    files.write_text(path, "old")
    with open(path) as reader:
        with files.whole_file(str(path)) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
            assert temporary.parent == path.parent and temporary.name.endswith(".weights.h5")
        assert path.read_text() == "new" and names(path.parent) == ["file.weights.h5"]
        assert reader.read() == "old", "whoever reads meanwhile reads one of the two"


def test_every_name_that_the_system_takes_can_be_written(tmp_path):
    path = tmp_path / f"{'n' * 243}.weights.h5"
    with files.whole_file(path) as temporary:
        assert temporary.name.endswith(".weights.h5")
        left = temporary.with_name(f".tmp-00000000{temporary.name[13:]}")
        left.write_text("of a process that was killed")
        os.utime(left, (0, 0))
        temporary.write_text("new")
    files.write_text(path, "newer")
    assert path.read_text() == "newer" and names(tmp_path) == [path.name]


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        files.write_text(tmp_path / "folder", "x")
    assert caught.value.filename == str(tmp_path / "folder")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failing_block_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, files.whole_file(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert caught.value is error and getattr(error, "filename", str(path)) == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_disk_that_fills_while_the_file_is_synced_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError) as caught:
        files.write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_real_full_disk_keeps_the_old_file(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError) as caught, files.whole_file(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_killed_writer_keeps_the_old_file_and_the_next_one_removes_its_leftovers(tmp_path):
    path, folder = tmp_path / "file.txt", tmp_path / "folder"
    path.write_text("old")
    program = f"""
import files
with files.whole_folder({str(folder)!r}) as first, files.whole_file({str(path)!r}) as second:
    first.mkdir()
    (first / "a").write_text("ne")
    second.write_text("ne")
    {KILL_HERE}
"""
    assert run_python("-c", program).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(names(tmp_path)) == 3
    with files.whole_file(tmp_path / "other.txt") as temporary:
        temporary.write_text("other")
    assert len(names(tmp_path)) == 4, "leftovers of another file are not our business"
    with files.whole_file(path) as temporary:
        temporary.write_text("new")
        files.write_text(path, "meanwhile")  # a living writer's file stays
    assert path.read_text() == "new"
    with files.whole_folder(folder) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["file.txt", "folder", "other.txt"]


def test_leftovers_from_another_machine_stay_for_a_day(tmp_path):
    left = tmp_path / ".tmp-00000000.1.0123abcd-file.txt"
    left.write_text("of another machine")
    files.write_text(tmp_path / "file.txt", "new")
    assert left.exists()
    os.utime(left, (0, 0))
    files.write_text(tmp_path / "file.txt", "new")
    assert names(tmp_path) == ["file.txt"]


WRITER = """
import sys
import files
who, file, folder = sys.argv[1:]
print("ready", flush=True)
sys.stdin.read(1)
for _ in range(40):
    files.write_text(file, who * 100_000)
    with files.whole_folder(folder) as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text(who * 1000)
"""


def test_two_processes_that_write_the_same_path_never_tear_it(tmp_path):
    path, folder = tmp_path / "file.txt", tmp_path / "folder"
    path.write_text("0" * 100_000)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    writers = [start_python(WRITER, who, path, folder, **pipes) for who in "12"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("x")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        seen.add(text[0])
    for writer in writers:
        assert writer.communicate()[1] == "" and writer.returncode == 0
    assert {"1", "2"} <= seen, "both were seen at work"
    assert len({(folder / name).read_text() for name in "ab"}) == 1 and names(folder) == ["a", "b"]
    assert names(tmp_path) == ["file.txt", "folder"]


def test_a_folder_that_another_process_put_there_meanwhile_is_replaced(tmp_path, monkeypatch):
    folder, replace = tmp_path / "folder", os.replace
    files.write_text(folder / "old", "")

    def replace_late(source, target):
        if target == folder and not folder.exists() and not interfered:
            interfered.append(files.write_text(folder / "others", ""))
        replace(source, target)

    interfered = []
    with files.whole_folder(folder) as temporary:
        files.write_text(temporary / "ours", "")
        monkeypatch.setattr(os, "replace", replace_late)
    assert interfered and names(folder) == ["ours"] and names(tmp_path) == ["folder"]


# Text, JSON, checksums


def test_json_comes_back_as_utf8(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": "ü"}}
    files.write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_bytes()) == value
    files.write_text(tmp_path / "file.txt", "Ü\n")
    assert (tmp_path / "file.txt").read_bytes() == b"\xc3\x9c\n"


def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    for value in (
        float("nan"),
        object(),
    ):
        path = tmp_path / "file.json"
        files.write_json(path, {"accuracy": 0.5})
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, {"accuracy": value})
        assert json.loads(path.read_bytes()) == {"accuracy": 0.5} and names(tmp_path) == ["file.json"]


def test_sha256_is_that_of_all_the_bytes_at_once(tmp_path):
    data = bytes(i * i % 251 for i in range(1000)) * 2200  # more than two blocks
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# One writer


def test_cache_folder_follows_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv("AD_CORRE_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "ad-corre"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert files.cache_folder() == tmp_path / "local" / "ad-corre"


def test_a_folder_has_one_writer_across_processes(tmp_path):
    """Another process holds the folder, is killed with -9, and the folder is free again."""
    folder = tmp_path / "run"
    assert not files.is_taken(folder) and not folder.exists(), "asking makes no folder"
    program = f"import files\nwith files.only_writer({str(folder)!r}):\n    print('held', flush=True)\n    input()"
    other = start_python(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "held\n"
        assert files.is_taken(folder)
        with pytest.raises(UserError, match="run: another process"), files.only_writer(folder):
            pytest.fail("two writers")
        with files.only_writer(tmp_path / "other"):
            pass
    finally:
        other.kill()
        other.communicate()
    assert not files.is_taken(folder)
    for _ in range(2):  # nor does our own first time stay locked
        with files.only_writer(folder):
            assert files.is_taken(folder)


def test_a_failing_writer_removes_the_folders_that_it_made_and_left_empty(tmp_path):
    def fail(folder, *names):
        with pytest.raises(KeyError), files.only_writer(folder):
            for name in names:
                (folder / name).touch()
            raise KeyError

    (tmp_path / "before").mkdir()
    fail(tmp_path / "before")
    fail(tmp_path / "a" / "b")
    assert {path.name for path in tmp_path.rglob("*")} - {".lock"} == {"before"}
    fail(tmp_path / "c" / "d", "work.txt")
    assert (tmp_path / "c" / "d" / "work.txt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_folder_stays_held_when_its_lock_file_is_removed(tmp_path):
    program = f"import files\nwith files.only_writer({str(tmp_path)!r}):\n    print('held', flush=True)\n    input()"
    with start_python(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        (tmp_path / ".lock").unlink()
        assert files.is_taken(tmp_path)
        for _ in range(2):  # the second time there is a lock file again
            with pytest.raises(UserError, match="another process"), files.only_writer(tmp_path):
                pytest.fail("two writers")
        assert files.is_taken(tmp_path)
        other.communicate("\n")
    assert not files.is_taken(tmp_path)


def test_a_file_system_that_cannot_lock_folders_still_has_locks(tmp_path, monkeypatch):
    """As NFS."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if os.path.isdir(descriptor):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.only_writer(tmp_path):
        assert files.is_taken(tmp_path)
    assert not files.is_taken(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    for code in (
        errno.ENOLCK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
    ):
        fcntl = pytest.importorskip("fcntl")

        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(UserError, match=f"{tmp_path}: .*no file locks"), files.only_writer(tmp_path):
            pytest.fail("without a lock")


def test_locks_need_no_fcntl():
    """As on Windows: importing must not fail there."""
    done = run_python("-c", "import sys; sys.modules['fcntl'] = None; import files; print(files.only_writer)")
    assert done.returncode == 0, done.stderr


# From a failure to the user


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (UserError("a.csv: expected 3 columns, found 2"), "a.csv: expected 3 columns, found 2"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/state.h5"), "the disk is full while writing runs/x/"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; get access to it, or choose"),
        (OSError(errno.EROFS, "Read-only file system", "data/x/.lock"), "data/x: Read-only file system; get access"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"a\n"), r"a\n: No such file or directory"),
        (OSError(errno.EBADF, "Bad file descriptor", 3), "[Errno 9] Bad file descriptor: 3"),
        (OSError("of a library"), "of a library"),
    ],
)
def test_a_users_failure_is_one_line_and_code_2(monkeypatch, capsys, error, facts):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["command.py"])
    assert run_command(main) == 2
    out, message = capsys.readouterr()
    assert out == "" and message.startswith(f"error: {facts}") and message.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["command.py", "--debug"])
    assert run_command(main) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "in main" in shown and shown.endswith(message)


def test_success_is_0_ctrl_c_130_and_our_own_bugs_keep_their_traceback(capsys):
    def stop():
        raise KeyboardInterrupt

    def fail():
        raise ZeroDivisionError

    assert run_command(lambda: None) == 0 and capsys.readouterr() == ("", "")
    assert run_command(stop) == 130 and "Traceback" not in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_command(fail)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_a_callback_of_the_garbage_collector_stops_too(name, code):
    """Python ignores an exception there, and JAX has such a callback."""
    program = (
        "import gc, os, signal, time\n"
        "from files import run_command\n"
        "def callback(phase, info):\n"
        "    gc.callbacks.clear()\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(0.1)\n"
        "def main():\n"
        "    gc.callbacks.append(callback)\n"
        "    gc.collect()\n"
        "    time.sleep(60)\n"
        "raise SystemExit(run_command(main))"
    )
    done = run_python("-c", program)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_reader_that_goes_away_is_no_failure():
    """As in `python test.py ... | head -1`."""
    program = (
        "from files import run_command\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print('line')\n"
        "raise SystemExit(run_command(main))\n"
    )
    with start_python(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_character_that_the_output_cannot_encode_is_no_failure():
    program = "from files import run_command\nraise SystemExit(run_command(lambda: print('a\\udce9\\u2192b')))\n"
    for encoding, shown in (("utf-8", "a\\udce9\u2192b\n"), ("cp1252", "a\\udce9\\u2192b\n")):
        done = run_python("-c", program, env_changes={"PYTHONIOENCODING": encoding}, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


CATCHES = """
import signal, sys, time
from files import run_command
def main():
    try:
        print("started", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("cleaned up")
        raise KeyboardInterrupt  # as the video command does
raise SystemExit(run_command(main))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM that can be caught")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_stops_a_command_as_ctrl_c_does(number, code):
    with start_python(CATCHES, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, message = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "cleaned up\n")
    assert message.count("\n") == 2 and "Traceback" not in message
    assert ("SIGTERM" in message and "same command" in message) == (number == signal.SIGTERM)


def test_a_signal_that_somebody_else_has_taken_stays_theirs():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert before == signal.SIG_DFL  # the tests before have left nothing
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGTERM)) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(KeyboardInterrupt), files._sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_name_that_is_not_utf_8_is_printed_with_its_codes():
    code = "from files import run_command; raise SystemExit(run_command(lambda: print('caf\\udce9')))"
    done = run_python("-c", code, env_changes={"PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (0, "caf\\udce9\n"), done.stderr
