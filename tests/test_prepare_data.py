"""Does each sub-command do what it says, say what it did, and help whom it refuses?"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

import prepare_data
from data_helper import open_split
from datasets.fer2013 import OFFICIAL_COUNTS
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.split_writer import SplitWriter


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
    lines = run("inspect", "--data-dir", tmp_path, "--duplicates", "none")
    assert lines[0] == "fer2013"
    assert lines[4].split() == ["Sad", "2", "100.0%"]
    assert lines[10:12] == ["train: not prepared", "val: not prepared"]
    assert lines[12].startswith("test: differs from the official release: Neutral 0 instead of 626, Happy 0 instead of")
    assert lines[13] == f"fer2013/test: 6 x 8 RGB, pictures in {tmp_path}/fer2013/test.png"
    assert lines[14] == "synthetic"
    assert lines[15].split() == ["class", "train", "share", "val", "share"]
    assert lines[16].split() == ["Neutral", "3", "75.0%", "0", "0.0%"]
    assert lines[23].split() == ["all", "4", "100.0%", "1", "100.0%"]
    assert lines[24] == f"synthetic/train: 8 x 8 gray, pictures in {tmp_path}/synthetic/train.png"
    for grid in ("fer2013/test.png", "synthetic/train.png", "synthetic/val.png"):
        picture = cv2.imread(str(tmp_path / grid))
        assert min(picture.shape[:2]) > 100 and picture.std() > 10
    assert run("inspect", "--data-dir", tmp_path, "--dataset", "synthetic", "--duplicates", "none") == lines[14:]


def write_pictures_of(data_dir, split, seeds, dataset="rafdb"):
    """A gray landscape a seed, labelled seed % 7; minus a seed is the same one brighter."""
    with SplitWriter(data_dir, dataset, split, len(seeds), (48, 48, 1), CLASS_NAMES[:7], [], {}) as writer:
        for seed in seeds:
            coarse = np.random.default_rng(abs(seed)).integers(0, 200, (6, 6), dtype=np.uint8)
            picture = cv2.resize(coarse, (48, 48)) + np.uint8(30 * (seed < 0))
            writer.add(picture[..., None], seed % 7)


def test_inspect_finds_duplicates_and_drops_them_from_train(tmp_path, run):
    """Train's 1 stands exactly in test, its 2 brighter in val; 3 twice in train alone. The seeds tell the labels."""
    write_pictures_of(tmp_path, "train", [1, 2, 3, 3, 4])
    write_pictures_of(tmp_path, "val", [5, -2])
    write_pictures_of(tmp_path, "test", [6, 1])
    options = ("inspect", "--data-dir", tmp_path, "--dataset", "rafdb")
    lines = run(*options)
    (start,) = (place for place, line in enumerate(lines) if line.startswith("pictures of"))
    assert lines[start].split("  ")[-1] == "labels differ" and "exact or near (4 bits)" in lines[start]
    table = [line.split() for line in lines[start + 1 :]]
    assert table[0] == ["train", "train", "2", "40.0%", "1", "0", "(0.0%)", "2", "40.0%", "1", "0", "(0.0%)"]
    assert table[1] == ["train", "val", "0", "0.0%", "0", "0", "(0.0%)", "1", "20.0%", "1", "1", "(100.0%)"]
    assert table[2] == ["train", "test", "1", "20.0%", "1", "0", "(0.0%)", "1", "20.0%", "1", "0", "(0.0%)"]
    assert table[3] == ["val", "train", "0", "0.0%", "0", "0", "(0.0%)", "1", "50.0%", "1", "1", "(100.0%)"]
    assert len(table) == 9

    dropped = run(*options, "--drop-duplicates")
    assert dropped[:-1] == lines
    assert dropped[-1] == (
        "rafdb/train: dropped 2 pictures that stand in val or test too, 3 are left; meta.json lists their rows"
    )
    assert open_split(tmp_path, "rafdb", "train").labels.tolist() == [3, 3, 4]
    again = run(*options, "--drop-duplicates", "--duplicates", "exact")
    assert "train + val: differs from the official release: Neutral 0 instead of 2,524" in "".join(again)
    assert any(line.endswith("(counting 2 dropped as duplicates)") for line in again)
    assert again[-1] == "rafdb/train: no picture stands in another split, nothing to drop"


def test_inspect_counts_blank_pictures_apart(tmp_path, run):
    write_split(tmp_path, [0, 0, 0], split="train")
    write_split(tmp_path, [0], split="test")
    assert run("inspect", "--data-dir", tmp_path)[-1] == (
        "blank pictures (one colour): train 3, test 1; exact duplicates of their like, near ones of none"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "--drop-duplicates changes one data set: name it with --dataset"),
        (("--dataset", "rafdb", "--duplicates", "none"), "expected --duplicates near or exact, received none"),
        (("--dataset", "rafdb"), "expected rafdb's train and its val or test in .*, found train; prepare the others"),
        (("--dataset", "synthetic"), "expected prepared synthetic data, found none"),
    ],
)
def test_a_drop_that_cannot_be_meant_is_refused(tmp_path, run, options, expected):
    write_pictures_of(tmp_path, "train", [1, 1])
    with pytest.raises(prepare_data.UserError, match=expected):
        run("inspect", "--data-dir", tmp_path, "--drop-duplicates", *options)
    assert len(open_split(tmp_path, "rafdb", "train")) == 2


def meta_of(split, counts, dataset="rafdb", options=(), skipped=()):
    names = list(CLASS_NAMES[: len(counts)])
    return {
        "dataset": dataset,
        "split": split,
        "class_names": names,
        "class_counts": list(counts),
        "options": dict(options),
        "skipped": list(skipped),
    }


def test_what_was_held_out_dropped_or_skipped_is_counted_where_it_belongs():
    """RAF-DB's training part is 2524 4772 1982 1290 281 717 705, its test part 680 1185 478 329 74 160 162."""
    train = [2272, 4295, 1784, 1161, 253, 645, 634]
    val = [252, 477, 198, 129, 28, 72, 70]  # one Anger is missing
    drop = {"dropped_duplicates": [{"class_counts": [2, 0, 0, 0, 0, 0, 0]}, {"class_counts": [0, 0, 0, 0, 0, 0, 1]}]}
    train_dropped = [2270, *train[1:6], 633]
    skipped = [{"name": "train_1.jpg", "reason": "cut off"}]
    metas = {
        "train": meta_of("train", train_dropped, options=drop, skipped=skipped),
        "val": meta_of("val", val),
        "test": meta_of("test", [680, 1185, 478, 329, 74, 160, 162]),
    }
    assert prepare_data.official_lines(metas) == [
        "train + val: differs from the official release: Anger 704 instead of 705 (counting 3 dropped as duplicates); "
        "could not be read: 1",
        "test: as in the official release",
    ]
    del metas["test"]
    assert prepare_data.official_lines(metas)[1] == "test: not prepared"


@pytest.mark.parametrize(("form", "contempt"), [("2021", 499), ("first", 500)])
@pytest.mark.parametrize("num_classes", [7, 8])
def test_affectnet_is_compared_with_the_release_it_came_from(form, contempt, num_classes):
    counts = [500] * 7 + [contempt]
    metas = {"test": meta_of("test", counts[:num_classes], "affectnet", {"form": form})}
    assert prepare_data.official_lines(metas) == ["train: not prepared", "test: as in the official release"]


def test_a_grid_is_not_taken_for_a_split(tmp_path, run):
    write_split(tmp_path, [0])
    assert run("inspect", "--data-dir", tmp_path) == run("inspect", "--data-dir", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (
            (),
            "expected prepared affectnet or .* or synthetic data, found none; run: python prepare_data.py affectnet ",
        ),
        ((), "or rafdb --source PATH --data-dir .*, or python prepare_data.py synthetic --data-dir "),
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
