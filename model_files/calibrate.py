"""Calibrates a model file on a split, and measures what that does to the calibration error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np

import evaluation
import metrics
from data_helper import PreparedSplit
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError
from measuring import calibration
from measuring.calibration import Calibration
from model_files import model_file
from model_files.description import ModelInfo


@dataclasses.dataclass(frozen=True)
class Measured:
    """What calibration does to the probabilities of a split.

    Each measure has three values: before, with the calibration that fits all images (too low, because the same images
    fitted it), and cross-fitted (`calibration.cross_fitted`).

    Attributes:
        fitted: on all images.
        n: the images.
        ece: expected calibration error (`metrics.expected_calibration_error`).
        nll: mean negative log-likelihood.
    """

    fitted: Calibration
    n: int
    ece: tuple[float, float, float]
    nll: tuple[float, float, float]


def calibrate(
    path: str | Path, split: PreparedSplit, batch_size: int = 256, group: ProcessGroup = GROUP_OF_ONE
) -> tuple[keras.Model, ModelInfo]:
    """Fits a model file's calibration on a split and keeps it in the file, which is written whole or not at all.

    The result does not depend on a calibration that the file has already.

    Args:
        path: a file of `model_file.save_model`.
        split: it should not be the split that is measured afterwards.
        batch_size: images per batch.
        group: the processes that share the images; rank 0 writes.

    Returns:
        The network, calibrated, and the new description (`model_file.load_model`).

    Raises:
        UserError: see `model_file.load_model`, `model_file.redescribe` and `evaluation.predict`; or other classes.
    """
    logits, info = _logits(path, split, batch_size, group)
    fitted = calibration.fit(split.labels, logits)
    network = dataclasses.replace(info.network, **dataclasses.asdict(fitted))
    group.on_rank0(model_file.redescribe)(path, dataclasses.replace(info, network=network, calibrated_on=split.name))
    group.wait()  # no process reads the file before it is written
    return model_file.load_model(path)


def measure(path: str | Path, split: PreparedSplit, batch_size: int = 256, seed: int = 0) -> Measured:
    """What the calibration that fits a split does to the probabilities there; the file stays as it is.

    Args:
        path: the model file.
        split: two images or more.
        batch_size: images per batch.
        seed: of the halves.
    """
    labels = split.labels
    if len(labels) < 2:
        raise UserError(f"{split.name}: expected two images or more to fit a calibration, found {len(labels)}")
    logits, _ = _logits(path, split, batch_size, GROUP_OF_ONE)
    fitted = calibration.fit(labels, logits)
    all_three = (Calibration().logits(logits), fitted.logits(logits), calibration.cross_fitted(labels, logits, seed))
    ece = tuple(metrics.expected_calibration_error(labels, evaluation.softmax(each)) for each in all_three)
    nll = tuple(calibration.negative_log_likelihood(labels, each) for each in all_three)
    return Measured(fitted, len(labels), ece, nll)


def _logits(
    path: str | Path, split: PreparedSplit, batch_size: int, group: ProcessGroup
) -> tuple[np.ndarray, ModelInfo]:
    """The logits without calibration, float32 (N, C), and the file's description."""
    network, info = model_file.load_model(path, calibrated=False)
    evaluation.check_classes(network, split, info.network.class_names)
    return evaluation.outputs(network, split.rows, batch_size, group=group)[0], info


def format_table(found: Measured) -> str:
    """What `test.py calibrate` prints."""
    head = f"{'':<28}{'before':>9}{'after':>9}  cross-fitted"
    rows = (("expected calibration error", found.ece), ("negative log-likelihood", found.nll))
    return "\n".join([head, *("{:<28}{:9.4f}{:9.4f}{:14.4f}".format(title, *values) for title, values in rows)])
