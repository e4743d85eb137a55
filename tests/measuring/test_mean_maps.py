"""Tests of mean_maps: the means are those of all images, the interval holds the mean, the figure shows every class."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import explain
from measuring import mean_maps

NAMES = ("Neutral", "Happy", "Sad", "Surprise")


def explanation(n=9, k=3, size=(24, 24, 1), num_classes=4, seed=0) -> explain.Explanation:
    """Faces with random maps; class 2 has none."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % (num_classes - 1))
    labels[labels == 2] = num_classes - 1
    return explain.Explanation(
        images=rng.integers(0, 256, (n, *size), dtype=np.uint8),
        labels=labels,
        probabilities=np.full((n, num_classes), 1 / num_classes, np.float32),
        logits=np.zeros(n, np.float32),
        parts=np.zeros((n, k), np.float32),
        signed_maps=rng.normal(size=(n, k, 3, 5)).astype(np.float32),
    )


@pytest.mark.parametrize("batch_size", [9, 4, 1])
def test_means_are_those_of_all_images_of_a_class(batch_size):
    whole = explanation()
    found = mean_maps.average((whole[start : start + batch_size] for start in range(0, 9, batch_size)), 4)
    assert found.counts.tolist() == [3, 3, 0, 3]
    for code in (0, 1, 3):
        rows = whole.labels == code
        np.testing.assert_allclose(found.faces[code], whole.images[rows].mean(axis=0))
        np.testing.assert_allclose(found.label_maps[code], whole.label_maps[rows].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.vector_maps[code], whole.vector_maps[rows].mean(axis=0), rtol=1e-5)
    assert found.faces[2].max() == found.vector_maps[2].max() == 0
    np.testing.assert_allclose(found.overlaps, explain.overlap(whole.vector_maps))


def test_the_interval_of_the_overlap_is_the_bootstraps():
    """For 400 values that are 0 or 1 with mean 0.25 the standard error is 0.0217: the interval is 0.25 +- 0.042."""
    overlaps = np.r_[np.zeros(300), np.ones(100), np.full(50, np.nan)]
    mean, (low, high) = mean_maps.MeanMaps(*([None] * 4), overlaps).mean_overlap()
    assert mean == 0.25
    assert (low, high) == (pytest.approx(0.2075, abs=0.006), pytest.approx(0.2925, abs=0.006))
    assert mean_maps.MeanMaps(*([None] * 4), overlaps).mean_overlap(seed=1)[1] != [low, high]


def test_one_vector_has_no_overlap():
    found = mean_maps.average([explanation(k=1)], 4)
    assert np.isnan(found.overlaps).all() and found.mean_overlap() is None


@pytest.mark.parametrize(
    ("size", "panel", "k", "vectors"),
    [((24, 24, 1), (96, 96), 3, 3), ((30, 20, 3), (96, 64), 1, 1), ((150, 150, 3), (96, 96), 40, 28)],
    ids=["gray", "one vector, colour, no square", "many vectors"],
)
def test_the_figure_has_a_row_per_class_with_images(size, panel, k, vectors, tmp_path, monkeypatch):
    from matplotlib.text import Text

    import plots

    drawn = []
    print_png = plots.FigureCanvasAgg.print_png
    monkeypatch.setattr(
        plots.FigureCanvasAgg, "print_png", lambda self, *args: drawn.append(self.figure) or print_png(self, *args)
    )
    mean_maps.average([explanation(size=size, k=k)], 4).save_figure(tmp_path / "explain.png", NAMES, "A title")
    (figure,) = drawn
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {"A title", "Mean face", "Label", "Neutral\nn = 3", "Happy\nn = 3", "Surprise\nn = 3"} <= texts
    assert not any("Sad" in text for text in texts)
    assert sum(text.startswith("Vector ") for text in texts) == vectors
    # Nothing is cut off at the border.
    image = cv2.imread(str(tmp_path / "explain.png"))
    assert (image[:, [0, -1]] == 255).all() and (image[[0, -1]] == 255).all()
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (3 * (panel[0] + 6) - 6, (vectors + 2) * (panel[1] + 6) - 6, 3)


def test_the_strongest_mean_map_has_the_full_colour(tmp_path):
    """A map that is 1 at one place and 0 elsewhere, beside one that is weaker: its colour is yellow only there."""
    maps = np.zeros((2, 1, 2, 2))
    maps[0, 0, 0, 0], maps[1, 0, 0, 0] = 0.5, 0.1
    faces = np.zeros((2, 8, 8, 1))
    found = mean_maps.MeanMaps(np.array([1, 1]), faces, maps[:, 0], maps, np.array([]))
    found.save_figure(tmp_path / "explain.png", ("Neutral", "Happy"))
    image = cv2.imread(str(tmp_path / "explain.png")).astype(int)  # BGR
    rows, _ = np.nonzero((image[..., 2] - image[..., 0] > 120) & (image[..., 1] > 120))
    assert len(rows) and rows.max() < image.shape[0] / 2
