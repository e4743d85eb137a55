"""Tests of datasets.shared.split_writer: a split appears whole or not at all, and resumes."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import signal

import numpy as np
import pytest
from conftest import run_python

from data_helper import content_digest
from datasets.shared import split_writer
from datasets.shared.split_writer import SplitWriter, published_together
from files import UserError, only_writer

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
    meta = json.loads((folder / "meta.json").read_text())
    assert len(meta.pop("digest")) == 64
    assert meta == {
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


def test_other_than_the_announced_number_is_an_error(tmp_path):
    earlier = write_earlier(tmp_path)
    for added in (1, 3):
        with pytest.raises(UserError, match=f"expected 2 images, received {added}"), new_writer(tmp_path) as writer:
            for _ in range(added):
                writer.add(pixels(1), 0)
        assert content(tmp_path) == earlier


def test_an_image_or_label_of_another_kind_is_refused(tmp_path):
    for image, label in (
        (np.zeros((3, 2, 1), np.uint8), 0),
        (np.zeros(SHAPE, np.float32), 0),
        (np.zeros(SHAPE, np.uint8), 3),
        (np.zeros(SHAPE, np.uint8), -1),
    ):
        with pytest.raises(ValueError, match="expected"), new_writer(tmp_path) as writer:
            writer.add(image, label)
        assert content(tmp_path) == {}


def test_an_interruption_leaves_the_earlier_split(tmp_path):
    earlier = write_earlier(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_writer(tmp_path) as writer:
        writer.add(pixels(1), 0)
        raise KeyboardInterrupt
    assert content(tmp_path) == earlier


KILLED = """
import os, signal, sys
import numpy as np
from datasets.shared.split_writer import SplitWriter
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
    monkeypatch.setattr(split_writer, "open", FullDisk, raising=False)
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
        monkeypatch.setattr(split_writer.os, "fsync", full)
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


# --- interruptions --------------------------------------------------------------------------------------------------

RUN = {"sha256": "1", "pictures": 5}


def resumable(data_dir, preparation=RUN, split="train"):
    return SplitWriter(data_dir, "set", split, 5, SHAPE, NAMES, [], {}, preparation)


def interrupt(data_dir, preparation=RUN):
    """Adds 10 (c), skips one and adds 20 (a) of five."""
    with pytest.raises(KeyboardInterrupt), resumable(data_dir, preparation) as writer:
        writer.add(pixels(10), 2)
        writer.skip("x.jpg", "broken")
        writer.add(pixels(20), 0)
        raise KeyboardInterrupt


def finish(writer):
    for value in range(writer.done, 4):
        writer.add(pixels(value), 1)
    writer.skip("y.jpg", "broken too")


def test_an_interrupted_preparation_goes_on(tmp_path):
    earlier = write_earlier(tmp_path)
    interrupt(tmp_path)
    assert {name: data for name, data in content(tmp_path).items() if "/.tmp" not in name} == earlier
    with resumable(tmp_path) as writer:
        assert writer.done == 3
        finish(writer)
    assert sorted(content(tmp_path)) == ["set/train/images.npy", "set/train/labels.npy", "set/train/meta.json"]
    images = np.load(tmp_path / "set/train/images.npy", mmap_mode="r")
    assert (images.shape, images[:, 1, 2, 0].tolist()) == ((3, 2, 3, 1), [10, 20, 3])
    assert (tmp_path / "set/train/images.npy").stat().st_size == 128 + 3 * 6, "the header leaves no gap"
    assert np.load(tmp_path / "set/train/labels.npy").tolist() == [2, 0, 1]
    meta = json.loads((tmp_path / "set/train/meta.json").read_text())
    assert (meta["num_images"], meta["class_counts"], meta["preparation"]) == (3, [1, 1, 1], RUN)
    assert meta["digest"] == content_digest(
        (3, *SHAPE), hashlib.sha256(images.tobytes()).hexdigest(), np.array([2, 0, 1])
    )
    assert meta["skipped"] == [{"name": "x.jpg", "reason": "broken"}, {"name": "y.jpg", "reason": "broken too"}]


@pytest.mark.parametrize(
    "damage",
    [
        lambda stage: (stage / "new/images.npy").write_bytes((stage / "new/images.npy").read_bytes()[:-1]),
        lambda stage: (stage / "new/images.npy").unlink(),
        lambda stage: (stage / "journal.jsonl").write_text("{"),
        *(
            lambda stage, label=label: (stage / "journal.jsonl").write_text(
                json.dumps({"preparation": RUN}) + "\n" + json.dumps({"labels": [label], "skipped": []}) + "\n"
            )
            for label in (7, -1, "2", True, None)
        ),
    ],
    ids=["images cut", "no images", "journal cut", "large label", "negative label", "text", "bool", "null"],
)
def test_what_does_not_fit_together_begins_anew(tmp_path, damage):
    interrupt(tmp_path)
    damage(tmp_path / "set/.tmp-train")
    with resumable(tmp_path) as writer:
        assert writer.done == 0
        finish(writer)
    assert np.load(tmp_path / "set/train/images.npy")[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("other", [{"sha256": "2", "pictures": 5}, None], ids=["other", "none"])
def test_another_preparation_begins_anew(tmp_path, other):
    interrupt(tmp_path)
    with resumable(tmp_path, other) as writer:
        assert writer.done == 0
        finish(writer)
    assert len(content(tmp_path)) == 3


def test_what_came_after_the_last_whole_line_of_the_journal_is_done_again(tmp_path):
    interrupt(tmp_path)
    stage = tmp_path / "set/.tmp-train"
    with open(stage / "journal.jsonl", "a") as file:
        file.write('{"labels": [1], "ski')  # killed while it wrote this line, after the image was on the disk
    with open(stage / "new/images.npy", "ab") as file:
        file.write(bytes(6 + 3))
    for _ in range(2):  # going on from there can be interrupted too
        with pytest.raises(KeyboardInterrupt), resumable(tmp_path) as writer:
            assert writer.done == 3
            raise KeyboardInterrupt
    with resumable(tmp_path) as writer:
        assert writer.done == 3
        finish(writer)
    assert np.load(tmp_path / "set/train/images.npy")[:, 0, 0, 0].tolist() == [10, 20, 3]


RESUMABLE_KILLED = """
import os, signal, sys
import numpy as np
from datasets.shared.split_writer import SplitWriter
with SplitWriter(sys.argv[1], "set", "train", 5, (2, 3, 1), "abc", [], {}, {"sha256": "1", "pictures": 5}) as writer:
    writer.add(np.full((2, 3, 1), 10, np.uint8), 2)
    writer.skip("x.jpg", "broken")
    writer.checkpoint()
    writer.add(np.full((2, 3, 1), 77, np.uint8), 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_costs_what_came_after_the_checkpoint(tmp_path):
    assert run_python("-c", RESUMABLE_KILLED, tmp_path).returncode == -signal.SIGKILL
    with resumable(tmp_path) as writer:
        assert writer.done == 2
        finish(writer)
    assert np.load(tmp_path / "set/train/images.npy")[:, 0, 0, 0].tolist() == [10, 2, 3]


def test_a_disk_that_fills_at_the_end_costs_nothing(tmp_path, monkeypatch):
    """The images are complete, and their header says so already, when the labels do not fit any more."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    interrupt(tmp_path)
    monkeypatch.setattr(split_writer.np, "save", full)
    with pytest.raises(OSError, match="No space left"), resumable(tmp_path) as writer:
        finish(writer)
    monkeypatch.undo()
    with resumable(tmp_path) as writer:
        assert writer.done == 5
    assert np.load(tmp_path / "set/train/images.npy")[:, 0, 0, 0].tolist() == [10, 20, 3]


def test_nothing_readable_is_an_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"none of its 5 images.*the first, 0\.jpg: why"),
        resumable(tmp_path) as writer,
    ):
        for number in range(5):
            writer.skip(f"{number}.jpg", "why")
    assert not (tmp_path / "set/train").exists()


# --- further arrays -------------------------------------------------------------------------------------------------


def test_a_further_array_lies_beside_the_labels_until_the_split_is_written_again(tmp_path):
    rows = np.array([[0.5, 0.5], [1, 0]], np.float32)
    with new_writer(tmp_path) as writer:
        writer.add_array("votes", rows)
        for value in (1, 2):
            writer.add(pixels(value), 0)
    found = np.load(tmp_path / "set/train/votes.npy", allow_pickle=False)
    assert (found.dtype, found.tolist()) == (np.float32, rows.tolist())
    write_earlier(tmp_path)
    assert not (tmp_path / "set/train/votes.npy").exists()


def test_a_further_array_has_one_row_per_image_or_nothing_is_written(tmp_path):
    earlier, num_rows = write_earlier(tmp_path), 3
    message = f"votes: expected 2 rows, .*received {num_rows}"
    with pytest.raises(ValueError, match=message), new_writer(tmp_path) as writer:
        for value in (1, 2):
            writer.add(pixels(value), 0)
        writer.add_array("votes", np.zeros((num_rows, 2)))
    assert content(tmp_path) == earlier


def test_a_further_array_cannot_replace_the_labels(tmp_path):
    message = "another name than images and labels, received 'labels'"
    with pytest.raises(ValueError, match=message), new_writer(tmp_path) as writer:
        writer.add_array("labels", np.zeros(2))
    assert content(tmp_path) == {}
