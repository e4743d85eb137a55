"""The command ``python test.py average``: the mean of the weights of several files of one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import runtime
from command_line import Range
from config import Backend, preferred_backend
from files import UserError
from reading.text import printable


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """Writes a model file whose weights are the mean of those of several files, which must have one network.

    It is for files that were trained on from the same weights; networks that began apart give nonsense. Calibrate the
    result anew.
    """

    weights: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Model files, as for evaluate."""
    output: str
    """Model file to write (.weights.h5)."""
    shares: tuple[Annotated[float, Range(0, 1_000_000)], ...] = ()
    """One number per file: how much it counts. None given: all count the same."""
    half: bool = False
    """Write the kernels in half precision (float16)."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    debug: bool = False
    """Show tracebacks."""


def average(settings: AverageConfig) -> None:
    """Writes the mean, whole or not at all, and prints the shares.

    `w = sum_i share_i w_i / sum_i share_i` for every variable, the batch statistics included, summed in float64.
    Sources: of several trainings from the same weights, Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482; of
    the weights before and after a training, Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv
    2109.01903.

    Raises:
        UserError: fewer than two files, files of different networks or that cannot be read (`model_file.load_model`),
            another number of shares, shares that sum to 0, or a target without ``.weights.h5``.
    """
    from model_files import model_file

    model_file.check_target(settings.output)
    if len(settings.weights) < 2:
        raise UserError(f"average: expected two or more model files, received {len(settings.weights)}")
    shares = _shares(settings)
    network, info = model_file.load_model(settings.weights[0], calibrated=False)
    described = model_file.uncalibrated(info.network)
    mean = [shares[0] * np.float64(values) for values in network.get_weights()]
    infos = [info]
    for path, share in zip(settings.weights[1:], shares[1:], strict=True):
        other, info = model_file.load_model(path, calibrated=False)
        if model_file.uncalibrated(info.network) != described:
            raise UserError(
                f"{path}: expected the network of {settings.weights[0]} (the same arch, classes, k, d, input size and "
                "scaling), found another; python test.py describe prints both"
            )
        mean = [total + share * values for total, values in zip(mean, other.get_weights(), strict=True)]
        infos.append(info)
    network.set_weights([values.astype(np.float32) for values in mean])
    new_info = model_file.ModelInfo(
        described,
        dataset=_common([info.dataset for info in infos]) or "",
        # So that a measurement on the split that chose the files is marked as one.
        metrics={"split": split} if (split := _common([info.metrics.get("split") for info in infos])) else {},
        versions=runtime.versions(),
        origin="mean of "
        # With the folder: the files of runs are all called best.weights.h5.
        + ", ".join(
            f"{'/'.join(Path(path).parts[-2:])} ({share:.3g})"
            for path, share in zip(settings.weights, shares, strict=True)
        ),
    )
    model_file.save_model(settings.output, network, new_info, settings.half)
    for path, share in zip(settings.weights, shares, strict=True):
        print(f"{share:6.1%}  {printable(path)}")
    print(f"wrote {settings.output}: not calibrated (python test.py calibrate)")


def _shares(settings: AverageConfig) -> np.ndarray:
    shares = np.array(settings.shares or [1.0] * len(settings.weights), np.float64)
    if len(shares) != len(settings.weights) or not shares.sum() > 0:
        raise UserError(
            f"--shares: expected one number per file ({len(settings.weights)}), not all 0, "
            f"received {' '.join(f'{share:g}' for share in shares)}"
        )
    return shares / shares.sum()


def _common(values: Sequence[str | None]) -> str | None:
    """The value that all have; None where they differ."""
    return values[0] if len(set(values)) == 1 else None
