"""Tests of datasets.shared.release: a release becomes prepared splits, once and whole; unreadable images are named."""

from __future__ import annotations

import json
import shutil
import signal

import cv2
import numpy as np
import pytest
from conftest import run_python, write_split

from data_helper import SPLITS, open_split
from datasets.shared.archives import SourceFiles
from datasets.shared.decoding import ImageFile
from datasets.shared.release import (
    ImageRelease,
    Release,
    find_prepared,
    stratified_hold_out,
    write_images,
    write_release,
)
from datasets.shared.split_writer import SplitWriter
from files import UserError, only_writer

SHAPE = (2, 3, 1)
NAMES = ("a", "b", "c")


def pixels(value):
    return np.full(SHAPE, value, np.uint8)


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


# --- releases to be decoded -----------------------------------------------------------------------------------------


def png(value):
    """An image file of 6 x 6 pixels, all of one gray."""
    return cv2.imencode(".png", np.full((6, 6), value, np.uint8))[1].tobytes()


def write_source(folder, broken=()):
    """Six images, image i of the gray 10 * i, those of ``broken`` cut."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(10 * i)[: 40 if i in broken else None])
    return folder


def release(
    source, *, splits=("val", "train", "train", "test", "train", "train"), labels=(0, 1, 2, 0, 1, 1), **changes
):
    files = SourceFiles(source, ("*.png",))
    images = [ImageFile(*row) for row in zip(splits, files.names, labels, strict=True)]
    return ImageRelease(**{
        "files": files, "images": images, "size": 4, "channels": 1, "class_names": NAMES,
        "sources": [files.stamp()], "options": {"seed": 3}, **changes,
    })  # fmt: skip


def grays(data_dir, split):
    return np.load(data_dir / f"set/{split}/images.npy")[:, 0, 0, 0].tolist()


@pytest.fixture
def reads(monkeypatch):
    """The names of the images that are read."""
    names, read = [], SourceFiles.read
    monkeypatch.setattr(SourceFiles, "read", lambda files, name: (names.append(name), read(files, name))[1])
    return names


def test_images_become_splits(tmp_path):
    wanted = release(write_source(tmp_path / "in"))
    metas = write_images(tmp_path, "set", wanted)
    assert list(metas) == ["train", "val", "test"]
    assert [grays(tmp_path, split) for split in metas] == [[10, 20, 40, 50], [0], [30]]
    assert np.load(tmp_path / "set/train/labels.npy").tolist() == [1, 2, 1, 1]
    for split, meta in metas.items():
        assert json.loads((tmp_path / "set" / split / "meta.json").read_text()) == meta
        assert meta["image_shape"] == [4, 4, 1] and meta["skipped"] == []
        assert meta["sources"] == wanted.sources and meta["options"] == {"seed": 3, "size": 4, "margin": 0.0}
        assert meta["preparation"]["splits"] == ["train", "val", "test"]
    assert (metas["train"]["num_images"], metas["train"]["class_counts"]) == (4, [0, 3, 1])
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [".lock", "test", "train", "val"]


def test_a_second_run_reads_no_image(tmp_path, reads):
    source = write_source(tmp_path / "in")
    metas = write_images(tmp_path, "set", release(source))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("set/*/*")}
    assert len(reads) == 6 and len(files) == 9
    assert write_images(tmp_path, "set", release(source), strict=True) == metas
    assert len(reads) == 6 and {path: path.stat().st_mtime_ns for path in tmp_path.glob("set/*/*")} == files


def test_anything_else_is_another_preparation(tmp_path):
    """The checksum of a preparation stays what it was when the first sets were prepared: they are recognised."""
    source = write_source(tmp_path / "in")

    def checksum(**changes):
        wanted = release(source, **{"sources": [], **changes})
        return write_images(tmp_path, "set", wanted)["train"]["preparation"]["sha256"]

    assert checksum() == "6db84ecbbf894314661737e872a667a2131d346e99ef1a6e6f6e3add6e861bd3"
    others = [
        {"size": 5},
        {"channels": 3},
        {"class_names": ("a", "b", "d")},
        {"options": {"seed": 4}},
        {"margin": 0.1},
        {"labels": (0, 1, 2, 0, 1, 0)},
        {"sources": [{"name": "in"}]},
    ]
    assert len({checksum(), *(checksum(**changes) for changes in others)}) == 8


def test_a_changed_source_and_a_damaged_split_are_prepared_again(tmp_path, reads):
    source = write_source(tmp_path / "in")
    write_images(tmp_path, "set", release(source))
    (source / "5.png").write_bytes(png(99))
    write_images(tmp_path, "set", release(source))
    assert grays(tmp_path, "train") == [10, 20, 40, 99]
    path = tmp_path / "set/val/images.npy"
    path.write_bytes(path.read_bytes()[:-1])
    del reads[:]
    write_images(tmp_path, "set", release(source))
    assert (reads, grays(tmp_path, "val")) == (["0.png"], [0])


def test_a_split_that_lost_images_since_is_prepared_again(tmp_path):
    """As `prepare_data.py inspect --drop-duplicates` leaves it."""
    source = write_source(tmp_path / "in")
    meta = write_images(tmp_path, "set", release(source))["train"]
    described = (meta["image_shape"], NAMES, meta["sources"], meta["options"])
    with SplitWriter(tmp_path, "set", "train", 1, *described) as writer:
        writer.meta |= {"skipped": [], "preparation": meta["preparation"]}
        writer.add(np.zeros((4, 4, 1), np.uint8), 0)
    assert find_prepared(tmp_path, "set", meta["sources"], {}) is None
    write_images(tmp_path, "set", release(source))
    assert grays(tmp_path, "train") == [10, 20, 40, 50]


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path, capsys):
    source = write_source(tmp_path / "in", broken=(1, 4))
    metas = write_images(tmp_path, "set", release(source))
    split = open_split(tmp_path, "set", "train")
    assert (grays(tmp_path, "train"), split.labels.tolist(), len(split)) == ([20, 50], [2, 1], 2)
    assert [image["name"] for image in metas["train"]["skipped"]] == ["1.png", "4.png"]
    assert metas["train"]["class_counts"] == [0, 1, 1] and metas["val"]["skipped"] == []
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert line.startswith("train: left out 2 images that cannot be read (1.png: expected a whole JPEG")
    assert "4.png: expected" in line and not line.endswith("...)")
    assert write_images(tmp_path, "set", release(source)) == metas
    assert "left out 2 images" in capsys.readouterr().err, "a second run says so too"


def test_strict_stops_at_what_cannot_be_read(tmp_path, reads):
    source = write_source(tmp_path / "in", broken=(4,))
    message = r"in/4\.png: expected a whole JPEG.*--strict"
    with pytest.raises(UserError, match=message):
        write_images(tmp_path, "set", release(source), strict=True)
    assert not list(tmp_path.glob("set/*/meta.json"))
    del reads[:]
    with pytest.raises(UserError, match=message):
        write_images(tmp_path, "set", release(source), strict=True)
    assert reads == [], "the journal knows"
    write_images(tmp_path, "set", release(source))
    with pytest.raises(UserError, match=message):
        write_images(tmp_path, "set", release(source), strict=True)


def test_a_split_of_which_nothing_can_be_read_is_an_error(tmp_path):
    source = write_source(tmp_path / "in", broken=(3,))
    with pytest.raises(UserError, match=r"set/test: none of its 1 images can be read; the first, 3\.png: expected"):
        write_images(tmp_path, "set", release(source))
    assert not list(tmp_path.glob("set/*/meta.json"))


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests", "tests/datasets"]
from datasets.shared import release as writing
from datasets.shared.split_writer import SplitWriter
from test_release import release
writing.CHECKPOINT_SECONDS = 0.0
add = SplitWriter.add
def add_or_die(writer, image, label):
    if image[0, 0, 0] == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    add(writer, image, label)
SplitWriter.add = add_or_die
writing.write_images(sys.argv[1], "set", release(sys.argv[2]))
"""


def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, reads):
    """Killed at the third of train's four images; broken images before that stay known."""
    write_split(tmp_path, [1], split="val", dataset="set")
    source = write_source(tmp_path / "in", broken=(2,))
    assert run_python("-c", KILLED, tmp_path, source).returncode == -signal.SIGKILL
    assert len(np.load(tmp_path / "set/val/labels.npy")) == 1 and not (tmp_path / "set/train").exists()
    metas = write_images(tmp_path, "set", release(source))
    assert sorted(reads) == ["0.png", "3.png", "4.png", "5.png"]
    assert [grays(tmp_path, split) for split in metas] == [[10, 40, 50], [0], [30]]
    assert np.load(tmp_path / "set/train/labels.npy").tolist() == [1, 1, 1]
    assert [image["name"] for image in metas["train"]["skipped"]] == ["2.png"]
    whole = write_images(tmp_path / "other", "set", release(source))
    assert metas == whole, "an interruption leaves no trace"
    for split in metas:
        assert (tmp_path / f"set/{split}/images.npy").read_bytes() == (
            tmp_path / f"other/set/{split}/images.npy"
        ).read_bytes()


def test_a_kill_before_the_last_split_is_in_place_costs_only_that(tmp_path, monkeypatch, reads):
    """The splits are moved into place one after the other."""
    source = write_source(tmp_path / "in")
    publish = SplitWriter._publish

    def die_at_test(writer):
        if writer.meta["split"] == "test":
            raise KeyboardInterrupt
        publish(writer)

    monkeypatch.setattr(SplitWriter, "_publish", die_at_test)
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path, "set", release(source))
    monkeypatch.undo()
    assert find_prepared(tmp_path, "set", release(source).sources, {}) is None
    before = len(reads)
    write_images(tmp_path, "set", release(source))
    assert len(reads) == before and [grays(tmp_path, s) for s in SPLITS] == [[10, 20, 40, 50], [0], [30]]


def test_two_preparations_at_once_are_refused(tmp_path):
    wanted = release(write_source(tmp_path / "in"))
    with only_writer(tmp_path / "set"), pytest.raises(UserError, match="another process is writing"):
        write_images(tmp_path, "set", wanted)


def test_find_prepared_knows_the_same_preparation(tmp_path):
    source = write_source(tmp_path / "in", broken=(1,))
    wanted = release(source, options={"seed": 3, "found": {"later": 1}})
    assert find_prepared(tmp_path, "set", wanted.sources, {"seed": 3}) is None
    metas = write_images(tmp_path, "set", wanted)
    assert find_prepared(tmp_path, "set", wanted.sources, {"seed": 3, "size": 4}) == metas
    assert find_prepared(tmp_path, "set", wanted.sources, {"seed": 3}, strict=True) is None
    assert find_prepared(tmp_path, "set", wanted.sources, {"seed": 4}) is None
    assert find_prepared(tmp_path, "set", wanted.sources, {"size": 5}) is None
    assert find_prepared(tmp_path, "set", [], {"seed": 3}) is None
    shutil.rmtree(tmp_path / "set/test")
    assert find_prepared(tmp_path, "set", wanted.sources, {"seed": 3}) is None


# --- hold-out -------------------------------------------------------------------------------------------------------


def test_the_hold_out_is_stratified():
    labels = np.array([0, 1, 2, 1, 0, 1] * 20 + [3] * 4)  # 40, 60, 20 and 4
    held_out = stratified_hold_out(labels, 0.1, seed=5)
    assert (held_out.dtype, held_out.shape) == (bool, (124,))
    assert [int(held_out[labels == label].sum()) for label in range(4)] == [4, 6, 2, 0]
    assert np.array_equal(stratified_hold_out(labels.tolist(), 0.1, seed=5), held_out)
    assert not np.array_equal(stratified_hold_out(labels, 0.1, seed=6), held_out)
    assert not stratified_hold_out(labels, 0.0, seed=5).any()
    first_ten = np.flatnonzero(held_out[:60]).size
    assert 0 < first_ten < held_out.sum(), "drawn from the whole, not from one end"


def test_the_hold_out_stays_what_it_was():
    """Anybody who prepares the data set gets the same images, on any machine and with any later version."""
    assert np.flatnonzero(stratified_hold_out([0, 1] * 20, 0.1, seed=0)).tolist() == [8, 23, 33, 38]


def test_a_share_of_everything_is_refused():
    for share in (
        1.0,
        float("nan"),
    ):
        with pytest.raises(UserError, match=f"received {share}"):
            stratified_hold_out([0, 1], share, seed=0)


# --- votes ------------------------------------------------------------------------------------------------------------


def test_a_release_with_votes_writes_them_for_each_split(tmp_path):
    images = [np.full((2, 2, 1), value, np.uint8) for value in range(4)]
    examples = [("train", images[0], 0), ("val", images[1], 1), ("train", images[2], 1), ("train", images[3], 0)]
    votes = {
        "train": np.array([[1, 0], [0.25, 0.75], [0.5, 0.5]], np.float32),
        "val": np.array([[0.125, 0.875]], np.float32),
    }
    write_release(tmp_path, "set", Release({"train": 3, "val": 1}, examples, (2, 2, 1), ("a", "b"), [], {}, votes))
    for split, expected in votes.items():
        found = open_split(tmp_path, "set", split)
        assert found.votes.tolist() == expected.tolist()
        assert len(found) == len(expected)
