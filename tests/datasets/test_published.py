"""Tests of datasets.published: the published repository's layout gives the right image the right label."""

from __future__ import annotations

import numpy as np
import pytest
from affectnet_releases import CODES, annotated, jpeg, npy, release_2021, shown, write_folder, write_tar, write_zip

from datasets.published import PreparePublishedConfig, prepare_published
from datasets.shared.expressions import CLASS_NAMES
from files import UserError

SEVEN = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger")
# Images a class; no two alike, so that no two can be swapped unseen.
COUNTS = dict(zip((*SEVEN, "Contempt"), (1, 2, 3, 4, 5, 6, 7, 8), strict=True))
ONE = dict.fromkeys(SEVEN, 1)


def prepare(source, data_dir, **options):
    return prepare_published(
        PreparePublishedConfig(str(source), str(data_dir), **{"size": 16, "workers": 1, **options})
    )


def check_prepared(data_dir, metas, split="train", counts=COUNTS, classes=7):
    assert list(metas) == [split]
    meta = metas[split]
    assert (meta["dataset"], meta["split"], meta["class_names"]) == ("published", split, list(CLASS_NAMES[:classes]))
    images, labels = (np.load(data_dir / "published" / split / name) for name in ("images.npy", "labels.npy"))
    assert (images.dtype, images.shape[1:]) == (np.uint8, (16, 16, 3))
    assert shown(images) == [(CLASS_NAMES[label], "train") for label in labels]
    assert meta["class_counts"] == [counts[name] for name in CLASS_NAMES[:classes]]
    assert np.bincount(labels, minlength=classes).tolist() == meta["class_counts"]


@pytest.mark.parametrize(
    ("pack", "prefix", "suffix"),
    [
        (write_folder, "", ".jpg"),
        (write_folder, "Fer2013/", ".JPG"),
        (write_zip, "Fer2013/", ".png"),
        (write_tar, "", ".jpeg"),
    ],
)
def test_the_layout(tmp_path, pack, prefix, suffix):
    files = {prefix + name: data for name, data in annotated(COUNTS, "train", suffix=suffix).items()}
    source = pack(tmp_path / "release", {**files, f"{prefix}images/.DS_Store": b"", "notes.txt": b""})
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data", classes=8), classes=8)


def test_the_split_is_the_chosen_one_and_seven_classes_leave_contempt_out(tmp_path):
    split = "val"
    files = annotated({**COUNTS, "uncertain": 2}, "train", lambda code: npy(float(code)))
    metas = prepare(write_folder(tmp_path / "release", files), tmp_path / "data", split=split)
    check_prepared(tmp_path / "data", metas, split)
    assert metas[split]["options"]["left_out"] == {split: {"contempt": 8, "uncertain": 2}}


def test_stems_with_points_and_underscores(tmp_path):
    """RAF-DB's images are called like this in the published layout."""
    files = {}
    for name, code in list(CODES.items())[:7]:
        files[f"images/train_0{code}_aligned.v1.jpg"] = jpeg(name, "train")
        files[f"annotations/train_0{code}_aligned.v1_exp.npy"] = npy(code)
    check_prepared(tmp_path / "data", prepare(write_folder(tmp_path / "a", files), tmp_path / "data"), counts=ONE)


def test_pictures_without_annotation_are_counted_and_passed_over(tmp_path):
    files = {**annotated(COUNTS, "train"), "images/more.jpg": jpeg("Happy", "test")}
    source = write_folder(tmp_path / "release", files)
    metas = prepare(source, tmp_path / "data")
    check_prepared(tmp_path / "data", metas)
    assert metas["train"]["options"]["pictures_without_annotation"] == 1
    with pytest.raises(UserError, match=r"release: .*1 images without an annotation \(images/more\.jpg\)"):
        prepare(source, tmp_path / "strict", strict=True)
    assert not list((tmp_path / "strict").rglob("*.npy"))


def test_what_a_user_can_get_wrong(tmp_path):
    mistakes = (
        ({}, r"release: expected one folder with images/\*\.jpg .*found none"),
        (release_2021(ONE, ONE), "found train_set, val_set; give that folder"),
        ({**annotated(ONE, "train"), "annotations/99_exp.npy": npy("3")}, r"1 annotations without an image \(ann"),
        ({**annotated(ONE, "train"), "images/3.png": b""}, r"found images/3\.jpg beside images/3\.png"),
        ({"images/1.jpg": b"", "notes": b""}, r"1 images without an annotation \(images/1\.jpg\)"),
        (annotated({"non-face": 2, "Contempt": 1}, "train", npy), "no image of the 7 classes is left"),
    )
    for number, (files, message) in enumerate(mistakes):
        source = tmp_path / str(number) / "release"
        source.mkdir(parents=True)
        write_folder(source, files)
        with pytest.raises(UserError, match=f"(?s){message}"):
            prepare(source, tmp_path / "data")
        assert not list((tmp_path / "data").rglob("*.npy"))


def test_a_second_run_reads_no_label_unless_for_another_split(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "release", annotated(COUNTS, "train"))
    first = prepare(source, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.published.read_annotated", None)
        assert prepare(source, tmp_path / "data") == first
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data", split="test"), "test")
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data", classes=8), classes=8)
