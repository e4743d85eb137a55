"""Tests of datasets.ferplus: the majority rule counts the votes, and they reach the images that they are about."""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from data_helper import open_split
from datasets import ferplus
from datasets.ferplus import OFFICIAL_COUNTS, PrepareFerplusConfig, majority, prepare_ferplus, vote_shares
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.tables import find_table
from files import UserError

REAL = [path for path in (ROOT / "../shared/data", Path("/work/shared/data")) if (path / "fer2013new.csv").exists()]
NAMES = {  # column -> our class name
    "neutral": "Neutral",
    "happiness": "Happy",
    "surprise": "Surprise",
    "sadness": "Sad",
    "anger": "Anger",
    "disgust": "Disgust",
    "fear": "Fear",
    "contempt": "Contempt",
}
COLUMNS = (*NAMES, "unknown", "NF")
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}

# Usage, votes in the order of COLUMNS, and by hand: the reason to leave it out, or name -> share of the votes.
# An image's gray level is its place in this list.
ROWS = [
    ("Training", [10, 0, 0, 0, 0, 0, 0, 0, 0, 0], {"Neutral": 1}),
    ("Training", [4, 6, 0, 0, 0, 0, 0, 0, 0, 0], {"Happy": 6 / 10, "Neutral": 4 / 10}),
    ("Training", [1, 0, 4, 1, 1, 0, 2, 0, 1, 0], {"Surprise": 4 / 6, "Fear": 2 / 6}),  # 4 of 10, but 4 of 6 that count
    ("Training", [4, 0, 0, 5, 0, 0, 1, 0, 0, 0], {"Sad": 5 / 9, "Neutral": 4 / 9}),  # half of all, more of what counts
    ("Training", [0, 0, 5, 0, 0, 0, 5, 0, 0, 0], "no majority"),  # exactly half
    ("Training", [0, 4, 0, 0, 1, 0, 4, 0, 0, 1], "no majority"),  # exactly half of what counts
    ("Training", [0, 0, 0, 0, 7, 0, 0, 0, 3, 0], {"Anger": 1}),  # unknown is no class to share with
    ("Training", [1, 1, 1, 0, 0, 3, 2, 1, 1, 0], {"Disgust": 3 / 5, "Fear": 2 / 5}),
    ("Training", [0, 0, 0, 2, 0, 2, 6, 0, 0, 0], {"Fear": 6 / 10, "Sad": 2 / 10, "Disgust": 2 / 10}),
    ("Training", [2, 0, 0, 0, 0, 0, 0, 8, 0, 0], {"Contempt": 8 / 10, "Neutral": 2 / 10}),
    ("Training", [0, 4, 0, 0, 0, 0, 0, 0, 6, 0], "unknown"),
    ("Training", [0, 0, 0, 0, 0, 0, 0, 0, 0, 10], "not a face"),
    ("Training", [0, 4, 0, 1, 0, 0, 0, 0, 3, 2], "no majority"),  # 4 of 9: unknown and no face count against it
    ("Training", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "no majority"),
    ("Training", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "no majority"),
    ("PublicTest", [0, 0, 0, 0, 5, 0, 0, 2, 2, 1], {"Anger": 5 / 7, "Contempt": 2 / 7}),  # 5 of 9
    ("PublicTest", [0, 0, 0, 0, 0, 0, 0, 10, 0, 0], {"Contempt": 1}),
    ("PublicTest", [0, 0, 0, 0, 0, 0, 0, 0, 2, 0], "unknown"),
    ("PrivateTest", [0, 0, 0, 0, 0, 0, 0, 0, 0, 9], "not a face"),
    ("PrivateTest", [0, 1, 0, 8, 1, 0, 0, 0, 0, 0], {"Sad": 1}),
    ("PrivateTest", [0, 0, 0, 0, 0, 6, 4, 0, 0, 0], {"Disgust": 6 / 10, "Fear": 4 / 10}),
]


def pixel_row(level, usage, emotion=0):
    return {"emotion": str(emotion), "Usage": usage, "pixels": " ".join([str(level)] * 2304)}


def pixel_table(header="emotion,pixels,Usage", rows=ROWS):
    """FER-2013's own labels go round the codes: what FER+ says must not depend on them."""
    lines = [header]
    for level, (usage, *_) in enumerate(rows):
        cells = pixel_row(level, usage, level % 7)
        lines.append(",".join(cells[column.strip()] for column in header.split(",")))
    return "\n".join(lines) + "\n"


def vote_table(rows=ROWS, columns=COLUMNS):
    """The official layout: an image that is no face has no name."""
    lines = [",".join(["Usage", "Image name", *columns])]
    for number, (usage, votes, _) in enumerate(rows):
        cells = dict(zip(COLUMNS, votes, strict=True))
        name = "" if cells["NF"] == 10 else f"fer{number:07d}.png"
        lines.append(",".join([usage, name, *(str(cells[column]) for column in columns)]))
    return "\n".join(lines) + "\n"


RELEASE = {"fer2013.csv": pixel_table(), "fer2013new.csv": vote_table()}


def write_folder(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def prepare(source, data_dir, **changes):
    return prepare_ferplus(PrepareFerplusConfig(str(source), str(data_dir), **changes))


def check_prepared(data_dir, metas):
    """Every image that the rule keeps lies in its split, in order, under its label and with its votes."""
    assert list(metas) == ["train", "val", "test"]
    for usage, name in SPLITS.items():
        split = open_split(data_dir, "ferplus", name)
        expected = [(level, row[2]) for level, row in enumerate(ROWS) if row[0] == usage and isinstance(row[2], dict)]
        assert split.images.shape == (len(expected), 48, 48, 1)
        assert (split.images == split.images[:, :1, :1, :1]).all()
        assert split.images[:, 0, 0, 0].tolist() == [level for level, _ in expected]
        assert [CLASS_NAMES[label] for label in split.labels] == [max(votes, key=votes.get) for _, votes in expected]
        assert (split.votes.shape, split.votes.dtype) == ((len(expected), 8), np.float32)
        for shares, (_, votes) in zip(split.votes, expected, strict=True):
            assert shares.tolist() == pytest.approx([votes.get(name, 0) for name in CLASS_NAMES])
        assert split.class_counts.tolist() == metas[name]["class_counts"]


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


# --- the majority rule ----------------------------------------------------------------------------------------------


def test_the_miniature_by_the_majority_rule(tmp_path):
    metas = prepare(write_folder(tmp_path / "release", RELEASE), tmp_path / "data")
    check_prepared(tmp_path / "data", metas)
    assert [metas[split]["num_images"] for split in ("train", "val", "test")] == [8, 2, 2]
    assert metas["train"]["class_names"] == list(CLASS_NAMES)
    assert metas["val"]["options"] == {
        "form": "csv",
        "rule": "majority",
        "classes": 8,
        "left_out": {
            "train": {"no majority": 5, "unknown": 1, "not a face": 1},
            "val": {"unknown": 1},
            "test": {"not a face": 1},
        },
    }
    assert [source["name"] for source in metas["val"]["sources"]] == ["fer2013.csv", "fer2013new.csv"]


def test_seven_classes_leave_contempt_out_of_images_and_votes(tmp_path):
    metas = prepare(write_folder(tmp_path / "release", RELEASE), tmp_path, classes=7)
    assert [metas[split]["class_names"] for split in metas] == [list(CLASS_NAMES[:7])] * 3
    assert [metas[split]["num_images"] for split in metas] == [7, 1, 2]
    train, val = (open_split(tmp_path, "ferplus", split) for split in ("train", "val"))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert train.votes.shape == (7, 7)
    assert train.votes[1].tolist() == pytest.approx([0.4, 0.6, 0, 0, 0, 0, 0])
    assert (val.images[0, 0, 0, 0], val.votes.tolist()) == (15, [[0, 0, 0, 0, 0, 0, 1]]), "5 for anger, 2 for contempt"
    assert metas["train"]["options"]["left_out"]["val"] == {"contempt": 1, "unknown": 1}


def test_the_rule_is_a_loop_over_the_votes():
    rng = np.random.default_rng(0)
    ballots = rng.multinomial(10, [0.4, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02, 0.02, 0.05, 0.03], 500)
    reasons = set()
    for votes, winner in zip(ballots, majority(ballots), strict=True):
        left = [n if n != 1 else 0 for n in votes]
        expected = [option for option in range(10) if left[option] > sum(left) / 2]
        assert expected == ([winner] if winner >= 0 else [])
        reasons.add(min(winner, 8))
        if 0 <= winner < 7:
            (shares,) = vote_shares(votes[None], 7)
            assert shares.tolist() == pytest.approx([n / sum(left[:7]) for n in left[:7]])
            assert shares.argmax() == winner and shares[winner] > 0.5
    assert reasons >= {-1, 0, 1, 2, 3}


@pytest.mark.skipif(not REAL, reason="the real fer2013new.csv is not here")
def test_the_real_votes():
    """The published counts, and a class by class what a plain loop finds."""
    splits, votes = ferplus.read_votes(find_table(REAL[0], ["fer2013new.csv"]))
    winners = majority(votes)
    found = {split: np.bincount(winners[(splits == split) & (winners >= 0)])[:8] for split in OFFICIAL_COUNTS}
    assert {split: sum(counts) for split, counts in found.items()} == {"train": 25_060, "val": 3_199, "test": 3_153}
    expected = {split: [0] * 8 for split in OFFICIAL_COUNTS}
    with open(REAL[0] / "fer2013new.csv", newline="") as file:
        for row in csv.DictReader(file):
            left = {column: int(row[column]) for column in COLUMNS if int(row[column]) > 1}
            for column, name in NAMES.items():
                won = 2 * left.get(column, 0) > sum(left.values())
                expected[SPLITS[row["Usage"]]][CLASS_NAMES.index(name)] += won
    assert {split: counts.tolist() for split, counts in found.items()} == expected
    assert {split: list(counts) for split, counts in OFFICIAL_COUNTS.items()} == expected


# --- where the two files lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pack", "prefix"), [(write_zip, "archive/fer2013/"), (write_tar, "")])
def test_both_files_in_an_archive(tmp_path, pack, prefix):
    files = {prefix + name: text for name, text in RELEASE.items()}
    metas = prepare(pack(tmp_path / "release", files), tmp_path / "data")
    check_prepared(tmp_path / "data", metas)
    assert [source["name"] for source in metas["val"]["sources"]] == ["release"]


def test_the_votes_beside_the_csv(tmp_path):
    files = {"icml_face_data.csv": pixel_table("emotion, Usage, pixels"), "fer2013new.csv": vote_table()}
    write_folder(tmp_path, files)
    check_prepared(tmp_path / "data", prepare(tmp_path / "icml_face_data.csv", tmp_path / "data"))


def test_the_votes_beside_a_zip(tmp_path):
    write_folder(tmp_path, {"fer2013new.csv": vote_table()})
    source = write_zip(tmp_path / "release", {"fer2013.csv": pixel_table()})
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data"))


@pytest.mark.parametrize("kind", ["file of another name", "zip"])
def test_the_votes_that_the_options_name(tmp_path, kind):
    """They come before those that lie in the source."""
    wrong = vote_table([(usage, votes[::-1], None) for usage, votes, _ in ROWS])
    source = write_folder(tmp_path / "release", {**RELEASE, "fer2013new.csv": wrong})
    if kind == "file of another name":
        labels = write_folder(tmp_path, {"votes.csv": vote_table()}) / "votes.csv"
    else:
        labels = write_zip(tmp_path / "FERPlus", {"fer2013new.csv": vote_table()})
    check_prepared(tmp_path / "data", prepare(source, tmp_path / "data", labels=str(labels)))


def test_columns_are_found_by_their_names(tmp_path):
    files = {**RELEASE, "fer2013new.csv": vote_table(columns=COLUMNS[::-1])}
    check_prepared(tmp_path / "data", prepare(write_folder(tmp_path / "release", files), tmp_path / "data"))


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_refused(tmp_path_factory):
    """Refuses a source with a message, and what was prepared earlier is untouched."""
    folder = tmp_path_factory.mktemp("earlier")
    data_dir = folder / "data"
    prepare(write_folder(folder / "good", RELEASE), data_dir)
    earlier = content(data_dir)

    def check(source, message, **changes):
        with pytest.raises(UserError, match=rf"(?s){message}"):
            prepare(source, data_dir, **changes)
        assert content(data_dir) == earlier

    return check


def test_a_missing_source(tmp_path, check_refused):
    check_refused(
        tmp_path / "nowhere", r"nowhere: no such file or folder; expected fer2013\.csv or icml_face_data\.csv"
    )


def test_the_folder_form_has_no_rows_to_match(tmp_path, check_refused):
    source = write_zip(tmp_path / "release", {"train/happy/Training_1.jpg": "", "fer2013new.csv": vote_table()})
    check_refused(
        source, r"expected fer2013\.csv or icml_face_data\.csv, found .*the folder form .*does not tell which"
    )


def test_no_votes_anywhere(tmp_path, check_refused):
    source = write_folder(tmp_path / "release", {"fer2013.csv": pixel_table()})
    places = rf"expected the votes of FER\+ in {source} or {tmp_path}/fer2013new\.csv, found none.* --labels"
    check_refused(source, places)
    check_refused(source / "fer2013.csv", r"release/fer2013\.csv or .*release/fer2013new\.csv, found none")
    check_refused(source, rf"in {tmp_path}/typo\.csv, found none", labels=str(tmp_path / "typo.csv"))


def test_images_that_are_not_those_of_the_votes(tmp_path, check_refused):
    for rows, message in (
        (ROWS[:-1], r"fer2013\.csv: expected 21 images, as .*fer2013new\.csv has rows, found 20"),
        ([*ROWS, ROWS[-1], ROWS[-1]], r"expected 21 images, .*found 23"),
        ([], r"expected 21 images, .*found 0"),
        (
            ROWS[:14] + ROWS[15:16] + ROWS[14:15] + ROWS[16:],
            r"line 16: .*a Training image, as in row 15 .*PublicTest",
        ),
    ):
        source = write_folder(tmp_path / "release", {**RELEASE, "fer2013.csv": pixel_table(rows=rows)})
        check_refused(source, message)


GOOD = "Training,fer0000000.png,10,0,0,0,0,0,0,0,0,0\n"


def test_votes_that_are_wrong_somewhere(tmp_path, check_refused):
    for text, message in (
        ("", r"expected the columns Usage and neutral, .* no 'Usage' is there"),
        (vote_table().replace("contempt", "scorn"), r"no 'contempt' is there"),
        (vote_table().split("\n")[0], r"leaves no image for train"),
        (vote_table() + GOOD.replace("10", "many"), r"line 23: expected a number of votes in neutral, found 'many'"),
        (vote_table() + GOOD.replace("10", "9" * 30), r"line 23: .*found '999"),
        (vote_table() + GOOD.replace("10", "²"), r"line 23: .*found '²'"),
        (vote_table() + GOOD.replace("Training", "Test"), r"line 23: expected Usage Training, .*found 'Test'"),
        (vote_table()[:-6], r"line 22: expected 12 columns, found 10; is the file cut off"),
        (vote_table() + "1" * 200_000, r"after line 22: expected a CSV table .*fer2013new\.csv of FER\+"),
    ):
        source = write_folder(tmp_path / "release", {**RELEASE, "fer2013new.csv": text})
        check_refused(source, rf"fer2013new\.csv.*{message}")


def test_pixels_that_are_wrong_somewhere(tmp_path, check_refused):
    """The last of the images that are kept: those before it must not be published."""
    text = pixel_table().rpartition(",PrivateTest")[0] + " 7,PrivateTest\n"
    check_refused(
        write_folder(tmp_path / "release", {**RELEASE, "fer2013.csv": text}), r"line 22: expected 2304 pixels"
    )
    text = pixel_table().replace("\n0,", "\n9,")
    check_refused(write_folder(tmp_path / "release", {**RELEASE, "fer2013.csv": text}), r"line 2: expected an emotion")
