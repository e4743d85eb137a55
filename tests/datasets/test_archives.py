"""Tests of datasets.shared.archives: folders, zips and tars are read in place; damaged ones are refused."""

from __future__ import annotations

import concurrent.futures
import errno
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import warnings
import zipfile
import zlib

import pytest
from conftest import run_python

from datasets.shared import archives
from datasets.shared.archives import SourceFiles, damaged, file_identity
from files import UserError

FILES = {"b/2.txt": b"two", "a/1.txt": b"one", "top.csv": b"1,2"}


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_a_folder_and_a_zip_of_it_hold_the_same(tmp_path):
    folder = write_folder(tmp_path / "folder", {**FILES, "deep/er/3.txt": b"not asked for"})
    for path in (folder, write_zip(tmp_path / "files.zip", {**FILES, "empty/": b""})):
        files = SourceFiles(path, ("*.csv", "*/*.txt"))
        assert files.names == ["a/1.txt", "b/2.txt", "top.csv"]
        assert [files.read(name) for name in files.names] == [b"one", b"two", b"1,2"]
        with files.open("a/1.txt") as file:
            assert file.read(2) == b"on"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """glob would pass over it, and the images of a class would be missing."""
    folder = write_folder(tmp_path / "folder", {**FILES, "lost+found/x": b""})
    for closed in ("b", "folder"):
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: path.name not in (closed, "lost+found"))
        with pytest.raises(PermissionError, match=closed):
            SourceFiles(folder, ("*/*.txt",))
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lost+found")
    assert SourceFiles(folder, ("*/*.txt",)).names == ["a/1.txt", "b/2.txt"]


def test_identity_of_a_zip_and_of_a_folder(tmp_path):
    path = write_zip(tmp_path / "files.zip", FILES)
    data = path.read_bytes()
    of_file = {"name": "files.zip", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert file_identity(path) == SourceFiles(path, ()).identity(["a/1.txt"]) == of_file

    folder = write_folder(tmp_path / "folder", FILES)
    (folder / "b/2.txt").write_bytes(b"TWOS")
    expected = hashlib.sha256(b"a/1.txt\0003\0oneb/2.txt\0004\0TWOS").hexdigest()
    identity = SourceFiles(folder, ("*/*.txt",)).identity(["a/1.txt", "b/2.txt"])
    assert identity == {"name": "folder", "files": 2, "bytes": 7, "sha256": expected}


def test_names_that_point_outside_are_refused(tmp_path):
    for name in (
        "a/../../evil.csv",
        "/etc/evil.csv",
        "..\\evil.csv",
        "C:\\evil.csv",
    ):
        path = write_zip(tmp_path / "evil.zip", {"a.csv": b"", name: b"x"})
        with pytest.raises(UserError, match="points outside"):
            SourceFiles(path, ())


def test_an_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "secret.zip", {"a.csv": b"x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # general purpose flag, bit 0, in the central directory
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.csv is encrypted"):
        SourceFiles(path, ())


def test_a_cut_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "cut.zip", FILES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut\.zip: the zip is cut off or damaged"):
        SourceFiles(path, ())


def test_a_flipped_byte_in_a_zip_is_noticed(tmp_path):
    path = tmp_path / "flipped.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that only the checksum can tell
        archive.writestr("a.csv", b"0123456789")
    path.write_bytes(path.read_bytes().replace(b"01234", b"01334"))
    with pytest.raises(UserError, match=r"damaged.*CRC"):
        SourceFiles(path, ()).read("a.csv")


def test_a_damaged_directory_of_a_zip_is_noticed(tmp_path):
    for patches in (
        [(b"PK\1\2", 8, b"\x00\x08"), (b"PK\1\2", 46, b"\xe9")],  # the flags say UTF-8, the name is not
        [(b"PK\1\2", 46, b"\0")],  # the name ends before it begins
        [(b"PK\1\2", 10, b"\x63\x00")],  # an unknown compression
        [(b"PK\1\2", 42, b"\xff\xff\xff\x7f")],  # the file lies beyond the end
        [(b"PK\5\6", 16, b"\xff\xff\x00\x00")],  # the directory lies so late that the file lies before the start
    ):
        path = write_zip(tmp_path / "damaged.zip", {"a.csv": b"x"})
        data = bytearray(path.read_bytes())
        for record, place, value in patches:
            start = data.index(record) + place
            data[start : start + len(value)] = value
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"damaged\.zip: (the zip is cut off or damaged|a\.csv is compressed with method 99)"
        ):
            SourceFiles(path, ()).read("a.csv")


def test_whatever_a_reader_of_archives_raises_is_one_message_with_the_name_of_the_file(tmp_path):
    raised = (zlib.error("Error -3"), EOFError(), IndexError("x"), RecursionError(), MemoryError(), OSError(22, "x"))
    for error in (*raised, lzma.LZMAError("x"), gzip.BadGzipFile("x")):
        with pytest.raises(UserError, match=r"a\.zip: the zip is cut off or damaged \(.+\)"), damaged("a.zip"):
            raise error
    with pytest.raises(OSError, match="No space left"), damaged(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
            for data in (b"one", b"two"):
                archive.writestr("a.csv", data)
    with pytest.raises(UserError, match=r"twice\.zip: expected every file once, found a\.csv twice"):
        SourceFiles(tmp_path / "twice.zip", ())
    path = write_tar(tmp_path / "twice.tar", {"a.csv": b"one"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("./a.csv"))
    with pytest.raises(UserError, match=r"twice\.tar: expected every file once, found a\.csv twice"):
        _ = SourceFiles(path, ()).names


@pytest.mark.parametrize(
    ("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma"), (9, "deflate64")]
)
def test_other_compressions_are_named_with_the_remedy(tmp_path, method, name):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if method == 9 else method) as archive:
        archive.writestr("a.csv", b"x")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 10] = method
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.csv is compressed with {name}, .*Deflate.*unpack the zip"):
        SourceFiles(path, ())


def test_what_file_managers_leave_is_passed_over(tmp_path):
    left = {name: b"" for name in ("a/Thumbs.db", "desktop.ini", "__MACOSX/a/1.txt", "a/.DS_Store", "a/._1.txt")}
    for path in (write_folder(tmp_path / "folder", FILES | left), write_zip(tmp_path / "a.zip", FILES | left)):
        assert SourceFiles(path, ("*", "*/*")).names == sorted(FILES)


def test_a_file_name_that_is_not_utf_8(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/folder/a")
    with open(os.fsencode(tmp_path) + b"/folder/a/caf\xe9.txt", "wb") as file:
        file.write(b"one")
    files = SourceFiles(tmp_path / "folder", ("*/*",))
    (name,) = files.names
    assert files.read(name) == b"one"
    assert len(files.stamp()["listing_sha256"]) == len(files.identity([name])["sha256"]) == 64


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_a_file_above_its_limit_is_refused_before_the_memory_is_full(tmp_path, kind):
    """Zeros are a thousand times smaller in a zip; as a sparse file they take no room in a tar or folder."""
    size = 3_000_000_000
    path = tmp_path / kind
    if kind == "zip":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("a", "w") as file,
        ):
            for _ in range(25):
                file.write(bytes(10_000_000))
    elif kind == "tar":
        entry = tarfile.TarInfo("a")
        entry.size = size
        path.write_bytes(entry.tobuf())
        os.truncate(path, 512 + size + 10_240 & ~511)
    else:
        path.mkdir()
        (path / "a").touch()
        os.truncate(path / "a", size)
    code = """
import sys
from datasets.shared.archives import SourceFiles
from files import UserError
try:
    SourceFiles(sys.argv[1], ("*",)).read("a")
except UserError as error:
    print(error)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    done = run_python("-c", code, path)
    assert f"{path}: a: expected a file of at most 200,000,000 bytes, found" in done.stdout, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 700_000, "kilobytes"


# --- tars -----------------------------------------------------------------------------------------------------------


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_a_tar_holds_the_same_as_a_folder(tmp_path):
    long_name = "deep/" * 40 + "3.txt"  # longer than a plain header's field
    path = write_tar(tmp_path / "files.tar", {f"./{name}": data for name, data in FILES.items()})
    with tarfile.open(path, "a") as archive:
        archive.add(write_folder(tmp_path / "folder", {"c/4.txt": b"four"}) / "c", "c")
        entry = tarfile.TarInfo(long_name)
        entry.size = 1500
        archive.addfile(entry, io.BytesIO(bytes(range(250)) * 6))
    files = SourceFiles(path, ())
    assert files.names == ["a/1.txt", "b/2.txt", "c/4.txt", long_name, "top.csv"]
    assert [files.read(name) for name in files.names] == [b"one", b"two", b"four", bytes(range(250)) * 6, b"1,2"]
    with files.open("a/1.txt") as file:
        assert file.read(2) == b"on"
    with pytest.raises(FileNotFoundError, match=r"other\.txt"):
        files.read("other.txt")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_refused(tmp_path, kind):
    """tar writes the second of two hard links as a link: passed over, one of two equal images would be missing."""
    path = write_tar(tmp_path / "files.tar", FILES)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = kind, "a/1.txt"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"files\.tar: link\.txt is a link.*unpack it"):
        _ = SourceFiles(path, ()).names


def test_names_of_a_tar_that_point_outside_are_refused(tmp_path):
    files = SourceFiles(write_tar(tmp_path / "evil.tar", {"a.csv": b"", "a/../../evil.csv": b"x"}), ())
    with pytest.raises(UserError, match=r"evil\.tar: .*points outside"):
        _ = files.names


def test_a_cut_tar_is_refused(tmp_path):
    """A tar of two short files is header, content, header, content, 512 bytes each, and an end of zeros."""
    for left in (
        600,
        1024,
        1536,
    ):
        path = write_tar(tmp_path / "cut.tar", {"a.txt": b"x" * 500, "b.txt": b"y" * 400})
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(UserError, match=r"cut\.tar: .*cut off or damaged"):
            _ = SourceFiles(path, ()).names


def test_a_damaged_header_in_a_tar_is_noticed(tmp_path):
    """Python's own reader takes it for the end."""
    path = write_tar(tmp_path / "damaged.tar", {"a.txt": b"x", "b.txt": b"y"})
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged\.tar: .*damaged"):
        _ = SourceFiles(path, ()).names


def test_a_compressed_tar_names_the_command(tmp_path):
    path = write_tar(tmp_path / "files.tar.x", FILES, "w:xz")
    with pytest.raises(UserError, match=r"plain tar.*run unxz on it"):
        SourceFiles(path, ())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("no archive")
    with pytest.raises(UserError, match="expected a folder, a zip or a tar"):
        _ = SourceFiles(tmp_path / "a.txt", ()).names
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; expected a folder, a zip or a tar"):
        SourceFiles(tmp_path / "nowhere", ())
    (tmp_path / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(UserError, match=r"a\.7z: .*found a 7z archive: unpack it first"):
        SourceFiles(tmp_path / "a.7z", ())
    with pytest.raises(UserError, match=f"{os.devnull}: .*found a pipe or a device"):
        SourceFiles(os.devnull, ())


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_many_threads_read_one_archive(tmp_path, write):
    contents = {f"{number}.bin": bytes([number]) * (1000 + 77 * number) for number in range(100)}
    files = SourceFiles(write(tmp_path / "archive", contents), ())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(files.read, [*contents] * 10)) == [*contents.values()] * 10


# --- stamps ---------------------------------------------------------------------------------------------------------


def test_the_stamp_of_a_folder_tells_a_change_without_reading(tmp_path):
    folder = write_folder(tmp_path / "folder", FILES)
    first = SourceFiles(folder, ("*/*.txt",)).stamp()
    listing = hashlib.sha256(b"a/1.txt\0003\0b/2.txt\0003\0").hexdigest()
    assert {**first, "times_sha256": ""} == {
        "name": "folder", "files": 2, "bytes": 6, "listing_sha256": listing, "times_sha256": ""
    }  # fmt: skip
    (folder / "top.csv").write_bytes(b"not asked for")
    assert SourceFiles(folder, ("*/*.txt",)).stamp() == first
    os.utime(folder / "a/1.txt", (1, 1))  # an older file of the same size
    touched = SourceFiles(folder, ("*/*.txt",)).stamp()
    assert [name for name in first if touched[name] != first[name]] == ["times_sha256"]
    (folder / "a/1.txt").rename(folder / "a/3.txt")
    assert SourceFiles(folder, ("*/*.txt",)).stamp()["listing_sha256"] != listing


def test_the_stamp_of_an_archive_tells_a_change(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "archive", FILES)
    data = path.read_bytes()
    first = SourceFiles(path, ()).stamp()
    edges = hashlib.sha256(data + data).hexdigest()
    assert first == {
        "name": "archive", "bytes": len(data), "edges_sha256": edges, "modified_ns": path.stat().st_mtime_ns
    }  # fmt: skip
    os.utime(path, ns=(0, 5))
    assert SourceFiles(path, ()).stamp() == {**first, "modified_ns": 5}
    monkeypatch.setattr(archives, "EDGE", 10)
    assert SourceFiles(path, ()).stamp()["edges_sha256"] == hashlib.sha256(data[:10] + data[-10:]).hexdigest()
