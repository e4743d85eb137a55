"""A file that is cut off, reaches outside or declares more than it holds is refused before it is read."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from files import UserError
from model_files.safe_hdf5 import open_hdf5


def write(path, change=lambda file: None, **options):
    """A small file with one group and one array, then ``change``."""
    with h5py.File(path, "w", **options) as file:
        file["group/array"] = np.arange(1000, dtype=np.float32)
        change(file)
    return path


def opened(path) -> bool:
    with open_hdf5(path) as file:
        return file["group/array"][3] == 3


# Whole


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("lost", [1, 500, -8, -100])
def test_a_file_that_was_cut_off_is_refused(tmp_path, libver, lost):
    """By the bytes lost at its end, or all but its first."""
    path = write(tmp_path / "a.h5", libver=libver)
    assert opened(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=r"a\.h5: .*get it again"):
        opened(path)


def test_bytes_after_the_end_do_no_harm(tmp_path):
    path = write(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes() + b"more")
    assert opened(path)


def test_a_web_page_instead_of_the_download_is_shown(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"<!DOCTYPE html><html>Google Drive - Virus scan warning")
    with pytest.raises(UserError, match=r"a\.h5: expected an HDF5 weights file .*found b'<!DOCTYP"):
        opened(tmp_path / "a.h5")


def test_messages_call_the_file_by_the_name_given(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"text")
    with pytest.raises(UserError, match=r"^model\.keras: expected"), open_hdf5(tmp_path / "a.h5", "model.keras"):
        pass


@pytest.mark.parametrize("name", ["none.h5", "."])
def test_no_file_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="no such weights file"):
        opened(tmp_path / name)


# To itself


def outside(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones(10, np.float32)
    return str(tmp_path / "other.h5")


def virtual(file, path):
    layout = h5py.VirtualLayout(shape=(10,), dtype=np.float32)
    layout[:] = h5py.VirtualSource(path, "secret", shape=(10,))
    file.create_virtual_dataset("group/v", layout)


REACHING = {
    "external link": (lambda f, path: f.__setitem__("x", h5py.ExternalLink(path, "/secret")), "/x is an external link"),
    "external link below": (
        lambda f, path: f["group"].__setitem__("x", h5py.ExternalLink(path, "/")),
        "/group/x is an external link",
    ),
    "soft link": (lambda f, _: f.__setitem__("x", h5py.SoftLink("/group/array")), "/x is a soft link to /group/array"),
    "virtual data set": (virtual, "/group/v is a virtual data set"),
    "external storage": (
        lambda f, path: f.create_dataset("e", (10,), np.float32, external=[(path, 0, 40)]),
        "/e is stored in .*other.h5",
    ),
    "ring": (lambda f, _: f["group"].__setitem__("again", f["group"]), "/group/again is a second name"),
    "two names": (lambda f, _: f.__setitem__("array", f["group/array"]), "is a second name"),
    "named type": (lambda f, _: f.__setitem__("type", np.dtype("f4")), "/type is neither a group nor an array"),
}


@pytest.mark.parametrize("kind", REACHING)
def test_what_reaches_beyond_an_array_is_refused(tmp_path, kind):
    change, message = REACHING[kind]
    path = write(tmp_path / "a.h5", lambda file: change(file, outside(tmp_path)))
    with pytest.raises(UserError, match=rf"a\.h5: .*{message}.*refused"):
        opened(path)


@pytest.mark.parametrize(
    "value",
    [np.array(["a", "b"], object), h5py.Empty("f4"), 1j],
    ids=["texts", "empty", "complex"],
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, value):
    path = write(tmp_path / "a.h5", lambda file: file.create_dataset("odd", data=value))
    with pytest.raises(UserError, match=r"a\.h5: /odd: expected an array of numbers"):
        opened(path)


def test_an_array_larger_than_the_file_can_hold_is_refused_unread(tmp_path):
    path = write(tmp_path / "a.h5", lambda f: f.create_dataset("big", (1 << 40, 1 << 40), "f4", chunks=(64, 64)))
    with pytest.raises(UserError, match=rf"/big its arrays declare {1 << 82:,} bytes, more than 16 times"):
        opened(path)


def test_a_compression_bomb_is_refused_and_plain_compression_is_not(tmp_path):
    rng = np.random.default_rng(0)
    for name, data in (("a.h5", rng.normal(size=200_000).astype("f4")), ("b.h5", np.zeros(2_000_000, "f4"))):
        write(tmp_path / name, lambda f, data=data: f.create_dataset("z", data=data, compression="gzip"))
    assert opened(tmp_path / "a.h5")
    with pytest.raises(UserError, match=r"b\.h5: refused: up to /z its arrays declare 8,00\d,\d{3} bytes"):
        opened(tmp_path / "b.h5")


def test_many_arrays_are_counted_together(tmp_path):
    def change(file):
        for i in range(50):
            file.create_dataset(f"part{i}", (10_000,), "f4", chunks=(100,))

    with pytest.raises(UserError, match="more than 16 times"):
        opened(write(tmp_path / "a.h5", change))


def test_a_failure_while_reading_is_a_damaged_file(tmp_path):
    path = write(tmp_path / "a.h5")
    with pytest.raises(UserError, match=r"a\.h5: the HDF5 file is damaged \(read failed\)"), open_hdf5(path):
        raise OSError("read failed\nmore lines")
