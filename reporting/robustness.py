"""Accuracy under thirteen corruptions of the images, beside the accuracy on the images as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import metrics
import plots
from data_helper import PreparedSplit
from files import whole_file
from images import read_image
from measuring.corruptions import CORRUPTIONS, CorruptedRows, corrupt
from measuring.study import Measured
from reporting.statistics import bootstrap_interval, paired_bootstrap

FILES = ("corruptions.png", "corruptions.npz")
NONE = "none"
# The example's face in the figure: data sets forbid that their images are passed on, and this one is free.
_EXAMPLE = Path(__file__).parents[1] / "examples" / "astronaut.png"
_FACE = slice(64, 169), slice(172, 277)  # rows and columns
_PANEL = 96  # pixels, side of a face in the figure
_INCHES = 0.42  # height of a row of the figure


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Measures a network under every one of `corruptions.CORRUPTIONS`: a study of `evaluation.evaluate`.

    Attributes:
        split: the images and their labels.
        seed: of the corruptions and of the bootstrap intervals.
    """

    split: PreparedSplit
    seed: int = 0

    def __call__(self, clean: Measured) -> dict[str, dict[str, Any]]:
        """Measures, draws ``corruptions.png`` and writes ``corruptions.npz``.

        ``corruptions.npz`` holds ``names`` (K,) and ``predicted``, int64 (K, N).

        Returns:
            The entry ``corruptions`` of the result: what `measured` returns.
        """
        found = {}
        for name in tqdm(CORRUPTIONS, desc="corruptions", disable=None):
            found[name] = clean.predict(CorruptedRows(self.split.rows, name, self.seed))
        entry = measured(self.split.labels, clean.probabilities, found, self.split.class_names, self.seed)
        with whole_file(clean.folder / "corruptions.npz") as temporary:
            predicted = np.stack([each.argmax(axis=1) for each in found.values()])
            np.savez_compressed(temporary, names=np.array(list(found)), predicted=predicted)
        height, width, channels = self.split.images.shape[1:]
        face = example_face(height, width, channels)
        save_figure(clean.folder / "corruptions.png", clean.title, clean.scores, entry, face, self.seed)
        return {"corruptions": entry}


def measured(
    labels: np.ndarray,
    clean: np.ndarray,
    corrupted: Mapping[str, np.ndarray],
    class_names: tuple[str, ...],
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the predictions for corrupted images with those for the same images as they are.

    Args:
        labels: int (N,).
        clean: float (N, C), probabilities for the images as they are.
        corrupted: name of `corruptions.CORRUPTIONS` to probabilities float (N, C).
        class_names: C names.
        seed: of the bootstrap intervals.

    Returns:
        JSON-ready. ``by_name``, for each corruption: ``title``, ``accuracy``, ``interval`` (95% bootstrap over the
        images, as `metrics.score`), ``mean_class_recall``, ``macro_f1``, and ``drop``, the clean accuracy minus this
        one, with its paired ``drop_interval`` (`statistics.paired_bootstrap`). ``mean``: ``accuracy``, the mean over
        the corruptions, its ``interval``, ``drop`` and ``drop_interval``, where a resample of the images is the same
        for all corruptions. ``seed``. All shares are 0..1.
    """
    right = {name: probabilities.argmax(axis=1) == labels for name, probabilities in corrupted.items()}
    clean_right = (clean.argmax(axis=1) == labels)[None]
    by_name = {}
    for name, probabilities in corrupted.items():
        scores = metrics.score(labels, probabilities, class_names, seed)
        by_name[name] = {
            "title": CORRUPTIONS[name].title,
            **{measure: scores[measure] for measure in ("accuracy", "mean_class_recall", "macro_f1")},
            "interval": scores["intervals"]["accuracy"],
            **_drop(clean_right, right[name][None], seed),
        }
    together = np.stack(list(right.values()))  # (K, N)
    mean = {
        "accuracy": float(together.mean()),
        "interval": list(bootstrap_interval(together, seed)),
        **_drop(clean_right, together, seed),
    }
    return {"seed": seed, "mean": mean, "by_name": by_name}


def _drop(clean: np.ndarray, corrupted: np.ndarray, seed: int) -> dict[str, Any]:
    found = paired_bootstrap(clean, corrupted, seed)
    return {"drop": found.difference, "drop_interval": [found.low, found.high]}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The table of a result with ``corruptions`` as plain text; no line for another result."""
    entry = result.get("corruptions")
    if not entry:
        return []
    rows = [
        (NONE, result["accuracy"], result["intervals"]["accuracy"], None),
        *((each["title"], each["accuracy"], each["interval"], each) for each in entry["by_name"].values()),
        (_mean_title(entry), entry["mean"]["accuracy"], entry["mean"]["interval"], entry["mean"]),
    ]
    width = max(len(title) for title, *_ in rows)
    table = [f"{'corruption':<{width}}  accuracy     95% interval      drop     95% interval"]
    for title, accuracy, (low, high), drop in rows:
        text = f"{title:<{width}}  {accuracy:8.2%}  {f'{low:.2%} to {high:.2%}':>16}"
        if drop:
            low, high = (100 * end for end in drop["drop_interval"])
            text += f"  {100 * drop['drop']:6.2f}  {f'{low:.2f} to {high:.2f}':>15}"
        table.append(text)
    drops = "The drop is in points; its interval is paired: the same images with and without the corruption."
    return [*table, drops, f"The corruptions are drawn with seed {entry['seed']}."]


def _mean_title(entry: Mapping[str, Any]) -> str:
    return f"mean of the {len(entry['by_name'])}"


# --- the figure


def example_face(height: int, width: int, channels: int) -> np.ndarray:
    """The face of the project's example image, uint8 (height, width, channels), channels 1 (gray) or 3 (RGB)."""
    face = read_image(_EXAMPLE)[_FACE]
    face = cv2.resize(face, (width, height), interpolation=cv2.INTER_AREA)
    return face if channels == 3 else cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[..., None]


def save_figure(
    path: str | Path, title: str, scores: Mapping[str, Any], entry: Mapping[str, Any], face: np.ndarray, seed: int = 0
) -> None:
    """Draws the accuracy under each corruption, the highest on top, beside a face under the same corruption.

    Args:
        path: the PNG to write.
        title: above the figure.
        scores: `metrics.score` of the images as they are.
        entry: what `measured` returned.
        face: uint8 (H, W, C), the example.
        seed: of the corruption of the example.
    """
    names = sorted(entry["by_name"], key=lambda name: -entry["by_name"][name]["accuracy"])
    faces = [face, *(corrupt(face, name, seed) for name in names)]
    shown = [(NONE, scores["accuracy"], scores["intervals"]["accuracy"])]
    shown += [(each["title"], each["accuracy"], each["interval"]) for each in map(entry["by_name"].get, names)]
    with plots.new_figure(path, 6.6, 0.9 + _INCHES * len(shown), title) as figure:
        strip, bars = figure.subplots(1, 2, sharey=True, width_ratios=(1, 11))
        _draw_faces(strip, faces)
        _draw_bars(bars, shown)
        strip.set_yticks(range(len(shown)), [name for name, *_ in shown])
        bars.axvline(scores["accuracy"], color=plots.BLUE, linewidth=1, linestyle="--", label="images as they are")
        mean = f"{_mean_title(entry)} corruptions, {entry['mean']['accuracy']:.1%}"
        bars.axvline(entry["mean"]["accuracy"], color=plots.ORANGE, linewidth=1.5, label=mean)
        figure.legend(loc="outside lower center", ncols=2)


def _draw_faces(axes: Any, faces: list[np.ndarray]) -> None:
    """The faces below each other, the first at height 0, each one high."""
    panels = [cv2.resize(face, (_PANEL, _PANEL), interpolation=cv2.INTER_NEAREST) for face in faces]
    panels = [np.broadcast_to(panel.reshape(_PANEL, _PANEL, -1), (_PANEL, _PANEL, 3)) for panel in panels]
    framed = [np.pad(panel, ((3, 3), (0, 0), (0, 0)), constant_values=255) for panel in panels]
    axes.imshow(np.concatenate(framed), extent=(0, 1, len(faces) - 0.5, -0.5), aspect="auto")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_bars(axes: Any, shown: list[tuple[str, float, list[float]]]) -> None:
    places = np.arange(len(shown))
    values = np.array([value for _, value, _ in shown])
    ends = np.array([interval for *_, interval in shown])
    colors = [plots.BLUE, *[plots.PALE] * (len(shown) - 1)]
    axes.barh(places, values, height=0.62, color=colors)
    # Not |value - end|: a percentile interval may lie beside the value where a resample can only lose.
    axes.hlines(places, ends[:, 0], ends[:, 1], color="black", linewidth=1.2)
    for place, value in zip(places, values, strict=True):  # at the base, where no line crosses them
        axes.text(0.01, place, f"{value:.1%}", va="center", color="black" if place else "white")
    axes.set_xlim(0, min(1, ends.max() + 0.03))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("Accuracy, with its 95% interval over the images")
