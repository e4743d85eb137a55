"""Opens an ONNX file, and tries one in a process of its own first (`exported_check`); no Keras."""

from __future__ import annotations

import sys
from pathlib import Path

from files import UserError
from model_files import exported_check
from reading import limits

SECONDS = 60  # for loading and the first two batches; a ResNet50 takes about two
_OUTSIDE = b"\x0a\x08location\x12"  # how a tensor with its data elsewhere names the file, in ONNX's binary form


def check_file(path: str | Path) -> None:
    """Loads and runs an ONNX file in another process; see `exported_check.check_file`."""
    exported_check.check_file(path, "model_files.onnx_check", "an ONNX file", SECONDS)


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
    data = limits.read_bytes(path, limits.EXPORTED_BYTES, "an ONNX file")
    if _OUTSIDE in data:
        raise UserError(f"{path}: expected a network in one file, found one that keeps weights in another file")
    return onnxruntime.InferenceSession(data, options, providers=providers)


def _attempt(path: str) -> None:
    session = open_session(path, ["CPUExecutionProvider"], threads=1)
    (pixels,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in pixels.shape[1:]]
    names = [output.name for output in session.get_outputs()]
    if pixels.type != "tensor(float)" or sorted(names) != ["embeddings", "probabilities"]:
        return  # `OnnxNetwork` names what differs
    run = lambda images: session.run(["probabilities", "embeddings"], {pixels.name: images})  # noqa: E731
    exported_check.try_batches(run, shape)


if __name__ == "__main__":
    exported_check.try_file(sys.argv[1], _attempt)
