"""Lists labels that are likely wrong: CSV files, a grid of the images, a table by class and a second opinion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import datasets
from data_helper import PreparedSplit
from files import write_json
from labels.confident_learning import Suspects
from labels.second_labels import SecondLabels
from plots import new_figure
from reading.image_digests import image_digests
from reading.label_lists import write_list
from reading.text import aligned

LIST, CONTROL, GRID, SUMMARY = "suspects.csv", "control.csv", "suspects.png", "suspects.json"
_COLUMNS, _GRID_ROWS = 10, 6  # images in the figure
_MANY = 0.3  # share of suspects above which the networks are doubted, not the labels
_TOO_MANY = "so many suspects rather mean that the networks are not good enough: use better ones"


def write_report(
    folder: str | Path,
    split: PreparedSplit,
    probabilities: np.ndarray,
    found: Suspects,
    second: SecondLabels | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes ``suspects.csv``, ``control.csv``, ``suspects.png`` and, as the last file, ``suspects.json``.

    A line of the lists is an image: ``row`` in the split, ``image`` (its digest), ``label``, ``suggested`` class,
    ``score`` (the probability of the label less that of the suggestion), and the probability of each class. The control
    holds as many images of each class, drawn from those that are no suspects: a training without them shows what
    fewer images cost.

    Args:
        folder: where the files go.
        split: the images.
        probabilities: float (N, C).
        found: the suspects among them.
        second: other labels of the same images, which judge the suspects.
        seed: of the control.

    Returns:
        The content of ``suspects.json``: ``dataset``, ``split``, ``digest`` (of the split), ``n``, ``suspects``,
        ``accuracy`` (of the probabilities), ``class_names``, ``pairs`` (C lists of C counts: label, suggestion),
        ``class_counts``, ``seed`` and, with ``second``, ``also`` (`judge`).
    """
    folder = Path(folder)
    pairs = np.zeros((split.num_classes, split.num_classes), np.int64)
    np.add.at(pairs, (split.labels[found.rows], found.suggested), 1)
    _write_list(folder / LIST, split, probabilities, found.rows)
    _write_list(folder / CONTROL, split, probabilities, control_rows(split, found.rows, seed))
    title = f"{datasets.title(split.meta['dataset'])}, {split.meta['split']}: label, and what the networks see"
    save_grid(folder / GRID, f"{title} ({len(found.rows):,} suspects of {len(split):,})", split, probabilities, found)
    summary = {
        "dataset": split.meta["dataset"],
        "split": split.meta["split"],
        "digest": split.digest,
        "n": len(split),
        "suspects": len(found.rows),
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == split.labels)),
        "class_names": list(split.class_names),
        "pairs": pairs.tolist(),
        "class_counts": split.class_counts.tolist(),
        "seed": seed,
        **({"also": judge(split, found, second)} if second else {}),
    }
    write_json(folder / SUMMARY, summary)
    return summary


def control_rows(split: PreparedSplit, suspects: np.ndarray, seed: int) -> np.ndarray:
    """Rows that are no suspects, int64, increasing: of each class as many as suspects, or all where there are fewer."""
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(split)), suspects)
    wanted = np.bincount(split.labels[suspects], minlength=split.num_classes)
    drawn = []
    for code, count in enumerate(wanted):
        members = others[split.labels[others] == code]
        drawn.append(rng.choice(members, min(count, len(members)), replace=False))
    return np.sort(np.concatenate(drawn))


def judge(split: PreparedSplit, found: Suspects, second: SecondLabels) -> dict[str, Any]:
    """How often the second label of a suspect is not its label either.

    Returns:
        JSON-ready: ``dataset``; ``n``, the images with a second label, and ``differ``, the share of them whose second
        label is another one (the base rate); ``suspects``, those among them, ``suspects_differ`` (the precision) with
        its 95% interval of Wilson (1927), and ``suggested``, the share whose second label is the suggestion;
        ``found``, the share of the images with another second label that are suspects (the recall). A share of
        nothing is None.
    """
    usable = second.usable
    differ = usable & (second.labels != split.labels)
    judged = usable[found.rows]
    rows, suggested = found.rows[judged], found.suggested[judged]
    wrong = int(np.sum(differ[rows]))
    share = stats.binomtest(wrong, len(rows)).proportion_ci(method="wilson") if len(rows) else None
    return {
        "dataset": second.dataset,
        "n": int(usable.sum()),
        "differ": _ratio(differ.sum(), usable.sum()),
        "suspects": len(rows),
        "suspects_differ": _ratio(wrong, len(rows)),
        "suspects_differ_interval": [share.low, share.high] if share else None,
        "suggested": _ratio(np.sum(second.labels[rows] == suggested), len(rows)),
        "found": _ratio(wrong, differ.sum()),
    }


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _write_list(path: Path, split: PreparedSplit, probabilities: np.ndarray, rows: np.ndarray) -> None:
    names, each = np.array(split.class_names), np.arange(len(rows))
    labels, listed = split.labels[rows], probabilities[rows].astype(np.float64)
    others = np.where(np.eye(split.num_classes, dtype=bool)[labels], -1.0, listed)
    suggested = others.argmax(axis=1)
    scores = listed[each, labels] - others[each, suggested]
    columns: dict[str, Sequence[Any]] = {
        "row": rows.tolist(),
        "image": image_digests(split.rows, split.name, rows),
        "label": names[labels].tolist(),
        "suggested": names[suggested].tolist(),
        "score": [f"{score:.4f}" for score in scores],
    }
    for code, name in enumerate(split.class_names):
        columns[f"p {name}"] = [f"{value:.4f}" for value in listed[:, code]]
    write_list(path, columns)


def save_grid(path: str | Path, title: str, split: PreparedSplit, probabilities: np.ndarray, found: Suspects) -> None:
    """Draws the most suspicious images, each with its label and the suggested class, and both probabilities.

    Args:
        path: the PNG to write.
        title: above the figure.
        split: the images.
        probabilities: float (N, C).
        found: the suspects; at most 60 are shown.
    """
    shown = len(found.rows[: _COLUMNS * _GRID_ROWS])
    lines = max(1, -(-shown // _COLUMNS))
    with new_figure(path, 0.95 * _COLUMNS, 1.28 * lines, title) as figure:
        axes = figure.add_subplot()
        for place, (row, suggested) in enumerate(zip(found.rows[:shown], found.suggested[:shown], strict=True)):
            line, column = divmod(place, _COLUMNS)
            image = np.broadcast_to(split.rows[[row]][0], (*split.images.shape[1:3], 3))
            axes.imshow(image, extent=(column + 0.04, column + 0.96, 1.35 * line + 0.96, 1.35 * line + 0.04))
            label = split.labels[row]
            for offset, code, color in ((1.06, label, "#b03a00"), (1.2, suggested, "black")):
                text = f"{split.class_names[code]} {probabilities[row, code]:.0%}"
                axes.text(column + 0.5, 1.35 * line + offset, text, ha="center", va="center", fontsize=7, color=color)
        axes.set(xlim=(0, _COLUMNS), ylim=(1.35 * lines, 0), xticks=[], yticks=[])
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        note = "upper line: the label and its probability; lower line: the likeliest class"
        figure.supxlabel(note if shown else "no suspects", fontsize=8)


def format_table(summary: dict[str, Any]) -> str:
    """The summary as text: the suspects by label and suggestion, and what the second labels say of them."""
    names, pairs = summary["class_names"], np.array(summary["pairs"])
    counts, total = np.array(summary["class_counts"]), summary["suspects"]
    rows = [["label", *names, "all", "share"]]
    for name, row, count in zip(names, pairs, counts, strict=True):
        share = f"{row.sum() / count:.1%}" if count else ""
        rows.append([name, *(f"{number:,}" if number else "." for number in [*row, row.sum()]), share])
    rows.append(["all", *(f"{number:,}" for number in [*pairs.sum(axis=0), total]), f"{total / summary['n']:.1%}"])
    lines = [
        f"{summary['dataset']}/{summary['split']}: {total:,} of {summary['n']:,} labels are likely wrong "
        f"({total / summary['n']:.1%})",
        f"the label is the likeliest class of {summary['accuracy']:.2%} of the images",
        *([_TOO_MANY] if total > _MANY * summary["n"] else []),
        "",
        *aligned(rows),
        "(rows: the label; columns: the suggested class; share: of the label's images)",
    ]
    return "\n".join([*lines, *_judge_lines(summary.get("also"))])


def _judge_lines(also: dict[str, Any] | None) -> list[str]:
    if also is None:
        return []
    lines = ["", f"second opinion: the labels of {also['dataset']} for {also['n']:,} of the images"]
    lines.append(f"  another label than here, all images    {also['differ']:7.2%}")
    if not also["suspects"]:
        return [*lines, "  it has no label for any suspect"]
    interval = "   95% interval {:.2%} to {:.2%}".format(*also["suspects_differ_interval"])
    lines.append(
        f"  another label, suspects ({also['suspects']:,}){'':<9}".ljust(41) + f"{also['suspects_differ']:7.2%}"
    )
    lines[-1] += interval
    lines.append(f"  the suggested label, suspects          {also['suggested']:7.2%}")
    if also["found"] is not None:
        lines.append(f"  suspects among those with another      {also['found']:7.2%}")
    return lines
