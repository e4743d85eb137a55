"""Measures several networks on several data sets: trained on one, tested on another, over the classes they share."""

from __future__ import annotations

import dataclasses
import hashlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

import datasets
import metrics
import plots
from data_helper import PreparedSplit
from files import UserError, write_json, write_text
from measuring.views import VIEW_TITLES, Views
from reading.text import csv_cell, printable

JSON, CSV, FIGURE = "matrix.json", "matrix.csv", "matrix.png"
_MEASURES = ("accuracy", "mean_class_recall", "macro_f1")
_DRAWN = ("accuracy", "mean_class_recall")
_RUNS_FILE = "best"  # every run has a file of this name, so its folder is part of its name
_FRAME = {"fill": False, "edgecolor": plots.ORANGE, "linewidth": 1.8}


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the matrix.

    Attributes:
        weights: the model file, or ``hf://owner/repository/file``.
        sha256: of the file, 64 hexadecimal digits.
        class_names: names of its classes, in the order of its probabilities.
        trained_on: ``<dataset>/<split>``; None where the file does not say.
        selected_on: the split of that data set that selected its epoch; None where the file does not say.
        load: builds the network; returns a function of uint8 images (N, H, W, C) to probabilities float (N, C).
    """

    weights: str
    sha256: str
    class_names: tuple[str, ...]
    trained_on: str | None
    selected_on: str | None
    load: Callable[[], Callable[[Any], np.ndarray]]


def shared_classes(models: Sequence[Model], splits: Sequence[PreparedSplit]) -> tuple[str, ...]:
    """The classes that every model and every data set has, by name, in the order of the first data set.

    Raises:
        UserError: fewer than two.
    """
    sets = [*((model.weights, model.class_names) for model in models), *((s.name, s.class_names) for s in splits)]
    shared = tuple(name for name in splits[0].class_names if all(name in names for _, names in sets))
    if len(shared) < 2:
        listed = "; ".join(f"{name}: {', '.join(names)}" for name, names in sets)
        raise UserError(
            f"--weights, --dataset: expected two classes or more that all of them have, found "
            f"{', '.join(shared) or 'none'} ({listed}); leave one of them out"
        )
    return shared


def restricted(probabilities: np.ndarray, class_names: Sequence[str], shared: Sequence[str]) -> np.ndarray:
    """Probabilities of the shared classes, given that it is one of them: ``p_c / sum of p over the shared classes``.

    Args:
        probabilities: float (N, C).
        class_names: C names.
        shared: K of them.

    Returns:
        float64 (N, K), in the order of ``shared``; 1 / K each where the shared classes have no probability at all.
    """
    kept = np.asarray(probabilities, np.float64)[:, [class_names.index(name) for name in shared]]
    total = kept.sum(axis=1, keepdims=True)
    return np.where(total > 0, kept / np.where(total > 0, total, 1), 1 / len(shared))


def relabelled(split: PreparedSplit, shared: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split whose label is a shared class, int64 (M,), and their labels as places in ``shared``, (M,).

    Raises:
        UserError: no such image.
    """
    place = np.array([shared.index(name) if name in shared else -1 for name in split.class_names], np.int64)
    labels = place[split.labels]
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise UserError(f"{split.name}: expected images of {', '.join(shared)}, found none")
    return rows, labels[rows]


def measure(models: Sequence[Model], splits: Sequence[PreparedSplit], views: Views, seed: int = 0) -> dict[str, Any]:
    """Measures every model on every split, on the images of the classes that all of them share.

    A network sees every image of a split, and one network is in memory at a time.

    Args:
        models: the rows.
        splits: the columns, of different data sets.
        views: of the probabilities (`views.VIEWS`), for the report.
        seed: of the bootstrap intervals.

    Returns:
        JSON-ready. ``class_names``, the shared classes; ``models``, each with ``name`` (the end of its path that
        tells it apart), ``weights``, ``sha256``, ``class_names``, ``trained_on``; ``datasets``, each with ``name``,
        ``split``, ``class_names``, ``n``, the images that are measured, and ``left_out``, those of other classes;
        ``cells``, row by row, each with ``model`` and ``dataset`` (names), ``same_dataset`` (the model was trained on
        this data set), ``selected_here`` (this split selected its epoch), and all that `metrics.score` returns;
        ``views`` and ``seed``.

    Raises:
        UserError: fewer than two shared classes, or a data set without an image of them.
    """
    shared = shared_classes(models, splits)
    chosen = [relabelled(split, shared) for split in splits]
    names = short_names([model.weights for model in models])
    cells = []
    for name, model in zip(names, models, strict=True):
        predict = model.load()
        for split, (rows, labels) in zip(splits, chosen, strict=True):
            found = restricted(predict(split.rows)[rows], model.class_names, shared)
            dataset = split.meta["dataset"]
            is_same = str(model.trained_on).split("/")[0] == dataset
            cells.append(
                {
                    "model": name,
                    "dataset": dataset,
                    "same_dataset": is_same,
                    "selected_here": is_same and model.selected_on == split.meta["split"],
                    **metrics.score(labels, found, shared, seed),
                }
            )
    return {
        "class_names": list(shared),
        "models": [
            {
                "name": name,
                "weights": model.weights,
                "sha256": model.sha256,
                "class_names": list(model.class_names),
                "trained_on": model.trained_on,
            }
            for name, model in zip(names, models, strict=True)
        ],
        "datasets": [
            {
                "name": split.meta["dataset"],
                "split": split.meta["split"],
                "class_names": list(split.class_names),
                "n": len(rows),
                "left_out": len(split) - len(rows),
            }
            for split, (rows, _) in zip(splits, chosen, strict=True)
        ],
        "cells": cells,
        "views": views,
        "seed": seed,
    }


def short_names(weights: Sequence[str]) -> list[str]:
    """A name for each model file: its own, with as many folders as tell it apart from the others.

    >>> short_names(["a/x/best.weights.h5", "b/x/best.weights.h5", "b/other.h5"])
    ['a/x/best', 'b/x/best', 'other']
    """
    parts = [[*path.replace("hf://", "").replace("\\", "/").split("/")] for path in weights]
    for each in parts:
        each[-1] = each[-1].removesuffix(".h5").removesuffix(".weights")
    names = ["/".join(each[-2:]) if each[-1] == _RUNS_FILE else each[-1] for each in parts]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) if names.count(name) > 1 else name for p, name in zip(parts, names, strict=True)]
    # Two files of one folder may differ in their ending only.
    return [path if names.count(name) > 1 else name for path, name in zip(weights, names, strict=True)]


def default_folder(
    models: Sequence[Model], splits: Sequence[PreparedSplit], split: str, views: Views, seed: int
) -> Path:
    """The folder of a matrix: ``runs/matrix-<files>x<data sets>-<split>[-<views>]-<8 hex>``.

    The digits depend on the bytes of the model files and the splits, in their order, and on the seed.
    """
    content = " ".join([*(model.sha256 for model in models), *(each.digest for each in splits), str(seed)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    names = ["matrix", f"{len(models)}x{len(splits)}", split, *[views] * (views != "none"), digest]
    return Path("runs") / "-".join(names)


def write(result: Mapping[str, Any], folder: str | Path) -> None:
    """Writes ``matrix.png``, ``matrix.csv`` (one line per cell) and, as the last file, ``matrix.json``.

    Args:
        result: what `measure` returned, with more entries or without.
        folder: where they go.
    """
    folder = Path(folder)
    save_figure(folder / FIGURE, result)
    records = [{name: csv_cell(value) for name, value in record.items()} for record in _records(result)]
    write_text(folder / CSV, pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))
    write_json(folder / JSON, result)


def _records(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    models = {model["name"]: model for model in result["models"]}
    split_of = {each["name"]: each["split"] for each in result["datasets"]}
    for cell in result["cells"]:
        model = models[cell["model"]]
        record = {
            "weights": model["weights"],
            "trained_on": model["trained_on"],
            "dataset": cell["dataset"],
            "split": split_of[cell["dataset"]],
            "classes": len(result["class_names"]),
            "n": cell["n"],
            "same_dataset": cell["same_dataset"],
            "selected_here": cell["selected_here"],
        }
        for measure in _MEASURES:
            low, high = cell["intervals"][measure]
            record |= {measure: cell[measure], f"{measure}_low": low, f"{measure}_high": high}
        yield record | {"ece": cell["ece"]}


# --- for people


def format_table(result: Mapping[str, Any]) -> str:
    """One table per measure: a line per model, a column per data set, 95% intervals in brackets."""
    lines = [*_class_lines(result)]
    if result["views"] != "none":
        lines.append(f"Every probability is the mean over {VIEW_TITLES[result['views']]} (--views {result['views']}).")
    heads = [f"{each['name']}/{each['split']}, n = {each['n']:,}" for each in result["datasets"]]
    names = [f"{model['name']} ({model['trained_on'] or 'unknown'})" for model in result["models"]]
    rows = [result["cells"][start : start + len(heads)] for start in range(0, len(result["cells"]), len(heads))]
    first = max(map(len, (*names, "trained on")))
    for measure in _MEASURES:
        texts = [[_cell_text(cell, measure) for cell in row] for row in rows]
        columns = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
        lines += ["", f"{metrics.MEASURES[measure].title} in %, 95% interval"]
        for name, row in zip(("model (trained on)", *names), (heads, *texts), strict=True):
            cells = "".join(f"  {text:<{width}}" for text, width in zip(row, columns, strict=True))
            lines.append(f"{name:<{max(first, 18)}}{cells}".rstrip())
    if any(cell["selected_here"] for cell in result["cells"]):
        lines += ["", "* This split selected the model's epoch, so the estimate is too high."]
    return "\n".join(lines)


def _class_lines(result: Mapping[str, Any]) -> list[str]:
    """Which classes are measured, and what that leaves out."""
    shared = result["class_names"]
    lines = [f"{len(shared)} classes: {', '.join(shared)}"]
    for each in result["datasets"]:
        if others := [name for name in each["class_names"] if name not in shared]:
            lines.append(
                f"{each['name']}/{each['split']}: the {each['left_out']:,} images of {', '.join(others)} are left out, "
                "because not all models and data sets have them."
            )
    for model in result["models"]:
        if others := [name for name in model["class_names"] if name not in shared]:
            lines.append(
                f"{model['name']}: its probability of {', '.join(others)} is left out, and the others are divided by "
                "their sum."
            )
    return lines


def _cell_text(cell: Mapping[str, Any], measure: str) -> str:
    low, high = cell["intervals"][measure]
    return f"{100 * cell[measure]:.1f} ({100 * low:.1f} to {100 * high:.1f})" + "*" * cell["selected_here"]


def save_figure(path: str | Path, result: Mapping[str, Any]) -> None:
    """Draws accuracy and mean class recall as heat maps: a row per model, a column per data set.

    Args:
        path: the PNG to write.
        result: what `measure` returned.
    """
    models, columns = result["models"], result["datasets"]
    shape = len(models), len(columns)
    title = f"{len(result['class_names'])} classes" + f", views: {result['views']}" * (result["views"] != "none")
    width = 2.2 + len(_DRAWN) * max(2.0, 1.4 * len(columns))
    with plots.new_figure(path, width, 1.4 + 0.52 * len(models), title) as figure:
        panels = figure.subplots(1, len(_DRAWN), sharey=True)
        for axes, measure in zip(panels, _DRAWN, strict=True):
            values = np.array([cell[measure] for cell in result["cells"]]).reshape(shape)
            image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for place, cell in zip(np.ndindex(shape), result["cells"], strict=True):
                _draw_cell(axes, place, cell, measure)
            heads = [f"{datasets.title(each['name'])}\n{each['split']}, n = {each['n']:,}" for each in columns]
            axes.set_xticks(range(len(columns)), heads)
            axes.set_title(metrics.MEASURES[measure].title.capitalize())
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        rows = [f"{textwrap.fill(printable(model['name']), 28)}\ntrained on {_trained_on(model)}" for model in models]
        panels[0].set_yticks(range(len(models)), rows)
        bar = figure.colorbar(image, ax=panels, shrink=0.9, aspect=24, format=PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        if handles := _legend(result["cells"]):
            figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _trained_on(model: Mapping[str, Any]) -> str:
    return datasets.title(str(model["trained_on"]).split("/")[0]) if model["trained_on"] else "unknown data"


def _draw_cell(axes: Any, place: tuple[int, int], cell: Mapping[str, Any], measure: str) -> None:
    row, column = place
    low, high = cell["intervals"][measure]
    color = "white" if cell[measure] > 0.6 else "black"
    star = "*" * cell["selected_here"]
    axes.text(column, row - 0.1, f"{cell[measure]:.1%}{star}", color=color, ha="center", va="center")
    axes.text(column, row + 0.24, f"{low:.1%} to {high:.1%}", color=color, ha="center", va="center", fontsize=6.5)
    if cell["same_dataset"]:
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, **_FRAME))


def _legend(cells: Sequence[Mapping[str, Any]]) -> list[Any]:
    handles = []
    if any(cell["same_dataset"] for cell in cells):
        handles.append(Rectangle((0, 0), 1, 1, label="tested on the data set it was trained on", **_FRAME))
    if any(cell["selected_here"] for cell in cells):
        label = "this split selected the epoch"
        handles.append(Line2D([], [], color="black", marker="*", linestyle="", markersize=5, label=label))
    return handles
