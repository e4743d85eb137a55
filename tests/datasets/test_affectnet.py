"""Tests of datasets.affectnet: both official releases give the right face the right label in the right split."""

from __future__ import annotations

import itertools
import os
import pickle

import numpy as np
import pytest
from affectnet_releases import (
    CODES,
    HEADER,
    jpeg,
    npy,
    release_2021,
    release_first,
    row,
    shown,
    write_folder,
    write_tar,
    write_zip,
)

from datasets.affectnet import OFFICIAL_COUNTS, PrepareAffectnetConfig, prepare_affectnet
from datasets.shared.expressions import CLASS_NAMES
from files import UserError

SEVEN = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger")
EIGHT = (*SEVEN, "Contempt")
# Images a class; no two of a part alike, so that no two can be swapped unseen.
TRAIN = dict(zip(EIGHT, (10, 12, 4, 6, 2, 8, 14, 3), strict=True))
TEST = dict(zip(EIGHT, (2, 1, 3, 1, 2, 1, 1, 2), strict=True))
ONE = dict.fromkeys(SEVEN, 1)
TWO = dict.fromkeys(SEVEN, 2)


def prepare(source, data_dir, **options):
    defaults = {"size": 16, "val_share": 0.5, "workers": 1}
    return prepare_affectnet(PrepareAffectnetConfig(str(source), str(data_dir), **{**defaults, **options}))


def prepared(data_dir, split):
    folder = data_dir / "affectnet" / split
    return np.load(folder / "images.npy"), np.load(folder / "labels.npy")


def counts(meta):
    return {name: count for name, count in zip(meta["class_names"], meta["class_counts"], strict=True) if count}


def check_prepared(data_dir, metas, train=TRAIN, test=TEST, classes=EIGHT):
    """Every image lies under its own class's name in its own split, half of each training class in ``val``."""
    wanted = {
        "train": {name: train.get(name, 0) - round(train.get(name, 0) / 2) for name in classes},
        "val": {name: round(train.get(name, 0) / 2) for name in classes},
        "test": {name: test.get(name, 0) for name in classes},
    }
    assert set(metas) == {split for split in wanted if any(wanted[split].values())}
    for split, meta in metas.items():
        assert meta["class_names"] == list(classes)
        assert meta["class_counts"] == list(wanted[split].values())
        images, labels = prepared(data_dir, split)
        assert (images.dtype, images.shape[1:]) == (np.uint8, (16, 16, 3))
        part = "test" if split == "test" else "train"
        assert shown(images) == [(CLASS_NAMES[label], part) for label in labels]
        assert np.bincount(labels, minlength=len(classes)).tolist() == meta["class_counts"]


def content(folder):
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    paths = (path for path in paths if ".tmp-" not in str(path))  # what the next run goes on from
    return {path: path.read_bytes() for path in paths}


# --- the 2021 release -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pack", "prefix"), [(write_folder, ""), (write_zip, "AffectNet/"), (write_tar, "")])
def test_2021(tmp_path, pack, prefix):
    files = {prefix + name: data for name, data in release_2021(TRAIN, TEST).items()}
    junk = {"__MACOSX/train_set/images/._0.jpg": b"", f"{prefix}train_set/images/.DS_Store": b"", "README": b""}
    metas = prepare(pack(tmp_path / "release", {**files, **junk}), tmp_path / "data", classes=8)
    check_prepared(tmp_path / "data", metas)
    options = metas["test"]["options"]
    assert (options["form"], options["classes"], options["val_share"], options["seed"]) == ("2021", 8, 0.5, 0)
    assert options["left_out"] == {"train": {}, "test": {}}
    assert options["pictures_without_annotation"] == 0


def test_labels_of_every_dtype(tmp_path):
    kinds = itertools.cycle(
        [
            lambda code: npy(str(code), "<U1"),
            lambda code: npy(f" {code}", "<U5"),
            lambda code: npy(str(code), ">U2"),
            lambda code: npy(str(code), "S1"),
            lambda code: npy(code, "<i8"),
            lambda code: npy([code], ">i2"),
            lambda code: npy(code, "u1"),
            lambda code: npy(code, "<f8"),
            lambda code: npy([[code]], "<f4"),
        ]
    )
    files = release_2021(TRAIN, TEST, lambda code: next(kinds)(code))
    check_prepared(tmp_path / "data", prepare(write_zip(tmp_path / "a", files), tmp_path / "data", classes=8))


def test_seven_classes_leave_contempt_out(tmp_path):
    metas = prepare(write_folder(tmp_path / "a", release_2021(TRAIN, TEST)), tmp_path / "data")
    check_prepared(tmp_path / "data", metas, classes=SEVEN)
    assert metas["train"]["options"]["left_out"] == {"train": {"contempt": 3}, "test": {"contempt": 2}}


def test_what_is_no_expression_is_left_out_and_counted(tmp_path):
    train = {**TRAIN, "none": 2, "uncertain": 1, "non-face": 3}
    files = release_2021(train, TEST, lambda code: npy(code))
    metas = prepare(write_folder(tmp_path / "a", files), tmp_path / "data", classes=8)
    check_prepared(tmp_path / "data", metas)
    assert metas["val"]["options"]["left_out"]["train"] == {"none": 2, "uncertain": 1, "non-face": 3}


def test_a_part_alone_prepares_its_splits_and_the_others_stay(tmp_path):
    part, splits = "train_set", {"train", "val"}
    data_dir = tmp_path / "data"
    prepare(write_folder(tmp_path / "a", release_2021(TRAIN, TEST)), data_dir, classes=8)
    earlier = content(data_dir)
    files = {name: data for name, data in release_2021(TWO, TWO).items() if name.startswith(part)}
    metas = prepare(write_tar(tmp_path / f"{part}.tar", files), data_dir, val_share=0.6, classes=8)
    assert set(metas) == splits
    now = content(data_dir)
    changed = {path.parent.name for path in now if now[path] != earlier[path]}
    assert changed == splits


# --- the hold-out ---------------------------------------------------------------------------------------------------


def hold_out(tmp_path, name, **options):
    """Ids of the images in train and val: the pixel in the corner tells the id."""
    data_dir = tmp_path / name
    metas = prepare(tmp_path / "release", data_dir, size=40, **options)
    found = {split: prepared(data_dir, split)[0][:, 2, 2] for split in metas if split != "test"}
    return {split: [round(pixel[2] / 4) for pixel in pixels.astype(int)] for split, pixels in found.items()}, metas


def numbered(name, number):
    """An image whose blue tells its number."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(jpeg(name, "train"), np.uint8), cv2.IMREAD_COLOR)
    pixels[..., 0] = 4 * number
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture
def many(tmp_path):
    """40 images of Happy, 20 of Sad."""
    files = {}
    for number in range(60):
        name = "Sad" if number % 3 == 0 else "Happy"
        files[f"train_set/images/{number}.png"] = numbered(name, number)
        files[f"train_set/annotations/{number}_exp.npy"] = npy(str(CODES[name]))
    write_folder(tmp_path / "release", files)
    return tmp_path


def test_the_hold_out_is_stratified_disjoint_and_complete(many):
    ids, metas = hold_out(many, "data", val_share=0.2)
    assert set(ids["train"]) & set(ids["val"]) == set()
    assert sorted(ids["train"] + ids["val"]) == list(range(60))
    assert counts(metas["val"]) == {"Happy": 8, "Sad": 4}
    assert counts(metas["train"]) == {"Happy": 32, "Sad": 16}


def test_the_hold_out_of_an_archive_is_that_of_the_folder(many):
    files = {path.relative_to(many / "release").as_posix(): path.read_bytes() for path in content(many / "release")}
    first, _ = hold_out(many, "1", val_share=0.2)
    assert hold_out(many, "other", val_share=0.2, seed=4)[0] != first
    write_tar(many / "packed", dict(reversed(files.items())))
    metas = prepare(many / "packed", many / "2", val_share=0.2, size=40)
    assert counts(metas["val"]) == {"Happy": 8, "Sad": 4}
    blues = prepared(many / "2", "val")[0][:, 2, 2, 2].astype(int)
    assert [round(blue / 4) for blue in blues] == first["val"]


# --- the first release ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pack", "header"),
    [(write_folder, (True, True)), (write_zip, (True, False)), (write_tar, (False, False))],
)
def test_first(tmp_path, pack, header):
    files = release_first(TRAIN, TEST, header=header)
    metas = prepare(pack(tmp_path / "release", files), tmp_path / "data", classes=8)
    check_prepared(tmp_path / "data", metas)
    assert metas["train"]["options"]["form"] == "first"


@pytest.mark.parametrize(
    ("prefix", "images", "tables"),
    [("", "", ""), ("AffectNet/", "Manually_Annotated/Manually_Annotated_Images/", "Manually_Annotated_file_lists/")],
)
def test_first_wherever_its_images_lie(tmp_path, prefix, images, tables):
    files = release_first(TRAIN, TEST, images, tables)
    source = write_folder(tmp_path / "release", {prefix + name: data for name, data in files.items()})
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data"), classes=SEVEN)


def test_first_leaves_out_what_has_no_expression_or_no_face(tmp_path):
    train = {**TRAIN, "none": 1, "uncertain": 2, "non-face": 3}
    files = release_first(train, TEST)
    extra = [
        row("7/negative.jpg", 1, (10, 10, -1, 30)),
        row("7/flat.jpg", 2, (10, 10, 20, 0)),
        row("7/not_there.jpg", 10, ("NULL", "NULL", "NULL", "NULL"), "-2", "-2"),
    ]
    files["training.csv"] += ("\n".join(extra) + "\n").encode()
    files |= {f"Manually_Annotated_Images/7/{name}.jpg": jpeg("Happy", "test") for name in ("negative", "flat")}
    metas = prepare(write_folder(tmp_path / "release", files), tmp_path / "data")
    check_prepared(tmp_path / "data", metas, classes=SEVEN)
    assert metas["train"]["options"]["left_out"] == {
        "train": {"contempt": 3, "none": 1, "uncertain": 2, "non-face": 4, "no face box": 2},
        "test": {"contempt": 2},
    }


def test_first_shows_the_face_box_and_no_more(tmp_path):
    """The box is one colour, all around it is white; a margin of 1/4 of 24 x 32 shows 6 and 8 pixels of white."""
    source = write_folder(tmp_path / "release", release_first(ONE, ONE))
    prepare(source, tmp_path / "data", size=48)
    for split in ("train", "test"):
        images, _ = prepared(tmp_path / "data", split)
        inner = images[:, 3:-3, 3:-3].astype(int)
        assert np.abs(inner - inner[:, 8:9, 8:9]).max() < 16, "nothing but the box"
    prepare(source, tmp_path / "data", size=48, margin=0.25)  # prepares again
    images, _ = prepared(tmp_path / "data", "test")
    white = (images.astype(int) > 215).all(-1)
    assert white[:, :6].all() and white[:, -6:].all() and white[:, :, :6].all() and white[:, :, -6:].all()
    assert not white[:, 10:-10, 10:-10].any()


def test_first_without_its_validation_table(tmp_path):
    files = release_first(TRAIN, {})
    del files["validation.csv"]
    metas = prepare(write_folder(tmp_path / "release", files), tmp_path / "data", classes=8)
    check_prepared(tmp_path / "data", metas, test={})


def test_first_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    files = release_first(TRAIN, TEST)
    for table in ("training.csv", "validation.csv"):
        files[table] = b"\xef\xbb\xbf" + files[table].replace(b"\n", b"\r\n") + b"\r\n"
    metas = prepare(write_folder(tmp_path / "release", files), tmp_path / "data", classes=8)
    check_prepared(tmp_path / "data", metas)


def test_official_counts_add_up():
    totals = {form: {split: sum(n) for split, n in parts.items()} for form, parts in OFFICIAL_COUNTS.items()}
    assert totals == {"2021": {"train": 287_651, "test": 3_999}, "first": {"train": 287_651, "test": 4_000}}
    sevens = {form: {split: sum(n[:7]) for split, n in parts.items()} for form, parts in OFFICIAL_COUNTS.items()}
    seven = {"train": 283_901, "test": 3_500}
    assert sevens == {"2021": seven, "first": seven}


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A release and what was prepared from it."""
    folder = tmp_path_factory.mktemp("earlier")
    prepare(write_folder(folder / "good", release_2021(ONE, ONE)), folder / "data")
    return folder


@pytest.fixture
def check_refused(earlier):
    """Refuses a source with a message, and what was prepared earlier is untouched."""
    data_dir = earlier / "data"
    before = content(data_dir)
    assert len(before) == 6

    def check(source, message, **options):
        with pytest.raises(UserError, match=rf"(?s){message}") as caught:
            prepare(source, data_dir, **options)
        assert content(data_dir) == before
        return str(caught.value)

    return check


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("form", "pack"), [("pickle", write_folder), ("object array", write_zip)])
def test_a_label_that_is_a_pickle_is_never_executed(tmp_path, check_refused, form, pack):
    trap = tmp_path / "executed"
    data = pickle.dumps(Evil(trap)) if form == "pickle" else npy(Evil(trap), object)
    files = {**release_2021(ONE, ONE), "train_set/annotations/3_exp.npy": data}
    found = "begins with" if form == "pickle" else r"Python objects \(a pickle\)"
    check_refused(
        pack(tmp_path / "release", files), rf"3_exp\.npy: expected a \.npy file .*{found}.*nothing in it was executed"
    )
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists(), "the trap works"


def test_a_label_that_is_none(tmp_path, check_refused):
    files = release_2021(ONE, ONE)
    for data, message in (
        (npy("11"), "expected an expression code 0..7 .*found '11'"),
        (npy(2.5), "found '2.5'"),
        (npy([1, 2]), r"int64 of shape \(2,\)"),
        (npy(True), "bool of shape"),
        (npy(3)[:-3], "133 bytes instead of 136; the file is cut off or damaged"),
        (npy(3) + b"3", "137 bytes instead of 136"),
        (npy(3)[:40], "expected a .npy file"),
        (npy("7").replace(b"7\0\0\0", b"\xff\xff\xff\xff"), "codec can't decode"),
        (b"", "it begins with b''"),
        (npy(3).replace(b"'shape': ()", b"'shape': (10**12,)"), "expected a .npy file"),
    ):
        source = write_zip(tmp_path / "a.zip", {**files, "val_set/annotations/1003_exp.npy": data})
        check_refused(source, rf"a\.zip/val_set: val_set/annotations/1003_exp\.npy: .*{message}")


def test_annotations_without_image(tmp_path, check_refused):
    files = release_2021(TRAIN, TEST)
    for number in (0, 2, 4, 5):
        del files[f"train_set/images/{number}.jpg"]
    message = check_refused(write_folder(tmp_path / "release", files), "4 annotations without an image")
    assert all(f"train_set/annotations/{number}_exp.npy" in message for number in (0, 2, 4))
    assert "5_exp" not in message and "images without an annotation" not in message
    del files["train_set/annotations/7_exp.npy"]
    both = r"4 annotations without an image .*and 1 images without an annotation \(train_set/images/7\.jpg\)"
    check_refused(write_zip(tmp_path / "release.zip", files), both)


def test_pictures_without_annotation_are_counted_and_passed_over(tmp_path, check_refused):
    """The first eight images are one of each class."""
    files = release_2021(TRAIN, TEST)
    del files["train_set/annotations/1_exp.npy"], files["train_set/annotations/6_exp.npy"]
    source = write_folder(tmp_path / "release", files)
    metas = prepare(source, tmp_path / "other", classes=8)
    check_prepared(tmp_path / "other", metas, train={**TRAIN, "Happy": 11, "Anger": 13})
    assert metas["val"]["options"]["pictures_without_annotation"] == 2
    check_refused(source, r"2 images without an annotation \(train_set/images/1\.jpg, train_set", strict=True)


def test_images_that_the_tables_name_and_nobody_has(tmp_path, check_refused):
    files = release_first(TRAIN, TEST)
    gone = sorted(name for name in files if name.endswith(".jpg"))[:5]
    files = {name: data for name, data in files.items() if name not in gone}
    source = write_folder(tmp_path / "release", files)
    message = check_refused(source, rf"5 of the 72 images that training\.csv and validation\.csv .*searched {source}")
    short = [name.removeprefix("Manually_Annotated_Images/") for name in gone]
    assert all(name in message for name in short[:3]) and short[3] not in message


def test_an_image_that_is_there_twice(tmp_path, check_refused):
    files = release_first(ONE, ONE)
    name = next(name for name in files if name.endswith(".jpg"))
    files[f"small/{name}"] = files[name]
    check_refused(write_zip(tmp_path / "a.zip", files), r"each image once, found Man.* and small/Man.*leave only")


def test_two_releases_or_two_parts_of_a_name(tmp_path, check_refused):
    both = {**release_2021(ONE, ONE), **release_first(ONE, ONE)}
    check_refused(write_folder(tmp_path / "both", both), r"expected one release, found both \(train_set, val_set, tr")
    double = {**release_2021(ONE, ONE), **{f"old/{name}": data for name, data in release_2021(ONE, ONE).items()}}
    check_refused(write_folder(tmp_path / "double", double), "expected one train_set, found old/train_set and train_s")
    tables = {**release_first(ONE, ONE), "a/training.csv": b""}
    check_refused(write_zip(tmp_path / "tables.zip", tables), r"one training\.csv, found a/training\.csv and training")


def test_something_else(tmp_path, check_refused):
    check_refused(tmp_path / "nowhere", "nowhere: no such file or folder")
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", r"empty: found nothing; expected the 2021 release \(train_set/ and val_set/")
    files = {"a/b.txt": b"", "c.txt": b"", "d.txt": b"", "e.txt": b""}
    check_refused(write_folder(tmp_path / "other", files), r"found a, c\.txt, d\.txt, \.\.\.; expected the 2021")
    check_refused(
        write_zip(tmp_path / "other.zip", files), r"found a/b\.txt, c\.txt, d\.txt, \.\.\.; expected the 2021"
    )


def test_nothing_left(tmp_path, check_refused):
    files = release_2021({"none": 2, "Contempt": 1}, ONE, lambda code: npy(code))
    check_refused(write_folder(tmp_path / "release", files), "no image of the 7 classes is left for train")


GOOD = row("1/a.jpg", 3)


def test_a_table_that_is_wrong_somewhere(tmp_path, check_refused):
    source = write_folder(tmp_path / "release", release_first(ONE, ONE))
    for lines, message in (
        ([], r"validation\.csv: the table is empty"),
        ([HEADER, GOOD, row("1/b.jpg", 11)], "line 3: expected an expression code 0..7 .*found '11'"),
        ([GOOD, row("1/b.jpg", "")], "line 2: .*found ''"),
        ([HEADER.replace("expression", "emotion"), GOOD], r"expected the columns .*\(no expression\)"),
        ([HEADER, GOOD[:300]], "line 2: expected 9 columns, found 6; is the file cut off"),
        ([GOOD, GOOD[: GOOD.rindex("0.")]], "line 2: expected a number in arousal, found '-'; is the file cut off"),
        ([HEADER, row("1/b.jpg", 3, (1, 1, "nan", 3))], "line 2: expected a number in face_width, found 'nan'"),
        ([HEADER, row("1/b.jpg", 3, (1, 1, "1e308", 3))], "line 2: expected a number in face_width, found '1e308'"),
        ([HEADER, "1" * 200_000], "after line 1: expected a CSV table .*field larger"),
        ([HEADER, GOOD, "\udcff\udcfe"], "after line .: expected a CSV table .*can't decode"),
    ):
        (source / "validation.csv").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        check_refused(source, message)


def test_a_margin_around_images_that_are_cut_out_already(earlier, check_refused):
    check_refused(earlier / "good", "--margin: expected 0 for the 2021 release", margin=0.1)


# --- once more ------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_no_label(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "release", release_2021(TRAIN, TEST))
    first = prepare(source, tmp_path / "data")
    earlier = content(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.affectnet.read_annotated", None)
        assert prepare(source, tmp_path / "data") == first
    assert content(tmp_path / "data") == earlier


def test_another_choice_prepares_again(tmp_path):
    source = write_folder(tmp_path / "release", release_2021(TRAIN, TEST))
    prepare(source, tmp_path / "data")
    chosen = {}
    for change in ({"classes": 8}, {"seed": 1}, {"val_share": 0.25}, {"size": 8}):
        chosen |= change
        again = prepare(source, tmp_path / "data", **chosen)
        assert all(meta["options"] == {**meta["options"], **chosen} for meta in again.values())
    assert again == prepare(source, tmp_path / "fresh", **chosen)
    for split in ("train", "val", "test"):
        pairs = zip(prepared(tmp_path / "data", split), prepared(tmp_path / "fresh", split), strict=True)
        assert all(np.array_equal(now, then) for now, then in pairs)


def test_another_label_prepares_again(tmp_path):
    files = release_2021(ONE, {"Happy": 3})
    source = write_folder(tmp_path / "release", files)
    assert counts(prepare(source, tmp_path / "data")["test"]) == {"Happy": 3}
    label = source / "val_set/annotations/1001_exp.npy"
    label.write_bytes(npy(str(CODES["Fear"])))
    os.utime(label, ns=(1, 1))
    assert counts(prepare(source, tmp_path / "data")["test"]) == {"Happy": 2, "Fear": 1}


def test_strict_looks_again_at_what_was_passed_over(tmp_path, check_refused):
    files = release_2021(TWO, TWO)
    del files["train_set/annotations/1_exp.npy"]
    source = write_folder(tmp_path / "release", files)
    prepare(source, tmp_path / "other")
    with pytest.raises(UserError, match="1 images without an annotation"):
        prepare(source, tmp_path / "other", strict=True)


def test_a_damaged_image_is_listed_and_skipped_or_stops(tmp_path, check_refused):
    files = release_first(TRAIN, TEST)
    name = next(name for name in files if name.endswith(".jpg"))
    files[name] = files[name][:20]
    source = write_folder(tmp_path / "release", files)
    metas = prepare(source, tmp_path / "other")
    skipped = [image["name"] for meta in metas.values() for image in meta["skipped"]]
    assert skipped == [name]
    assert sum(meta["num_images"] for meta in metas.values()) == 56 + 11 - 1
    check_refused(source, "expected a whole JPEG", strict=True)
