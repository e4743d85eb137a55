"""The figures of a report: accuracy, confusion matrices, correlations, t-SNE and training curves of its rows."""

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

from plots import BLUE, COLORS, GRAY, ORANGE, PALE, curve_titles, draw_tsne, expression_legend, new_figure
from reporting.rows import AD_CORRE, Row
from reporting.statistics import bootstrap_interval, mean_and_std
from reporting.tables import Paper, measured_on, percent, seeds_text, why_empty

_OPTION_TITLES = {
    "num_embeddings": "k, embedding vectors per face",
    "embedding_size": "d, numbers per embedding vector",
}
# Options that a report never compares.
_NOT_A_CHOICE = {"dataset", "seed", "run_dir", "data_dir", "debug", "backend"}
# The total loss adds up other terms in each row, so it cannot be compared; the learning rate is no result.
_NOT_COMPARED = ("loss", "accuracy", "learning_rate")
_MOST_ROWS = 9  # with a panel of their own in one figure
_PANELS_PER_LINE = 3


class ReportFigure(NamedTuple):
    """A figure of a report, with its title and caption in the page."""

    path: Path
    title: str
    caption: str


def save_figures(folder: str | Path, rows: Sequence[Row]) -> list[ReportFigure]:
    """Draws every figure that the runs of one data set have the numbers for.

    Args:
        folder: where the PNG files go; their names begin with the name of the data set.
        rows: of one data set, the reference first.

    Returns:
        The figures in the order of reading; none where no run is finished.
    """
    figures = [draw(Path(folder), rows) for draw in _DRAWERS] if any(row.runs for row in rows) else []
    return [figure for figure in figures if figure]


def _path(folder: Path, rows: Sequence[Row], name: str) -> Path:
    return folder / f"{rows[0].dataset}-{name}.png"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The rows that get a panel: all with a finished run, or of many the first, Ad-Corre and the most accurate."""
    there = [row for row in rows if row.runs]
    if len(there) <= _MOST_ROWS:
        return there
    order = sorted(there, key=lambda row: -np.mean(row.values("accuracy")))
    kept = list(dict.fromkeys([id(there[0]), *(id(row) for row in there if row.name == AD_CORRE), *map(id, order)]))
    return [row for row in there if id(row) in kept[:_MOST_ROWS]]


def _left_out(rows: Sequence[Row], shown: Sequence[Row], why: str) -> str:
    """A sentence that names the rows without a panel, and why; empty where every row has one."""
    missing = {row.name: why_empty(row) for row in rows if not row.runs}
    others = [row for row in rows if row.runs and row not in shown]
    if len(shown) == _MOST_ROWS:
        why = f"only the first, {AD_CORRE} and the most accurate rows are shown, {_MOST_ROWS} in all"
    missing |= {row.name: why for row in others}
    return (
        f" Without a panel: {'; '.join(f'{name} ({reason})' for name, reason in missing.items())}." if missing else ""
    )


def _wrapped(text: str) -> str:
    """Long names on several lines, because they would overlap the next panel."""
    return textwrap.fill(text, 34)


def _seeds_note(row: Row) -> str:
    return "one seed" if len(row.runs) == 1 else f"mean of {len(row.runs)} seeds"


def _save_accuracy(folder: Path, rows: Sequence[Row]) -> ReportFigure:
    path = _path(folder, rows, "accuracy")
    with new_figure(path, 6.4, 0.9 + 0.36 * len(rows), measured_on(rows)) as figure:
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
            Line2D([], [], color=BLUE, marker="o", markersize=4.5, linestyle="", label="one seed"),
            Line2D([], [], color=ORANGE, marker="|", markersize=10, markeredgewidth=2.2, linestyle="", label="mean"),
            Line2D([], [], color=PALE, linewidth=6, solid_capstyle="round", label="95% interval over images"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    done = "; ".join(f"{row.name} {seeds_text(row)}" for row in rows)
    return ReportFigure(
        path, "Accuracy of every row", f"Seeds: {done}. The interval is the mean's, by bootstrap over the images."
    )


def _save_confusion(folder: Path, rows: Sequence[Row]) -> ReportFigure | None:
    """Confusion matrices of the rows and of the paper, in percent of the true class."""
    chosen = [row for row in _shown(rows) if row.values("confusion_matrix")]
    if not chosen:
        return None
    names = chosen[0].results[0]["class_names"]
    panels = []
    for row in chosen:
        shares = row.mean("confusion_matrix", scale=_row_percent)
        accuracy = np.mean(row.values("accuracy"))
        panels.append((f"{_wrapped(row.name)}\n{percent(accuracy)}%, {_seeds_note(row)}", shares, ".1f"))
    paper = Paper(rows)
    if paper.ad_corre and set(names) == set(paper.class_order):
        order = [paper.class_order.index(name) for name in names]
        shares = np.array(paper.ad_corre["confusion_percent"])[np.ix_(order, order)]
        panels.append((f"The paper's Ad-Corre\n{percent(paper.ad_corre['accuracy'])}%, as published", shares, "g"))
    path = _path(folder, rows, "confusion")
    with _matrix_figure(path, rows, panels, names, "Blues", (0, 100)) as (figure, panel_axes, image):
        for axes in panel_axes.flat[: len(panels)][-panel_axes.shape[1] :]:  # the lowest of each column
            axes.set_xlabel("Predicted expression")
        for axes in panel_axes[:, 0]:
            axes.set_ylabel("True expression")
        _color_bar(figure, image, panel_axes, "Share of the true class", PercentFormatter(decimals=0))
    source = f" The paper's numbers: {paper.ad_corre['source']}." if paper.ad_corre else ""
    caption = f"Percent of each true class, averaged over seeds, on {chosen[0].results[0]['split']}.{source}"
    caption += _left_out(rows, chosen, "no confusion matrix in its results")
    return ReportFigure(path, "Confusion matrices", caption)


def _row_percent(counts: np.ndarray) -> np.ndarray:
    """(C, C) counts in percent of their row; a row without images is absent (NaN)."""
    support = counts.sum(axis=1, keepdims=True)
    return np.where(support > 0, 100 * counts / np.maximum(support, 1), np.nan)


def _save_tsne(folder: Path, rows: Sequence[Row]) -> ReportFigure | None:
    """t-SNE of the embeddings of the rows, of the seed that most of them have."""
    there = [
        (row, {seed: run for seed, run in row.runs.items() if len(run.predictions["tsne_rows"])})
        for row in _shown(rows)
    ]
    seeds = sorted(seed for _, runs in there for seed in runs)
    if not seeds:
        return None
    seed = max(dict.fromkeys(seeds), key=seeds.count)  # the smallest of equals
    chosen = [(row, runs[seed]) for row, runs in there if seed in runs]
    path = _path(folder, rows, "tsne")
    count = len(chosen[0][1].predictions["tsne_rows"])
    columns, lines = _grid_of(len(chosen))
    with new_figure(path, 1.4 + 3.6 * columns, 3.8 * lines, f"{measured_on(rows)} ({count:,} shown)") as figure:
        panel_axes = figure.subplots(lines, columns, squeeze=False)
        seen = []
        for axes, (row, run) in zip(panel_axes.flat, chosen, strict=False):
            found = run.predictions
            seen.append(found["labels"][found["tsne_rows"]])
            draw_tsne(axes, seen[-1], found["tsne_places"])
            axes.set_title(f"{_wrapped(row.name)}, {percent(run.result['accuracy'])}%")
        for axes in panel_axes.flat[len(chosen) :]:
            axes.set_axis_off()
        expression_legend(figure, np.concatenate(seen), chosen[0][1].result["class_names"])
    caption = (
        f"t-SNE of all embeddings of {count:,} images, seed {seed}. Each panel has its own plane: compare which "
        "images are close together and which are apart, not the places."
    )
    caption += _left_out(rows, [row for row, _ in chosen], f"no t-SNE of seed {seed}")
    return ReportFigure(path, "Embeddings on a plane", caption)


def _grid_of(count: int) -> tuple[int, int]:
    """Columns and lines of so many panels."""
    columns = min(count, _PANELS_PER_LINE)
    return columns, math.ceil(count / columns)


def _save_correlations(folder: Path, rows: Sequence[Row]) -> ReportFigure | None:
    """Correlations of the classes' mean embeddings: of the first row untrained, then of the trained rows."""
    chosen = [row for row in _shown(rows) if row.mean("correlations", "class_means") is not None]
    if not chosen:
        return None
    untrained = (f"{chosen[0].name}, untrained", chosen[0].mean("correlations_untrained", "class_means"))
    trained = [(row.name, row.mean("correlations", "class_means")) for row in chosen]
    panels = [
        (f"{_wrapped(title)}\n{_off_diagonal(means)}", means, ".2f")
        for title, means in (untrained, *trained)
        if means is not None
    ]
    path = _path(folder, rows, "correlations")
    names = chosen[0].results[0]["class_names"]
    with _matrix_figure(path, rows, panels, names, "RdBu_r", (-1, 1)) as (figure, panel_axes, image):
        _color_bar(figure, image, panel_axes, "Pearson's correlation", None)
    caption = "Correlations between the mean embeddings of the classes, averaged over embeddings and seeds."
    caption += _left_out(rows, chosen, "no correlations in its results")
    return ReportFigure(path, "Class means before and after training", caption)


def _off_diagonal(matrix: np.ndarray) -> str:
    between = matrix[~np.eye(len(matrix), dtype=bool)]
    return "" if np.isnan(between).all() else f"mean off the diagonal {_number(np.nanmean(between), '.2f')}"


def _number(value: float, form: str) -> str:
    text = format(value, form)
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")


@contextlib.contextmanager
def _matrix_figure(
    path: Path,
    rows: Sequence[Row],
    panels: Sequence[tuple[str, np.ndarray, str]],
    names: Sequence[str],
    color_map: str,
    limits: tuple[float, float],
) -> Iterator[tuple[Figure, np.ndarray, AxesImage]]:
    """Draws (C, C) matrices, each with its title and number format, on one colour scale.

    Yields the figure, the axes (lines, columns) and the last image.
    """
    side = 0.42 * len(names)
    height = side + 0.75 + 0.17 * (1 + max(title.count("\n") for title, _, _ in panels))
    columns, lines = _grid_of(len(panels))
    with new_figure(path, 1.6 + (side + 0.15) * columns, height * lines, measured_on(rows)) as figure:
        panel_axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in panel_axes.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, values, form) in zip(panel_axes.flat, panels, strict=False):
            image = axes.imshow(values, cmap=color_map, vmin=limits[0], vmax=limits[1])
            for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
                red, green, blue, _ = image.cmap(image.norm(values[row, column]))
                ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                text = _number(values[row, column], form)
                cell = axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=6.5)
                cell.set_in_layout(False)  # it is inside the axes, and measuring all cells is slow
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
    bar = figure.colorbar(image, cax=panel_axes[0, -1].inset_axes([1.05, 0, 0.05, 1]), format=form)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _save_against(folder: Path, rows: Sequence[Row]) -> ReportFigure | None:
    """Accuracy against the one number in which the rows differ; None where they differ in anything else."""
    found = _varied(rows)
    if not found:
        return None
    title, values = found
    path = _path(folder, rows, "against-" + "-".join(re.findall(r"\w+", title.split(",")[0])))
    with new_figure(path, 4.8, 3.2, measured_on(rows)) as figure:
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
        # Above the bars, which would hide them.
        seed_style = {"color": ORANGE, "marker": "o", "markersize": 4, "linestyle": "", "zorder": 4}
        seed_style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        for value, row in points:
            accuracies = [result["accuracy"] for result in row.results]
            axes.plot([value] * len(accuracies), accuracies, **seed_style)
        axes.plot([], [], **seed_style, label="one seed")
        _number_axis(axes, sorted(values))
        axes.set(xlabel=title, ylabel="Accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2)
    missing = [row.name for row in rows if not row.runs]
    caption = "Every seed, and mean \u00b1 sample standard deviation."
    caption += f" Not run: {', '.join(missing)}." * bool(missing)
    return ReportFigure(path, f"Accuracy against {title}", caption)


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
    """One tick per value; logarithmic where the values span more than a factor of 12, and linear around 0."""
    smallest = min(value for value in values if value > 0) if max(values) > 0 else 0
    if min(values) >= 0 and smallest and max(values) / smallest > 12:
        if min(values) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _save_curves(folder: Path, rows: Sequence[Row]) -> ReportFigure | None:
    """Training and validation curves of the accuracy and of every term of the loss, one line per row."""
    there = [row for row in rows if any(run.history for run in row.runs.values())]
    if not there:
        return None
    titles = curve_titles(dict.fromkeys(name for row in there for run in row.runs.values() for name in run.history))
    titles = {"accuracy": "Accuracy"} | {name: titles[name] for name in titles if name not in _NOT_COMPARED}
    path = _path(folder, rows, "curves")
    width = 0.6 + 2.3 * len(titles)
    # Inches that the longest entry of the legend takes: its line, and about 0.08 per letter.
    columns = max(1, int(width / (0.6 + 0.08 * max(len(row.name) for row in there))))
    height = 4.1 + 0.2 * math.ceil(len(there) / columns)
    with new_figure(path, width, height, measured_on(rows)) as figure:
        grid = figure.subplots(2, len(titles), squeeze=False, sharex=True, sharey="col")
        for place, row in enumerate(rows):
            for column, name in enumerate(titles):
                _draw_curve(grid[0, column], row, name, _line_style(place))
                _draw_curve(grid[1, column], row, f"val_{name}", _line_style(place))
        for column, title in enumerate(titles.values()):
            grid[0, column].set_title(title)
            grid[1, column].set_xlabel("Epoch")
        for axes in grid.flat:
            axes.grid(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10], min_n_ticks=1))
        for axes, label in zip(grid[:, 0], ("Training", "Validation"), strict=True):
            axes.set_ylabel(label)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        handles = [Line2D([], [], **_line_style(i), label=row.name) for i, row in enumerate(rows) if row in there]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    caption = (
        "Mean over seeds, the band one sample standard deviation. A row without a term has no line in its panels. "
        "Training images are augmented and dropout is on, so the upper curves cannot be compared with the lower ones."
    )
    return ReportFigure(path, "Training curves", caption)


def _line_style(place: int) -> dict[str, Any]:
    """Colour and dashes of a row, different for 24 places."""
    return {"color": COLORS[place % len(COLORS)], "linestyle": ("-", "--", ":")[place // len(COLORS) % 3]}


def _draw_curve(axes: Axes, row: Row, name: str, style: dict[str, Any]) -> None:
    curves = [run.history[name] for run in row.runs.values() if name in run.history]
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
