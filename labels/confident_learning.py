"""Finds labels that are likely wrong, by confident learning, with the library cleanlab."""

from __future__ import annotations

import dataclasses

import numpy as np

from files import UserError


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Images whose label is likely wrong, the most suspicious first.

    Attributes:
        rows: int64 (M,), of the images.
        suggested: int64 (M,), the likeliest class of each, never its label.
        scores: float64 (M,), -1..0, ascending: the probability of the label less that of the suggested class.
    """

    rows: np.ndarray
    suggested: np.ndarray
    scores: np.ndarray


def find_suspects(labels: np.ndarray, probabilities: np.ndarray) -> Suspects:
    """Confident learning: Northcutt, Jiang and Chuang, JAIR 2021, section 3.1.

    The threshold of a class is its mean probability over the images that carry its label, ``t_j = mean p_j(x)``. An
    image counts as class j where ``p_j >= t_j`` (the likeliest such j). It is a suspect where that is not its label
    (off the diagonal of the confident joint), unless its label is its likeliest class.

    Args:
        labels: int (N,), codes 0 <= label < C.
        probabilities: float (N, C), rows sum to 1; of networks that were not trained on these images, because a
            network that has learnt a wrong label by heart does not doubt it.

    Raises:
        UserError: cleanlab is not installed, or all labels are of one class.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("suspects: expected labels of two classes or more, found one: nothing can be compared")
    try:
        from cleanlab.filter import find_label_issues  # late: it takes two seconds
    except ImportError as error:
        raise UserError(f"suspects: needs the package cleanlab ({error}); pip install -r requirements.txt") from None
    # cleanlab counts on rows that sum to 1 in the precision that they have.
    exact = np.asarray(probabilities, np.float64)
    exact = exact / exact.sum(axis=1, keepdims=True)
    rows = np.flatnonzero(find_label_issues(np.asarray(labels), exact, filter_by="confident_learning", n_jobs=1))
    suggested = exact[rows].argmax(axis=1)
    scores = exact[rows, labels[rows]] - exact[rows, suggested]
    order = np.argsort(scores, kind="stable")
    return Suspects(rows[order], suggested[order], scores[order])
