"""Tests of datasets.folders: one folder per class gives the right image the right label in the right split."""

from __future__ import annotations

import numpy as np
import pytest
from affectnet_releases import jpeg, shown, write_folder, write_tar, write_zip

from data_helper import open_split
from datasets.folders import PrepareFoldersConfig, prepare_folders
from files import UserError

FOLDERS = {"neutral": "Neutral", "Happiness": "Happy", "sad": "Sad", "surprise": "Surprise", "FEAR": "Fear"}
FOLDERS |= {"disgust": "Disgust", "angry": "Anger", "contempt": "Contempt"}


def release(parts, folders=FOLDERS, prefix=""):
    """Two images of each class per part; the part's images have the green level of train or test."""
    return {
        f"{prefix}{part}/{folder}/{number}.jpg": jpeg(name, "train" if part.lower().startswith("tr") else "test")
        for part in parts
        for folder, name in folders.items()
        for number in range(2)
    }


def prepare(source, data_dir, **options):
    return prepare_folders(PrepareFoldersConfig(str(source), str(data_dir), size=16, workers=1, **options))


def check_split(data_dir, split, part, count, num_classes=7):
    opened = open_split(data_dir, "folders", split)
    assert len(opened) == count and opened.num_classes == num_classes
    assert shown(np.asarray(opened.images)) == [(opened.class_names[label], part) for label in opened.labels]


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_every_folder_is_its_class_in_its_split(tmp_path, write):
    source = write(tmp_path / "mine", release(("train", "validation", "test"), prefix="images/"))
    metas = prepare(source, tmp_path / "data", classes=8)
    assert {split: meta["num_images"] for split, meta in metas.items()} == {"train": 16, "val": 16, "test": 16}
    for split in metas:
        check_split(tmp_path / "data", split, "train" if split == "train" else "test", 16, 8)


def test_validation_is_held_out_and_contempt_left_out(tmp_path):
    source = write_folder(tmp_path / "mine", release(("Training",)))
    assert prepare(source, tmp_path / "data", val_share=0.5).keys() == {"train", "val"}
    for split in ("train", "val"):
        check_split(tmp_path / "data", split, "train", 7)
        assert open_split(tmp_path / "data", "folders", split).meta["options"]["left_out"] == {"train": {"contempt": 2}}


def test_a_mapping_names_the_class_of_a_folder(tmp_path):
    names = {"1": "Surprise", "2": "Fear", "x": "none"}
    source = write_folder(tmp_path / "mine", release(("train",), names))
    with pytest.raises(UserError, match=r"folders named after .*found 1, 2, x; .*--mapping 1=Happy"):
        prepare(source, tmp_path / "data")
    prepare(source, tmp_path / "data", val_share=0, mapping="1=surprise, 2=Fear,x=none")
    check_split(tmp_path / "data", "train", "train", 4)


def test_what_is_wrong_is_named(tmp_path):
    for mapping in ("1", "=Happy", "1=moon", "1=Happy,1=Sad"):
        with pytest.raises(UserError, match="--mapping: expected folder=Class"):
            prepare(write_folder(tmp_path / "mine", release(("train",))), tmp_path / "data", mapping=mapping)
    with pytest.raises(UserError, match=r"--mapping angre=.*: expected the name of a folder in .*mine, found FEAR,"):
        prepare(tmp_path / "mine", tmp_path / "data", mapping="angre=none")
    for name, files in (("empty", {"a.txt": b""}), ("test", release(("test",)))):
        with pytest.raises(UserError, match=rf"{name}: (expected images as train/<class>|no image of the 7 classes)"):
            prepare(write_folder(tmp_path / name, files), tmp_path / "data")
    assert not (tmp_path / "data").exists()
