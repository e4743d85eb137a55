"""Tests of datasets.fer2013: every official form gives the right image the right label in the right split."""

from __future__ import annotations

import gzip
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from conftest import ROOT

from datasets.fer2013 import OFFICIAL_COUNTS, PrepareFer2013Config, prepare_fer2013
from datasets.shared.expressions import CLASS_NAMES
from files import UserError

REAL_ZIP = ROOT / "../shared/data/fer2013-folder.zip"

# Official name -> (the CSV's code, our class name, the gray level of its images in these tests).
CLASSES = {
    "angry": (0, "Anger", 10),
    "disgust": (1, "Disgust", 45),
    "fear": (2, "Fear", 80),
    "happy": (3, "Happy", 115),
    "sad": (4, "Sad", 150),
    "surprise": (5, "Surprise", 185),
    "neutral": (6, "Neutral", 220),
}
LEVEL_NAMES = {level: name for _, name, level in CLASSES.values()}
# Usage -> (our split, images of each class in these tests); the first pixel tells the usage.
USAGES = {"Training": ("train", 3, 1), "PublicTest": ("val", 2, 2), "PrivateTest": ("test", 1, 3)}


def row_pixels(level, mark):
    return " ".join([str(mark), "255", *[str(level)] * 2302])


def table(header="emotion,pixels,Usage", usages=USAGES, quote=""):
    """A release as a CSV in the column order of ``header``; classes and usages alternate, as in the real one."""
    lines = [header]
    for repeat in range(3):
        for usage in usages:
            _, number, mark = USAGES[usage]
            for code, _, level in CLASSES.values():
                cells = {"emotion": str(code), "Usage": usage, "pixels": quote + row_pixels(level, mark) + quote}
                if repeat < number:
                    lines.append(",".join(cells[column.strip()] for column in header.split(",")))
    return "\n".join(lines) + "\n"


def folder_form(usages=USAGES):
    """A release as folders: relative name -> JPEG bytes, each class one gray level."""
    files = {}
    for usage in usages:
        _, number, _ = USAGES[usage]
        for folder, (_, _, level) in CLASSES.items():
            data = cv2.imencode(".jpg", np.full((48, 48), level, np.uint8))[1].tobytes()
            for index in range(number):
                part = "train" if usage == "Training" else "test"
                files[f"{part}/{folder}/{usage}_{index}{level}.jpg"] = data
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def prepare(source, data_dir, **options):
    return prepare_fer2013(PrepareFer2013Config(str(source), str(data_dir), **options))


def prepared(data_dir, split):
    folder = data_dir / "fer2013" / split
    return np.load(folder / "images.npy"), np.load(folder / "labels.npy")


def check_prepared(data_dir, metas, usages=USAGES, marked=True):
    """Every image lies under its own class's name, in its own split, and none is missing."""
    assert set(metas) == {USAGES[usage][0] for usage in usages}
    for usage in usages:
        split, number, mark = USAGES[usage]
        images, labels = prepared(data_dir, split)
        assert (images.dtype, images.shape[1:]) == (np.uint8, (48, 48, 1))
        assert [CLASS_NAMES[label] for label in labels] == [LEVEL_NAMES[level] for level in images[:, 24, 24, 0]]
        assert np.bincount(labels).tolist() == [number] * 7 == metas[split]["class_counts"]
        assert metas[split]["class_names"] == ["Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger"]
        if marked:
            assert set(images[:, 0, 0, 0]) == {mark}, "the split is the usage's own"
            assert set(images[:, 0, 1, 0]) == {255} and set(images[:, 1, 0, 0]) == set(LEVEL_NAMES), "row by row"


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


# --- the forms ------------------------------------------------------------------------------------------------------


def test_fer2013_csv(tmp_path):
    source = tmp_path / "fer2013.csv"
    source.write_text(table())
    metas = prepare(source, tmp_path / "data")
    check_prepared(tmp_path / "data", metas)
    assert metas["val"]["sources"][0]["name"] == "fer2013.csv"
    assert metas["val"]["sources"][0]["bytes"] == source.stat().st_size
    assert metas["val"]["options"] == {"form": "csv"}


def test_icml_face_data_csv_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    source = tmp_path / "icml_face_data.csv"
    text = "\ufeff" + table("emotion, Usage, pixels").replace("\n", "\r\n") + "\r\n"
    source.write_bytes(text.encode())
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data"))


def test_train_csv_is_all_training(tmp_path):
    source = tmp_path / "train.csv"
    source.write_text(table("emotion,pixels", ["Training"], quote='"'))
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data"), ["Training"])


@pytest.mark.parametrize("form", ["csv", "folders"])
def test_validation_can_be_held_out_of_a_source_of_train_alone(tmp_path, form):
    def source(name, *usages):
        if form == "folders":
            return write_folder(tmp_path / name, folder_form(*usages))
        (tmp_path / f"{name}.csv").write_text(table("emotion,pixels" if usages else "emotion,pixels,Usage", *usages))
        return tmp_path / f"{name}.csv"

    metas = prepare(source("train", ["Training"]), tmp_path / "data", val_share=1 / 3)
    assert {split: meta["class_counts"] for split, meta in metas.items()} == {"train": [2] * 7, "val": [1] * 7}
    assert metas["val"]["options"] == {"form": form, "val_share": 1 / 3, "seed": 0}
    for split in ("train", "val"):
        images, labels = (np.load(tmp_path / f"data/fer2013/{split}/{name}.npy") for name in ("images", "labels"))
        assert [LEVEL_NAMES[level] for level in images[:, 40, 40, 0].tolist()] == [CLASS_NAMES[k] for k in labels]
    with pytest.raises(UserError, match=r"--val-share .*has test and train and val"):
        prepare(source("fer2013"), tmp_path / "data", val_share=0.1)


def test_a_compressed_csv(tmp_path):
    (tmp_path / "fer2013.csv.gz").write_bytes(gzip.compress(table().encode()))
    for source in (tmp_path / "fer2013.csv.gz", tmp_path):
        assert {split: meta["num_images"] for split, meta in prepare(source, tmp_path / "data").items()} == {
            "train": 21, "val": 14, "test": 7
        }  # fmt: skip


def test_a_csv_in_a_zip(tmp_path):
    source = write_zip(tmp_path / "release.zip", {"archive/README": b"", "archive/fer2013/fer2013.csv": table()})
    metas = prepare(source, tmp_path / "data")
    check_prepared(tmp_path / "data", metas)
    assert metas["train"]["sources"][0]["name"] == "release.zip"


def test_a_tar_is_read_and_a_compressed_one_names_the_remedy(tmp_path):
    folder = write_folder(tmp_path / "release", folder_form())
    for name, mode in (("release.tar", "w"), ("release.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(folder, ".")
    metas = prepare(tmp_path / "release.tar", tmp_path / "data")
    check_prepared(tmp_path / "data", metas, marked=False)
    with pytest.raises(UserError, match="run gunzip on it"):
        prepare(tmp_path / "release.tar.gz", tmp_path / "data")


def test_the_more_complete_csv_is_preferred(tmp_path):
    """The challenge's archive holds several tables; fer2013.csv and icml_face_data.csv hold all three splits."""
    empty = "emotion,pixels\n"
    source = write_zip(tmp_path / "a.zip", {"train.csv": empty, "test.csv": "pixels\n", "icml_face_data.csv": table()})
    check_prepared(tmp_path / "1", prepare(source, tmp_path / "1"))
    source = write_zip(tmp_path / "b.zip", {"icml_face_data.csv": empty, "fer2013.csv": table(), "train.csv": empty})
    check_prepared(tmp_path / "2", prepare(source, tmp_path / "2"))
    training = table("emotion,pixels", ["Training"])
    source = write_folder(tmp_path / "c", {"train.csv": training, "test.csv": "pixels\n"})
    check_prepared(tmp_path / "3", prepare(source, tmp_path / "3"), ["Training"])


def test_folders(tmp_path):
    source = write_folder(tmp_path / "release", {**folder_form(), "train/.DS_Store": b"", "test/sad/._x.jpg": b""})
    metas = prepare(source, tmp_path / "data")
    check_prepared(tmp_path / "data", metas, marked=False)
    assert metas["train"]["options"] == {"form": "folders"}
    assert metas["train"]["sources"][0]["files"] == 7 * (3 + 2 + 1)


def test_folders_in_a_zip(tmp_path):
    files = {f"fer2013/{name}": data for name, data in folder_form().items()}
    source = write_zip(tmp_path / "release.zip", {**files, "__MACOSX/train/sad/x.jpg": b"", "fer2013/train/": b""})
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data"), marked=False)


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    """A zip packed backwards gives the same bytes as the folder."""
    files = folder_form()
    prepare(write_folder(tmp_path / "release", files), tmp_path / "1")
    prepare(write_zip(tmp_path / "release.zip", dict(reversed(files.items()))), tmp_path / "2")
    for split in ("train", "val", "test"):
        (images, labels), (images_2, labels_2) = prepared(tmp_path / "1", split), prepared(tmp_path / "2", split)
        assert np.array_equal(images, images_2) and np.array_equal(labels, labels_2)
    assert prepared(tmp_path / "1", "test")[1].tolist() == [6, 5, 4, 1, 0, 2, 3], "angry, disgust, fear, happy, ..."


def test_a_split_that_the_source_lacks_is_absent_and_an_earlier_one_stays(tmp_path):
    data_dir = tmp_path / "data"
    (tmp_path / "fer2013.csv").write_text(table())
    prepare(tmp_path / "fer2013.csv", data_dir)
    earlier = prepared(data_dir, "test")
    usages = ["Training", "PublicTest"]
    source = write_zip(tmp_path / "release.zip", folder_form(usages))
    check_prepared(data_dir, prepare(source, data_dir), usages, marked=False)
    assert all(np.array_equal(now, then) for now, then in zip(prepared(data_dir, "test"), earlier, strict=True))


def test_official_counts_add_up():
    totals = {split: sum(counts) for split, counts in OFFICIAL_COUNTS.items()}
    assert totals == {"train": 28_709, "val": 3_589, "test": 3_589}


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ZIP.exists(), reason="the real release is not here")
def test_the_real_release(tmp_path):
    metas = prepare(REAL_ZIP, tmp_path)
    counts = {split: dict(zip(meta["class_names"], meta["class_counts"], strict=True)) for split, meta in metas.items()}
    train = {"Anger": 3995, "Disgust": 436, "Fear": 4097, "Happy": 7215, "Sad": 4830, "Surprise": 3171, "Neutral": 4965}
    val = {"Anger": 467, "Disgust": 56, "Fear": 496, "Happy": 895, "Sad": 653, "Surprise": 415, "Neutral": 607}
    assert counts == {"train": train, "val": val}
    images, _ = prepared(tmp_path, "train")
    assert images.shape == (28709, 48, 48, 1)
    assert 100 < images.mean() < 160 and images.std() > 50


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_refused(tmp_path_factory):
    """Refuses a source with a message, and what was prepared earlier is untouched."""
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "good.csv").write_text(table())
    data_dir = folder / "data"
    prepare(folder / "good.csv", data_dir)
    earlier = content(data_dir)

    def check(source, message):
        with pytest.raises(UserError, match=rf"(?s){message}"):
            prepare(source, data_dir)
        assert content(data_dir) == earlier

    return check


def test_a_missing_source(tmp_path, check_refused):
    check_refused(tmp_path / "nowhere", r"nowhere: no such file or folder; expected fer2013\.csv, icml_face_data\.csv")


def test_a_folder_or_zip_of_something_else(tmp_path, check_refused):
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", r"empty: found nothing; expected fer2013\.csv")
    files = {"a.txt": b"", "b.txt": b"", "c/d.txt": b"", "e.txt": b""}
    check_refused(write_folder(tmp_path / "other", files), r"found 'a\.txt', 'b\.txt', 'c', \.\.\.; expected")
    check_refused(write_zip(tmp_path / "other.zip", files), r"found 'a\.txt', 'b\.txt', 'c/d\.txt', \.\.\.; expected")


def test_a_file_of_something_else(tmp_path, check_refused):
    (tmp_path / "fer2013.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + bytes(range(256)))
    check_refused(tmp_path / "fer2013.tar.gz", r"fer2013\.tar\.gz: the gzip file is cut off or damaged")
    (tmp_path / "latin1.csv").write_bytes(b"emotion,pixels\n\xe9,1\n")
    check_refused(tmp_path / "latin1.csv", r"latin1\.csv, after line 0: expected a CSV table .* expected fer2013")
    (tmp_path / "fake.zip").write_bytes(b"hello")
    check_refused(tmp_path / "fake.zip", "the zip is cut off or damaged")


def test_a_zip_damaged_in_the_middle_of_an_image(tmp_path, check_refused):
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in folder_form().items():
            archive.writestr(name, data)
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xda", len(data) // 2) + 20] ^= 1
    path.write_bytes(data)
    check_refused(path, "damaged.*CRC")


def test_a_zip_with_another_digit_in_its_csv(tmp_path, check_refused):
    """The damage makes another valid pixel: only the checksum at the end of the file can tell."""
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fer2013.csv", table())
    path.write_bytes(path.read_bytes().replace(b" 150 150 ", b" 140 150 ", 1))
    check_refused(path, r"damaged\.zip: the zip is cut off or damaged .*CRC")


def test_a_damaged_compressed_zip(tmp_path, check_refused):
    """Compressed data are nonsense after the damage; whatever notices it first, the user gets a message."""
    path = write_zip(tmp_path / "damaged.zip", {"fer2013.csv": table()})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    check_refused(path, r"damaged\.zip")


def test_test_csv_has_no_labels(tmp_path, check_refused):
    source = write_zip(tmp_path / "challenge.zip", {"test.csv": "pixels\n" + row_pixels(0, 0) + "\n"})
    check_refused(source, r"test\.csv: this file has pixels but no labels .* fer2013\.csv and in icml_face_data\.csv")


def test_a_csv_that_is_wrong_somewhere(tmp_path, check_refused):
    """The first 42 images are good; a fault after them must not publish them."""
    for text, message in (
        ("", "the file is empty"),
        ("emotion,pixels,Usage\n", "no rows"),
        (
            "Usage,Image name,neutral,happiness\n",
            "columns 'emotion', 'pixels' and 'Usage', found 'Usage', 'Image name'",
        ),
        (table() + "3,1 2 3,Training\n", "line 44: expected 2304 pixels .*found 3"),
        (table() + f"3,{row_pixels(0, 0)} 0,Training\n", "line 44: expected 2304 pixels .*found 2305"),
        (table() + f"3,{row_pixels('x7', 0)},Training\n", "line 44: .*whole numbers 0..255, found 'x7'"),
        (table() + f"3,{row_pixels(0, 256)},Training\n", "line 44: .*whole numbers 0..255, found '256'"),
        (table() + f"3,{row_pixels(0, 0)},Validation\n", "line 44: expected Usage .*found 'Validation'"),
        (table() + f"7,{row_pixels(0, 0)},Training\n", "line 44: expected an emotion 0..6, found '7'"),
        (table()[:-4000], "line 43: expected 3 columns, found 2; is the file cut off"),
        (table("emotion, Usage, pixels")[:-4000], "line 43: expected 2304 pixels .*cut off"),
        ("emotion,pixels,Usage\n0," + "1" * 200_000, "after line 1: expected a CSV table .*field larger"),
    ):
        (tmp_path / "fer2013.csv").write_text(text)
        check_refused(tmp_path / "fer2013.csv", rf"fer2013\.csv.*{message}")


def test_a_folder_that_is_wrong_somewhere(tmp_path, check_refused):
    for name, data, message in (
        ("test/sad/PublicTest_9.jpg", b"no image", r"PublicTest_9\.jpg: expected a whole JPEG"),
        ("train/sad/Training_9.jpg", (48, 47), r"Training_9\.jpg: .*48 x 48, found 47 x 48 gray"),
        ("train/sad/Training_9.jpg", (48, 48, 3), r"Training_9\.jpg: .*48 x 48, found 48 x 48 colour"),
        ("train/contempt/Training_9.jpg", (48, 48), "expected a class folder angry, .*found 'contempt'"),
        ("train/sad/PublicTest_9.jpg", (48, 48), r"expected Training_\*\.jpg in train/, found 'PublicTest_9\.jpg'"),
        ("test/sad/Training_9.jpg", (48, 48), r"PublicTest_\*\.jpg or PrivateTest_\*\.jpg in test/, found 'Training"),
    ):
        if isinstance(data, tuple):
            data = cv2.imencode(".jpg", np.full(data, 9, np.uint8))[1].tobytes()
        check_refused(write_zip(tmp_path / "release.zip", {**folder_form(), name: data}), message)
