"""A network of each family that ``keras:<Name>`` offers builds, trains, is saved and loaded, and is exported."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT, run_python

import cnn_model

FAMILIES = {
    "ConvNeXt": "ConvNeXtTiny",
    "DenseNet": "DenseNet121",
    "EfficientNetB": "EfficientNetB0",
    "EfficientNetV2": "EfficientNetV2B0",
    "Inception": "InceptionV3",
    "MobileNet": "MobileNetV2",
    "MobileNetV3": "MobileNetV3Small",
    "NASNet": "NASNetMobile",
    "ResNet": "ResNet50V2",
    "VGG": "VGG16",
    "Xception": "Xception",
}


def test_every_name_that_is_offered_is_of_a_family_that_is_tried():
    assert set(FAMILIES.values()) <= set(cnn_model.keras_names())
    assert not [name for name in cnn_model.keras_names() if not name.startswith(tuple(FAMILIES))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
@pytest.mark.parametrize("name", ["EfficientNetV2B0", "MobileNetV3Small"])  # `backbones.py` tries all: 8 minutes here
def test_a_network_of_the_family_works_from_building_to_export(name):
    done = run_python(ROOT / "tests" / "backbones.py", name)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
