"""What is read is what was written, or one message; nothing outside is read, and no damage ends this process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from files import UserError
from model_files import hdf5_content, safe_hdf5
from model_files.safe_hdf5 import read_arrays, write_arrays


def write(path, change=lambda file: None, **options):
    """A small file of h5py with one group and one array, then ``change``."""
    with h5py.File(path, "w", **options) as file:
        file["group/array"] = np.arange(1000, dtype=np.float32)
        change(file)
    return path


def opened(path) -> bool:
    return read_arrays(path).arrays["group/array"][3] == 3


def same(found, expected) -> bool:
    return (
        found.groups == expected.groups
        and found.arrays.keys() == expected.arrays.keys()
        and all(np.array_equal(found.arrays[name], array) for name, array in expected.arrays.items())
    )


def own_file(path):
    """A small file of ours."""
    arrays = {f"layers/dense_{i}/vars/0": np.full((2, 3), i, np.float32) for i in range(12)}
    write_arrays(path, arrays, {"described": "text", "step": 3})
    return path


# What was written comes back


@pytest.mark.parametrize("ours", [True, False])
def test_arrays_and_attributes_come_back(tmp_path, ours):
    arrays = {
        "a/b/0": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/half": np.array([0.5, 7], np.float16),
        "seed": np.array([1, 2**32 - 1], np.uint32),
        "step": np.array(12, np.int64),
        "none": np.zeros((0, 3)),
    }
    attributes = {"text": "größer", "epoch": 3, "rate": 0.5}
    if ours:
        write_arrays(tmp_path / "a.h5", arrays, attributes)
    with h5py.File(tmp_path / "a.h5", "r" if ours else "w") as file:  # plain h5py reads ours
        for name, array in {} if ours else arrays.items():
            file[name] = array
        file.attrs.update({} if ours else attributes)
        assert np.array_equal(file["a/b/0"][()], arrays["a/b/0"]) and dict(file.attrs) == attributes
    content = read_arrays(tmp_path / "a.h5")
    assert content.has_digest == ours and content.attributes == attributes and set(content.groups) == {"", "a", "a/b"}
    assert content.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert content.arrays[name].dtype == array.dtype and content.arrays[name].shape == array.shape
        np.testing.assert_array_equal(content.arrays[name], array)


def test_attributes_of_every_kind_are_text_numbers_or_lists(tmp_path):
    def change(file):
        group = file["group"]
        group.attrs["bytes"], group.attrs["list"] = b"a", [b"b", b"c"]
        group.attrs["texts"], group.attrs["numbers"] = np.array(["d", "e"], object), [1.5, 2.5]
        group.attrs["not utf-8"] = np.bytes_(b"\xff")
        group.attrs["empty"], group.attrs["reference"] = h5py.Empty("f4"), group.ref  # left out

    found = read_arrays(write(tmp_path / "a.h5", change)).groups["group"]
    assert found == {
        "bytes": "a",
        "list": ["b", "c"],
        "texts": ["d", "e"],
        "numbers": [1.5, 2.5],
        "not utf-8": "\udcff",
    }


def test_other_byte_orders_become_this_machines(tmp_path):
    def change(file):
        file["big"] = np.arange(3, dtype=">f8")

    found = read_arrays(write(tmp_path / "a.h5", change)).arrays["big"]
    assert found.dtype == np.dtype("=f8") and found.tolist() == [0, 1, 2]


def test_groups_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.h5", lambda file: file.create_dataset("optimizer/text", data="neither read nor refused"))
    assert set(read_arrays(path, without=("optimizer",)).arrays) == {"group/array"}
    with pytest.raises(UserError, match="/optimizer/text: expected an array of numbers"):
        read_arrays(path)


def test_equal_content_gives_equal_bytes(tmp_path):
    assert own_file(tmp_path / "a.h5").read_bytes() == own_file(tmp_path / "b.h5").read_bytes()


# Damage


def test_no_flipped_bit_of_our_own_file_is_believed(tmp_path, monkeypatch):
    """Not one reaches the HDF5 library, in this process or in a child."""
    path = own_file(tmp_path / "a.h5")
    data, rng = path.read_bytes(), random.Random(0)
    monkeypatch.setattr(h5py, "File", lambda *_, **__: pytest.fail("opened the file"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    for place in [*range(140), *range(500, 560), *rng.sample(range(560, len(data)), 300)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.h5: (the HDF5 file is damaged|expected an HDF5)") as caught:
            read_arrays(path)
        assert "\n" not in str(caught.value)


def test_our_own_file_changed_by_another_program_is_refused(tmp_path):
    with h5py.File(own_file(tmp_path / "a.h5"), "r+") as file:
        file["layers/dense_3/vars/0"][0] = 7
    with pytest.raises(UserError, match=r"a\.h5: .*SHA-256.*get it again"):
        read_arrays(tmp_path / "a.h5")


def dense_file(path, **options):
    """A file with dense link storage, in which a flipped bit can abort the HDF5 library."""
    with h5py.File(path, "w", libver="latest", **options) as file:
        for i in range(30):
            file[f"layers/layer_number_{i}/vars/0"] = np.arange(4, dtype="f4")
    return path


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("place", [20807, 21010, 21204])
def test_a_crash_of_the_library_is_one_message(tmp_path, place, forged):
    """A digest is no reason to trust a file: whoever damages it on purpose computes the new one."""
    path = dense_file(tmp_path / "a.h5", userblock_size=512 if forged else 0)
    data = bytearray(path.read_bytes())
    data[place + 512 * forged] ^= 0xFF
    if forged:
        safe_hdf5.seal(memoryview(data))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.h5: the HDF5 file is damaged \(.*signal.*\); get it again$"):
        read_arrays(path)


@pytest.mark.slow
def test_no_flipped_bit_of_another_file_ends_this_process(tmp_path):
    """Such a file can hold other numbers unnoticed: nothing in it could tell."""
    path = dense_file(tmp_path / "a.h5")
    data, rng, messages = path.read_bytes(), random.Random(1), []
    for place in rng.sample(range(20_400, len(data)), 40):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read_arrays(path)
        except UserError as error:
            messages.append(str(error))
    assert all("\n" not in message for message in messages)
    assert any("ended with signal" in message for message in messages), "no flip crashed the library: the test is idle"


PROGRAMS = {
    "a signal": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"damaged \(.* ended with signal 11\)"),
    "nothing": ("", r"damaged \(.* exit code 0\)"),
    "an error": ("import no_such_module", r"exit code 1: ModuleNotFoundError: No module named 'no_such_module'\)"),
    "noise": ("import sys; sys.stdout.write('x' * 100_000)", "damaged"),
    "a header that is no JSON": ("import sys; sys.stdout.buffer.write(bytes([3]) + bytes(7) + b'{]}')", "damaged"),
    "a huge array": (
        "import json, sys; h = json.dumps({'arrays': [['a', '<f4', [10**15]]], 'groups': {'': {}}}).encode(); "
        "sys.stdout.buffer.write(len(h).to_bytes(8, 'little') + h)",
        "damaged",
    ),
    "no end": ("import time; time.sleep(60)", "refused: reading it took more than"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_whatever_the_child_process_does_is_one_message(tmp_path, monkeypatch, kind):
    program, message = PROGRAMS[kind]
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(hdf5_content, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(safe_hdf5, "_SECONDS", 0.5 if kind == "no end" else 30.0)
    path, started = write(tmp_path / "a.h5"), time.monotonic()
    with pytest.raises(UserError, match=rf"a\.h5: .*{message}"):
        read_arrays(path)
    assert time.monotonic() - started < 30


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux limits a process's memory")
def test_the_child_process_has_a_limit_of_memory(tmp_path):
    program = "import sys, hdf5_content as h; sys.argv[1:] = ['a.h5']; h.main(); bytearray(1 << 27); bytearray(1 << 29)"
    folder, path = os.path.dirname(hdf5_content.__file__), write(tmp_path / "a.h5")
    done = subprocess.run([sys.executable, "-c", program.replace("a.h5", str(path))], cwd=folder, capture_output=True)
    assert done.stdout and done.stderr.endswith(b"MemoryError\n")


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


def test_a_chunk_larger_than_its_array_is_refused(tmp_path):
    path = write(tmp_path / "a.h5", lambda f: f.create_dataset("z", (9,), "f4", maxshape=(None,), chunks=(1 << 25,)))
    with pytest.raises(
        UserError, match=f"up to /z its arrays declare 134,2.*, more than {hdf5_content.INFLATION} times"
    ):
        opened(path)


def test_many_arrays_are_counted_together(tmp_path):
    def change(file):
        for i in range(50):
            file.create_dataset(f"part{i}", (10_000,), "f4", chunks=(100,))

    with pytest.raises(UserError, match="more than 16 times"):
        opened(write(tmp_path / "a.h5", change))


def test_groups_too_deep_or_too_many_are_refused(tmp_path, monkeypatch):
    started = time.monotonic()
    path = write(tmp_path / "deep.h5", lambda file: file.create_group("/".join("a" * 5000)))
    with pytest.raises(UserError, match=r"deep\.h5: refused: .*more than 32 groups inside each other"):
        read_arrays(path)
    assert time.monotonic() - started < 20
    write(tmp_path / "wide.h5", lambda file: [file.create_group(f"g{i}") for i in range(12)])
    monkeypatch.setattr(hdf5_content, "MOST_OBJECTS", 10)
    with h5py.File(tmp_path / "wide.h5") as file, pytest.raises(hdf5_content.Refused, match="more than 10 groups and"):
        hdf5_content.look_through(file, 1000)


def test_names_in_messages_are_printable(tmp_path):
    path = write(tmp_path / "a.h5", lambda file: file.__setitem__("x\n\x1b[31m", h5py.SoftLink("/group")))
    with pytest.raises(UserError, match=r"/x\\n\\x1b\[31m is a soft link"):
        read_arrays(path)


@pytest.mark.parametrize("front", [b"PK\x03\x04", b"", b"\0"])
def test_an_hdf5_file_behind_something_else_is_refused(tmp_path, front):
    """HDF5 finds its beginning at byte 512 too; a zip archive or a page could stand before it."""
    path = write(tmp_path / "a.h5", userblock_size=512)
    data = bytearray(path.read_bytes())
    data[: len(front)] = front
    path.write_bytes(data)
    assert h5py.is_hdf5(path)
    with pytest.raises(UserError, match=r"a\.h5: expected an HDF5 weights file, found b'"):
        read_arrays(path)
