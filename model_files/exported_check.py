"""Tries an exported file in a process of its own, with limits, before this process loads it; no Keras.

A file can hold a loop without end, or a constant of gigabytes that the runtime makes while it loads the file; or it can
make the runtime crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError
from reading import limits
from reading.text import printable

_MEMORY = 2 * 2**30  # bytes beside four times the file, on systems that have such a limit
_LONGEST_REASON = 400
_BATCHES = (1, 3)  # a network with one row for any batch passes with one of them only
_SUM_ERROR = 1e-3


def check_file(path: str | Path, module: str, kind: str, seconds: float) -> None:
    """Loads and runs a file in another process.

    Args:
        path: the file.
        module: what runs there: its `main` calls `try_file`.
        kind: what the file should be, as ``an ONNX file``.
        seconds: for all of it.

    Raises:
        UserError: the file is too large, cannot be loaded or run, takes too long or too much memory, or gives
            something else than `checked` outputs.
    """
    limits.check_size(Path(path).stat().st_size, limits.EXPORTED_BYTES, path, kind)
    root = str(Path(__file__).resolve().parents[1])
    # One thread: each further one reserves memory of its own.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **threads, "PYTHONPATH": found, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", module, str(Path(path).absolute())]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: expected a network that runs at once, found one that runs for {seconds} s") from None
    lines = done.stdout.decode(errors="replace").splitlines()
    reason = f"the process that tried it ended with code {done.returncode}"
    with contextlib.suppress(ValueError, IndexError):
        reason = str(json.loads(lines[-1]))
    if done.returncode or reason:
        raise UserError(f"{path}: expected {kind} of a network, found one that cannot be used ({reason})")


def try_file(path: str, attempt: Callable[[str], None]) -> None:
    """What the other process does: prints why the file cannot be used, as JSON; an empty text when it can."""
    _limit_memory(path)
    reason = ""
    try:
        attempt(path)
    except Exception as error:  # the runtimes' exceptions have no common class but this
        reason = printable(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)
    print(json.dumps(reason))


def try_batches(run: Callable[[np.ndarray], Any], shape: tuple[int, int, int]) -> None:
    """Runs a network on random images, and checks what it returns.

    Args:
        run: float32 (B, H, W, 3) to probabilities and embeddings.
        shape: H, W, 3.
    """
    rng = np.random.default_rng(0)
    for batch in _BATCHES:
        checked(run(rng.integers(0, 256, (batch, *shape), np.uint8).astype(np.float32)), batch)


def checked(outputs: Any, batch: int, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities and embeddings of a batch, if they can be those of a classifier.

    Args:
        outputs: what the network returned: probabilities (B, C) and embeddings (B, k, d).
        batch: B.
        num_classes: C; None for any.

    Raises:
        ValueError: not float32, another shape, not finite, or probabilities that are negative or do not sum to 1.
    """
    probabilities, embeddings = outputs
    for name, array, axes in (("probabilities", probabilities, 2), ("embeddings", embeddings, 3)):
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise ValueError(f"{name}: expected float32, found {getattr(array, 'dtype', type(array).__name__)}")
        if array.ndim != axes or len(array) != batch or (axes == 2 and num_classes not in (None, array.shape[1])):
            raise ValueError(f"{name}: expected {axes} axes and {batch} rows for {batch} images, found {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    sums = probabilities.sum(axis=1)
    if (probabilities < 0).any() or (np.abs(sums - 1) > _SUM_ERROR).any():
        worst = probabilities[np.abs(sums - 1).argmax()]
        raise ValueError(
            f"probabilities: expected 0 or more with the sum 1, as after a softmax, found {worst[:8].tolist()}"
        )
    return probabilities, embeddings


def _limit_memory(path: str) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    most = _MEMORY + 4 * Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
