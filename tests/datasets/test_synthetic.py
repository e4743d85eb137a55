"""Tests of datasets.synthetic: the splits are drawn as asked, share no face, and are reproducible."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from datasets.synthetic import PrepareSyntheticConfig, ensure_synthetic_splits, write_synthetic_splits

SPLITS = ("train", "val", "test")


def write(data_dir, **options):
    small = {"num_train": 16, "num_val": 9, "num_test": 8, "size": 16, **options}
    return write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(data_dir), **small))


def images_of(data_dir, split):
    return np.load(data_dir / "synthetic" / split / "images.npy")


def test_three_splits_as_asked(tmp_path):
    metas = write(tmp_path, num_classes=8, seed=5)
    assert list(metas) == list(SPLITS)
    for split, number in zip(SPLITS, (16, 9, 8), strict=True):
        images, labels = images_of(tmp_path, split), np.load(tmp_path / "synthetic" / split / "labels.npy")
        assert (images.shape, images.dtype, labels.shape) == ((number, 16, 16, 3), np.uint8, (number,))
        assert set(labels) == set(range(8))
        assert metas[split]["options"] == {"num_classes": 8, "size": 16, "seed": 5}
        assert metas[split]["class_names"][-1] == "Contempt"
        assert metas[split]["sources"] == []


def test_no_two_splits_and_no_two_seeds_share_an_image(tmp_path):
    """Seeds 0, 1 and 2, three splits each, 33 images a seed: 99 different ones."""
    for seed in range(3):
        write(tmp_path / str(seed), seed=seed)
    images = [image.tobytes() for seed in "012" for split in SPLITS for image in images_of(tmp_path / seed, split)]
    assert len(set(images)) == len(images) == 99


def test_the_same_seed_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, seed=3)
    for path in (tmp_path / "a").rglob("*.*"):
        if path.suffix in (".npy", ".json"):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


ENSURE = """
import sys
from datasets.synthetic import PrepareSyntheticConfig, ensure_synthetic_splits
ensure_synthetic_splits(PrepareSyntheticConfig(sys.argv[1], num_train=1000, num_val=8, num_test=8, size=16))
"""


@pytest.mark.slow
def test_processes_that_start_together_draw_the_faces_once(tmp_path):
    """A grid on an empty folder starts several."""
    started = [
        subprocess.Popen([sys.executable, "-c", ENSURE, str(tmp_path)], cwd=ROOT, stdout=-1, stderr=-2, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert sum("waiting for another process" in text for text in printed) >= 1
    assert len(images_of(tmp_path, "train")) == 1000 and len(images_of(tmp_path, "test")) == 8


def test_faces_that_are_there_stay(tmp_path):
    write(tmp_path)
    before = images_of(tmp_path, "train")
    ensure_synthetic_splits(PrepareSyntheticConfig(data_dir=str(tmp_path), num_train=3, size=20))
    assert (images_of(tmp_path, "train") == before).all()
