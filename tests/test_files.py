"""Is a file whole or absent after any failure, and does a failure reach the user as one clear line?"""

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


# Whole files


def test_a_file_appears_with_its_folders_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.weights.h5"
    with files.whole_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == path.parent and temporary.name.endswith(".weights.h5")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file.weights.h5"]


def test_a_file_is_replaced_in_the_end_only(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with open(path) as reader:
        with files.whole_file(str(path)) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"
            temporary.write_text("new")
        assert path.read_text() == "new"
        assert reader.read() == "old"  # whoever reads meanwhile reads one of the two


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failing_block_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, files.whole_file(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_failure_before_anything_is_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), files.whole_file(tmp_path / "file.txt"):
        raise ValueError
    assert names(tmp_path) == []


def test_a_disk_error_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, files.whole_file(tmp_path / "file.txt"):
        disk_full()
    assert caught.value.filename == str(tmp_path / "file.txt")


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    program = f"""
import files
with files.whole_file({str(path)!r}) as temporary:
    temporary.write_text("ne")
    {KILL_HERE}
"""
    assert run_python("-c", program).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    files.write_text(path, "new")  # and what the kill left is in nobody's way
    assert path.read_text() == "new" and names(tmp_path) == ["file.txt"]


# Text, JSON, checksums


def test_text_is_utf8(tmp_path):
    files.write_text(tmp_path / "file.txt", "Überraschung\n")
    assert (tmp_path / "file.txt").read_bytes() == b"\xc3\x9cberraschung\n"


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": "ü"}}
    files.write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value == files.read_json(tmp_path / "file.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), object()])
def test_what_json_cannot_say_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "file.json"
    files.write_json(path, {"accuracy": 0.5})
    with pytest.raises((ValueError, TypeError)):
        files.write_json(path, {"accuracy": value})
    assert files.read_json(path) == {"accuracy": 0.5} and names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"accuracy,0.5"])
def test_a_file_that_is_not_json_is_the_users_mistake(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.json: expected JSON"):
        files.read_json(path)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 17])
def test_sha256_is_that_of_all_the_bytes_at_once(tmp_path, size):
    data = bytes(i * i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


# One writer


def test_a_folder_has_one_writer_across_processes(tmp_path):
    """Another process holds the folder, is killed with -9, and the folder is free again."""
    folder = tmp_path / "run"
    program = f"import files\nwith files.only_writer({str(folder)!r}):\n    print('held', flush=True)\n    input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="run: another process is writing there"), files.only_writer(folder):
            pytest.fail("two writers")
    finally:
        other.kill()
        other.communicate()
    with files.only_writer(folder):
        pass
    with files.only_writer(folder):  # nor does our own first time stay locked
        pass


def test_two_folders_have_two_writers(tmp_path):
    with files.only_writer(tmp_path / "a"), files.only_writer(tmp_path / "b"):
        assert names(tmp_path) == ["a", "b"]


# From a failure to the user


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a.csv: expected 3 columns, found 2"), "error: a.csv: expected 3 columns, found 2\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/state.h5"),
            "error: the disk is full while writing runs/x/state.h5: nothing half-written was kept; "
            "free some space and run the same command again\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: [Errno 13] Permission denied: 'a'\n"),
    ],
)
def test_a_users_failure_is_one_line_and_code_2(monkeypatch, capsys, error, message):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["command.py"])
    assert run_command(main) == 2
    assert capsys.readouterr() == ("", message)
    monkeypatch.setattr("sys.argv", ["command.py", "--debug"])
    assert run_command(main) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "in main" in shown and shown.endswith(message)


def test_a_full_disk_under_a_whole_file_is_one_line_that_names_the_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["command.py"])
    monkeypatch.setattr(os, "fsync", disk_full)
    path = tmp_path / "result.json"
    assert run_command(lambda: files.write_json(path, {})) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the disk is full while writing {path}: ") and error.count("\n") == 1
    assert names(tmp_path) == []


def test_success_is_silent_and_0(capsys):
    assert run_command(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_is_130_without_a_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    assert run_command(main) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_bugs_keep_their_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)


def test_a_reader_that_goes_away_is_no_failure():
    """As in `python test.py ... | head -1`."""
    program = (
        "from files import run_command\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print('line')\n"
        "raise SystemExit(run_command(main))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_real_full_disk_keeps_the_old_file(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    (tmp_path / ".tmp-file.txt").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        files.write_text(path, "new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]
