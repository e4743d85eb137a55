"""Measures of groups of images (such as age or sex), the largest gap between groups, and a test of it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

import metrics
import plots
from data_helper import PreparedSplit
from measuring.study import Measured
from reading.group_table import read_groups
from reading.text import aligned, printable

FILES = ("groups.png",)
LEAST_IMAGES = 30  # of a group that is compared; below it, intervals of the bootstrap are not to be trusted
_RESAMPLES = 2_000
_EXCHANGES = 10_000
_BLOCK = 500  # exchanges whose counts are in memory at a time
_MEASURES = ("accuracy", "mean_class_recall", "macro_f1")
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Groups:
    """Measures every group of a split's images: a study of `evaluation.evaluate`.

    Attributes:
        file: name of the table, for the report.
        names: the groups, sorted.
        rows: int64 (M,), the images that have a group.
        codes: int64 (M,), their group's place in ``names``.
        labels: int64 (M,), their labels.
        class_names: C names.
        num_images: of the split.
        seed: of the bootstrap intervals and of the test.
    """

    file: str
    names: tuple[str, ...]
    rows: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    num_images: int
    seed: int = 0

    def __call__(self, all_images: Measured) -> dict[str, dict[str, Any]]:
        """Measures the groups and draws ``groups.png``.

        Returns:
            The entry ``groups`` of the result: what `measured` returns, and ``file``, ``n``, the images that have a
            group, and ``without``, those that have none.
        """
        predicted = all_images.probabilities.argmax(axis=1)[self.rows]
        entry = measured(self.labels, predicted, self.codes, self.names, self.class_names, self.seed)
        save_figure(all_images.folder / "groups.png", all_images.title, entry)
        head = {"file": self.file, "n": len(self.rows), "without": self.num_images - len(self.rows)}
        return {"groups": {**head, **entry}}


def open_groups(path: str | Path, split: PreparedSplit, seed: int = 0) -> Groups:
    """The groups of a split's images, from a table (`group_table.read_groups`).

    Raises:
        UserError: see `group_table.read_groups`.
    """
    found = read_groups(path, len(split), split.name)
    names = tuple(sorted(set(found.values())))
    rows = np.fromiter(found, np.int64)
    codes = np.array([names.index(group) for group in found.values()], np.int64)
    labels = np.asarray(split.labels[rows], np.int64)
    return Groups(Path(path).name, names, rows, codes, labels, split.class_names, len(split), seed)


def measured(
    labels: np.ndarray,
    predicted: np.ndarray,
    codes: np.ndarray,
    names: tuple[str, ...],
    class_names: tuple[str, ...],
    seed: int = 0,
    exchanges: int = _EXCHANGES,
) -> dict[str, Any]:
    """The measures of every group, and the largest gap between two groups with its interval and test.

    Args:
        labels: int (M,), true codes.
        predicted: int (M,), predicted codes.
        codes: int (M,), each image's place in ``names``; every group has an image.
        names: G groups.
        class_names: C names.
        seed: of the resamples and exchanges.
        exchanges: R, random exchanges of the group labels per test.

    Returns:
        JSON-ready. ``by_group``, for each group: ``n``, ``accuracy``, ``mean_class_recall``, ``macro_f1`` (all as
        `metrics.score`), ``intervals`` (their 95% bootstrap intervals), ``absent``, the classes without an image in it,
        and ``compared``, whether it has `LEAST_IMAGES` images. ``all``, the same of all M images. ``largest_gaps``,
        for each measure: ``higher`` and ``lower``, the groups that are compared and have the largest and the smallest
        value; ``gap``, their difference, and ``interval`` (`simultaneous_interval`); ``p`` and ``p_within_classes``
        (`exchange_test`). None where fewer than two groups are compared. ``exchanges`` and ``least_images``. All shares
        are 0..1.
    """
    confusion = _counts(labels, predicted, codes, len(names), len(class_names))
    values = metrics.measures_of_counts(confusion)
    # A sequence of its own for each group: the groups' resamples are independent.
    resampled = [metrics.resampled_measures(each, [seed, code], _RESAMPLES) for code, each in enumerate(confusion)]
    by_group = {
        name: _described(counts, drawn, class_names)
        for name, counts, drawn in zip(names, confusion, resampled, strict=True)
    }
    together = confusion.sum(axis=0)
    in_all = _described(together, metrics.resampled_measures(together, seed, _RESAMPLES), class_names)
    compared = [code for code, name in enumerate(names) if by_group[name]["compared"]]
    gaps = None
    if len(compared) > 1:
        draws = {measure: np.stack([resampled[code][measure] for code in compared], axis=1) for measure in _MEASURES}
        found = {measure: values[measure][compared] for measure in _MEASURES}
        inside = np.isin(codes, compared)
        places = np.searchsorted(compared, codes[inside])
        ps = [
            exchange_test(labels[inside], predicted[inside], places, len(class_names), within, seed, exchanges)
            for within in (False, True)
        ]
        gaps = {m: _largest_gap(found[m], draws[m], [names[code] for code in compared]) for m in _MEASURES}
        for measure, gap in gaps.items():
            gap |= {"p": ps[0][measure], "p_within_classes": ps[1][measure]}
    return {
        "all": in_all,
        "by_group": by_group,
        "largest_gaps": gaps,
        "exchanges": exchanges,
        "least_images": LEAST_IMAGES,
    }


def _described(counts: np.ndarray, drawn: Mapping[str, np.ndarray], class_names: tuple[str, ...]) -> dict[str, Any]:
    """The measures of one group: from its counts (C, C), and those of its resamples."""
    support = counts.sum(axis=1)
    return {
        "n": int(support.sum()),
        **{measure: float(value) for measure, value in metrics.measures_of_counts(counts).items()},
        "intervals": {measure: np.percentile(values, [2.5, 97.5]).tolist() for measure, values in drawn.items()},
        "absent": [class_names[i] for i in np.flatnonzero(support == 0)],
        "compared": bool(support.sum() >= LEAST_IMAGES),
    }


def _counts(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, num_groups: int, num_classes: int):
    """Counts by group, true and predicted class, int64 (G, C, C)."""
    cells = (codes * num_classes + labels) * num_classes + predicted
    return np.bincount(cells, minlength=num_groups * num_classes**2).reshape(num_groups, num_classes, num_classes)


def _largest_gap(values: np.ndarray, draws: np.ndarray, names: list[str]) -> dict[str, Any]:
    high, low = int(values.argmax()), int(values.argmin())
    interval = simultaneous_interval(values, draws, high, low)
    return {
        "higher": names[high],
        "lower": names[low],
        "gap": float(values[high] - values[low]),
        "interval": list(interval),
    }


def simultaneous_interval(values: np.ndarray, draws: np.ndarray, high: int, low: int) -> tuple[float, float]:
    """95% interval of the difference of two groups that holds for all pairs of groups at once.

    The two groups were chosen because they differ most, and an interval for two given groups would be too narrow. So
    the difference ``d_ij`` of every pair gets ``d_ij -+ q s_ij``, where ``s_ij^2 = s_i^2 + s_j^2`` are variances of the
    bootstrap and q is the 95% quantile, over the resamples r, of ``max_ij |(d*_ij)_r - mean(d*_ij)| / s_ij`` (the
    bootstrap form of Tukey's intervals: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, chapter
    5; Westfall and Young, "Resampling-Based Multiple Testing", 1993).

    Args:
        values: float (G,), the measure of each group.
        draws: float (R, G), the measure in resamples of the group's images, independent between groups.
        high: place of the first group.
        low: place of the second group.

    Returns:
        Low and high end, at most -1..1.
    """
    deviations = draws - draws.mean(axis=0)
    variances = deviations.var(axis=0)
    first, second = np.triu_indices(len(values), 1)
    largest = np.zeros(len(draws))
    for i, j in zip(first, second, strict=True):  # one pair at a time: all would be R times G (G - 1) / 2 numbers
        spread = np.sqrt(variances[i] + variances[j])
        if spread > _ROUNDING:  # two groups without an error do not vary
            np.maximum(largest, np.abs(deviations[:, i] - deviations[:, j]) / spread, out=largest)
    half = float(np.percentile(largest, 95) * np.sqrt(variances[high] + variances[low]))
    difference = float(values[high] - values[low])
    return max(-1.0, difference - half), min(1.0, difference + half)


def exchange_test(
    labels: np.ndarray,
    predicted: np.ndarray,
    codes: np.ndarray,
    num_classes: int,
    within_classes: bool = False,
    seed: int = 0,
    exchanges: int = _EXCHANGES,
) -> dict[str, float]:
    """Permutation test of the largest gap between groups, for each measure.

    If the group had no influence, the images' groups could be exchanged at random. p is
    ``(1 + #{gap* >= gap}) / (1 + R)`` over R random exchanges (Davison and Hinkley 1997, section 4.3), where gap and
    gap* are the largest minus the smallest value of all groups: so p counts for all pairs together.

    Args:
        labels: int (M,), true codes.
        predicted: int (M,), predicted codes.
        codes: int (M,), groups 0..G-1, each with an image.
        num_classes: C.
        within_classes: exchange only among images of the same true class. Groups with other shares of easy and hard
            classes then do not differ for that reason.
        seed: of the exchanges.
        exchanges: R.

    Returns:
        Name of the measure -> p, in 0..1.
    """
    num_groups = int(codes.max()) + 1
    order = np.argsort(labels, kind="stable")
    labels, predicted, codes = labels[order], predicted[order], codes[order]
    ends = np.flatnonzero(np.diff(labels)) + 1 if within_classes else []
    exchanged = codes.copy()
    parts = np.split(exchanged, ends)  # views
    found = _gaps(_counts(labels, predicted, codes, num_groups, num_classes)[None])
    rng = np.random.default_rng(seed)
    reached = dict.fromkeys(_MEASURES, 0)
    for start in range(0, exchanges, _BLOCK):
        drawn = []
        for _ in range(min(_BLOCK, exchanges - start)):
            for part in parts:
                rng.shuffle(part)
            drawn.append(_counts(labels, predicted, exchanged, num_groups, num_classes))
        for measure, gaps in _gaps(np.stack(drawn)).items():
            reached[measure] += int(np.sum(gaps >= found[measure] - _ROUNDING))
    return {measure: (1 + count) / (1 + exchanges) for measure, count in reached.items()}


def _gaps(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The largest gap between groups in each of R tables of counts (R, G, C, C), by measure."""
    return {name: np.ptp(values, axis=-1) for name, values in metrics.measures_of_counts(confusion).items()}


# --- the report


def lines(result: Mapping[str, Any]) -> list[str]:
    """The tables of a result with ``groups`` as plain text; no line for another result."""
    entry = result.get("groups")
    if not entry:
        return []
    groups = entry["by_group"]
    head = f"groups of {printable(entry['file'])}: {entry['n']:,} of {entry['n'] + entry['without']:,} images have one"
    rows = [["group", "n", *(f"{metrics.MEASURES[measure].title}, %" for measure in _MEASURES)]]
    for name, group in (*groups.items(), ("all", entry["all"])):
        rows.append([name, f"{group['n']:,}", *(_percents(group, measure) for measure in _MEASURES)])
    table = [head, "", *aligned(rows), "In brackets: 95% intervals."]
    return [*table, "", *_gap_lines(entry), *_notes(entry)]


def _percents(group: Mapping[str, Any], measure: str) -> str:
    low, high = group["intervals"][measure]
    return f"{100 * group[measure]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _gap_lines(entry: Mapping[str, Any]) -> list[str]:
    gaps = entry["largest_gaps"]
    if gaps is None:
        return [f"There is no gap to test: fewer than two groups have {entry['least_images']} images."]
    pairs = {measure: f"{gap['higher']} over {gap['lower']}" for measure, gap in gaps.items()}
    width = max(map(len, pairs.values()))
    table = [f"{'largest gap':<17}  {'':<{width}}  points     95% interval       p  within"]
    for measure, gap in gaps.items():
        low, high = (100 * end for end in gap["interval"])
        table.append(
            f"{metrics.MEASURES[measure].title:<17}  {pairs[measure]:<{width}}  {100 * gap['gap']:6.2f}  "
            f"{f'{low:.2f} to {high:.2f}':>15}  {gap['p']:.4f}  {gap['p_within_classes']:.4f}"
        )
    return [
        *table,
        "The interval holds for all pairs of groups at once.",
        f"p: the share of {entry['exchanges']:,} random exchanges of the groups' labels whose largest gap",
        "is at least as large; within: images of the same true expression are exchanged.",
    ]


def _notes(entry: Mapping[str, Any]) -> list[str]:
    groups = entry["by_group"]
    notes = []
    small = [f"{name} ({group['n']})" for name, group in groups.items() if not group["compared"]]
    if small:
        notes.append(f"Fewer than {entry['least_images']} images, so in no gap: {', '.join(small)}.")
    absent = [f"{name} ({', '.join(group['absent'])})" for name, group in groups.items() if group["absent"]]
    if absent:
        notes.append(f"Classes without an image, left out of that group's means: {'; '.join(absent)}.")
    return notes


def save_figure(path: str | Path, title: str, entry: Mapping[str, Any]) -> None:
    """Draws each measure of every group with its interval; groups that are not compared are gray.

    Args:
        path: the PNG to write.
        title: above the figure.
        entry: what `measured` returned.
    """
    groups = entry["by_group"]
    everyone = f"all {entry['all']['n']:,} images with a group"  # the title's n may be larger
    with plots.new_figure(path, 7.6, 1.0 + 0.3 * len(groups), title) as figure:
        panels = figure.subplots(1, len(_MEASURES), sharey=True)
        for axes, measure in zip(panels, _MEASURES, strict=True):
            axes.axvline(entry["all"][measure], color=plots.ORANGE, linewidth=1.2, label=everyone)
            for place, group in enumerate(groups.values()):
                color = plots.BLUE if group["compared"] else plots.GRAY
                axes.plot(group["intervals"][measure], [place, place], color=color, linewidth=1.6, alpha=0.6)
                axes.plot([group[measure]], [place], color=color, marker="o", markersize=5, linestyle="")
            axes.set_title(metrics.MEASURES[measure].title.capitalize().replace("f1", "F1"))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.grid(True, axis="x")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        names = [f"{textwrap.fill(name, 28)}\nn = {group['n']:,}" for name, group in groups.items()]
        panels[0].set_yticks(range(len(groups)), names)
        panels[0].set_ylim(len(groups) - 0.5, -0.5)
        handles = [
            *panels[0].get_legend_handles_labels()[0],
            Line2D([], [], color=plots.BLUE, marker="o", markersize=5, label="group, 95% interval"),
        ]
        if any(not group["compared"] for group in groups.values()):
            label = f"fewer than {entry['least_images']} images"
            handles.append(Line2D([], [], color=plots.GRAY, marker="o", markersize=5, label=label))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
