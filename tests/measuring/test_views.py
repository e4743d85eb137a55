"""The views of an image are those that are named, and their probabilities are averaged."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import evaluation
from files import UserError
from measuring.views import VIEWS, views_of
from model_files import model_file
from test_model import TestModels


def ten_crops(image, height, width, middle):
    """The crops of one image (H, W, C), written out."""
    corners = [image[:height, :width], image[:height, -width:], image[-height:, :width], image[-height:, -width:]]
    centre = image[middle[0] : middle[0] + height, middle[1] : middle[1] + width]
    crops = [*corners, centre]
    return [*crops, *(np.fliplr(crop) for crop in crops)]


@pytest.mark.parametrize(
    ("size", "crop", "middle"),
    [((48, 48), (42, 42), (3, 3)), ((24, 40), (21, 35), (1, 2)), ((9, 4), (8, 4), (0, 0)), ((1, 1), (1, 1), (0, 0))],
    ids=["48 pixels", "wide", "odd", "one pixel"],
)
def test_ten_crop_is_corners_and_centre_and_their_mirror_images(size, crop, middle):
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    views = [view(images) for view in VIEWS["ten-crop"]]
    assert len(views) == 10
    for i, image in enumerate(images):
        for view, expected in zip(views, ten_crops(image, *crop, middle), strict=True):
            np.testing.assert_array_equal(view[i], expected)


def oracle(network, images, views):
    """The mean over the views of the softmax, one image at a time."""
    rows = []
    for image in images:
        seen = ten_crops(image, 21, 21, (1, 1)) if views == "ten-crop" else [image, np.fliplr(image)]
        logits = [np.asarray(network(np.array(each)[None], training=False)["logits"][0], np.float64) for each in seen]
        rows.append(np.mean([np.exp(z) / np.exp(z).sum() for z in logits], axis=0))
    return np.array(rows)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 24, 24, 3), np.uint8)


@pytest.mark.parametrize("views", ["flip", "ten-crop"])
def test_predict_averages_the_probabilities_of_the_views(tiny_weights, images, views):
    network, _ = model_file.load_model(tiny_weights)
    expected = oracle(network, images, views)
    found, embeddings = evaluation.predict(network, images, 2, views)
    plain, same = evaluation.predict(network, images, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(embeddings, same, atol=1e-6)  # of the image itself
    assert np.abs(found - plain).max() > 1e-5  # or the oracle could not tell the views apart
    recognised, _ = TestModels(tiny_weights, views=views).predict(images)
    np.testing.assert_allclose(recognised, expected, atol=1e-6)


@pytest.mark.slow
def test_an_onnx_file_has_the_same_views(tiny_weights, images, tmp_path):
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    from model_files import export

    export.export_network(*model_file.load_model(tiny_weights), tmp_path / "a.onnx", "onnx")
    for views, tolerance in (("none", 1e-5), ("flip", 1e-5), ("ten-crop", 5e-3)):  # crops are rounded to uint8
        expected, _ = TestModels(tiny_weights, views=views).predict(images)
        found, _ = TestModels(tmp_path / "a.onnx", views=views).predict(images)
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_unknown_views_are_refused_with_the_choices():
    with pytest.raises(UserError, match=r"views: expected one of none, flip, ten-crop, received 'mirror'"):
        TestModels(views="mirror")


def test_the_views_of_an_old_result():
    assert [views_of(result) for result in ({}, {"flip": False}, {"flip": True}, {"views": "ten-crop"})] == [
        *("none", "none", "flip", "ten-crop")
    ]
