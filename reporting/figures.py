"""Which pictures does a report hold? The paper's figures, each row beside the others and beside the paper's own."""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from grids.experiments import AD_CORRE
from plots import BLUE, COLORS, GRAY, ORANGE, PALE, TERM_TITLES, draw_tsne, expression_legend, new_figure
from reporting.rows import Row
from reporting.statistics import bootstrap_interval, mean_and_std
from reporting.tables import Paper, percent, seeds_text, why_empty

_OPTION_TITLES = {
    "num_embeddings": "k, embedding vectors a face",
    "embedding_size": "d, numbers in an embedding vector",
}
# Where a run lies, on what and with which luck: no row of one data set differs in these on purpose.
_NOT_A_CHOICE = {"dataset", "seed", "run_dir", "data_dir", "debug", "backend"}
# Not a term of the loss: the sum of other terms in each row, so that two rows' totals cannot be compared.
_NOT_A_TERM = {"epoch", "loss", "accuracy", "learning_rate", "seconds"}


class Picture(NamedTuple):
    """A figure of a report: its file and the words to it."""

    path: Path
    title: str
    caption: str


def save_figures(folder: str | Path, rows: Sequence[Row]) -> list[Picture]:
    """Draws what the runs of one data set allow.

    Args:
        folder: where the PNG files go, their names beginning with the data set's.
        rows: of one data set, the reference first.

    Returns:
        The pictures in the order of reading; none where nothing has run.
    """
    pictures = [draw(Path(folder), rows) for draw in _DRAWERS] if any(row.runs for row in rows) else []
    return [picture for picture in pictures if picture]


def _path(folder: Path, rows: Sequence[Row], name: str) -> Path:
    return folder / f"{rows[0].dataset}-{name}.png"


def _pair(rows: Sequence[Row]) -> list[Row]:
    """The first row and Ad-Corre (or the last row that has run), those of the two that have run."""
    there = [row for row in rows if row.runs]
    chosen = next((row for row in there if row.name == AD_CORRE), there[-1])
    return [rows[0]] * (rows[0] is not chosen and bool(rows[0].runs)) + [chosen]


def _wrapped(text: str) -> str:
    """Long names on several lines, or they would run into the next panel."""
    return textwrap.fill(text, 34)


def _seeds_words(row: Row) -> str:
    return "one seed" if len(row.runs) == 1 else f"mean of {len(row.runs)} seeds"


def _save_accuracy(folder: Path, rows: Sequence[Row]) -> Picture:
    path = _path(folder, rows, "accuracy")
    with new_figure(path, 6.4, 0.9 + 0.36 * len(rows)) as figure:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            if not row.runs:
                axes.text(0.02, place, why_empty(row), transform=axes.get_yaxis_transform(), color=GRAY, va="center")
                continue
            values = [result["accuracy"] for result in row.results]
            low, high = bootstrap_interval(row.correct(sorted(row.runs)))
            axes.plot([low, high], [place, place], color=PALE, linewidth=6, solid_capstyle="round", zorder=1)
            axes.plot([np.mean(values)] * 2, [place - 0.28, place + 0.28], color=ORANGE, linewidth=2.2, zorder=2)
            axes.plot(values, [place] * len(values), color=BLUE, marker="o", markersize=4.5, linestyle="", zorder=3)
        axes.set_yticks(range(len(rows)), [_wrapped(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.grid(True, axis="x")
        axes.set_xlabel("Accuracy")
        handles = [
            Line2D([], [], color=BLUE, marker="o", markersize=4.5, linestyle="", label="a seed"),
            Line2D([], [], color=ORANGE, marker="|", markersize=10, markeredgewidth=2.2, linestyle="", label="mean"),
            Line2D([], [], color=PALE, linewidth=6, solid_capstyle="round", label="95% interval over images"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    done = "; ".join(f"{row.name} {seeds_text(row)}" for row in rows)
    return Picture(
        path, "Accuracy of every row", f"Seeds: {done}. The interval is the mean's, by bootstrap over the images."
    )


def _save_confusion(folder: Path, rows: Sequence[Row]) -> Picture:
    """Confusion matrices of the first row, of Ad-Corre and of the paper, in percent of the true class."""
    chosen = _pair(rows)
    names = chosen[0].results[0]["class_names"]
    panels = []
    for row in chosen:
        shares = row.mean(lambda result: _row_percent(result["confusion_matrix"]))
        accuracy = np.mean([result["accuracy"] for result in row.results])
        panels.append((f"{_wrapped(row.name)}\n{percent(accuracy)}%, {_seeds_words(row)}", shares, ".1f"))
    paper = Paper(rows)
    if paper.ad_corre and set(names) == set(paper.class_order):
        order = [paper.class_order.index(name) for name in names]
        shares = np.array(paper.ad_corre["confusion_percent"])[np.ix_(order, order)]
        panels.append((f"The paper's Ad-Corre\n{percent(paper.ad_corre['accuracy'])}%, as published", shares, "g"))
    path = _path(folder, rows, "confusion")
    with _matrix_figure(path, panels, names, "Blues", (0, 100)) as (figure, panel_axes, image):
        for axes in panel_axes:
            axes.set_xlabel("Predicted expression")
        panel_axes[0].set_ylabel("True expression")
        _color_bar(figure, image, panel_axes, "Share of the true class", PercentFormatter(decimals=0))
    source = f" The paper's numbers: {paper.ad_corre['source']}." if paper.ad_corre else ""
    words = f"Percent of each true class, averaged over seeds, on {chosen[0].results[0]['split']}.{source}"
    return Picture(path, "Confusion matrices", words)


def _row_percent(confusion: Sequence[Sequence[int]]) -> np.ndarray:
    """(C, C) counts in percent of their row; a row without images is absent (NaN)."""
    counts = np.array(confusion, np.float64)
    support = counts.sum(axis=1, keepdims=True)
    return np.where(support > 0, 100 * counts / np.maximum(support, 1), np.nan)


def _save_tsne(folder: Path, rows: Sequence[Row]) -> Picture | None:
    """t-SNE of the embeddings of the first row beside Ad-Corre's, of one seed that both have."""
    chosen = _pair(rows)
    shown = [{seed: run for seed, run in row.runs.items() if len(run.predictions["tsne_rows"])} for row in chosen]
    shared = set(shown[0]).intersection(*shown)
    if not shared:
        return None
    seed = min(shared)
    path = _path(folder, rows, "tsne")
    with new_figure(path, 1.4 + 3.6 * len(chosen), 3.8) as figure:
        panel_axes = figure.subplots(1, len(chosen), squeeze=False)[0]
        seen = []
        for axes, row, runs in zip(panel_axes, chosen, shown, strict=True):
            found = runs[seed].predictions
            seen.append(found["labels"][found["tsne_rows"]])
            draw_tsne(axes, seen[-1], found["tsne_places"])
            axes.set_title(f"{_wrapped(row.name)}, {percent(runs[seed].result['accuracy'])}%")
        expression_legend(figure, np.concatenate(seen), chosen[0].results[0]["class_names"])
    words = (
        f"t-SNE of all embeddings of {len(seen[0]):,} images, seed {seed}. Each picture has its own plane: only what "
        "lies together and what lies apart can be compared."
    )
    return Picture(path, "Embeddings on a plane", words)


def _save_correlations(folder: Path, rows: Sequence[Row]) -> Picture:
    """Correlations of the classes' mean embeddings: untrained, of the first row, of Ad-Corre."""
    chosen = _pair(rows)
    panels = []
    if all(result.get("correlations_untrained") for result in chosen[0].results):
        untrained = chosen[0].mean(lambda result: result["correlations_untrained"]["class_means"])
        panels.append((f"{_wrapped(chosen[0].name + ', untrained')}\n{_off_diagonal(untrained)}", untrained, ".2f"))
    for row in chosen:
        trained = row.mean(lambda result: result["correlations"]["class_means"])
        panels.append((f"{_wrapped(row.name)}\n{_off_diagonal(trained)}", trained, ".2f"))
    path = _path(folder, rows, "correlations")
    names = chosen[0].results[0]["class_names"]
    with _matrix_figure(path, panels, names, "RdBu_r", (-1, 1)) as (figure, panel_axes, image):
        _color_bar(figure, image, panel_axes, "Pearson's correlation", None)
    words = "Correlations between the mean embeddings of the classes, averaged over embeddings and seeds."
    return Picture(path, "Class means before and after training", words)


def _off_diagonal(matrix: np.ndarray) -> str:
    between = matrix[~np.eye(len(matrix), dtype=bool)]
    return "" if np.isnan(between).all() else f"mean off the diagonal {_number(np.nanmean(between), '.2f')}"


def _number(value: float, form: str) -> str:
    text = format(value, form)
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")


@contextlib.contextmanager
def _matrix_figure(
    path: Path,
    panels: Sequence[tuple[str, np.ndarray, str]],
    names: Sequence[str],
    color_map: str,
    limits: tuple[float, float],
) -> Iterator[tuple[Figure, np.ndarray, AxesImage]]:
    """Draws (C, C) matrices, each with its title and number format, side by side on one colour scale.

    Yields the figure, the axes and the last image.
    """
    side = 0.42 * len(names)
    height = side + 0.75 + 0.17 * (1 + max(title.count("\n") for title, _, _ in panels))
    with new_figure(path, 1.6 + (side + 0.15) * len(panels), height) as figure:
        panel_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, values, form) in zip(panel_axes, panels, strict=True):
            image = axes.imshow(values, cmap=color_map, vmin=limits[0], vmax=limits[1])
            for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
                red, green, blue, _ = image.cmap(image.norm(values[row, column]))
                ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                text = _number(values[row, column], form)
                cell = axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=6.5)
                cell.set_in_layout(False)  # inside anyway, and measuring them all is slow
            axes.set_title(title)
            codes = range(len(names))
            axes.set_xticks(codes, names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(codes, names)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        yield figure, panel_axes, image


def _color_bar(
    figure: Figure, image: AxesImage, panel_axes: np.ndarray, label: str, form: PercentFormatter | None
) -> None:
    bar = figure.colorbar(image, cax=panel_axes[-1].inset_axes([1.05, 0, 0.05, 1]), format=form)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _save_against(folder: Path, rows: Sequence[Row]) -> Picture | None:
    """Accuracy against the one number in which the rows differ; None where they differ in anything else."""
    found = _varied(rows)
    if not found:
        return None
    title, values = found
    path = _path(folder, rows, "against-" + "-".join(re.findall(r"\w+", title.split(",")[0])))
    with new_figure(path, 4.8, 3.2) as figure:
        axes = figure.add_subplot()
        points = sorted((value, row) for value, row in zip(values, rows, strict=True) if row.runs)
        spread = [mean_and_std([result["accuracy"] for result in row.results]) for _, row in points]
        axes.errorbar(
            [value for value, _ in points],
            [mean for mean, _ in spread],
            [std or 0 for _, std in spread],
            **{"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.4, "capsize": 5},
            label="mean \u00b1 standard deviation",
        )
        # On top of the bars, which would hide them.
        seed_style = {"color": ORANGE, "marker": "o", "markersize": 4, "linestyle": "", "zorder": 4}
        seed_style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        for value, row in points:
            accuracies = [result["accuracy"] for result in row.results]
            axes.plot([value] * len(accuracies), accuracies, **seed_style)
        axes.plot([], [], **seed_style, label="a seed")
        _number_axis(axes, sorted(values))
        axes.set(xlabel=title, ylabel="Accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(True)
        figure.legend(loc="outside upper center", ncols=2)
    missing = [row.name for row in rows if not row.runs]
    words = "Every seed, and mean \u00b1 sample standard deviation." + (
        f" Not run: {', '.join(missing)}." * bool(missing)
    )
    return Picture(path, f"Accuracy against {title}", words)


def _varied(rows: Sequence[Row]) -> tuple[str, list[float]] | None:
    """The title and each row's value of the one number in which the rows differ.

    Several options count as one where they are equal in every row, such as three weights that move together.
    """
    names = [name for name in rows[0].settings if name not in _NOT_A_CHOICE]
    columns = {name: [row.settings.get(name) for row in rows] for name in names}
    varied = {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
    if not varied or len(rows) < 3:
        return None
    values = next(iter(varied.values()))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) < len(rows) or any(other != values for other in varied.values()):
        return None
    return " = ".join(_OPTION_TITLES.get(name, "--" + name.replace("_", "-")) for name in varied), values


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    """A tick at every value; logarithmic where they span much, with a linear piece around 0."""
    smallest = min(value for value in values if value > 0) if max(values) > 0 else 0
    if min(values) >= 0 and smallest and max(values) / smallest > 12:
        if min(values) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _save_curves(folder: Path, rows: Sequence[Row]) -> Picture | None:
    """Training and validation curves of the accuracy and of every term of the loss, a line a row."""
    there = [row for row in rows if row.runs]
    found = {name: None for row in there for run in row.runs.values() for name in run.history}
    terms = [name for name in found if name not in _NOT_A_TERM and not name.startswith("val_")]
    panels = ["accuracy", *sorted(terms, key=lambda name: list(TERM_TITLES).index(name) if name in TERM_TITLES else 99)]
    path = _path(folder, rows, "curves")
    width = 0.6 + 2.3 * len(panels)
    # Inches that the longest entry of the legend takes: its line, and some 0.08 a letter.
    columns = max(1, int(width / (0.6 + 0.08 * max(len(row.name) for row in there))))
    with new_figure(path, width, 4.1 + 0.2 * math.ceil(len(there) / columns)) as figure:
        grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="col")
        for number, row in enumerate(rows):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[number // len(COLORS) % 3]}
            for column, name in enumerate(panels):
                for axes, key in ((grid[0, column], name), (grid[1, column], f"val_{name}")):
                    _draw_curve(axes, [run.history[key] for run in row.runs.values() if key in run.history], style)
        for column, name in enumerate(panels):
            grid[0, column].set_title(TERM_TITLES.get(name, name))
            grid[1, column].set_xlabel("Epoch")
        for axes in grid.flat:
            axes.grid(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10], min_n_ticks=1))
        for axes, label in zip(grid[:, 0], ("Training", "Validation"), strict=True):
            axes.set_ylabel(label)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        handles = [
            Line2D(
                [], [], color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3], label=row.name
            )
            for i, row in enumerate(rows)
            if row.runs
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    words = (
        "Mean over seeds, the band one sample standard deviation. A row without a term has no line there; training "
        "images are augmented and dropout is on, so that the upper curves are not comparable with the lower ones."
    )
    return Picture(path, "Training curves", words)


def _draw_curve(axes: Axes, curves: Sequence[np.ndarray], style: dict[str, Any]) -> None:
    if not curves:
        return
    length = min(map(len, curves))
    values = np.array([curve[:length] for curve in curves])  # (seeds, epochs)
    epochs = np.arange(1, length + 1)
    mean = values.mean(axis=0)
    axes.plot(epochs, mean, linewidth=1.4, marker="o" if length == 1 else None, markersize=3, **style)
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0)


_DRAWERS = (_save_accuracy, _save_against, _save_confusion, _save_correlations, _save_tsne, _save_curves)
