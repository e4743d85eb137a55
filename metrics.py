"""Measures of predictions: accuracy, recall, F1, calibration, correlations and t-SNE; needs no Keras."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from threadpoolctl import threadpool_limits

_TSNE_SAMPLES = 1000  # more would overlap, and each thousand takes seconds
_TSNE_LEAST_SAMPLES = 10
_TSNE_PCA_SIZE = 50


def score(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    seed: int = 0,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Measures predicted class probabilities against the true labels.

    Args:
        labels: int (N,), codes 0 <= label < C.
        probabilities: float (N, C), rows that add up to 1; the prediction is the largest (the first of equals).
        class_names: C names.
        seed: of the bootstrap.
        num_resamples: bootstrap resamples.

    Returns:
        JSON-ready ``n``; every one of `MEASURES`; ``intervals`` of accuracy, recall and F1, each the 95% percentile
        bootstrap ``[low, high]``; ``per_class``, by name ``n``, ``precision``, ``recall``, ``f1``;
        ``confusion_matrix``, C lists of C counts, one row per true class. All shares are 0..1.

        A class without samples has no recall and no F1: both are None, and both means leave the class out.
        A class never predicted has no precision: None; its F1 is 0 when it has samples.

    Raises:
        ValueError: no samples, shapes that do not fit, a label out of range, or rows that are not probabilities.
    """
    labels, probabilities = _checked(labels, probabilities)
    num_classes = probabilities.shape[1]
    if len(class_names) != num_classes:
        raise ValueError(
            f"expected {num_classes} class names, one per column of the probabilities, "
            f"received {len(class_names)}: {', '.join(class_names)}"
        )
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), labels=np.arange(num_classes))
    precision, recall, f1, support = _by_class(labels, probabilities)
    predicted = confusion.sum(axis=0)
    per_class = {
        name: {
            "n": int(support[code]),
            "precision": float(precision[code]) if predicted[code] else None,
            "recall": float(recall[code]) if support[code] else None,
            "f1": float(f1[code]) if support[code] else None,
        }
        for code, name in enumerate(class_names)
    }
    return {
        "n": len(labels),
        **{name: measure.of(labels, probabilities) for name, measure in MEASURES.items()},
        "intervals": _bootstrap_intervals(confusion, seed, num_resamples),
        "per_class": per_class,
        "confusion_matrix": confusion.tolist(),
    }


def correlations(labels: np.ndarray, embeddings: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Pearson's correlations that the three discriminators of Ad-Corre act on, over a whole split.

    Each is the mean over the k embeddings of correlations over the d coordinates (`custom_loss.pearson_correlation`).

    Args:
        labels: int (N,), codes 0 <= label < C.
        embeddings: float (N, k, d).
        num_classes: C.

    Returns:
        JSON-ready, all -1..1: ``same_class`` and ``different_classes``, the means over pairs of images (the
        Feature Discriminator pushes them to 1 and -1); ``class_means``, C lists of C, of the classes' mean
        embeddings, and ``between_class_means``, its mean off the diagonal (Mean Discriminator: towards -1);
        ``between_embeddings``, the mean over an image's pairs of embeddings (Embedding Discriminator: towards -1).
        None where there is no such pair; an absent class has None in ``class_means``.
    """
    u_nkd = _unit_deviations(embeddings)
    n, k, _ = u_nkd.shape
    counts = np.bincount(labels, minlength=num_classes)
    member_nc = np.eye(num_classes)[labels]
    # A sum over pairs is the squared length of a sum, minus the pairs of an image with itself.
    sum_ckd = np.einsum("nc,nkd->ckd", member_nc, u_nkd, optimize=True)
    itself = np.sum(u_nkd**2)
    same = np.sum(sum_ckd**2)
    everything = np.sum(sum_ckd.sum(axis=0) ** 2)
    same_pairs = int(np.sum(counts * (counts - 1)))
    other_pairs = n * (n - 1) - same_pairs

    means_ckd = np.einsum("nc,nkd->ckd", member_nc, embeddings, optimize=True) / np.maximum(counts, 1)[:, None, None]
    u_ckd = _unit_deviations(means_ckd)
    means_cc = np.einsum("ckd,ekd->ce", u_ckd, u_ckd) / k
    absent = counts == 0
    means_cc[absent] = means_cc[:, absent] = np.nan
    between_means = means_cc[~np.eye(num_classes, dtype=bool)]

    within = np.sum(u_nkd.sum(axis=1) ** 2) - itself  # of the pairs l != m of each image
    return {
        "same_class": float((same - itself) / (k * same_pairs)) if same_pairs else None,
        "different_classes": float((everything - same) / (k * other_pairs)) if other_pairs else None,
        "class_means": [[None if np.isnan(value) else float(value) for value in row] for row in means_cc],
        "between_class_means": None if np.isnan(between_means).all() else float(np.nanmean(between_means)),
        "between_embeddings": float(within / (n * k * (k - 1))) if k > 1 else None,
    }


def tsne(embeddings: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Places of at most 1,000 images in the plane, by t-SNE (van der Maaten and Hinton 2008) of all their embeddings.

    Args:
        embeddings: float (N, k, d); the k vectors of an image are used as one vector of k * d numbers.
        seed: of the choice of images and of the initialisation.

    Returns:
        ``rows`` int64 (M,), the images, in random order, and ``places`` float32 (M, 2). Both are empty for fewer
        than 10 different images, because their figure would show nothing.
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(embeddings), min(len(embeddings), _TSNE_SAMPLES), replace=False)
    vectors = embeddings[rows].reshape(len(rows), -1)  # (M, k * d)
    # Equal rows count once: the initialisation divides by the spread.
    if len(np.unique(vectors, axis=0)) < _TSNE_LEAST_SAMPLES:
        return np.empty(0, np.int64), np.empty((0, 2), np.float32)
    # One thread: with several, sklearn is ten times slower beside another process, and sums in varying order.
    with threadpool_limits(1):
        vectors = PCA(min(_TSNE_PCA_SIZE, *vectors.shape), random_state=seed).fit_transform(vectors)
        places = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed).fit_transform(vectors)
    return rows, places.astype(np.float32)


def _unit_deviations(x: np.ndarray) -> np.ndarray:
    """Float64: every vector of the last axis minus its mean, scaled to length 1; a constant vector becomes 0."""
    x = np.asarray(x, np.float64)
    x = x - x[..., :1]  # first: otherwise the rounding of the mean would remain in a constant vector
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.maximum(np.sum(x * x, axis=-1, keepdims=True), 1e-12))


def reliability_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts the samples by the probability of their prediction into equal-width bins ``(low, high]`` over 0..1.

    Args:
        labels: int (N,).
        probabilities: float (N, C).
        num_bins: number of bins.

    Returns:
        Each (num_bins,): the mean confidence and the accuracy of the bin's samples (float64, NaN in an empty bin)
        and their count (int64).
    """
    labels, probabilities = _checked(labels, probabilities)
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    members = np.where(count > 0, count, np.nan)
    mean_confidence = np.bincount(bins, weights=confidence, minlength=num_bins) / members
    accuracy = np.bincount(bins, weights=correct, minlength=num_bins) / members
    return mean_confidence, accuracy, count


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, ``sum_b n_b / N * |accuracy_b - confidence_b|``, 0..1.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    The arguments are those of `reliability_bins`.
    """
    confidence, accuracy, count = reliability_bins(labels, probabilities, num_bins)
    return float(np.nansum(count * np.abs(accuracy - confidence)) / count.sum())


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number that describes the predictions of a whole split.

    Attributes:
        title: its name in tables.
        of: labels int (N,) and probabilities float (N, C) to the number.
        is_share: 0..1, printed in percent.
        has_column: whether the accuracy table of a report has a column for it.
    """

    title: str
    of: Callable[[np.ndarray, np.ndarray], float]
    is_share: bool = True
    has_column: bool = True


def _by_class(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall, F1 and number of samples of every class, each (C,); 0 where one is not defined."""
    codes = np.arange(probabilities.shape[1])
    return precision_recall_fscore_support(labels, probabilities.argmax(axis=1), labels=codes, zero_division=0)


def _accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def _mean_class_recall(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The field's "average accuracy"; a class without samples does not count."""
    _, recall, _, support = _by_class(labels, probabilities)
    return float(recall[support > 0].mean())


def _macro_f1(labels: np.ndarray, probabilities: np.ndarray) -> float:
    _, _, f1, support = _by_class(labels, probabilities)
    return float(f1[support > 0].mean())


# Everything that measures a split: `result.json`, the printed report and the tables of a grid iterate over it.
MEASURES = {
    "accuracy": Measure("accuracy", _accuracy),
    "mean_class_recall": Measure("mean class recall", _mean_class_recall),
    "macro_f1": Measure("macro F1", _macro_f1),
    "ece": Measure("expected calibration error", expected_calibration_error, is_share=False, has_column=False),
}


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(
            "expected labels (N,) and probabilities (N, C), "
            f"received labels {labels.shape} and probabilities {probabilities.shape}"
        )
    if not len(labels):
        raise ValueError("expected at least one sample, received none")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected integer labels, received {labels.dtype}")
    num_classes = probabilities.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise ValueError(
            f"expected labels 0..{num_classes - 1} for {num_classes} classes, "
            f"received {labels[outside[0]]} at row {outside[0]}"
        )
    # 1e-2 accepts half precision and refuses logits; NaN fails every comparison.
    sums_to_one = np.abs(probabilities.sum(axis=1, dtype=np.float64) - 1) < 1e-2
    improper = np.flatnonzero(~((probabilities >= 0).all(axis=1) & sums_to_one))
    if len(improper):
        raise ValueError(
            "expected rows of probabilities (0..1, adding up to 1), "
            f"received {probabilities[improper[0]].tolist()} at row {improper[0]} ({len(improper)} such rows); "
            "NaN comes from a training that diverged"
        )
    return labels, probabilities


def resampled_measures(confusion: np.ndarray, seed: int, num_resamples: int) -> dict[str, np.ndarray]:
    """Accuracy, mean class recall and macro F1 of bootstrap resamples of the samples, each (num_resamples,).

    Drawing N samples with replacement and counting their (true, predicted) cells is a multinomial draw of N
    over the cells with the cells' shares as probabilities. These measures need only the counts, so a
    resample costs C * C numbers for any N.

    Args:
        confusion: int (C, C), counts by true and predicted class, at least one sample.
        seed: of the resamples; an integer, or a sequence of them.
        num_resamples: resamples.
    """
    n = confusion.sum()
    drawn = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=num_resamples)
    return measures_of_counts(drawn.reshape(-1, *confusion.shape))


def measures_of_counts(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, mean class recall and macro F1 of confusion matrices, as `score` defines them.

    Args:
        confusion: int (..., C, C), counts by true and predicted class, at least one sample in each matrix.

    Returns:
        Name of a measure -> float64 (...).
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)  # (..., C)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    # A resample may have no sample of a rare class; as in `score`, the means leave it out.
    occurs = true > 0
    recall = hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    return {
        "accuracy": hits.sum(axis=-1) / true.sum(axis=-1),
        "mean_class_recall": np.mean(recall, axis=-1, where=occurs),
        "macro_f1": np.mean(f1, axis=-1, where=occurs),
    }


def _bootstrap_intervals(confusion: np.ndarray, seed: int, num_resamples: int) -> dict[str, list[float]]:
    """95% percentile intervals (Efron 1979) of the three summary measures, from the confusion matrix (C, C) alone."""
    resampled = resampled_measures(confusion, seed, num_resamples)
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in resampled.items()}
