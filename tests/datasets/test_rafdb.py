"""Tests of datasets.rafdb: the official release is read, and a mistake in it is named."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile

import cv2
import numpy as np
import pytest

from data_helper import SPLITS
from datasets.rafdb import LIST, OFFICIAL_COUNTS, PrepareRafdbConfig, prepare_rafdb
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.release import stratified_hold_out
from files import UserError

# The codes as RAF-DB's own readme lists them, against the canonical names.
RAFDB = {1: "Surprise", 2: "Fear", 3: "Disgust", 4: "Happy", 5: "Sad", 6: "Anger", 7: "Neutral"}
# What an image of an expression looks like here: a colour of its own, in RGB.
COLOURS = {
    "Neutral": (250, 250, 250), "Happy": (250, 0, 0), "Sad": (0, 250, 0), "Surprise": (0, 0, 250),
    "Fear": (250, 250, 0), "Disgust": (0, 250, 250), "Anger": (250, 0, 250),
}  # fmt: skip
PER_CLASS = {"train": 3, "test": 1}


def png(image):
    """An image file; lossless, whatever its name says."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def write_release(folder, *, per_class=None):
    """The official layout: in each part the codes 1 to 7 in turn, the images numbered from 1.

    An aligned image is filled with its class's colour; an original is black but for the face in that colour.
    """
    for name in ("EmoLabel", "Image/aligned", "Image/original", "Annotation/boundingbox"):
        (folder / name).mkdir(parents=True)
    lines = []
    for part, repeats in (per_class or PER_CLASS).items():
        for number in range(1, 7 * repeats + 1):
            code = (number - 1) % 7 + 1
            stem = f"{part}_{number:0{5 if part == 'train' else 4}}"
            lines.append(f"{stem}.jpg {code}\n")
            colour = COLOURS[RAFDB[code]]
            (folder / f"Image/aligned/{stem}_aligned.jpg").write_bytes(png(np.full((10, 10, 3), colour, np.uint8)))
            original = np.zeros((40, 60, 3), np.uint8)
            original[8:20, 30:50] = colour
            (folder / f"Image/original/{stem}.jpg").write_bytes(png(original))
            (folder / f"Annotation/boundingbox/{stem}_boundingbox.txt").write_text("30.2 8.1 49.6 19.8\n")
    (folder / LIST).write_text("".join(lines))
    return folder


def prepare(source, data_dir, **options):
    settings = {"size": 8, "val_share": 1 / 3, "workers": 2, **options}
    return prepare_rafdb(PrepareRafdbConfig(str(source), str(data_dir), **settings))


def prepared(data_dir, split):
    folder = data_dir / "rafdb" / split
    return np.load(folder / "images.npy"), np.load(folder / "labels.npy")


def check_colours(images, labels):
    """Every image shows what its label says."""
    for image, label in zip(images, labels.tolist(), strict=True):
        assert np.all(image == COLOURS[CLASS_NAMES[label]])


def as_folder(folder):
    return folder


def as_zip(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return folder.with_suffix(".zip")


def as_tar(folder):
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, "./basic")
    shutil.rmtree(folder)
    return folder.with_suffix(".tar")


def as_parent(folder):
    return folder.parent


@pytest.mark.parametrize(
    ("form", "images"),
    [(as_folder, "aligned"), (as_parent, "original"), (as_zip, "original"), (as_tar, "aligned")],
)
def test_every_image_shows_what_its_label_says(tmp_path, form, images):
    source = form(write_release(tmp_path / "in" / "basic"))
    metas = prepare(source, tmp_path, images=images)
    assert {split: meta["class_counts"] for split, meta in metas.items()} == {
        "train": [2] * 7, "val": [1] * 7, "test": [1] * 7
    }  # fmt: skip
    for split, meta in metas.items():
        assert meta["class_names"] == ["Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger"]
        assert meta["image_shape"] == [8, 8, 3]
        check_colours(*prepared(tmp_path, split))
    assert prepared(tmp_path, "test")[1].tolist() == [3, 4, 5, 1, 2, 6, 0], "in the order of the list"


def with_three_columns(folder):
    path = folder / LIST
    path.write_text("".join(f"{line} 1\n" for line in path.read_text().splitlines()))


def with_aligned_names(folder):
    path = folder / LIST
    path.write_text(path.read_text().replace(".jpg", "_aligned.jpg"))


def in_code_folders(folder):
    for line in (folder / LIST).read_text().splitlines():
        name, code = line.split()
        aligned = name.replace(".jpg", "_aligned.jpg")
        place = folder / "DATASET" / name.partition("_")[0] / code
        place.mkdir(parents=True, exist_ok=True)
        (folder / "Image/aligned" / aligned).rename(place / aligned)
    shutil.rmtree(folder / "EmoLabel")


@pytest.mark.parametrize("change", [with_three_columns, with_aligned_names, in_code_folders])
@pytest.mark.parametrize("form", [as_folder, as_zip])
def test_other_forms_in_circulation(tmp_path, form, change):
    official = write_release(tmp_path / "official/basic")
    expected = {split: prepare(official, tmp_path / "a") and prepared(tmp_path / "a", split) for split in SPLITS}
    source = write_release(tmp_path / "other/basic")
    change(source)
    prepare(form(source), tmp_path / "b")
    for split in SPLITS:
        images, labels = prepared(tmp_path / "b", split)
        check_colours(images, labels)
        assert sorted(labels.tolist()) == sorted(expected[split][1].tolist())


def test_the_hold_out_is_recorded_and_repeatable(tmp_path):
    source = write_release(tmp_path / "basic", per_class={"train": 10, "test": 1})
    metas = prepare(source, tmp_path, val_share=0.2, seed=3)
    options = metas["val"]["options"]
    assert (options["val_share"], options["seed"], options["images"], options["unlisted"]) == (0.2, 3, "aligned", 0)
    assert metas["val"]["class_counts"] == [2] * 7 and metas["train"]["class_counts"] == [8] * 7
    labels = np.array([3, 4, 5, 1, 2, 6, 0] * 10)  # of the codes 1 to 7, ten times
    held_out = stratified_hold_out(labels, 0.2, 3)
    assert prepared(tmp_path, "val")[1].tolist() == labels[held_out].tolist()
    assert prepared(tmp_path, "train")[1].tolist() == labels[~held_out].tolist()
    assert list(prepare(source, tmp_path / "all", val_share=0)) == ["train", "test"]
    with pytest.raises(UserError, match=r"rafdb/val: .*--val-share 0\.2, .*in this train too"):
        prepare(source, tmp_path, val_share=0)
    assert prepared(tmp_path, "train")[1].tolist() == labels[~held_out].tolist()


def test_a_second_run_reads_no_list(tmp_path, monkeypatch):
    source = write_release(tmp_path / "basic")
    metas = prepare(source, tmp_path)
    monkeypatch.setattr("datasets.rafdb._read_list", lambda *_: pytest.fail("the list was read"))
    assert prepare(source, tmp_path) == metas
    monkeypatch.undo()
    for changed in ({"size": 9}, {"val_share": 0.4}, {"seed": 1}, {"images": "original"}):
        assert prepare(source, tmp_path, **changed) != metas
    text = (source / LIST).read_text()
    (source / LIST).write_text(text.replace("test_0001.jpg 1", "test_0001.jpg 4"))
    assert prepare(source, tmp_path)["test"]["class_counts"] == [1, 2, 1, 0, 1, 1, 1]


def test_the_official_counts_are_those_of_the_paper():
    """By RAF-DB's codes 1 to 7, as its readme lists them; 12,271 and 3,068 together."""
    by_code = {"train": (1290, 281, 717, 4772, 1982, 705, 2524), "test": (329, 74, 160, 1185, 478, 162, 680)}
    for part, counts in by_code.items():
        named = dict(zip(RAFDB.values(), counts, strict=True))
        assert OFFICIAL_COUNTS[part] == tuple(named[name] for name in CLASS_NAMES[:7])
    assert {part: sum(counts) for part, counts in OFFICIAL_COUNTS.items()} == {"train": 12271, "test": 3068}


def test_images_without_an_entry_are_left_out_and_counted(tmp_path, capsys):
    source = write_release(tmp_path / "basic")
    for number in range(90001, 90005):
        shutil.copy(
            source / "Image/aligned/train_00001_aligned.jpg", source / f"Image/aligned/train_{number}_aligned.jpg"
        )
    (source / "Image/aligned/Thumbs.db").write_bytes(b"")
    metas = prepare(source, tmp_path)
    assert metas["train"]["options"]["unlisted"] == 4 and metas["train"]["num_images"] == 14
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    names = ", ".join(f"Image/aligned/train_{number}_aligned.jpg" for number in (90001, 90002, 90003))
    assert line == f"left out 4 images that EmoLabel/list_patition_label.txt does not name ({names}, ...)"


def test_one_broken_image_is_left_out_or_stops(tmp_path):
    source = write_release(tmp_path / "basic")
    (source / "Image/aligned/test_0002_aligned.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"basic/Image/aligned/test_0002_aligned\.jpg: expected a whole JPEG"):
        prepare(source, tmp_path, strict=True)
    assert not (tmp_path / "rafdb/test").exists()
    metas = prepare(source, tmp_path)
    assert metas["test"]["class_counts"] == [1, 1, 1, 1, 0, 1, 1]
    check_colours(*prepared(tmp_path, "test"))


# --- mistakes -------------------------------------------------------------------------------------------------------


def edit_list(edit):
    return lambda source: (source / LIST).write_text(edit((source / LIST).read_text()))


def replace(old, new):
    return edit_list(lambda text: text.replace(old, new))


def remove(*names):
    return lambda source: [(source / name).unlink() for name in names]


def write_box(text):
    return lambda source: (source / "Annotation/boundingbox/train_00003_boundingbox.txt").write_text(text)


ALIGNED = [f"Image/aligned/train_0000{number}_aligned.jpg" for number in (2, 3, 4, 5)]


def test_a_mistake_is_named_and_nothing_written(tmp_path):
    whole = write_release(tmp_path / "whole")
    mistakes = (
        (remove(LIST), "aligned", r"basic: expected one RAF-DB basic release.*found no EmoLabel/"),
        (
            remove(*ALIGNED),
            "aligned",
            rf"4 of the 28 images that the list needs are missing \({', '.join(ALIGNED[:3])}, \.\.\.\)",
        ),
        (
            remove("Image/original/test_0001.jpg"),
            "original",
            r"1 of the 28 images.*\(Image/original/test_0001\.jpg\); expected all of them in Image/original/",
        ),
        (
            remove("Annotation/boundingbox/test_0001_boundingbox.txt"),
            "original",
            r"1 of the 28 bounding boxes .*test_0001_boundingbox\.txt\)",
        ),
        (replace("02.jpg 2", "02.jpg 8"), "aligned", r"line 2: expected a code 1\.\.7, found 8"),
        (replace("03.jpg 3", "03.jpg"), "aligned", r"line 3: .*found 'train_00003\.jpg'"),
        (replace("00003.", "00002."), "aligned", r"line 3: train_00002\.jpg .* second time"),
        (edit_list(lambda text: text[:-3]), "aligned", r"txt, line 28: .*found 'test_0007\.jpg'; is the file cut off"),
        (edit_list(lambda text: text[: text.index("test")]), "aligned", "no test images; is it cut off"),
        (write_box("1 2 3"), "original", r"train_00003_boundingbox\.txt: expected four numbers x1 y1 x2 y2"),
        (write_box("1 2 nan 4"), "original", "expected four numbers"),
        (write_box("9 2 3 4"), "original", "x1 < x2"),
    )
    for number, (damage, images, message) in enumerate(mistakes):
        source = shutil.copytree(whole, tmp_path / str(number) / "basic")
        damage(source)
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "data", images=images)
        assert not list((tmp_path / "data").rglob("*.npy"))


def test_two_releases_in_one_folder_are_refused(tmp_path):
    write_release(tmp_path / "in/basic")
    write_release(tmp_path / "in/copy")
    with pytest.raises(UserError, match=r"expected one RAF-DB basic release.*found basic/ and copy/"):
        prepare(tmp_path / "in", tmp_path)


def test_windows_line_ends_and_a_mark_at_the_start(tmp_path):
    source = write_release(tmp_path / "basic")
    text = (source / LIST).read_text()
    (source / LIST).write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    metas = prepare(source, tmp_path)
    assert json.loads((tmp_path / "rafdb/test/meta.json").read_text()) == metas["test"]
    check_colours(*prepared(tmp_path, "train"))
