"""Tests of recognition.recognize_command: names of files and of classes cannot change what a terminal shows."""

from __future__ import annotations

import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np

from recognition import recognize_command
from recognition.recognize_command import RecognizeConfig, run
from recognition.results import ImageResult, Recognition

NAMES = ("a\x1b[2J.png", "b\nc.png", os.fsdecode(b"caf\xe9.png"))


def results():
    face = Recognition(
        "Sad", {"Sad": 0.75, "Happy": 0.25}, np.zeros((1, 3)), np.zeros((4, 4, 3), np.uint8), (0, 0, 4, 4)
    )
    yield ImageResult(NAMES[0], (4, 4), [face])
    yield ImageResult(NAMES[1], (4, 4), [])
    yield ImageResult(NAMES[2], (0, 0), [], error=f"{NAMES[2]}: cut off")


def output(monkeypatch, capsys, **options):
    model = SimpleNamespace(class_names=("Sad", "Happy"), stream=lambda *args, **kwargs: results())
    inputs = SimpleNamespace(images=[SimpleNamespace(name=name) for name in NAMES], count=3)
    monkeypatch.setattr(recognize_command, "open_inputs", lambda images: inputs)
    try:
        run(model, RecognizeConfig(images=("x",), **options))
    except recognize_command.UserError as error:
        assert str(error).isprintable()
    found = capsys.readouterr()
    for text in found:
        text.encode()
        assert all(line.isprintable() for line in text.split("\n"))
    return found.out


def test_a_table_has_one_printable_line_per_face(monkeypatch, capsys):
    lines = output(monkeypatch, capsys).splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines[1:]] == [r"a\x1b[2J.png", r"b\nc.png", r"caf\udce9.png"]
    assert (
        len({line.index(word) for line, word in zip(lines, ("label", "Sad", "no face", "unreadable"), strict=True)})
        == 1
    )


def test_views_are_named(monkeypatch, capsys):
    named = [
        json.loads(line).get("views") for line in output(monkeypatch, capsys, json=True, views="flip").splitlines()
    ]
    assert named == ["flip", None, None]  # a line without a face has no probabilities
    output(monkeypatch, capsys)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    output(monkeypatch, capsys, views="ten-crop")
    assert "four corner crops" in sys.stderr.getvalue() and "--views ten-crop" in sys.stderr.getvalue()


def test_every_line_of_json_is_valid(monkeypatch, capsys):
    lines = output(monkeypatch, capsys, json=True).splitlines()
    assert [json.loads(line)["image"] for line in lines] == [r"a\x1b[2J.png", r"b\nc.png", r"caf\udce9.png"]
