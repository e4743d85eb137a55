"""Does a prepared split appear whole or not at all, whatever happens on the way?"""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import signal
import zipfile

import numpy as np
import pytest
from conftest import run_python, write_split

import data_helper
from data_helper import Release, SourceFiles, SplitWriter, damaged_zip, file_identity, published_together, write_release
from errors import UserError
from files import only_writer

NAMES = ("a", "b", "c")
SHAPE = (2, 3, 1)


def new_writer(data_dir, split="train", num_images=2):
    return SplitWriter(data_dir, "set", split, num_images, SHAPE, NAMES, [], {})


def pixels(value):
    return np.full(SHAPE, value, np.uint8)


def content(data_dir):
    """Every file below a folder but the lock: relative name -> bytes."""
    return {
        str(path.relative_to(data_dir)): path.read_bytes()
        for path in sorted(data_dir.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def write_earlier(data_dir):
    """An earlier preparation of one image, which a failing one must not touch."""
    with new_writer(data_dir, num_images=1) as writer:
        writer.add(pixels(9), 2)
    return content(data_dir)


# --- SplitWriter ----------------------------------------------------------------------------------------------------


def test_a_split_holds_what_was_added(tmp_path):
    sources = [{"name": "x.csv", "bytes": 3, "sha256": "0"}]
    with SplitWriter(tmp_path, "set", "val", 3, SHAPE, NAMES, sources, {"form": "csv"}) as writer:
        for value, label in ((10, 2), (20, 0), (30, 2)):
            writer.add(pixels(value), label)
    assert sorted(content(tmp_path)) == ["set/val/images.npy", "set/val/labels.npy", "set/val/meta.json"]
    folder = tmp_path / "set" / "val"
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    assert (images.shape, images.dtype, labels.dtype) == ((3, 2, 3, 1), np.uint8, np.int64)
    assert images[:, 1, 2, 0].tolist() == [10, 20, 30]
    assert labels.tolist() == [2, 0, 2]
    assert json.loads((folder / "meta.json").read_text()) == {
        "format_version": 1,
        "dataset": "set",
        "split": "val",
        "num_images": 3,
        "image_shape": [2, 3, 1],
        "class_names": ["a", "b", "c"],
        "class_counts": [1, 0, 2],
        "sources": sources,
        "options": {"form": "csv"},
    }


def test_rows_and_columns_and_channels_keep_their_places(tmp_path):
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    with SplitWriter(tmp_path, "set", "train", 1, (2, 3, 3), NAMES, [], {}) as writer:
        writer.add(image[:, ::-1], 0)  # a view whose memory runs the other way
    stored = np.load(tmp_path / "set" / "train" / "images.npy")
    assert stored[0, 1, 0].tolist() == [15, 16, 17]


def test_a_second_preparation_replaces_the_first(tmp_path):
    write_earlier(tmp_path)
    with new_writer(tmp_path) as writer:
        writer.add(pixels(1), 0)
        writer.add(pixels(2), 1)
    assert np.load(tmp_path / "set" / "train" / "labels.npy").tolist() == [0, 1]
    assert len(content(tmp_path)) == 3


@pytest.mark.parametrize("added", [0, 1, 3])
def test_other_than_the_announced_number_is_an_error(tmp_path, added):
    earlier = write_earlier(tmp_path)
    with pytest.raises(UserError, match=f"expected 2 images, received {added}"), new_writer(tmp_path) as writer:
        for _ in range(added):
            writer.add(pixels(1), 0)
    assert content(tmp_path) == earlier


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (np.zeros((3, 2, 1), np.uint8), 0),
        (np.zeros(SHAPE, np.float32), 0),
        (np.zeros(SHAPE, np.uint8), 3),
        (np.zeros(SHAPE, np.uint8), -1),
    ],
    ids=["shape", "dtype", "label above", "label below"],
)
def test_an_image_or_label_of_another_kind_is_refused(tmp_path, image, label):
    with pytest.raises(ValueError, match="expected"), new_writer(tmp_path) as writer:
        writer.add(image, label)
    assert content(tmp_path) == {}


def test_a_split_has_at_least_one_image(tmp_path):
    with pytest.raises(ValueError, match="expected 1 or more, received 0"):
        new_writer(tmp_path, num_images=0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_earlier_split(tmp_path, error):
    earlier = write_earlier(tmp_path)
    with pytest.raises(error), new_writer(tmp_path) as writer:
        writer.add(pixels(1), 0)
        raise error
    assert content(tmp_path) == earlier


KILLED = """
import os, signal, sys
import numpy as np
from data_helper import SplitWriter
with SplitWriter(sys.argv[1], "set", "train", 2, (2, 3, 1), "abc", [], {}) as writer:
    writer.add(np.zeros((2, 3, 1), np.uint8), 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_preparation_leaves_the_earlier_split_and_no_obstacle(tmp_path):
    earlier = write_earlier(tmp_path)
    assert run_python("-c", KILLED, tmp_path).returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*/.tmp*/meta.json")), "nobody takes the leftovers for a split"
    assert {name: data for name, data in content(tmp_path).items() if "/.tmp" not in name} == earlier
    with new_writer(tmp_path, num_images=1) as writer:
        writer.add(pixels(9), 2)
    assert content(tmp_path) == earlier, "the leftovers are gone"


def test_a_kill_between_the_two_renames_is_put_right(tmp_path):
    earlier = write_earlier(tmp_path)
    stage = tmp_path / "set" / ".tmp-train"
    stage.mkdir()
    (tmp_path / "set" / "train").rename(stage / "old")
    with pytest.raises(RuntimeError), new_writer(tmp_path):
        raise RuntimeError
    assert content(tmp_path) == earlier


class FullDisk:
    """A file on a disk with no room left for what is written, nor for what closing would write."""

    def __init__(self, path, mode):
        self.file = builtins.open(path, mode)  # noqa: SIM115 - open as long as this is

    def write(self, data):
        if len(data) == np.prod(SHAPE):  # an image; the header before it still fits
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def close(self):
        self.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_earlier_split(tmp_path, monkeypatch):
    earlier = write_earlier(tmp_path)
    monkeypatch.setattr(data_helper, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left") as caught, new_writer(tmp_path) as writer:
        writer.add(pixels(1), 0)
    assert caught.value.filename == str(tmp_path / "set"), "the message can say where"
    monkeypatch.undo()
    assert content(tmp_path) == earlier


def test_a_disk_that_fills_while_the_buffers_are_flushed(tmp_path, monkeypatch):
    earlier = write_earlier(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), new_writer(tmp_path, num_images=1) as writer:
        writer.add(pixels(1), 0)
        monkeypatch.setattr(data_helper.os, "fsync", full)
    monkeypatch.undo()
    assert content(tmp_path) == earlier


def test_one_process_at_a_time(tmp_path):
    with only_writer(tmp_path / "set"), pytest.raises(UserError, match="another process is writing"):
        new_writer(tmp_path).__enter__()
    assert content(tmp_path) == {}


# --- several splits -------------------------------------------------------------------------------------------------


def test_all_splits_or_none(tmp_path):
    """The first split is complete, the second is not: neither is published."""
    earlier = write_earlier(tmp_path)
    train, val = new_writer(tmp_path, "train", 1), new_writer(tmp_path, "val", 2)
    with pytest.raises(UserError, match="val: expected 2 images, received 1"), published_together([train, val]):
        train.add(pixels(1), 0)
        val.add(pixels(2), 1)
    assert content(tmp_path) == earlier


def test_a_release_is_written_split_by_split(tmp_path):
    """The splits may alternate; one that the release lacks stays from before."""
    write_split(tmp_path, [1], split="test", dataset="set")
    examples = [("val", pixels(1), 0), ("train", pixels(2), 1), ("val", pixels(3), 2)]
    sources = [{"name": "x", "bytes": 1, "sha256": "0"}]
    metas = write_release(
        tmp_path, "set", Release({"train": 1, "val": 2}, iter(examples), SHAPE, NAMES, sources, {"form": "csv"})
    )
    assert {split: meta["class_counts"] for split, meta in metas.items()} == {"train": [0, 1, 0], "val": [1, 0, 1]}
    for split, meta in metas.items():
        assert json.loads((tmp_path / "set" / split / "meta.json").read_text()) == meta
        assert (meta["sources"], meta["options"]) == (sources, {"form": "csv"})
    assert np.load(tmp_path / "set" / "val" / "images.npy")[:, 0, 0, 0].tolist() == [1, 3]
    assert np.load(tmp_path / "set" / "test" / "labels.npy").tolist() == [1]


# --- sources --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ["../evil.csv", "a/../../evil.csv", "/etc/evil.csv", "..\\evil.csv", "C:\\evil.csv"])
def test_names_that_point_outside_are_refused(tmp_path, name):
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


@pytest.mark.parametrize(
    "patches",
    [
        [(b"PK\1\2", 8, b"\x00\x08"), (b"PK\1\2", 46, b"\xe9")],  # the flags say UTF-8, the name is not
        [(b"PK\1\2", 10, b"\x63\x00")],  # an unknown compression
        [(b"PK\1\2", 42, b"\xff\xff\xff\x7f")],  # the file lies beyond the end
        [(b"PK\5\6", 16, b"\xff\xff\x00\x00")],  # the directory lies so late that the file lies before the start
    ],
    ids=["name", "compression", "beyond the end", "before the start"],
)
def test_a_damaged_directory_of_a_zip_is_noticed(tmp_path, patches):
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
