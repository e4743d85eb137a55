"""Draws predictions, training and data as PNG figures; needs neither a display nor Keras."""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

import config
from files import UserError, whole_file
from metrics import reliability_bins
from reading.text import printable

# Okabe and Ito's colours: distinguishable with common colour blindness; their yellow darkened for white paper.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#c9b800")
BLUE, ORANGE, _GREEN = COLORS[:3]
GRAY = "#8c8c8c"
PALE = "#c3cfda"

_STYLE = {
    "text.parse_math": False,  # names of rows, classes and files may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 160,
}

_CHARACTER = 0.075  # inches, of a title

# The columns of a history that are no curves.
_NOT_CURVES = ("epoch", "seconds")


def curve_titles(columns: Iterable[str]) -> dict[str, str]:
    """The curves in a history, name to title, in the order of drawing.

    The total loss and the accuracy are first, then the terms of the loss in the order of `config.LOSS_TERMS`, then
    columns that no list knows (their name is the title), and the learning rate is last.

    Args:
        columns: the columns of the history; the ``val_`` partner of a curve counts as that curve.
    """
    found = {column.removeprefix("val_") for column in columns} - set(_NOT_CURVES)
    titles = {"loss": "Total loss", "accuracy": "Accuracy", **config.LOSS_TERMS}
    titles |= {name: name for name in sorted(found - set(titles) - {"learning_rate"})}
    titles["learning_rate"] = "Learning rate"
    return {name: title for name, title in titles.items() if name in found}


def save_figures(
    folder: str | Path,
    title: str,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    scores: Mapping[str, Any],
    tsne_rows: np.ndarray,
    tsne_places: np.ndarray,
) -> list[Path]:
    """Draws the figures of an evaluation.

    Args:
        folder: where ``confusion_matrix.png``, ``per_class.png``, ``reliability.png`` and ``tsne.png`` go.
        title: above every figure, such as "FER-2013, val, n = 3,589".
        labels: int (N,).
        probabilities: float (N, C).
        class_names: C names.
        scores: the result of `metrics.score` for these labels and probabilities.
        tsne_rows: int (M,), the samples that t-SNE shows (`metrics.tsne`); without any, no ``tsne.png``.
        tsne_places: float (M, 2), their places.

    Returns:
        The files written.
    """
    folder = Path(folder)
    _save_confusion_matrix(folder / "confusion_matrix.png", title, np.array(scores["confusion_matrix"]), class_names)
    _save_per_class(folder / "per_class.png", title, scores["per_class"])
    _save_reliability(folder / "reliability.png", title, labels, probabilities, scores["ece"])
    written = [folder / name for name in ("confusion_matrix.png", "per_class.png", "reliability.png")]
    if len(tsne_rows):
        shown = f"{title} ({len(tsne_rows):,} shown)"
        _save_tsne(folder / "tsne.png", shown, labels[tsne_rows], tsne_places, class_names)
        written.append(folder / "tsne.png")
    return written


def save_history(
    path: str | Path, history: Sequence[Mapping[str, float]], title: str = "", best_epoch: int | None = None
) -> None:
    """Draws the total loss, the accuracy, each loss term, any other column and the learning rate over the epochs.

    Args:
        path: the PNG to write.
        history: one dictionary per epoch, the first epoch first: every column except ``epoch`` and ``seconds`` gets a
            panel (`curve_titles`), shared with its ``val_`` partner; None and absent values leave gaps.
        title: above the figure, such as "FER-2013, 12 epochs".
        best_epoch: epoch that is marked in every panel, 1 for the first; None marks none.

    Raises:
        ValueError: no epoch, or no column to draw.
    """
    titles = curve_titles(dict.fromkeys(name for epoch in history for name in epoch))
    if not titles:
        raise ValueError(f"expected epochs with a loss, an accuracy or another curve; received {list(history)}")
    columns = min(len(titles), 4)
    rows = math.ceil(len(titles) / columns)
    with new_figure(path, 2.4 * columns, 2.0 * rows + 0.3, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, titles, strict=False):
            _draw_history(axes, name, history, best_epoch)
            axes.set_title(titles[name])
        for axes in panels[len(titles) :]:
            axes.set_axis_off()
        # Of all panels: the first may have no validation.
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)


def _draw_history(axes: Axes, name: str, history: Sequence[Mapping[str, float]], best_epoch: int | None) -> None:
    epochs = np.arange(1, len(history) + 1)
    if best_epoch is not None:
        axes.axvline(best_epoch, color=GRAY, linestyle="--", linewidth=1, label=f"best epoch ({best_epoch})")
    for key, label, color in ((name, "training", BLUE), (f"val_{name}", "validation", ORANGE)):
        values = np.array([epoch.get(key) for epoch in history], np.float64)  # None becomes NaN
        if not np.isnan(values).all():
            # A single epoch has no line: the marker shows it.
            axes.plot(epochs, values, color=color, label=label, marker="o", markersize=2.5, linewidth=1.4)
    axes.grid(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set(xlabel="Epoch", xlim=(0.5, len(history) + 0.5))


def recognition_png(image: np.ndarray, probabilities: Mapping[str, float]) -> bytes:
    """Draws an image beside the probability of each expression, for a notebook.

    Args:
        image: uint8 (H, W, C), C 1 or 3 (RGB).
        probabilities: class name to 0..1, drawn in this order.

    Returns:
        The bytes of a PNG.
    """
    names, values = list(probabilities), np.array(list(probabilities.values()))
    png = io.BytesIO()
    with new_figure(png, 5.6, 2.4) as figure:
        left, bars = figure.subplots(1, 2, width_ratios=(2, 3))
        left.imshow(_as_rgb(image), interpolation="bicubic")
        left.set_axis_off()
        drawn = bars.barh(names, values, color=[BLUE if value == values.max() else PALE for value in values])
        bars.bar_label(drawn, [f"{value:.0%}" for value in values], padding=3)
        bars.set_xlim(0, 1.12)  # room for "100%"
        bars.invert_yaxis()
        bars.tick_params(length=0)
        bars.set_xticks([])
        bars.spines[["bottom", "left"]].set_visible(False)
    return png.getvalue()


def save_image_grid(
    path: str | Path, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], per_class: int = 10
) -> None:
    """Draws the first images of every class, one row per class, with the name and count of the class on the left.

    Args:
        path: the PNG to write.
        images: uint8 (N, H, W, C), C 1 or 3 (RGB); only the rows shown are read, so a memory map may be huge.
        labels: int (N,), codes 0 <= label < len(class_names).
        class_names: one name per class; a class without images has an empty row.
        per_class: images per row.

    Raises:
        UserError: no images, or not as many labels as images.
    """
    labels = np.asarray(labels)
    if not len(labels) or len(labels) != len(images):
        raise UserError(f"{path}: expected one label per image, received {len(images)} images and {len(labels)} labels")
    side_y, side_x, _ = images.shape[1:]
    gap = max(1, side_x // 16)
    step_y, step_x = side_y + gap, side_x + gap
    # One canvas instead of one axes per image: the layout of 80 axes takes seconds.
    canvas = np.full((len(class_names) * step_y - gap, per_class * step_x - gap, 3), 255, np.uint8)
    for code in range(len(class_names)):
        for column, row in enumerate(np.flatnonzero(labels == code)[:per_class]):
            top, left = code * step_y, column * step_x
            canvas[top : top + side_y, left : left + side_x] = _as_rgb(images[row])
    counts = np.bincount(labels, minlength=len(class_names))
    cell = 0.6  # inches
    with new_figure(path, 1.0 + cell * per_class, 0.1 + cell * len(class_names) * step_y / step_x) as figure:
        axes = figure.add_subplot()
        axes.imshow(canvas)
        axes.set_xticks([])
        axes.set_yticks(
            np.arange(len(class_names)) * step_y + side_y / 2,
            [f"{name}\n{count:,}" for name, count in zip(class_names, counts, strict=True)],
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) -> (H, W, 3)."""
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _save_confusion_matrix(path: Path, title: str, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    num_classes = len(class_names)
    support = confusion.sum(axis=1)
    percent = 100 * confusion / np.maximum(support, 1)[:, None]
    side = 0.62 * num_classes
    with new_figure(path, side + 1.9, side + 0.7, title) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.ndindex(confusion.shape):
            color = "white" if percent[row, column] > 65 else "black"
            if support[row]:
                axes.text(column, row - 0.1, f"{percent[row, column]:.1f}", color=color, ha="center", va="center")
            axes.text(
                column, row + 0.24, f"{confusion[row, column]:,}", color=color, ha="center", va="center", fontsize=6.5
            )
        codes = range(num_classes)
        axes.set_xticks(codes, class_names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(codes, class_names)
        axes.set_xticks(np.arange(num_classes - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(num_classes - 1) + 0.5, minor=True)
        axes.grid(True, which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="Predicted expression", ylabel="True expression")
        bar = figure.colorbar(image, ax=axes, shrink=0.85, aspect=28, format=PercentFormatter(decimals=0))
        bar.set_label("Share of the true class")
        bar.outline.set_visible(False)


def _save_per_class(path: Path, title: str, per_class: Mapping[str, Mapping[str, Any]]) -> None:
    measures = {"precision": BLUE, "recall": ORANGE, "f1": _GREEN}
    width = 0.27  # of the distance between two classes
    places = np.arange(len(per_class))
    with new_figure(path, 1.0 + 1.0 * len(per_class), 3.0, title) as figure:
        axes = figure.add_subplot()
        for offset, (measure, color) in zip((-width, 0, width), measures.items(), strict=True):
            values = [values[measure] for values in per_class.values()]
            heights = [value or 0 for value in values]
            bars = axes.bar(places + offset, heights, width - 0.02, color=color, label=measure.capitalize())
            texts = ["–" if value is None else f"{value:.2f}" for value in values]  # noqa: RUF001
            axes.bar_label(bars, texts, padding=1.5, fontsize=7)
        axes.set_xticks(places, [f"{name}\nn = {values['n']:,}" for name, values in per_class.items()])
        axes.set_ylim(0, 1.05)
        axes.set_xlim(-0.55, len(per_class) - 0.45)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3)


def _save_reliability(path: Path, title: str, labels: np.ndarray, probabilities: np.ndarray, ece: float) -> None:
    confidence, accuracy, count = reliability_bins(labels, probabilities)
    edges = np.linspace(0, 1, len(count) + 1)
    full = count > 0
    with new_figure(path, 3.8, 4.6, title) as figure:
        curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        curve.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1, label="perfect calibration")
        curve.plot(
            confidence[full], accuracy[full], color=BLUE, marker="o", markersize=4, clip_on=False, label="this model"
        )
        curve.set(ylabel="Accuracy", xlim=(0, 1), ylim=(0, 1))
        curve.legend(loc="upper left")
        curve.text(0.97, 0.05, f"ECE = {ece:.3f}", ha="right")
        curve.grid(True)
        histogram.bar(edges[:-1], count / count.sum(), np.diff(edges), align="edge", color=BLUE, edgecolor="white")
        histogram.set(xlabel="Confidence", ylabel="Samples")
        histogram.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        histogram.yaxis.set_major_locator(MaxNLocator(3))
        histogram.grid(True, axis="y")


def _save_tsne(path: Path, title: str, labels: np.ndarray, places: np.ndarray, class_names: Sequence[str]) -> None:
    with new_figure(path, 5.4, 4.2, title) as figure:
        draw_tsne(figure.add_subplot(), labels, places)
        expression_legend(figure, labels, class_names)


def draw_tsne(axes: Axes, labels: np.ndarray, places: np.ndarray) -> None:
    """Draws each sample, label (M,), at its place (M, 2), in the colour of its class."""
    # In the given (random) order: class by class, the last class would hide the others.
    axes.scatter(*places.T, c=[COLORS[label % len(COLORS)] for label in labels], s=9, linewidths=0)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)


def expression_legend(figure: Figure, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Adds a legend of the classes that occur in ``labels``, at the right of the figure."""
    dots = [
        Line2D([], [], color=COLORS[code % len(COLORS)], marker="o", markersize=5, linestyle="", label=name)
        for code, name in enumerate(class_names)
        if (labels == code).any()
    ]
    figure.legend(handles=dots, loc="outside right center", handletextpad=0.2)


@contextlib.contextmanager
def new_figure(target: str | Path | io.BytesIO, width: float, height: float, title: str = "") -> Iterator[Figure]:
    """Yields an empty figure and writes it to ``target`` as a PNG.

    Args:
        target: a path or a buffer.
        width: inches.
        height: inches, without the title.
        title: above the figure; a long line is broken.
    """
    with matplotlib.rc_context(_STYLE):
        # A title that is wider than the figure would be cut at both ends.
        lines = [part for line in title.split("\n") for part in textwrap.wrap(printable(line), int(width / _CHARACTER))]
        figure = Figure(figsize=(width, height + (0.15 + 0.15 * len(lines)) * bool(lines)), layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines))
        canvas = FigureCanvasAgg(figure)
        yield figure
        if isinstance(target, io.BytesIO):
            canvas.print_png(target)
            return
        with whole_file(target) as temporary:
            canvas.print_png(temporary)
