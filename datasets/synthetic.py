"""Synthetic faces: draws three splits that share no face and writes them like any other release."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from command_line import Range
from data_helper import SPLITS, prepared_splits
from datasets.shared.dataset import DataSet
from datasets.shared.drawn_faces import draw_faces
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.release import Release, write_release
from files import UserError, is_taken

_WAIT_SECONDS = 0.2  # between two looks at another process's work


@dataclasses.dataclass(frozen=True)
class PrepareSyntheticConfig:
    """Draws the synthetic faces."""

    data_dir: str = "data"
    """Folder of the prepared data sets."""
    num_classes: Literal[7, 8] = 7
    """8 adds contempt."""
    num_train: Annotated[int, Range(1, 10_000_000)] = 3500
    """Images of train."""
    num_val: Annotated[int, Range(1, 10_000_000)] = 700
    """Images of val."""
    num_test: Annotated[int, Range(1, 10_000_000)] = 700
    """Images of test."""
    size: Annotated[int, Range(16, 4_096)] = 48
    """Side of the images in pixels."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the drawing; two seeds share no face."""
    debug: bool = False
    """Show tracebacks."""


def write_synthetic_splits(config: PrepareSyntheticConfig) -> dict[str, dict[str, Any]]:
    """Draws the synthetic faces and writes ``<data_dir>/synthetic/{train,val,test}``, with one progress bar per split.

    Images are uint8 (N, size, size, 3), RGB. The splits are drawn from the seeds ``3 * seed``, ``3 * seed + 1`` and
    ``3 * seed + 2``, so that neither two splits nor the splits of two seeds share a face.

    Returns:
        Split -> the content of its `meta.json`.

    Raises:
        UserError: a number is out of its range, or another process is writing there.
    """
    counts = {"train": config.num_train, "val": config.num_val, "test": config.num_test}
    return write_release(
        config.data_dir,
        "synthetic",
        Release(
            counts=counts,
            examples=_draw(config, counts),
            image_shape=(config.size, config.size, 3),
            class_names=CLASS_NAMES[: config.num_classes],
            sources=[],
            options={"num_classes": config.num_classes, "size": config.size, "seed": config.seed},
        ),
    )


def ensure_synthetic_splits(config: PrepareSyntheticConfig) -> None:
    """Draws the synthetic faces unless they are there; waits for another process that is drawing them.

    So runs that start at the same time, such as those of a grid, draw them once. Faces that are there stay, whatever
    their size and seed are.

    Raises:
        UserError: see `write_synthetic_splits`.
    """
    folder = Path(config.data_dir) / "synthetic"
    waits = False
    while True:
        there = {split for dataset, split in prepared_splits(config.data_dir) if dataset == "synthetic"}
        if there >= set(SPLITS):
            return
        if is_taken(folder):  # its splits appear one after the other
            if not waits:
                print(f"{folder}: waiting for another process, which is drawing the synthetic faces", flush=True)
            waits = True
            time.sleep(_WAIT_SECONDS)
        elif "train" in there:
            return
        else:
            try:
                write_synthetic_splits(config)
                return
            except UserError:  # another process was faster
                if not is_taken(folder) and ("synthetic", "train") not in prepared_splits(config.data_dir):
                    raise


def _draw(config: PrepareSyntheticConfig, counts: dict[str, int]) -> Iterator[tuple[str, np.ndarray, int]]:
    for offset, (split, count) in enumerate(counts.items()):
        seed = 3 * config.seed + offset
        images, labels = draw_faces(count, config.num_classes, config.size, seed, progress=True)
        for image, label in zip(images, labels.tolist(), strict=True):
            yield split, image, label


DATASET = DataSet(
    name="synthetic", title="synthetic faces", options=PrepareSyntheticConfig, prepare=write_synthetic_splits
)
