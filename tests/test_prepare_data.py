"""Does each sub-command do what it says, say what it did, and help whom it refuses?"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

import prepare_data
from fer2013 import OFFICIAL_COUNTS


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process and returns the lines it printed."""

    def command(*args):
        monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, args)])
        prepare_data.main()
        return capsys.readouterr().out.splitlines()

    return command


def row(emotion, usage="Training"):
    return f"{emotion},{' '.join(['7'] * 2304)},{usage}\n"


def test_fer2013_prints_its_counts_beside_the_official_ones(tmp_path, run):
    """The CSV's 3 is happy and its 0 angry; PrivateTest is missing."""
    (tmp_path / "fer2013.csv").write_text("emotion,pixels,Usage\n" + row(3) + row(3) + row(0) + row(6, "PublicTest"))
    lines = run("fer2013", "--source", tmp_path / "fer2013.csv", "--data-dir", tmp_path / "data")
    assert lines[0].split() == ["class", "train", "official", "val", "official", "test", "official"]
    assert lines[1].split() == ["Neutral", "0", "4,965", "1", "607", "-", "626"]
    assert lines[2].split() == ["Happy", "2", "7,215", "0", "895", "-", "879"]
    assert lines[7].split() == ["Anger", "1", "3,995", "0", "467", "-", "491"]
    assert lines[8].split() == ["all", "3", "28,709", "1", "3,589", "-", "3,589"]
    assert len({len(line) for line in lines[:9]}) == 1, "the columns are aligned"
    assert lines[9].startswith("train: differs from the official release: Neutral 0 instead of 4,965, Happy 2 instead")
    assert lines[10].startswith("val: differs from the official release: Neutral 1 instead of 607")
    assert lines[11:] == [
        "test: not in the source",
        f"wrote 3 images to {tmp_path}/data/fer2013/train",
        f"wrote 1 images to {tmp_path}/data/fer2013/val",
    ]
    assert (tmp_path / "data/fer2013/train/images.npy").exists()


def test_fer2013_says_what_stays_from_before(tmp_path, run):
    write_split(tmp_path, [0], split="test", dataset="fer2013")
    (tmp_path / "train.csv").write_text("emotion,pixels,Usage\n" + row(3))
    lines = run("fer2013", "--source", tmp_path / "train.csv", "--data-dir", tmp_path)
    assert f"test: {tmp_path}/fer2013/test was prepared earlier and stays as it was" in lines
    assert not any("val was prepared earlier" in line for line in lines)


def test_official_counts_are_recognised():
    names = list("abcdefg")
    meta = {"class_names": names, "class_counts": list(OFFICIAL_COUNTS["val"])}
    assert prepare_data.compared_with_official("val", meta) == "as in the official release"
    meta["class_counts"][4] += 1
    assert prepare_data.compared_with_official("val", meta) == (
        "differs from the official release: e 497 instead of 496"
    )


def test_synthetic_draws_what_is_asked(tmp_path, run):
    options = ("--num-train", 14, "--num-val", 7, "--num-test", 7, "--size", 16, "--seed", 2)
    lines = run("synthetic", "--data-dir", tmp_path, *options)
    assert lines[0].split() == ["class", "train", "share", "val", "share", "test", "share"]
    assert lines[1].split() == ["Neutral", "2", "14.3%", "1", "14.3%", "1", "14.3%"]
    assert f"wrote 14 images to {tmp_path}/synthetic/train" in lines
    assert np.load(tmp_path / "synthetic/train/images.npy").shape == (14, 16, 16, 3)


def test_inspect_counts_every_split_and_draws_its_pictures(tmp_path, run):
    write_split(tmp_path, [0, 0, 0, 1], split="train")
    write_split(tmp_path, [6], split="val")
    write_split(tmp_path, [2, 2], split="test", dataset="fer2013", shape=(8, 6, 3))
    lines = run("inspect", "--data-dir", tmp_path)
    assert lines[0] == "fer2013"
    assert lines[4].split() == ["Sad", "2", "100.0%"]
    assert lines[10] == f"fer2013/test: 6 x 8 RGB, pictures in {tmp_path}/fer2013/test.png"
    assert lines[11] == "synthetic"
    assert lines[12].split() == ["class", "train", "share", "val", "share"]
    assert lines[13].split() == ["Neutral", "3", "75.0%", "0", "0.0%"]
    assert lines[20].split() == ["all", "4", "100.0%", "1", "100.0%"]
    assert lines[21] == f"synthetic/train: 8 x 8 gray, pictures in {tmp_path}/synthetic/train.png"
    for grid in ("fer2013/test.png", "synthetic/train.png", "synthetic/val.png"):
        picture = cv2.imread(str(tmp_path / grid))
        assert min(picture.shape[:2]) > 100 and picture.std() > 10
    assert run("inspect", "--data-dir", tmp_path, "--dataset", "synthetic") == lines[11:]


def test_a_grid_is_not_taken_for_a_split(tmp_path, run):
    write_split(tmp_path, [0])
    assert run("inspect", "--data-dir", tmp_path) == run("inspect", "--data-dir", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ((), "expected prepared fer2013 or synthetic data, found none; run: python prepare_data.py fer2013 --source "),
        (("--dataset", "fer2013"), "expected prepared fer2013 data, found none; run: python prepare_data.py fer2013"),
        (("--dataset", "synthetic"), "run: python prepare_data.py synthetic --data-dir"),
    ],
)
def test_inspect_of_nothing_names_the_command(tmp_path, run, dataset, expected):
    with pytest.raises(prepare_data.UserError, match=expected):
        run("inspect", "--data-dir", tmp_path, *dataset)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run_python(ROOT / "prepare_data.py", "fer2013", "--source", tmp_path / "nowhere", "--data-dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such file or folder; expected fer2013.csv")
    assert done.stderr.count("\n") == 1
