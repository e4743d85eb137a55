"""Tests of arrays: a .npy header must fit its file, nothing is unpickled, and rows are those of the memory map."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
from conftest import run_python

from files import UserError
from reading import limits
from reading.arrays import Rows, open_array, read_header, read_npz


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5), np.uint8),
        np.float32([1.5]),
        np.array(3),
        np.array(["ab", "c"]),
        np.zeros((2, 3), ">f8", order="F"),
        np.zeros((0, 4), bool),
    ],
)
def test_a_header_says_what_numpy_wrote(array):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    header = read_header(file)
    assert (header.shape, header.dtype) == (array.shape, array.dtype)
    assert header.fortran_order == (array.flags.f_contiguous and not array.flags.c_contiguous)
    assert header.num_bytes == len(file.getvalue()) and header.offset == file.tell()


def with_header(text, magic=b"\x93NUMPY\x01\x00"):
    return magic + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (b"", "no .npy file"),
        (b"\x93NUMPY", "no .npy file"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "format version 3.0"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4,294,967,295 bytes"),
        (with_header("")[:9], "cut off"),
        (with_header("{" * 200), "damaged header"),
        (with_header("{'descr': '<f8', 'fortran_order': 3, 'shape': (1,), }"), "damaged header"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"), "damaged header"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1 2,), }"), "damaged header"),
        (with_header("{'descr': '<q9', 'fortran_order': False, 'shape': (1,), }"), "damaged header"),
        (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "Python objects"),
        (with_header("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }"), "records"),
        (with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**20},), }}"), "of shape"),
        (with_header("{'descr': '<M8', 'fortran_order': False, 'shape': (1,), }"), "of shape|damaged"),
    ],
)
def test_a_damaged_header_is_refused(data, facts):
    with pytest.raises(ValueError, match=facts):
        read_header(io.BytesIO(data))


def test_rows_are_those_of_the_memory_map(tmp_path):
    array = np.arange(60, dtype=np.uint8).reshape(10, 3, 2)
    np.save(tmp_path / "a.npy", array)
    rows = Rows(open_array(tmp_path / "a.npy", np.uint8, (None, 3, 2), mapped=True))
    assert (len(rows), rows.shape, rows.dtype) == (10, (10, 3, 2), np.uint8)
    chosen = [
        3,
        -1,
        np.int64(0),
        slice(None),
        slice(2, 5),
        slice(8, 2, -3),
        slice(4, 2),
        [5, 1, 1],
        np.arange(10) % 2 == 0,
    ]
    for index in (*chosen, np.array([], int)):
        assert np.array_equal(rows[index], array[index]), index
    assert np.array_equal(np.asarray(rows), array)
    with pytest.raises(IndexError):
        rows[[10]]


ARRAYS = {"labels": ("iu", 1), "probabilities": ("f", 2)}


def test_named_arrays_are_read(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz", labels=np.arange(3), probabilities=np.asfortranarray(np.eye(3)[:, :2]), more=1
    )
    found = read_npz(tmp_path / "a.npz", ARRAYS)
    assert list(found) == list(ARRAYS)
    assert found["labels"].tolist() == [0, 1, 2] and np.array_equal(found["probabilities"], np.eye(3)[:, :2])


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [
        ({"labels": np.arange(3)}, "an array 'probabilities'"),
        ({"labels": np.arange(3.0), "probabilities": np.eye(3)}, "labels: expected 1 axes of kind iu, found float64"),
        ({"labels": np.eye(2, dtype=int), "probabilities": np.eye(3)}, r"labels: .*\(2, 2\)"),
        ({"labels": np.arange(3), "probabilities": np.eye(3) * np.nan}, "probabilities: expected finite"),
        ({"labels": np.array([None]), "probabilities": np.eye(3)}, "Python objects"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, facts):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"a\.npz: .*{facts}"):
        read_npz(tmp_path / "a.npz", ARRAYS)


def test_a_damaged_npz_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", labels=np.arange(300), probabilities=np.eye(30))
    data = (tmp_path / "whole.npz").read_bytes()
    for damaged in (b"", data[:-100], data[:100] + b"xxxx" + data[104:]):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.npz: "):
            read_npz(tmp_path / "a.npz", ARRAYS)
    for path in (tmp_path, os.devnull):  # zipfile alone reads /dev/zero until the memory is full
        with pytest.raises(UserError, match="found a folder, a pipe or a device"):
            read_npz(path, ARRAYS)


def test_an_array_above_the_limit_is_refused_before_it_takes_memory(tmp_path):
    """The header claims 600 MB; zeros are a thousand times smaller in the file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (75_000_000,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("labels.npy", header.getvalue() + bytes(10_000_000))
    code = """
import sys
import files
from reading import arrays
try:
    arrays.read_npz(sys.argv[1], {"labels": ("i", 1)})
except files.UserError as error:
    print(error)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    done = run_python("-c", code, tmp_path / "a.npz")
    message, memory = done.stdout.splitlines()
    assert f"labels: expected an array of at most {limits.PREDICTIONS_BYTES:,} bytes" in message
    assert int(memory) < 200_000, "kilobytes"
