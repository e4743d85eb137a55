"""Tests of datasets.shared.archives: folders, zips and tars are read in place; damaged ones are refused."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import io
import os
import tarfile
import zipfile

import pytest

from datasets.shared import archives
from datasets.shared.archives import SourceFiles, damaged_zip, file_identity
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
        with pytest.raises(UserError, match=r"damaged\.zip: the zip is cut off or damaged"):
            SourceFiles(path, ()).read("a.csv")


def test_damaged_zip_lets_other_errors_through(tmp_path):
    with pytest.raises(KeyError), damaged_zip(tmp_path):
        raise KeyError
    with pytest.raises(OSError, match="No space left"), damaged_zip(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


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
        archive.add(write_folder(tmp_path / "folder", {"b/2.txt": b"newer"}) / "b", "b")  # the later of two counts
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        entry = tarfile.TarInfo(long_name)
        entry.size = 1500
        archive.addfile(entry, io.BytesIO(bytes(range(250)) * 6))
    files = SourceFiles(path, ())
    assert files.names == ["a/1.txt", "b/2.txt", long_name, "top.csv"]
    assert [files.read(name) for name in files.names] == [b"one", b"newer", bytes(range(250)) * 6, b"1,2"]
    with files.open("a/1.txt") as file:
        assert file.read(2) == b"on"
    with pytest.raises(FileNotFoundError, match=r"link\.txt"):
        files.read("link.txt")


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
