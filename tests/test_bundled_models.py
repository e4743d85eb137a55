"""Every model that comes with the project gives an image the same probabilities, whatever else is in its batch."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import ROOT

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cv2

import evaluation
from images import resize_image
from model_files import model_file
from test_model import TestModels

MODELS = sorted((ROOT / "trained_models").glob("*.weights.h5"))


def test_a_model_comes_with_the_project():
    assert MODELS


def varied_images(size):
    """23 images that differ much: parts of a photograph, some dark or bright, and noise."""
    photograph = cv2.cvtColor(cv2.imread(str(ROOT / "examples" / "astronaut.png")), cv2.COLOR_BGR2RGB)
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(20):
        side = int(rng.integers(60, 300))
        top, left = rng.integers(0, 512 - side, 2)
        part = resize_image(np.ascontiguousarray(photograph[top : top + side, left : left + side]), size)
        parts.append((part * rng.uniform(0.2, 1)).astype(np.uint8))
    noise = rng.integers(0, 256, (size, size, 3), np.uint8)
    return np.stack([*parts, noise, np.zeros_like(noise), np.full_like(noise, 255)])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_probabilities_do_not_depend_on_the_batch(path):
    network, info = model_file.load_model(path)
    images = varied_images(info.network.input_size)
    expected, expected_embeddings = evaluation.predict(network, images, batch_size=1)
    assert np.ptp(expected.max(axis=1)) > 0.2  # images of one probability would show nothing
    order = np.random.default_rng(1).permutation(len(images))
    for batch_size in (2, 7, 23, 256):
        for rows in (np.arange(len(images)), order):
            found, embeddings = evaluation.predict(network, images[rows], batch_size)
            np.testing.assert_allclose(found, expected[rows], atol=1e-5)
            np.testing.assert_allclose(embeddings, expected_embeddings[rows], atol=1e-5)
    model = TestModels(path)
    alone = np.concatenate([model.predict(image)[0] for image in images])
    np.testing.assert_allclose(alone, expected, atol=1e-5)
