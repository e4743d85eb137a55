"""The notebook examples/tour.ipynb: what is kept in it, and that its cells run in a real kernel."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from notebooks import notices, run_notebook, shown_images, text_of

TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(TOUR, as_version=4)


@pytest.fixture(scope="module")
def executed(kept, tmp_path_factory) -> tuple[nbformat.NotebookNode, Path]:
    folder = tmp_path_factory.mktemp("elsewhere")
    return run_notebook(kept, folder), folder


def cell(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(each for each in notebook.cells if each.id == name)


def test_outputs_are_kept_small_and_without_notices(kept):
    assert TOUR.stat().st_size < 1_500_000
    code = [each for each in kept.cells if each.cell_type == "code"]
    assert [each.execution_count for each in code] == list(range(1, len(code) + 1))
    assert not [output for each in code for output in each.outputs if output.get("name") == "stderr"]
    check_facts(kept)


def test_no_path_of_the_machine_that_executed_it_is_kept(kept):
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users)\b[^\s\"']*", nbformat.writes(kept))


def test_colab_opens_and_clones_the_same_repository(kept):
    badge = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/([\w./-]+)", text_of(kept))
    cloned = re.search(r'"https://github\.com/([\w.-]+/[\w.-]+)"', cell(kept, "colab").source)
    assert badge[1] == cloned[1]
    assert ROOT / badge[2] == TOUR


def test_links_lead_to_files(kept):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(kept))
    assert links and not [link for link in links if not (TOUR.parent / link).exists()]


@pytest.mark.slow
def test_every_cell_runs_in_another_folder_without_a_notice(executed):
    notebook, folder = executed
    assert not notices(notebook)
    check_facts(notebook)
    assert [path.name for path in folder.iterdir()] == ["tour"]
    assert {"group.jpg", "faces.csv", "clip-faces.mp4", "clip.csv", "why.png"} <= {
        path.name for path in (folder / "tour").iterdir()
    }
    assert not (ROOT / "tour").exists() and not (TOUR.parent / "tour").exists()


def check_facts(notebook: nbformat.NotebookNode) -> None:
    """What the outputs have to show."""
    assert text_of(cell(notebook, "photograph")).startswith("Happy\n")
    assert "embeddings: (7, 256) float32" in text_of(cell(notebook, "face"))
    assert "5 faces: " in text_of(cell(notebook, "several"))
    assert len(text_of(cell(notebook, "group")).split("\n")) == 5
    assert text_of(cell(notebook, "arrays")).split() == ["Happy", "Happy", "True"]
    batch = text_of(cell(notebook, "batch"))
    assert "broken.jpg: cannot be read" in batch and "wall.png: no face found" in batch
    table = cell(notebook, "table").outputs[0].data["text/html"]
    columns = ["image", "face", "x", "y", "width", "height", "score", "label", "Neutral", "Happy", "Sad", "Surprise"]
    assert re.findall(r"<th>([A-Za-z]+)</th>", table) == [*columns, "Fear", "Disgust", "Anger"]
    assert text_of(cell(notebook, "predict")) == "((7, 7), (7, 7, 256))"
    assert [line.split()[0] for line in text_of(cell(notebook, "video")).split("\n")[:3]] == ["1", "2", "3"]
    assert {"<th>time</th>", "<th>identity</th>"} <= set(
        re.findall(r"<th>\w+</th>", cell(notebook, "video-table").outputs[0].data["text/html"])
    )
    training = text_of(cell(notebook, "train"))
    assert "1400 images" in training and re.search(r"^accuracy +\d+\.\d+%", training, re.M)
    # Chance is 14%.
    assert float(re.search(r"synthetic/test: accuracy (\d+\.\d)%", text_of(cell(notebook, "result")))[1]) > 25
    for name in ("photograph", "several", "batch", "video", "grid", "tsne", "result", "trained", "explain"):
        (image,) = shown_images(cell(notebook, name))
        assert min(image.shape[:2]) > 100 and len(set(image.ravel()[::97].tolist())) > 20, name
