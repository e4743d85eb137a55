"""Every name that ``keras:<Name>`` offers was tried out; backbones.csv lists with what outcome, backbones.py tries."""

from __future__ import annotations

import importlib.util
import re
import sys

import backbones
import pytest

import cnn_model

NEEDS_ONNX = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
SMALLEST = "MobileNetV3Small"


def test_every_name_that_is_offered_is_in_the_record_and_none_fails():
    """A name that a new Keras brings is tried out with backbones.py, and recorded, or not offered."""
    rows = backbones.read_record()
    assert set(cnn_model.keras_names()) <= set(rows)
    expected = re.compile(r"works|not tried|needs more than [0-9.]+ GiB")
    assert not [row for row in rows.values() if not expected.fullmatch(row.outcome)]
    tried = [row for row in rows.values() if row.outcome == "works"]
    assert all(int(row.parameters) > 100_000 and float(row.onnx_difference) < 1e-3 for row in tried)


@pytest.mark.slow
@NEEDS_ONNX
@pytest.mark.parametrize("name", ["EfficientNetV2B0", SMALLEST])
def test_a_network_works_from_building_to_export(name):
    row, errors = backbones.run(name, memory=8)
    assert row.outcome == "works", errors[-3000:]
    assert row.size == "32" and 0 < float(row.onnx_difference) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_network_that_takes_too_much_memory_is_ended():
    row, _ = backbones.run(SMALLEST, memory=0.1)
    assert row.outcome == "needs more than 0.1 GiB" and float(row.memory) >= 0.1
