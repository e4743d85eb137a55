"""Averages the maps of a split: one mean map per class, for the label and for each embedding vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

import explain
import plots

_PANEL = 96  # pixels, the longer side of a face in the figure
_GAP = 6  # pixels
_INCHES = 0.6  # of a panel: its pixels are the figure's own at 160 per inch
_TITLE = 4.8  # inches, room for the title where there are few panels
_MOST_VECTORS = 28


@dataclasses.dataclass(frozen=True)
class MeanMaps:
    """Mean faces and mean Grad-CAM maps by explained class.

    Attributes:
        counts: int64 (C,), images of each class; a class without images has zeros in the means.
        faces: float64 (C, H, W, 1 or 3), mean faces, 0..255.
        label_maps: float64 (C, h, w), means of `explain.Explanation.label_maps`, 0..1.
        vector_maps: float64 (C, k, h, w), means of `explain.Explanation.vector_maps`, 0..1.
        overlaps: float64 (N,), `explain.overlap` of each image; NaN where it has none, and for k = 1.
    """

    counts: np.ndarray
    faces: np.ndarray
    label_maps: np.ndarray
    vector_maps: np.ndarray
    overlaps: np.ndarray

    def mean_overlap(self, seed: int = 0, num_resamples: int = 1000) -> tuple[float, list[float]] | None:
        """The mean overlap over the images, and its 95% percentile bootstrap interval ``[low, high]``.

        The interval takes the network as given: it says nothing about another seed of the training.

        Args:
            seed: of the bootstrap.
            num_resamples: resamples of the images.

        Returns:
            None where no image has an overlap.
        """
        values = self.overlaps[~np.isnan(self.overlaps)]
        if not len(values):
            return None
        rng = np.random.default_rng(seed)
        # One resample at a time: all of them would be num_resamples times N numbers.
        resampled = [rng.choice(values, len(values)).mean() for _ in range(num_resamples)]
        return float(values.mean()), np.percentile(resampled, [2.5, 97.5]).tolist()

    def save_figure(self, path: str | Path, class_names: Sequence[str], title: str = "") -> None:
        """Draws one row per class that has images: mean face, mean label map, mean maps of the vectors.

        The strongest mean map of the figure has the full colour; all others are on its scale. The first 28 vectors
        are drawn.

        Args:
            path: the PNG to write.
            class_names: C names.
            title: above the figure.
        """
        codes = np.flatnonzero(self.counts)
        drawn = np.concatenate([self.label_maps[:, None], self.vector_maps[:, :_MOST_VECTORS]], axis=1)[codes]
        strongest = drawn.max() or 1
        height, width = self.faces.shape[1:3]
        side = _PANEL / max(height, width)
        size = max(1, round(width * side)), max(1, round(height * side))
        rows = [
            [face, *(explain.overlaid(face, cv2.resize(map_hw / strongest, size)) for map_hw in maps_hw)]
            for face, maps_hw in zip((_face(self.faces[code], size) for code in codes), drawn, strict=True)
        ]
        titles = ["Mean face", "Label", *(f"Vector {number}" for number in range(1, drawn.shape[1]))]
        names = [f"{class_names[code]}\nn = {self.counts[code]:,}" for code in codes]
        _draw(path, rows, names, titles, title)


def average(batches: Iterable[explain.Explanation], num_classes: int) -> MeanMaps:
    """Averages explanations by class; one batch is in memory at a time.

    Args:
        batches: one or more, with faces and maps of the same size (`explain.batches`).
        num_classes: C.
    """
    counts, sums, overlaps = np.zeros(num_classes, np.int64), None, []
    for batch in batches:
        maps = batch.vector_maps
        columns = (batch.images, batch.label_maps, maps)
        if sums is None:
            sums = [np.zeros((num_classes, *column.shape[1:])) for column in columns]
        for code in np.unique(batch.labels):
            rows = batch.labels == code
            counts[code] += rows.sum()
            for total, column in zip(sums, columns, strict=True):
                total[code] += column[rows].sum(axis=0, dtype=np.float64)
        overlaps.append(explain.overlap(maps) if maps.shape[1] > 1 else np.full(len(maps), np.nan))
    means = (total / np.maximum(counts, 1).reshape(-1, *[1] * (total.ndim - 1)) for total in sums)
    return MeanMaps(counts, *means, np.concatenate(overlaps))


def _face(mean: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mean face, stretched to the full range of gray: uint8 (H, W, 3) of the given width and height."""
    darkest, brightest = mean.min(), mean.max()
    face = ((mean - darkest) / max(brightest - darkest, 1) * 255).round().astype(np.uint8)
    face = cv2.resize(face, size, interpolation=cv2.INTER_AREA if size[0] < face.shape[1] else cv2.INTER_CUBIC)
    return np.broadcast_to(face.reshape(*face.shape[:2], -1), (*face.shape[:2], 3))


def _draw(path: str | Path, rows: list, names: list[str], titles: list[str], title: str) -> None:
    """Draws panels of one size in a table: one canvas, because the layout of hundreds of axes takes minutes."""
    height, width, _ = rows[0][0].shape
    step_y, step_x = height + _GAP, width + _GAP
    canvas = np.full((len(rows) * step_y - _GAP, len(titles) * step_x - _GAP, 3), 255, np.uint8)
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            canvas[row * step_y :, column * step_x :][:height, :width] = panel
    high, wide = (_INCHES / _PANEL * pixels for pixels in canvas.shape[:2])
    with plots.new_figure(path, max(_TITLE, 0.9 + wide), 0.5 + high, title) as figure:
        axes = figure.add_subplot()
        axes.imshow(canvas)
        axes.set_xticks(np.arange(len(titles)) * step_x + width / 2, titles)
        axes.set_yticks(np.arange(len(rows)) * step_y + height / 2, names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
        axes.spines[:].set_visible(False)
