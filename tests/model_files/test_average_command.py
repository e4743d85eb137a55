"""The mean of several model files."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from files import UserError
from model_files import model_file
from model_files.average_command import AverageConfig, average


@pytest.fixture(scope="module")
def other_weights(tiny_weights, tmp_path_factory):
    """The same network with other weights, a calibration, and the split that selected its epoch."""
    path = tmp_path_factory.mktemp("other") / "other.weights.h5"
    network, info = model_file.load_model(tiny_weights)
    rng = np.random.default_rng(0)
    network.set_weights([values + rng.uniform(0.1, 1, values.shape) for values in network.get_weights()])
    described = dataclasses.replace(info.network, temperature=2.0)
    model_file.save_model(path, network, dataclasses.replace(info, network=described, calibrated_on="a/val"))
    return path


def weights_of(path):
    return model_file.load_model(path, calibrated=False)[0].get_weights()


@pytest.mark.parametrize("shares, first", [((), 0.5), ((3, 1), 0.75), ((0, 2), 0.0)])
def test_every_variable_is_the_weighted_mean(tiny_weights, other_weights, tmp_path, shares, first):
    target = tmp_path / "mean.weights.h5"
    average(AverageConfig((str(tiny_weights), str(other_weights)), str(target), shares))
    for mean, a, b in zip(*map(weights_of, (target, tiny_weights, other_weights)), strict=True):
        np.testing.assert_allclose(mean, first * np.float64(a) + (1 - first) * np.float64(b), rtol=1e-6, atol=1e-7)


def test_the_mean_is_described_and_not_calibrated(tiny_weights, other_weights, tmp_path):
    target = tmp_path / "mean.weights.h5"
    average(AverageConfig((str(tiny_weights), str(other_weights)), str(target), half=True))
    given, found = model_file.read_info(tiny_weights), model_file.read_info(target)
    assert found.network == model_file.uncalibrated(given.network) and found.calibrated_on == ""
    assert (found.dataset, found.metrics.get("split")) == (given.dataset, given.metrics.get("split"))
    assert f"{other_weights.parent.name}/other.weights.h5 (0.5)" in found.origin
    assert target.stat().st_size < tiny_weights.stat().st_size


@pytest.mark.parametrize(
    "change, fact",
    [
        ({"weights": ("one.weights.h5",)}, "received 1"),
        ({"shares": (1,)}, "one number per file"),
        ({"shares": (0, 0)}, "0 0"),
        ({"output": "mean.h5"}, "weights.h5"),
    ],
)
def test_refusals(tiny_weights, tmp_path, change, fact):
    options = {"weights": (str(tiny_weights),) * 2, "output": str(tmp_path / "mean.weights.h5"), **change}
    with pytest.raises(UserError, match=fact):
        average(AverageConfig(**options))
    assert not list(tmp_path.iterdir())


def test_files_of_different_networks_are_refused(tiny_weights, tmp_path):
    other = tmp_path / "scaled.weights.h5"
    shutil.copy(tiny_weights, other)
    info = model_file.read_info(other)
    model_file.redescribe(other, dataclasses.replace(info, network=dataclasses.replace(info.network, logit_scale=2.0)))
    with pytest.raises(UserError, match=r"scaled.weights.h5: expected the network of"):
        average(AverageConfig((str(tiny_weights), str(other)), str(tmp_path / "mean.weights.h5")))
