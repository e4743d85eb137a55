"""The examples of docs/extending.md, applied to a copy of the project: each addition appears where the page says."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

PAGE = ROOT / "docs" / "extending.md"
EXAMPLE = re.compile(r"^```(?:python|yaml)\n# (\S+): ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"""(above|below|instead of) (["'])(.+)\2""")


pytestmark = pytest.mark.slow


def insert(text: str, place: str, code: str) -> str:
    """``text`` with ``code`` above, below or instead of the only line that starts as ``place`` says."""
    where, _, start = PLACE.fullmatch(place).groups()
    lines = text.splitlines(keepends=True)
    found = [row for row, line in enumerate(lines) if line.startswith(start)]
    assert len(found) == 1, f"expected one line that starts with {start!r}, found {len(found)}"
    first = found[0] + (where == "below")
    lines[first : first + (where == "instead of")] = [code]
    return "".join(lines)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with every example applied."""
    root = tmp_path_factory.mktemp("extended")
    for path in (*ROOT.glob("*.py"), *(init.parent for init in ROOT.glob("*/__init__.py"))):
        if path.is_dir():
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, root)
    page = PAGE.read_text(encoding="utf-8")
    examples = EXAMPLE.findall(page)
    assert len(examples) == len(re.findall(r"^```(?:python|yaml)$", page, re.MULTILINE))
    for name, place, code in examples:
        path = root / name
        assert path.exists() == (place != "new file"), f"{name}: {place}"
        path.write_text(code if place == "new file" else insert(path.read_text(encoding="utf-8"), place, code))
    return root


def command(project, *args):
    """Runs one of the copy's commands in its folder; the text that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, *args], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_folder(project):
    """One epoch of the new data set and backbone, with the new term, augmentation and option."""
    rng = np.random.default_rng(0)
    for split, name, count in (("train", "Happy", 6), ("train", "Sad", 6), ("val", "Happy", 3), ("val", "Sad", 3)):
        folder = project / "faces" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    printed = command(project, "prepare_data.py", "my_faces", "--source", "faces")
    assert "12" in printed and "Happy" in printed
    options = ["--arch", "tiny", "--w-confidence", "0.1", "--noise", "5", "--clip-norm", "1", "--embedding-size", "8"]
    printed = command(
        project, "train.py", "--dataset", "my_faces", "--epochs", "1", "--batch-size", "6", "--run-dir", "run", *options
    )
    assert "top-2 accuracy" in printed
    return project / "run"


def test_options_and_data_set_are_in_the_help(project):
    shown = command(project, "train.py", "--help")
    for option in ("--w-confidence", "--noise", "--clip-norm", "my_faces"):
        assert option in shown
    assert "my_faces" in command(project, "prepare_data.py", "--help")


def test_term_metric_and_figure_are_in_the_run(project, run_folder):
    with open(run_folder / "history.csv") as file:
        (row,) = csv.DictReader(file)
    assert -np.log(7) <= float(row["confidence"]) < 0 and "val_confidence" in row
    titles = command(project, "-c", "import plots; print(plots.curve_titles(['loss', 'confidence']))")
    assert "Confidence penalty" in titles
    result = json.loads((run_folder / "result.json").read_text())
    assert result["accuracy"] <= result["top2_accuracy"] <= 1
    assert (run_folder / "confidence.png").stat().st_size > 1000


def test_new_network_is_exported_in_the_new_format(project, run_folder):
    command(
        project, "test.py", "export", "--weights", "run/best.weights.h5", "--format", "keras", "--output", "t.keras"
    )
    assert (project / "t.keras").stat().st_size > 1000


def test_augmentation_and_option_take_effect(project):
    code = """
import numpy as np
from augmentation import Augmentation
from config import AugmentConfig, OptimizerConfig
from training.optimization import make_optimizer
still = dict(flip=False, rotation=0.0, shift=0.0, zoom=0.0, erase=0.0)
pixels = np.full((4, 8, 8, 1), 100, np.uint8)
for gamma in (0.0, 0.5):
    print(float(np.std(np.asarray(Augmentation(AugmentConfig(gamma=gamma, **still), seed=0)(pixels, training=True)))))
print(make_optimizer(OptimizerConfig(clip_norm=2.0), 10, 1).global_clipnorm)
"""
    without, with_gamma, clip_norm = map(float, command(project, "-c", code).split())
    assert without < 1e-3 and with_gamma > 4 and clip_norm == 2.0


def test_preset_is_listed(project):
    listed = command(project, "reproduce.py", "list", "ramp", "--seeds", "1").splitlines()
    assert len(listed) == 3 and "--ramp-epochs 5" in listed[1] and "--w-fd 0.5" in listed[2]
