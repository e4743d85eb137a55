"""Rows that a training leaves out: those of a list, those of a fold, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_split

import experiment
from config import LossConfig, ModelConfig, TrainConfig
from data_helper import open_split
from datasets import CLASS_NAMES
from files import UserError
from reading.label_lists import write_list
from training import distillation
from training.left_out import folds_of, kept_rows

LABELS = np.arange(60) % 7
IMAGES = np.random.default_rng(3).integers(0, 256, (60, 24, 24, 1), np.uint8)
IMAGES[[10, 20, 30]] = IMAGES[5]  # copies of one image, with other labels


def digest(image: np.ndarray) -> str:
    """What `label_lists` writes, from its description."""
    height, width, channels = image.shape
    return hashlib.sha256(f"({height}, {width}, {channels})".encode() + image.tobytes()).hexdigest()[:16]


@pytest.fixture
def split(tmp_path):
    for name in ("train", "val"):
        write_split(tmp_path, LABELS, images=IMAGES, shape=IMAGES.shape[1:], split=name)
    return open_split(tmp_path, "synthetic", "train")


def listed(tmp_path, rows, **changes) -> str:
    columns = {
        "score": [-0.5] * len(rows),
        "row": rows,
        "image": [digest(IMAGES[row]) for row in rows],
        "label": [CLASS_NAMES[LABELS[row]] for row in rows],
    }
    write_list(tmp_path / "list.csv", {**columns, **changes})
    return str(tmp_path / "list.csv")


# --- a list


def test_the_rows_of_a_list_are_left_out(split, tmp_path, capsys):
    assert kept_rows(split, None, None) is None
    kept = kept_rows(split, listed(tmp_path, [59, 3, 20]), None)
    assert kept.dtype == np.int64 and kept.tolist() == [row for row in range(60) if row not in (3, 20, 59)]
    assert "3 of 60" in capsys.readouterr().out


def test_a_list_that_was_shortened_in_a_spreadsheet_is_read(split, tmp_path):
    path = Path(listed(tmp_path, [1, 2, 3]))
    lines = path.read_text().splitlines()[:2]
    quoted = ['"' + line.replace(",", '","') + '"' for line in lines]
    path.write_bytes(("\ufeff" + "\r\n".join([*quoted, "", ""])).encode())
    assert kept_rows(split, str(path), None).tolist() == [0, *range(2, 60)]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"row": [1, 60, 3]}, r"row 60.*60 images"),
        ({"row": [1, 4, 3]}, r"row 4 is image .*make the list again"),
        ({"label": ["Happy", "Fear", "Surprise"]}, r"row 2 .*label 'Fear'.*label 'Sad'"),
        ({"row": [1, 1, 3]}, "line 3.*row 1 twice"),
        ({"row": [1, -2, 3]}, "line 3.*'-2'"),
        ({"row": [], "image": [], "label": [], "score": []}, "no lines"),
    ],
)
def test_a_list_of_other_images_or_labels_is_refused(split, tmp_path, changes, facts):
    path = listed(tmp_path, [1, 2, 3], **changes)
    with pytest.raises(UserError, match=rf"list\.csv.*{facts}"):
        kept_rows(split, path, None)


@pytest.mark.parametrize("content", [b"", b"row,image\n1,2\n", b"row,image,label,row\n", b"\xff\xfe\x00", b'"row'])
def test_another_file_is_refused(split, tmp_path, content):
    (tmp_path / "other.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"other\.csv.*test\.py suspects"):
        kept_rows(split, str(tmp_path / "other.csv"), None)


def test_something_must_be_left(split, tmp_path):
    with pytest.raises(UserError, match="no image is left"):
        kept_rows(split, listed(tmp_path, list(range(60))), None)


# --- folds


def test_every_image_is_in_one_fold_and_copies_are_in_the_same(split):
    folds = folds_of(split, 3)
    assert folds.tolist() == [int(digest(image), 16) % 3 + 1 for image in IMAGES]
    left_out = [set(range(60)) - set(kept_rows(split, None, f"{number}/3").tolist()) for number in (1, 2, 3)]
    assert sorted(row for rows in left_out for row in rows) == list(range(60))
    assert len({folds[row] for row in (5, 10, 20, 30)}) == 1
    assert min(map(len, left_out)) > 0


def test_a_list_and_a_fold_together(split, tmp_path):
    fold = set(kept_rows(split, None, "2/3").tolist())
    assert set(kept_rows(split, listed(tmp_path, [0, 1, 2, 3]), "2/3").tolist()) == fold - {0, 1, 2, 3}


@pytest.mark.parametrize("fold", ["", "1", "0/5", "6/5", "1/1", "1/101", "a/b", "1/5/2", "\u0661/5", "-1/5", "1 / 5"])
def test_no_other_fold_is_taken(split, fold):
    with pytest.raises(UserError, match="--fold"):
        kept_rows(split, "", fold or "x")


# --- a training


def small(tmp_path, **options) -> TrainConfig:
    usual = {
        "data_dir": str(tmp_path),
        "epochs": 1,
        "batch_size": 8,
        "model": ModelConfig(num_embeddings=2, embedding_size=8, input_size=24),
        "loss": LossConfig(history=20),
        "run_dir": str(tmp_path / "run"),
    }
    return TrainConfig(**{**usual, **options})


@pytest.mark.slow
def test_a_training_never_sees_what_it_leaves_out(split, tmp_path, tiny_weights):
    """With a teacher, balanced classes, images on the device: the targets that the loss gets are of kept rows."""
    distillation.write_teacher(str(tmp_path / "teacher.npz"), [str(tiny_weights)], split)
    options = {"without": listed(tmp_path, [0, 7, 14]), "fold": "1/4", "teacher": str(tmp_path / "teacher.npz")}
    settings = small(tmp_path, **options, balanced=True, resident="yes")
    kept = set(kept_rows(split, settings.without, settings.fold).tolist())
    engine, _ = experiment.make_engine(settings, {"train": split, "val": split})
    rows, targets = engine.train[0]
    used = rows >= 0
    assert engine.train.steps == len(kept) // 8 and set(rows[used].tolist()) <= kept
    wanted = distillation.blended_targets(split, settings.teacher, 0.5, soft_labels=False).votes
    np.testing.assert_array_equal(targets[used], wanted[rows[used]])
    assert len(engine.validation.kept) == 60


@pytest.mark.slow
def test_what_was_left_out_is_part_of_the_run(split, tmp_path):
    settings = small(tmp_path, without=listed(tmp_path, [0, 7, 14]), fold="1/4")
    kept = kept_rows(split, settings.without, settings.fold)
    result = experiment.train_and_evaluate(settings)
    assert (result["train_images"], result["n"]) == (len(kept), 60)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["fold"] == "1/4" and stored["digests"]["without"] == result["digests"]["without"]
    listed(tmp_path, [0, 7])  # the same name, another list
    with pytest.raises(UserError, match="file of --without"):
        experiment.train_and_evaluate(settings)
    with pytest.raises(UserError, match="row 59"):
        changed = listed(tmp_path, [59], label=["Disgust"])
        experiment.train_and_evaluate(dataclasses.replace(settings, without=changed, run_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
