"""Tests of data_helper: opening prepared splits, and their digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_split

import data_helper
from data_helper import PreparedSplit, open_split, prepared_splits
from datasets.shared.split_writer import SplitWriter
from files import UserError, only_writer

EARLIER = Path(__file__).parent / "data" / "prepared_without_digest"
EARLIER_DIGEST = "440bfc69b69d673ac70f5e3d0695845b963a1a2d3cf3acae20577420bccbc338"


@pytest.fixture
def earlier(tmp_path):
    """A copy of a split that was prepared before digests existed; its data folder."""
    shutil.copytree(EARLIER, tmp_path / "data")
    return tmp_path / "data"


def meta_of(data_dir):
    return json.loads((data_dir / "ferplus/train/meta.json").read_text())


def test_the_digest_of_an_earlier_split_is_computed_once_and_kept(earlier, monkeypatch):
    before = meta_of(earlier)
    split = open_split(earlier, "ferplus", "train")
    assert meta_of(earlier) == before, "opening alone computes nothing"
    assert split.digest == EARLIER_DIGEST
    assert meta_of(earlier) == {**before, "digest": EARLIER_DIGEST}
    assert sorted(path.name for path in (earlier / "ferplus/train").iterdir()) == [
        *("images.npy", "labels.npy", "meta.json", "votes.npy")
    ]
    again = open_split(earlier, "ferplus", "train")
    monkeypatch.setattr(data_helper, "_sha256", None)  # is not called again
    assert split.digest == again.digest == EARLIER_DIGEST


def test_the_digest_is_the_sha256_of_shapes_and_bytes(earlier):
    """The arithmetic written out, from the files themselves."""
    parts = []
    for name in ("images", "labels", "votes"):
        array = np.load(earlier / f"ferplus/train/{name}.npy")
        parts.append(f'["{name}", {list(array.shape)}, "{hashlib.sha256(array.tobytes()).hexdigest()}"]')
    assert hashlib.sha256(f"[{', '.join(parts)}]".encode()).hexdigest() == EARLIER_DIGEST


def test_a_folder_that_cannot_be_written_still_has_a_digest(earlier, monkeypatch):
    def read_only(*_):
        raise PermissionError

    before = meta_of(earlier)
    with monkeypatch.context() as patch:
        patch.setattr(data_helper, "write_json", read_only)
        assert open_split(earlier, "ferplus", "train").digest == EARLIER_DIGEST
    with only_writer(earlier / "ferplus"):  # by somebody else
        assert open_split(earlier, "ferplus", "train").digest == EARLIER_DIGEST
    assert meta_of(earlier) == before


def test_a_split_prepared_again_meanwhile_gets_no_digest_of_the_old_pixels(earlier):
    split = open_split(earlier, "ferplus", "train")
    path = earlier / "ferplus/train/meta.json"
    path.write_text(json.dumps({**meta_of(earlier), "options": {"classes": 7}}))
    with pytest.raises(UserError, match="ferplus/train: was prepared again"):
        _ = split.digest
    assert "digest" not in meta_of(earlier)


def test_other_content_has_another_digest(earlier):
    opened = open_split(earlier, "ferplus", "train")
    arrays = {name: np.array(getattr(opened, name)) for name in ("images", "labels", "votes")}
    split = PreparedSplit(**arrays, meta={"dataset": "ferplus", "split": "train"})
    assert split.digest == EARLIER_DIGEST, "in memory as on disk"
    others = [
        dataclasses.replace(split, images=split.images ^ np.eye(4, 3, dtype=np.uint8)[..., None]),
        dataclasses.replace(split, images=split.images.reshape(3, 3, 4, 1)),
        dataclasses.replace(split, labels=split.labels[::-1]),
        dataclasses.replace(split, votes=split.votes[::-1]),
        dataclasses.replace(split, votes=None),
    ]
    assert len({split.digest, *(other.digest for other in others)}) == 6


def test_a_new_split_is_written_with_the_digest_that_would_be_computed(tmp_path):
    with SplitWriter(tmp_path, "ferplus", "train", 3, (5, 4, 3), "abc", [], {}) as writer:
        for label in (0, 2, 1):
            writer.add(np.full((5, 4, 3), 50 * label, np.uint8), label)
        writer.add_array("votes", np.eye(3, dtype=np.float32)[[0, 2, 1]])
    split = open_split(tmp_path, "ferplus", "train")
    written = split.meta.pop("digest")
    assert written == writer.meta["digest"] == split.digest


def test_a_digest_of_another_form_is_refused(earlier):
    path = earlier / "ferplus/train/meta.json"
    path.write_text(json.dumps({**meta_of(earlier), "digest": "\x1b[31m"}))
    with pytest.raises(UserError, match=r"meta\.json: digest: .*a-f.*x1b"):
        open_split(earlier, "ferplus", "train")


def write_votes(data_dir, votes, labels=(0, 2, 1)):
    folder = write_split(data_dir, labels, num_classes=3)
    np.save(folder / "votes.npy", np.array(votes))
    edit_meta(digest=None)(folder)
    return open_split(data_dir, "synthetic", "train")


GOOD_VOTES = np.array([[0.5, 0.25, 0.25], [0, 0, 1], [0.3, 0.6, 0.1]], np.float32)


def test_votes_are_opened_beside_the_labels(tmp_path):
    votes = write_votes(tmp_path, GOOD_VOTES).votes
    assert not votes.flags.writeable
    assert votes.tolist() == GOOD_VOTES.tolist()
    write_split(tmp_path, [0], split="val")
    assert open_split(tmp_path, "synthetic", "val").votes is None


def test_votes_that_do_not_belong_to_the_labels_are_refused(tmp_path):
    for votes, message in (
        (GOOD_VOTES[:2], r"expected float32 \(3, 3\) in C order, found float32 \(2, 3\)"),
        (GOOD_VOTES[:, :2].copy(), r"found float32 \(3, 2\)"),
        (GOOD_VOTES.astype(np.float64), r"expected float32 .*, found float64"),
        (GOOD_VOTES[[0, 2, 1]], r"largest at the label, found \[0\.3.* for label 2 at row 1; prepare"),
        (GOOD_VOTES * 10, r"sum to 1 .*found \[5\.0, 2\.5, 2\.5\] for label 0 at row 0"),
        (GOOD_VOTES + np.float32([[0, 0, 0], [0, 0, np.nan], [0, 0, 0]]), r"nan\] for label 2 at row 1"),
        (GOOD_VOTES + np.float32([[0, 0, 0], [0, 0, 0], [0, 0.2, -0.2]]), r"at row 2"),
    ):
        with pytest.raises(UserError, match=rf"votes\.npy: .*{message}"):
            write_votes(tmp_path, votes)


# --- opening

LABELS = np.array([0] * 10 + [1] * 3 + [2] * 6 + [6] * 4)  # 23 images


@pytest.mark.parametrize(("shape", "num_classes"), [((8, 8, 1), 7), ((5, 9, 3), 8)])
def test_a_split_is_what_was_prepared(tmp_path, shape, num_classes):
    labels = [3, 0, 0, num_classes - 1]
    write_split(tmp_path, labels, split="val", shape=shape, num_classes=num_classes)
    split = open_split(str(tmp_path), "synthetic", "val")
    assert split.images.shape == (4, *shape) and split.images.dtype == np.uint8
    assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
    assert split.labels.tolist() == labels and split.labels.dtype == np.int64
    assert (split.images == np.arange(4).reshape(4, 1, 1, 1)).all()
    assert (len(split), split.name, split.num_classes) == (4, "synthetic/val", num_classes)
    assert split.class_names[:3] == ("Neutral", "Happy", "Sad") and len(split.class_names) == num_classes
    assert split.class_counts.tolist() == [2, 0, 0, 1, 0, 0] + ([1] if num_classes == 7 else [0, 1])


def test_prepared_splits_are_listed_in_order(tmp_path):
    assert prepared_splits(tmp_path / "nowhere") == []
    for dataset, split in (("synthetic", "val"), ("fer2013", "train"), ("synthetic", "test")):
        write_split(tmp_path, [0], dataset=dataset, split=split)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert prepared_splits(tmp_path) == [("fer2013", "train"), ("synthetic", "test"), ("synthetic", "val")]


@pytest.mark.parametrize(("dataset", "source"), [("fer2013", " --source PATH"), ("synthetic", "")])
def test_what_is_not_prepared_names_the_command(tmp_path, dataset, source):
    with pytest.raises(UserError) as caught:
        open_split(tmp_path, dataset, "train")
    assert f"python prepare_data.py {dataset}{source} --data-dir {tmp_path}" in str(caught.value)
    write_split(tmp_path, [0, 1], dataset=dataset, split="val")
    with pytest.raises(UserError, match=rf"source had no such part \(found: {dataset}/val\); prepare {dataset} again"):
        open_split(tmp_path, dataset, "train")


def test_a_missing_validation_part_names_what_makes_one(tmp_path):
    """The command that was just run would leave the same splits again."""
    write_split(tmp_path, [0, 1], dataset="rafdb")
    with pytest.raises(UserError, match=r"rafdb/val is not prepared .*--val-share 0\.1") as caught:
        open_split(tmp_path, "rafdb", "val")
    assert "--select-on" not in str(caught.value), "there is no test part either"
    write_split(tmp_path, [0, 1], dataset="rafdb", split="test")
    with pytest.raises(UserError, match=r"--val-share 0\.1.*or train with --select-on test"):
        open_split(tmp_path, "rafdb", "val")


def replace(name, array):
    return lambda folder: np.save(folder / name, array)


def cut(name, length):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return damage


def append(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def edit_meta(**values):
    def damage(folder):
        path = folder / "meta.json"
        changed = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))

    return damage


def as_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def flip(name, place):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


IMAGES, INTS = np.zeros((23, 8, 8, 1), np.uint8), np.zeros(23, np.int64)
SHUFFLED = LABELS[::-1].copy()  # as many of each class
DAMAGES = {
    "fewer labels": (replace("labels.npy", INTS[:22]), r"labels\.npy: expected int64 \(23\) .*found int64 \(22\)"),
    "meta counts others": (edit_meta(num_images=24), r"images\.npy: expected uint8 \(24, 8, 8, 1\).*\(23, 8, 8, 1\)"),
    "images cut off": (cut("images.npy", -10), r"images\.npy: not a whole \.npy file: expected 1,600 .*found 1,590"),
    "images too long": (append("images.npy"), r"images\.npy: not a whole .*expected 1,600 .*found 1,601"),
    "labels cut off": (cut("labels.npy", -1), r"labels\.npy: not a whole \.npy file"),
    "header cut off": (cut("images.npy", 60), r"images\.npy: the file is cut off in its header"),
    "images are text": (as_text("images.npy", "emotion,pixels\n0,70 80 82\n"), r"images\.npy: no \.npy file"),
    "labels are objects": (replace("labels.npy", np.array([None] * 23)), r"labels\.npy: Python objects"),
    "images are floats": (replace("images.npy", IMAGES / 255), r"expected uint8 .*found float64"),
    "images of another shape": (replace("images.npy", IMAGES.reshape(23, 4, 16, 1)), r"found uint8 \(23, 4, 16, 1\)"),
    "images in Fortran order": (
        replace("images.npy", np.asfortranarray(np.zeros((23, 8, 8, 1), np.uint8))),
        r"images\.npy: expected .* in C order, found .* in Fortran order",
    ),
    "labels of the other byte order": (replace("labels.npy", INTS.astype(">i8")), r"expected int64 .*found >i8"),
    "labels are one-hot": (replace("labels.npy", np.eye(23, 7, dtype=np.int64)), r"expected int64 \(23\) .*found"),
    "a label too large": (replace("labels.npy", INTS + 7 * (np.arange(23) == 9)), r"codes 0\.\.6, found 7 at row 9"),
    "a label below 0": (replace("labels.npy", INTS - (np.arange(23) == 22)), r"codes 0\.\.6, found -1 at row 22"),
    "other labels": (replace("labels.npy", INTS), r"expected \[10, 3, 6, 0, 0, 0, 4\] labels per class.*found \[23, 0"),
    "labels in another order": (replace("labels.npy", SHUFFLED), r"not those that meta\.json names"),
    "a pixel": (flip("images.npy", -1), r"not those that meta\.json names"),
    "a bit of the header": (flip("images.npy", 12), r"images\.npy: "),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), r"labels\.npy: the file is missing"),
    "another format": (edit_meta(format_version=2), r"meta\.json: format_version: expected 1, found 2"),
    "meta lacks the classes": (edit_meta(class_names=None), r"meta\.json: class_names: .*required"),
    "meta lacks the counts": (edit_meta(class_counts=None), r"meta\.json: class_counts"),
    "classes are numbers": (edit_meta(class_names=[1, 2, 3, 4, 5, 6, 7]), r"class_names\.0: expected a valid string"),
    "two equal classes": (edit_meta(class_names=["a"] * 7), r"class_names: expected every class name once, found 'a'"),
    "a class with escape codes": (edit_meta(class_names=["\x1b[31m", *"bcdefg"]), r"printable characters, found .*x1b"),
    "a length as text": (edit_meta(num_images="23"), r"meta\.json: num_images: expected a valid integer, found '23'"),
    "options are a list": (edit_meta(options=[1]), r"meta\.json: options"),
    "counts are nested": (edit_meta(options={"left_out": {"train": [3]}}), r"meta\.json: options\.left_out\.train"),
    "meta is a list": (as_text("meta.json", "[1, 2]"), r"meta\.json: expected"),
    "meta nests deeply": (as_text("meta.json", "[" * 100_000), r"meta\.json: expected JSON"),
    "meta cut off": (cut("meta.json", 50), r"meta\.json: expected JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, damage):
    make, message = DAMAGES[damage]
    make(write_split(tmp_path, LABELS))
    with pytest.raises(UserError, match=message) as caught:
        open_split(tmp_path, "synthetic", "train")
    assert "prepare the data set again" in str(caught.value) and len(str(caught.value)) < 600


def test_images_cut_since_they_were_opened_are_an_error_and_not_the_end_of_the_process(tmp_path):
    """Reading a memory map beyond the end of its file would end the process with SIGBUS."""
    folder = write_split(tmp_path, [0] * 23, shape=(64, 64, 3))
    split = open_split(tmp_path, "synthetic", "train")
    assert split.rows[[22, 3]].tolist() == split.images[[22, 3]].tolist()
    os.truncate(folder / "images.npy", 128 + 20 * 64 * 64 * 3 + 5)
    assert split.rows[19].tolist() == np.full((64, 64, 3), 19).tolist()
    for read in (lambda: split.rows[[3, 20]], lambda: split.rows[18:23], split.computed_digest):
        with pytest.raises(UserError, match=r"images\.npy: ends before row 20"):
            read()


class Planted:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("name", "kind"), [("images.npy", "bare pickle"), ("labels.npy", "object array")])
def test_a_pickle_is_refused_and_not_run(tmp_path, name, kind):
    path = write_split(tmp_path / "data", LABELS) / name
    planted = Planted(tmp_path / "planted")
    if kind == "object array":
        np.save(path, np.array([planted], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(planted))
    with pytest.raises(UserError, match=rf"{name}: (no \.npy file|Python objects)"):
        open_split(tmp_path / "data", "synthetic", "train")
    assert not (tmp_path / "planted").exists()
    with pytest.raises(FileNotFoundError):  # the trap works
        (tmp_path / "planted").rmdir()
    np.load(path, allow_pickle=True)
    assert (tmp_path / "planted").is_dir()
