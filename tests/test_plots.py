"""Figures show the numbers they are given, and read no more images than they show."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text

import config
import metrics
import plots
from files import UserError

NAMES = ("Neutral", "Happy", "Contempt")


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn during a test, in order."""
    figures = []

    class Recorder(plots.FigureCanvasAgg):
        def print_png(self, *args, **kwargs):
            figures.append(self.figure)
            super().print_png(*args, **kwargs)

    monkeypatch.setattr(plots, "FigureCanvasAgg", Recorder)
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def read_png(path):
    """uint8 (H, W, 3) RGB, read by another library than the one that wrote it."""
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


def case(n=60, num_classes=3, seed=0):
    """Labels of the first two classes only, probabilities, unit embeddings (N, 2, 8) that separate the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    logits = rng.normal(size=(n, num_classes)) + 2 * np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    embeddings = rng.normal(size=(n, 2, 8)) + 3 * labels[:, None, None]
    return labels, probabilities, embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def save_all(folder, labels, probabilities, embeddings):
    scores = metrics.score(labels, probabilities, NAMES)
    return plots.save_figures(
        folder, "FER-2013, val, n = 60", labels, probabilities, NAMES, scores, *metrics.tsne(embeddings)
    )


def test_save_figures_writes_four_figures_with_a_title(tmp_path, drawn):
    written = save_all(tmp_path / "new", *case())
    assert [path.name for path in written] == ["confusion_matrix.png", "per_class.png", "reliability.png", "tsne.png"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)  # and nothing temporary
    for path in written:
        image = read_png(path)
        assert min(image.shape[:2]) > 300
        assert (image == 255).mean() > 0.2 and image.std() > 10  # something on white
    assert len(drawn) == 4 and all("FER-2013, val, n = 60" in figure.get_suptitle() for figure in drawn)


def test_a_title_of_several_and_of_long_lines_is_drawn_whole(tmp_path, drawn):
    with plots.new_figure(tmp_path / "title.png", 3, 2, "two\nlines, one of them " + "long " * 20):
        pass
    assert drawn[0].get_suptitle().startswith("two\nlines, one of them long")
    image = read_png(tmp_path / "title.png")
    assert (image[:, [0, -1]] == 255).all() and (image[[0, -1]] == 255).all()


def test_names_with_dollar_signs_and_escape_codes_are_drawn_as_they_are(tmp_path):
    """Matplotlib would read a formula between dollar signs, and refuse this one."""
    labels, probabilities, embeddings = case()
    names = ["$x^$", "a_$b", "c"]
    scores = metrics.score(labels, probabilities, names)
    title = "$x^$ \x1b[31m \udce9"
    plots.save_figures(tmp_path, title, labels, probabilities, names, scores, *metrics.tsne(embeddings))
    assert len(list(tmp_path.iterdir())) == 4


def test_confusion_matrix_shows_counts_and_row_percent(tmp_path, drawn):
    # true a: 2 predicted as a, 6 as b: 25% and 75%; true b: all 1,234; c never occurs and has no percent
    confusion = np.array([[2, 6, 0], [0, 1234, 0], [0, 0, 0]])
    plots._save_confusion_matrix(tmp_path / "c.png", "", confusion, NAMES)
    (axes, _) = drawn[0].axes
    cells = {}
    for text in axes.texts:
        column, row = (round(place) for place in text.get_position())
        cells.setdefault((row, column), []).append(text.get_text())
    assert cells[0, 0] == ["25.0", "2"]
    assert cells[0, 1] == ["75.0", "6"]
    assert cells[1, 1] == ["100.0", "1,234"]
    assert cells[2, 2] == ["0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    np.testing.assert_allclose(axes.images[0].get_array(), [[25, 75, 0], [0, 100, 0], [0, 0, 0]])


def test_per_class_shows_every_share_and_marks_what_is_missing(tmp_path, drawn):
    per_class = {
        "Happy": {"n": 1200, "precision": 0.5, "recall": 0.25, "f1": 1 / 3},
        "Contempt": {"n": 0, "precision": None, "recall": None, "f1": None},
    }
    plots._save_per_class(tmp_path / "p.png", "", per_class)
    axes = drawn[0].axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.5, 0], [0.25, 0], [pytest.approx(1 / 3), 0]]
    assert {"Happy\nn = 1,200", "Contempt\nn = 0", "Precision", "Recall", "F1"} <= set(texts(drawn[0]))
    values = [text.get_text() for text in axes.texts]
    assert values == ["0.50", "–", "0.25", "–", "0.33", "–"]  # noqa: RUF001


def test_reliability_shows_the_bins(tmp_path, drawn):
    # 3 samples at confidence 0.9, one right; 1 sample at 0.6, right
    labels = np.array([0, 1, 1, 0])
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    plots._save_reliability(tmp_path / "r.png", "", labels, probabilities, ece=0.525)
    curve, histogram = drawn[0].axes
    line = next(line for line in curve.lines if line.get_label() == "this model")
    np.testing.assert_allclose(line.get_xydata(), [[0.6, 1], [0.9, 1 / 3]])
    heights = [bar.get_height() for bar in histogram.patches]
    assert sorted(heights) == [0] * 13 + [0.25, 0.75]
    assert "ECE = 0.525" in texts(drawn[0])


def tsne_points(figure):
    """The drawn samples' places and colours: the collection that is not a legend entry."""
    points = max(figure.axes[0].findobj(PathCollection), key=lambda found: len(found.get_offsets()))
    return np.asarray(points.get_offsets()), points.get_facecolors()


def test_tsne_shows_every_sample_in_the_colour_of_its_class(tmp_path, drawn):
    labels, _, embeddings = case(n=80)
    rows, places = metrics.tsne(embeddings)
    plots._save_tsne(tmp_path / "tsne.png", "", labels[rows], places, NAMES)
    points, colors = tsne_points(drawn[-1])
    np.testing.assert_allclose(points, places)
    kinds, kind_of = np.unique(colors, axis=0, return_inverse=True)
    assert len(kinds) == 2
    assert len(set(zip(kind_of.ravel().tolist(), labels[rows].tolist(), strict=True))) == 2
    assert {"Neutral", "Happy"} <= set(texts(drawn[-1])) and "Contempt" not in texts(drawn[-1])


def test_tsne_is_left_out_where_it_would_show_nothing(tmp_path):
    labels, probabilities, embeddings = case(n=40)
    embeddings = np.broadcast_to(embeddings[:1], embeddings.shape)  # all equal
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = save_all(tmp_path, labels, probabilities, embeddings)
    assert [path.name for path in written] == ["confusion_matrix.png", "per_class.png", "reliability.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_history_has_a_panel_per_column_and_marks_the_best_epoch(tmp_path, drawn, monkeypatch):
    """Terms come in the order of `config.LOSS_TERMS`, then unknown columns."""
    monkeypatch.setattr(config, "LOSS_TERMS", {"margin": "Margin loss", **config.LOSS_TERMS})
    history = [
        {"epoch": 1, "unknown": 7.0, "loss": 9.0, "accuracy": 0.3, "fd": 0.9, "learning_rate": 0.1, "seconds": 3},
        {"epoch": 2, "unknown": 6.0, "loss": 5.0, "accuracy": 0.6, "fd": None, "learning_rate": 0.2, "seconds": 3},
    ]
    history[0] |= {"val_accuracy": 0.25, "val_margin": 1.0}
    history[1] |= {"val_accuracy": 0.5, "val_margin": 0.5}
    plots.save_history(tmp_path / "history.png", history, "FER-2013, train, n = 60", best_epoch=2)
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_title()}
    terms = ["Margin loss", "Feature Discriminator", "unknown"]
    assert list(panels) == ["Total loss", "Accuracy", *terms, "Learning rate"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels["Accuracy"].lines}
    assert lines.pop("best epoch (2)")[0][0] == 2
    assert lines == {"training": [[1, 0.3], [2, 0.6]], "validation": [[1, 0.25], [2, 0.5]]}
    np.testing.assert_array_equal(panels["Feature Discriminator"].lines[-1].get_ydata(), [0.9, np.nan])
    assert [line.get_label() for line in panels["Margin loss"].lines] == ["best epoch (2)", "validation"]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(legend) == ["best epoch (2)", "training", "validation"]
    assert drawn[0].get_suptitle() == "FER-2013, train, n = 60"


def test_history_of_one_epoch_is_visible(tmp_path):
    plots.save_history(tmp_path / "one.png", [{"loss": 2.0}])
    red, _, blue = np.moveaxis(read_png(tmp_path / "one.png").astype(int), -1, 0)
    middle = slice(len(red) // 3, len(red) * 2 // 3)  # above the legend, which is blue too
    assert (blue - red)[middle].max() > 100


def test_history_without_anything_to_draw(tmp_path):
    for history in ([], [{"epoch": 1, "seconds": 3.0}]):
        with pytest.raises(ValueError, match="expected epochs"):
            plots.save_history(tmp_path / "h.png", history)
    assert not list(tmp_path.iterdir())


class Spy:
    """Replaces a large memory map and records which rows were read."""

    def __init__(self, images):
        self.images, self.shape, self.rows = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        assert np.ndim(row) == 0 and not isinstance(row, slice)
        self.rows.append(int(row))
        return self.images[row]


def test_image_grid_reads_only_the_first_of_each_class(tmp_path):
    labels = np.array([1, 1, 0, 1, 0, 0, 1])
    images = Spy(np.zeros((7, 8, 8, 1), np.uint8))
    plots.save_image_grid(tmp_path / "grid.png", images, labels, NAMES, per_class=2)
    assert sorted(images.rows) == [0, 1, 2, 4]


def test_image_grid_shows_a_row_per_class_and_its_count(tmp_path, drawn):
    colors = np.array([[200, 30, 30], [30, 160, 30], [30, 30, 220]], np.uint8)
    labels = np.array([2, 0, 2, 2, 0])
    images = np.broadcast_to(colors[labels][:, None, None, :], (5, 12, 12, 3))
    plots.save_image_grid(tmp_path / "grid.png", images, labels, NAMES, per_class=3)
    image = read_png(tmp_path / "grid.png")
    where = [np.argwhere((image == color).all(axis=-1)) for color in colors]
    assert len(where[1]) == 0  # no Happy: its row is empty
    assert where[0][:, 0].max() < where[2][:, 0].min() - 50
    # three images and two, of one size
    assert len(where[2]) / len(where[0]) == pytest.approx(3 / 2, rel=0.05)
    assert [text for text in texts(drawn[0]) if "\n" in text] == ["Neutral\n2", "Happy\n0", "Contempt\n3"]


def test_image_grid_shows_gray_images_gray(tmp_path):
    images = np.full((2, 10, 10, 1), 77, np.uint8)
    plots.save_image_grid(tmp_path / "grid.png", images, np.array([0, 1]), NAMES[:2], per_class=1)
    assert (read_png(tmp_path / "grid.png") == 77).all(axis=-1).mean() > 0.2


def test_image_grid_needs_one_label_per_image(tmp_path):
    for count, num_labels in ((0, 0), (2, 3)):
        with pytest.raises(UserError, match=f"{count} images and {num_labels} labels"):
            plots.save_image_grid(tmp_path / "g.png", np.zeros((count, 4, 4, 1), np.uint8), np.zeros(num_labels), NAMES)


def test_recognition_png_shows_image_and_percent(tmp_path, drawn):
    image = np.full((20, 30, 1), 77, np.uint8)
    png = plots.recognition_png(image, {"Neutral": 0.125, "Happy": 0.85, "Sad": 0.025})
    (tmp_path / "r.png").write_bytes(png)
    assert (read_png(tmp_path / "r.png") == 77).all(axis=-1).mean() > 0.1
    bars = drawn[0].axes[1]
    assert [bar.get_width() for bar in bars.patches] == [0.125, 0.85, 0.025]
    assert [text.get_text() for text in bars.texts] == ["12%", "85%", "2%"]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["Neutral", "Happy", "Sad"]
    strongest = bars.patches[1].get_facecolor()
    assert strongest not in (bars.patches[0].get_facecolor(), bars.patches[2].get_facecolor())


def test_a_failing_write_leaves_the_old_figure(tmp_path, monkeypatch):
    target = tmp_path / "history.png"
    plots.save_history(target, [{"loss": 2.0}])
    before = target.read_bytes()

    def full_disk(self, path):
        Path(path).write_bytes(b"half a figure")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plots.save_history(target, [{"loss": 3.0}])
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_plots_needs_neither_keras_nor_a_display():
    code = "import sys, plots; print(*({'keras', 'tensorflow', 'matplotlib.pyplot'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(plots.__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
