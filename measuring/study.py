"""What `evaluation.evaluate` hands to everything that measures more of a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measured:
    """A split that was measured.

    Attributes:
        predict: images uint8 (N, H, W, C), or what is indexed like them, to probabilities float32 (N, C), with the
            views of the evaluation.
        probabilities: float32 (N, C), of the split's images.
        scores: `metrics.score` of them.
        folder: of the report.
        title: of its figures.
    """

    predict: Callable[[Any], np.ndarray]
    probabilities: np.ndarray
    scores: Mapping[str, Any]
    folder: Path
    title: str


# Measures and draws more; returns more JSON-ready entries of the result.
Study = Callable[[Measured], dict[str, Any]]
