"""Tests of prepare_data.py: each sub-command does what it says and reports it."""

from __future__ import annotations

import os
import re

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

import prepare_data
from data_helper import open_split
from datasets import CLASS_NAMES
from datasets.shared.split_writer import SplitWriter
from files import UserError


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


def test_a_release_is_prepared_and_compared_with_the_official_counts(tmp_path, run):
    """The CSV's 3 is happy and its 0 angry; PrivateTest is missing."""
    (tmp_path / "fer2013.csv").write_text("emotion,pixels,Usage\n" + row(3) + row(3) + row(0) + row(6, "PublicTest"))
    lines = run("fer2013", "--source", tmp_path / "fer2013.csv", "--data-dir", tmp_path / "data")
    assert lines[0].split() == ["class", "train", "share", "val", "share"]
    assert lines[2].split() == ["Happy", "2", "66.7%", "0", "0.0%"]
    assert lines[8].split() == ["all", "3", "100.0%", "1", "100.0%"]
    assert len({len(line) for line in lines[:9]}) == 1, "the columns are aligned"
    assert lines[9].startswith("train: differs from the official release: Neutral 0 instead of 4,965, Happy 2 instead")
    assert lines[9].endswith("all 3 instead of 28,709") and lines[10].startswith("val: differs")
    assert lines[11].startswith("test: not in the source") and "3,589" in lines[11]
    assert lines[12:] == [
        f"3 images in {tmp_path}/data/fer2013/train",
        f"1 images in {tmp_path}/data/fer2013/val",
    ]
    assert len(open_split(tmp_path / "data", "fer2013", "train")) == 3


def test_synthetic_draws_what_is_asked(tmp_path, run):
    options = ("--num-train", 14, "--num-val", 7, "--num-test", 7, "--size", 16, "--seed", 2)
    lines = run("synthetic", "--data-dir", tmp_path, *options)
    assert lines[1].split() == ["Neutral", "2", "14.3%", "1", "14.3%", "1", "14.3%"]
    assert np.load(tmp_path / "synthetic/train/images.npy").shape == (14, 16, 16, 3)


def test_inspect_counts_every_split_and_draws_its_images(tmp_path, run):
    write_split(tmp_path, [0, 0, 0, 1], split="train")
    write_split(tmp_path, [2, 2], split="test", dataset="fer2013", shape=(8, 6, 3))
    lines = run("inspect", "--data-dir", tmp_path, "--duplicates", "none")
    assert lines[0] == "fer2013"
    assert lines[4].split() == ["Sad", "2", "100.0%"]
    assert [line.split(" (")[0] for line in lines[10:12]] == ["train: not prepared", "val: not prepared"]
    assert lines[12].startswith("test: differs from the official release: Neutral 0 instead of 626, Happy 0 instead of")
    assert lines[13] == f"fer2013/test: 6 x 8 RGB, images in {tmp_path}/fer2013/test.png"
    assert lines[14] == "synthetic"
    assert lines[-1] == f"synthetic/train: 8 x 8 gray, images in {tmp_path}/synthetic/train.png"
    for grid in ("fer2013/test.png", "synthetic/train.png"):
        image = cv2.imread(str(tmp_path / grid))
        assert min(image.shape[:2]) > 100 and image.std() > 10
    again = run("inspect", "--data-dir", tmp_path, "--dataset", "synthetic", "--duplicates", "none")
    assert again == lines[14:], "and a grid is not taken for a split"


def test_the_grid_of_read_only_data_is_drawn_in_the_current_folder(tmp_path, run, monkeypatch):
    write_landscapes(tmp_path / "data", "train", [1, 2])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "data" not in str(path) and writable(path, mode))
    run("inspect", "--data-dir", tmp_path / "data", "--duplicates", "none")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["rafdb-train.png"]
    assert not list((tmp_path / "data").rglob("*.png"))


@pytest.fixture
def no_grids(monkeypatch):
    monkeypatch.setattr("plots.save_image_grid", lambda *_: None)


def write_landscapes(data_dir, split, seeds, dataset="rafdb"):
    """One gray landscape per seed, labelled seed % 7; minus a seed is the same landscape, brighter; 0 is blank."""
    with SplitWriter(data_dir, dataset, split, len(seeds), (48, 48, 1), CLASS_NAMES[:7], [], {}) as writer:
        for seed in seeds:
            coarse = np.random.default_rng(abs(seed)).integers(0, 200, (6, 6), dtype=np.uint8) * (seed != 0)
            image = cv2.resize(coarse, (48, 48)) + np.uint8(30 * (seed < 0))
            writer.add(image[..., None], seed % 7)


@pytest.mark.usefixtures("no_grids")
def test_inspect_finds_duplicates_and_drops_them_from_train(tmp_path, run):
    """Train's 1 is exactly in test, its 2 brighter in val; 3 is twice in train only; 0 is blank."""
    write_landscapes(tmp_path, "train", [1, 2, 3, 3, 0])
    write_landscapes(tmp_path, "val", [5, -2])
    write_landscapes(tmp_path, "test", [6, 1])
    options = ("inspect", "--data-dir", tmp_path, "--dataset", "rafdb")
    lines = run(*options)
    (start,) = (place for place, line in enumerate(lines) if line.startswith("in "))
    assert lines[start].split()[-4:] == ["near", "share", "pairs", "differ"]
    assert any("exact or near (4 bits)" in line for line in lines)
    table = [line.split() for line in lines[start + 1 :]]
    assert table[0] == ["train", "train", "2", "40.0%", "1", "0", "(0.0%)", "2", "40.0%", "1", "0", "(0.0%)"]
    assert table[1] == ["train", "val", "0", "0.0%", "0", "0", "(0.0%)", "1", "20.0%", "1", "1", "(100.0%)"]
    assert table[2] == ["train", "test", "1", "20.0%", "1", "0", "(0.0%)", "1", "20.0%", "1", "0", "(0.0%)"]
    assert table[3] == ["val", "train", "0", "0.0%", "0", "0", "(0.0%)", "1", "50.0%", "1", "1", "(100.0%)"]
    assert len(table) == 9 + 2 and lines[-1].startswith("blank images (one colour): train 1, val 0, test 0")

    dropped = run(*options, "--drop-duplicates")
    assert dropped[:-1] == lines
    assert dropped[-1].startswith("rafdb/train: dropped 2 images") and "val or test, 3 are left" in dropped[-1]
    assert open_split(tmp_path, "rafdb", "train").labels.tolist() == [3, 3, 0]
    again = run(*options, "--drop-duplicates", "--duplicates", "exact")
    assert any(line.endswith("(counting 2 dropped as duplicates)") for line in again)
    assert again[-1].startswith("rafdb/train:") and "nothing to drop" in again[-1]


def test_a_drop_that_cannot_be_meant_is_refused(tmp_path, run):
    write_landscapes(tmp_path, "train", [1, 1])
    for options, expected in (
        ((), "--drop-duplicates .*--dataset"),
        (("--dataset", "rafdb", "--duplicates", "none"), "expected --duplicates near or exact, received none"),
        (("--dataset", "rafdb"), "expected rafdb's train and its val or test in .*, found train"),
    ):
        with pytest.raises(prepare_data.UserError, match=expected):
            run("inspect", "--data-dir", tmp_path, "--drop-duplicates", *options)
        assert len(open_split(tmp_path, "rafdb", "train")) == 2


def test_inspect_of_nothing_names_the_command(tmp_path, run):
    for options, expected in (
        ((), "prepare_data.py affectnet or .* or rafdb --source PATH .*, or python prepare_data.py synthetic --data"),
        (("--dataset", "synthetic"), "run: python prepare_data.py synthetic --data-dir"),
    ):
        with pytest.raises(prepare_data.UserError, match=expected):
            run("inspect", "--data-dir", tmp_path, *options)


def test_the_help_of_a_data_set_says_where_to_get_it(run, capsys):
    with pytest.raises(SystemExit):
        run("rafdb", "--help")
    shown = capsys.readouterr().out
    assert "http://www.whdeng.cn/RAF/model1.html" in shown and "CVPR 2017" in shown and "--val-share" in shown


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run_python(ROOT / "prepare_data.py", "fer2013", "--source", tmp_path / "nowhere", "--data-dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such file or folder") and done.stderr.count("\n") == 1


def test_a_number_out_of_its_range_is_refused_before_anything_is_read(tmp_path, run):
    for data_set, option, value in (
        ("affectnet", "--val-share", "1.0"),
        ("affectnet", "--margin", "inf"),
        ("affectnet", "--workers", "0"),
        ("published", "--size", "0"),
        ("rafdb", "--val-share", "-0.1"),
        ("rafdb", "--size", "5000"),
        ("synthetic", "--num-val", "0"),
        ("synthetic", "--seed", "-1"),
    ):
        source = () if data_set == "synthetic" else ("--source", tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"{option}: expected .*, received {re.escape(value.removesuffix('.0'))}"):
            run(data_set, *source, "--data-dir", tmp_path, option, value)
    assert not list(tmp_path.iterdir())
