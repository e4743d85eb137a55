"""The benchmark of faces: what it draws and how it counts, with a detector whose answers are known."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import face_detection as benchmark

from faces.face import Face
from images import read_image


@pytest.fixture
def split(tmp_path):
    """Eight faces of 48 pixels: the astronaut, lighter and darker."""
    face = cv2.cvtColor(read_image(ROOT / "examples" / "astronaut.png")[66:161, 177:272], cv2.COLOR_RGB2GRAY)
    face = cv2.resize(face, (48, 48), interpolation=cv2.INTER_AREA)
    shades = np.stack([cv2.convertScaleAbs(face, alpha=a) for a in np.linspace(0.7, 1.1, 8)])
    np.save(tmp_path / "images.npy", shades[..., None])
    np.save(tmp_path / "labels.npy", np.ones(8, np.int64))
    return tmp_path


class StandIn:
    """Finds every pasted face with a box of 0.8 of its side, a tenth of the box too far to the left."""

    name = "stand-in"

    def __init__(self, monkeypatch):
        draw = benchmark.scene_with

        def drawn(*args):
            scene, self.true = draw(*args)
            return scene, self.true

        monkeypatch.setattr(benchmark, "scene_with", drawn)

    def detect(self, scene):
        x, y, side = self.true
        return [Face((x + 0.1 * side - 0.08 * side, y + 0.1 * side, 0.8 * side, 0.8 * side), 0.9)]


def test_framing_is_what_the_detector_needs(split, monkeypatch):
    images, labels = np.load(split / "images.npy"), np.load(split / "labels.npy")
    (row,) = benchmark.measure_framing(StandIn(monkeypatch), images, labels, 2, seed=0)
    assert row["scale"] == pytest.approx(1 / 0.8) and row["shift x"] == pytest.approx(0.1)
    assert (row["shift y"], row["± scale"]) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_pasted_face_lies_where_it_is_said():
    scene = np.zeros((120, 160, 3), np.uint8)
    benchmark.paste(scene, np.full((48, 48), 200, np.uint8), 30, 20, 60)
    assert cv2.boundingRect(scene[..., 0]) == (30, 20, 60, 60) and scene.max() == 200
    assert benchmark.overlap((0, 0, 10), (5, 0, 10)) == pytest.approx(1 / 3)
    assert benchmark.overlap((0, 0, 10), (20, 0, 10)) == 0


def test_all_parts_but_the_accuracy_run(split, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TIMED", ((160, 120),))
    monkeypatch.setattr(benchmark, "SIZES", (64,))
    options = ["--data", str(split), "--detectors", "haar", "--faces", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["face_detection.py", *options, "--only", "framing", "recall", "time"])
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["framing"][0]["found"] >= 4 and result["framing"][0]["scale"] == pytest.approx(1, abs=0.15)
    assert result["recall"][0]["64 px"] == 1.0 and result["time"][0]["160 x 120"] > 0
