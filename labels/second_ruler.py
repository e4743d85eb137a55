"""Scores one model's predictions against two sets of labels for the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter
from scipy import stats
from sklearn.metrics import cohen_kappa_score, confusion_matrix

import datasets
from data_helper import PreparedSplit
from labels.second_labels import SecondLabels
from measuring.study import Measured
from plots import BLUE, COLORS, GRAY, ORANGE, PALE, new_figure
from reporting.statistics import bootstrap_interval, paired_bootstrap

FIGURE = "second_labels.png"
FILES = (FIGURE,)
# What can happen to an image, in the order of the figure.
_OUTCOMES = {
    "both": ("the model agrees with both", BLUE),
    "own_only": ("with {own} only", COLORS[4]),
    "also_only": ("with {also} only", ORANGE),
    "labels_agree": ("with neither, which agree", GRAY),
    "none_agree": ("with neither, which differ", PALE),
}


@dataclasses.dataclass(frozen=True)
class SecondRuler:
    """Scores a network against a second set of labels: a study of `evaluation.evaluate`.

    Attributes:
        split: the images and their labels.
        second: their other labels.
        seed: of the bootstrap intervals.
    """

    split: PreparedSplit
    second: SecondLabels
    seed: int = 0

    def __call__(self, evaluated: Measured) -> dict[str, dict[str, Any]]:
        """Measures, and draws ``second_labels.png``.

        Returns:
            The entry ``also`` of the result: what `measure` returns, ``dataset`` and ``left_out`` (`SecondLabels`).
        """
        split, second, usable = self.split, self.second, self.second.usable
        predictions = evaluated.probabilities.argmax(axis=1)[usable]
        found = measure(split.labels[usable], second.labels[usable], predictions, split.class_names, self.seed)
        also = {"dataset": second.dataset, **found, "left_out": second.left_out}
        title = f"{datasets.title(split.meta['dataset'])}, {split.meta['split']}"
        title += f", labels of {datasets.title(second.dataset)}, n = {also['n']:,}"
        save_figure(evaluated.folder / FIGURE, title, also, split.meta["dataset"])
        return {"also": also}


def measure(
    labels: np.ndarray, second: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Compares predictions with two labels of every image.

    Args:
        labels: int (N,), the labels of the split.
        second: int (N,), the other labels.
        predictions: int (N,), the classes that the model predicts.
        class_names: C names.
        seed: of the bootstrap.

    Returns:
        JSON-ready. ``n``; ``accuracy`` and ``also_accuracy``, by each set of labels, with ``interval`` and
        ``also_interval`` (95% bootstrap over the images); ``difference`` (``also_accuracy - accuracy``), paired, with
        ``difference_interval``; ``label_agreement``, the share of images with two equal labels, and ``kappa`` (Cohen
        1960), each with its interval (kappa is None where all labels are of one class); ``errors``, the images whose
        prediction is not the label, of which ``also_with_model`` have the prediction as their second label,
        ``also_with_label`` the label and ``third`` another class; ``share_with_model`` (None without errors) with its
        95% interval of Wilson (1927); ``per_class``, by name of the label: ``n`` and the numbers of images by
        `_OUTCOMES`.
    """
    right, also_right, agree = predictions == labels, predictions == second, labels == second
    gain = paired_bootstrap(also_right[None], right[None], seed)
    errors, with_model = int(np.sum(~right)), int(np.sum(~right & also_right))
    share = stats.binomtest(with_model, errors).proportion_ci(method="wilson") if errors else None
    has_kappa = len(np.union1d(labels, second)) > 1  # otherwise all labels are equal by chance too
    outcomes = {
        "both": right & also_right,
        "own_only": right & ~also_right,
        "also_only": also_right & ~right,
        "labels_agree": ~right & ~also_right & agree,
        "none_agree": ~right & ~also_right & ~agree,
    }
    return {
        "n": len(labels),
        "accuracy": float(right.mean()),
        "interval": list(bootstrap_interval(right[None], seed)),
        "also_accuracy": float(also_right.mean()),
        "also_interval": list(bootstrap_interval(also_right[None], seed)),
        "difference": gain.difference,
        "difference_interval": [gain.low, gain.high],
        "label_agreement": float(agree.mean()),
        "label_agreement_interval": list(bootstrap_interval(agree[None], seed)),
        "kappa": float(cohen_kappa_score(labels, second)) if has_kappa else None,
        "kappa_interval": kappa_interval(labels, second, seed) if has_kappa else None,
        "errors": errors,
        "also_with_model": with_model,
        "also_with_label": int(np.sum(~right & agree)),
        "third": int(np.sum(outcomes["none_agree"])),
        "share_with_model": with_model / errors if errors else None,
        "share_with_model_interval": [share.low, share.high] if share else None,
        "per_class": {
            name: {
                "n": int(np.sum(labels == code)),
                **{outcome: int(np.sum(members & (labels == code))) for outcome, members in outcomes.items()},
            }
            for code, name in enumerate(class_names)
        },
    }


def kappa_interval(labels: np.ndarray, second: np.ndarray, seed: int = 0, num_resamples: int = 10_000) -> list[float]:
    """95% percentile bootstrap interval over the images of Cohen's kappa, ``(p_o - p_e) / (1 - p_e)``.

    ``p_o`` is the share of equal labels and ``p_e`` the one expected by chance, ``sum_c share_c * second_share_c``. A
    resample is a multinomial draw of the pairs of labels.

    Args:
        labels: int (N,).
        second: int (N,).
        seed: of the resamples.
        num_resamples: resamples.

    Returns:
        Low and high; resamples of one class, which have no kappa, do not count.
    """
    pairs = confusion_matrix(labels, second)
    drawn = np.random.default_rng(seed).multinomial(pairs.sum(), pairs.ravel() / pairs.sum(), size=num_resamples)
    shares = drawn.reshape(-1, *pairs.shape) / pairs.sum()
    observed = np.trace(shares, axis1=1, axis2=2)
    expected = np.sum(shares.sum(axis=1) * shares.sum(axis=2), axis=1)
    defined = expected < 1 - 1e-12
    return np.percentile((observed - expected)[defined] / (1 - expected[defined]), [2.5, 97.5]).tolist()


def lines(result: Mapping[str, Any]) -> list[str]:
    """The tables of a result with ``also`` as plain text; no line for another result."""
    also = result.get("also")
    if not also:
        return []
    own, total, other = result["dataset"], result["n"], also["dataset"]
    table = [f"second labels: {other}, {also['n']:,} of the {total:,} images"]
    table += [f"  {count:,} {reason}" for reason, count in also["left_out"].items()]
    width = max(map(len, (own, f"{other} - {own}")))
    gain = "{:+.2f} points   95% interval {:+.2f} to {:+.2f}".format(
        *(100 * value for value in (also["difference"], *also["difference_interval"]))
    )
    table += [
        "",
        "accuracy of the model on these images, by the labels of",
        f"  {own:<{width}}  {_share(also['accuracy'], also['interval'])}",
        f"  {other:<{width}}  {_share(also['also_accuracy'], also['also_interval'])}",
        f"  {f'{other} - {own}':<{width}}  {gain}",
        "",
        f"the two labels are equal     {_share(also['label_agreement'], also['label_agreement_interval'])}",
        *_kappa_lines(also),
        f"  (a model that always gave the label of {other} would have this accuracy by {own})",
        "",
        f"errors by the labels of {own}: {also['errors']:,}",
    ]
    if also["errors"]:
        shares = {
            f"{other} has the model's answer": (also["also_with_model"], also["share_with_model_interval"]),
            f"{other} has the label of {own}": (also["also_with_label"], None),
            f"{other} has a third class": (also["third"], None),
        }
        width = max(map(len, shares))
        for text, (count, interval) in shares.items():
            table.append(f"  {text:<{width}} {count:>7,}   {_share(count / also['errors'], interval)}")
    return [*table, "", *_class_lines(also, own, other)]


def _kappa_lines(also: Mapping[str, Any]) -> list[str]:
    if also["kappa"] is None:
        return []
    interval = "95% interval {:.3f} to {:.3f}".format(*also["kappa_interval"])
    return [f"Cohen's kappa of the labels  {also['kappa']:7.3f}   {interval}"]


def _class_lines(also: Mapping[str, Any], own: str, other: str) -> list[str]:
    width = max(map(len, [*also["per_class"], "label"]))
    lines = [
        f"by the label of {own} (equal: {other} has the same; with model: errors where {other} has the model's answer)",
        f"{'label':<{width}}        n    equal   errors   with model",
    ]
    for name, counts in also["per_class"].items():
        errors = counts["n"] - counts["both"] - counts["own_only"]
        equal = f"{(counts['both'] + counts['labels_agree']) / counts['n']:.1%}" if counts["n"] else "-"
        with_model = f"{counts['also_only'] / errors:.1%}" if errors else "-"
        lines.append(f"{name:<{width}}  {counts['n']:>7,}  {equal:>7}  {errors:>7,}  {with_model:>11}")
    return lines


def _share(value: float, interval: Sequence[float] | None = None) -> str:
    return f"{value:7.2%}" + ("   95% interval {:.2%} to {:.2%}".format(*interval) if interval else "")


def save_figure(path: str | Path, title: str, also: Mapping[str, Any], own: str) -> None:
    """Draws with which labels the model agrees, one bar per class of the split's label and one for all.

    Args:
        path: the PNG to write.
        title: above the figure.
        also: what `measure` returns, and ``dataset``.
        own: the split's data set.
    """
    shown = {name: counts for name, counts in also["per_class"].items() if counts["n"]}
    keys = ("n", *_OUTCOMES)
    rows = {**shown, "all": {key: sum(counts[key] for counts in shown.values()) for key in keys}}
    titles = {"own": datasets.title(own), "also": datasets.title(also["dataset"])}
    with new_figure(path, 7.0, 0.8 + 0.34 * len(rows), title) as figure:
        axes = figure.add_subplot()
        left = np.zeros(len(rows))
        for outcome, (text, color) in _OUTCOMES.items():
            shares = np.array([counts[outcome] / counts["n"] for counts in rows.values()])
            bars = axes.barh(range(len(rows)), shares, left=left, color=color, label=text.format(**titles), height=0.75)
            texts = [f"{share:.0%}" if share >= 0.04 else "" for share in shares]
            dark = outcome in ("both", "labels_agree")
            axes.bar_label(bars, texts, label_type="center", fontsize=7, color="white" if dark else "black")
            left += shares
        axes.set_yticks(range(len(rows)), [f"{name}, n = {counts['n']:,}" for name, counts in rows.items()])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel(f"label of {titles['own']}")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
