"""A teacher's probabilities: computed from model files, kept in a file, blended into the targets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import write_split

import test as test_module
from config import DatasetName
from data_helper import open_split
from datasets import CLASS_NAMES
from files import UserError
from model_files import model_file
from training import distillation
from training.distillation import blended_targets

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 24, 24, 1), np.uint8)


@pytest.fixture
def split(tmp_path):
    write_split(tmp_path, np.arange(11) % 7, images=IMAGES, shape=IMAGES.shape[1:])
    return open_split(tmp_path, "synthetic", "train")


def probabilities(weights) -> np.ndarray:
    """The mean of the softmax over image and mirror image, in float64."""
    network, _ = model_file.load_model(weights)
    total = 0.0
    for images in (IMAGES, IMAGES[:, :, ::-1]):
        logits = np.asarray(network.predict_on_batch(images)["logits"], np.float64)
        total += np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) / 2
    return total


@pytest.fixture
def other_weights(tiny_weights, tmp_path):
    network, info = model_file.load_model(tiny_weights)
    head = network.get_layer("logits")
    head.set_weights([2 * array for array in head.get_weights()])
    model_file.save_model(tmp_path / "other.weights.h5", network, info)
    return tmp_path / "other.weights.h5"


def teach(tmp_path, *weights, **options):
    path = tmp_path / "teacher.npz"
    usual = {"dataset": DatasetName.synthetic, "data_dir": str(tmp_path), "output": str(path), "batch_size": 4}
    test_module.teach(test_module.TeachConfig(weights=tuple(map(str, weights)), **{**usual, **options}))
    return path


def test_a_model_file_is_a_teacher(split, tiny_weights):
    found = blended_targets(split, str(tiny_weights), 0.25, soft_labels=False).votes
    np.testing.assert_allclose(found, 0.75 * np.eye(7)[split.labels] + 0.25 * probabilities(tiny_weights), atol=1e-5)


def test_several_teachers_are_kept_as_their_mean(split, tiny_weights, other_weights, tmp_path, monkeypatch, capsys):
    path = teach(tmp_path, tiny_weights, other_weights)
    mean = (probabilities(tiny_weights) + probabilities(other_weights)) / 2
    right = np.mean(mean.argmax(axis=1) == split.labels)
    assert f"{right:.2%} of synthetic/train" in capsys.readouterr().out
    monkeypatch.setattr(distillation, "_predicted", None)  # nothing is computed again
    votes = np.full((11, 7), 1 / 7, np.float32)
    voted = dataclasses.replace(split, votes=votes)
    found = blended_targets(voted, str(path), 0.4, soft_labels=True).votes
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.6 * votes + 0.4 * mean, atol=1e-5)


def test_a_teacher_of_other_classes_or_images_is_refused(split, tiny_weights, tmp_path):
    path = teach(tmp_path, tiny_weights)
    write_split(tmp_path / "more", np.arange(11) % 8, images=IMAGES, shape=IMAGES.shape[1:], num_classes=8)
    eight = open_split(tmp_path / "more", "synthetic", "train")
    for teacher in (str(tiny_weights), str(path)):
        with pytest.raises(UserError, match=rf"{teacher}: expected a teacher of the classes .*{CLASS_NAMES[7]}"):
            blended_targets(eight, teacher, 0.5, soft_labels=False)
    write_split(tmp_path / "changed", np.arange(11) % 7, images=255 - IMAGES, shape=IMAGES.shape[1:])
    with pytest.raises(UserError, match=r"teacher.npz: .* of other images; .*test.py teach"):
        blended_targets(open_split(tmp_path / "changed", "synthetic", "train"), str(path), 0.5, soft_labels=False)


def test_a_damaged_teacher_is_refused(split, tiny_weights, tmp_path):
    path = teach(tmp_path, tiny_weights)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"teacher\.npz"):
        blended_targets(split, str(path), 0.5, soft_labels=False)


@pytest.mark.parametrize(("options", "facts"), [({"weights": ()}, "--weights"), ({"output": "x.txt"}, r"x.txt.*\.npz")])
def test_what_teach_refuses(split, tmp_path, options, facts):
    with pytest.raises(UserError, match=facts):
        teach(tmp_path, *options.pop("weights", ("a",)), **options)
