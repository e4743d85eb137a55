"""Tries an ONNX file in a process of its own, with limits, before this process loads it; no Keras.

A file can hold a loop without end, or a constant of gigabytes that ONNX Runtime makes while it loads the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from files import UserError
from reading import limits
from reading.text import printable

SECONDS = 60  # for loading and the first two batches; a ResNet50 takes about two
_MEMORY = 2 * 2**30  # bytes beside four times the file, on systems that have such a limit
_LONGEST_REASON = 400
_BATCHES = (1, 3)  # a network with one row for any batch passes with one of them only
_OUTSIDE = b"\x0a\x08location\x12"  # how a tensor with its data elsewhere names the file, in ONNX's binary form
_SUM_ERROR = 1e-3


def check_file(path: str | Path) -> None:
    """Loads and runs an ONNX file in another process.

    Raises:
        UserError: the file is too large, cannot be loaded or run, takes too long or too much memory, or gives
            something else than `checked` outputs.
    """
    limits.check_size(Path(path).stat().st_size, limits.ONNX_BYTES, path, "an ONNX file")
    root = str(Path(__file__).resolve().parents[1])
    # One thread: each further one reserves memory of its own.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **threads, "PYTHONPATH": found, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "model_files.onnx_check", str(Path(path).absolute())]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: expected a network that runs at once, found one that runs for {SECONDS} s") from None
    lines = done.stdout.decode(errors="replace").splitlines()
    reason = f"the process that tried it ended with code {done.returncode}"
    with contextlib.suppress(ValueError, IndexError):
        reason = str(json.loads(lines[-1]))
    if done.returncode or reason:
        raise UserError(f"{path}: expected an ONNX file of a network, found one that cannot be used ({reason})")


def checked(outputs: list[np.ndarray], batch: int, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
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


def open_session(path: str | Path, providers: list[str], threads: int = 0):
    """An `onnxruntime.InferenceSession`; data outside of the file is refused.

    Args:
        path: the file.
        providers: of ONNX Runtime, the wanted ones first.
        threads: 0 is ONNX Runtime's choice.

    Raises:
        UserError: the file is too large, or keeps weights in another file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    options.intra_op_num_threads = threads
    # Threads that wait for the next call at full load take the cores from what runs in between (a video's frames).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # From memory: then there is no folder in which ONNX Runtime would look for data outside of the file.
    data = limits.read_bytes(path, limits.ONNX_BYTES, "an ONNX file")
    if _OUTSIDE in data:
        raise UserError(f"{path}: expected a network in one file, found one that keeps weights in another file")
    return onnxruntime.InferenceSession(data, options, providers=providers)


def _try(path: str) -> str:
    """Why the file cannot be used; empty when it can."""
    try:
        session = open_session(path, ["CPUExecutionProvider"], threads=1)
        (pixels,) = session.get_inputs()
        shape = [size if isinstance(size, int) else 1 for size in pixels.shape[1:]]
        names = [output.name for output in session.get_outputs()]
        if pixels.type != "tensor(float)" or sorted(names) != ["embeddings", "probabilities"]:
            return ""  # `OnnxNetwork` names what differs
        rng = np.random.default_rng(0)
        for batch in _BATCHES:
            images = rng.integers(0, 256, (batch, *shape), np.uint8).astype(np.float32)
            checked(session.run(["probabilities", "embeddings"], {pixels.name: images}), batch)
    except Exception as error:  # ONNX Runtime's exceptions have no common class but this
        return printable(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)
    return ""


def _limit_memory(path: str) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    most = _MEMORY + 4 * Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _limit_memory(sys.argv[1])
    print(json.dumps(_try(sys.argv[1])))
