"""Exports a network as an ONNX, TensorFlow Lite or SavedModel file, and checks that the file agrees with it.

All three take ``pixels`` float32 (N, S, S, 3), RGB in 0..255, S the network's own size, and return ``probabilities``
float32 (N, C) and ``embeddings`` float32 (N, k, d), for any N. Class names and size travel with the file, as one JSON
object named ``ad_corre``: in ONNX's ``metadata_props``, in a zip behind the TensorFlow Lite model (as in TFLite
Metadata; ``unzip -p model.tflite ad_corre.json`` shows it), in the SavedModel's folder ``assets.extra``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np

import evaluation
import runtime
from files import UserError, whole_file, whole_folder
from images import resize_image
from model_files import hub
from model_files.description import ATTRIBUTE, ExportInfo, ModelInfo, to_json
from model_files.lite_check import INFO_NAME
from model_files.onnx_network import OnnxNetwork
from model_files.quantization import Accuracies, Quantization, Run, quantize_onnx, quantized_tflite
from model_files.serving import onnx_layers, plain_layers, serving_network

TOLERANCE = 1e-4
_NUM_IMAGES = 16
_LONGEST_REASON = 400


def export_network(network: keras.Model, info: ModelInfo, path: str | Path, format: str) -> dict[str, float]:
    """Writes a network in another runtime's format, whole or not at all, and only if the file agrees with it.

    That runtime runs the file on seeded random images, all at once and one alone.

    Args:
        network: what `model_file.load_model` returned, on the TensorFlow backend.
        info: its description.
        path: ends with ``.onnx`` or ``.tflite``; a folder for ``saved_model``. An existing file is replaced, a folder
            only if it is a SavedModel.
        format: ``onnx``, ``tflite`` or ``saved_model``.

    Returns:
        The largest absolute difference of ``probabilities`` and of ``embeddings``.

    Raises:
        UserError: see `check_target`; another backend; or a file that differs by more than `TOLERANCE`.
    """
    with _written(network, info, path, format) as run:
        differences = compare(run, network, info.network.input_size)
        if not all(value <= TOLERANCE for value in differences.values()):  # NaN too
            raise UserError(
                f"{path}: the {format} file does not agree with the network, so it was not kept: expected a difference "
                f"of at most {TOLERANCE:g}, found {differences['probabilities']:.2g} in the probabilities and "
                f"{differences['embeddings']:.2g} in the embeddings; try another --format or other package versions"
            )
    return differences


def export_quantized(
    network: keras.Model, info: ModelInfo, path: str | Path, format: str, data: Quantization
) -> Accuracies:
    """As `export_network`, but computes with 8-bit integers, and keeps the file only if its accuracy is about the same.

    Args:
        network, info, path: see `export_network`.
        format: ``onnx`` or ``tflite``.
        data: what calibrates and measures it.

    Raises:
        UserError: see `export_network`; or see `Quantization.measure`.
    """
    about = dataclasses.replace(info, origin=f"{info.origin}; int8, calibrated on {data.source}")
    with _written(network, about, path, format, data.calibration) as run:
        return data.measure(run, network, path)


@contextlib.contextmanager
def _written(
    network: keras.Model, info: ModelInfo, path: str | Path, format: str, calibration: np.ndarray | None = None
) -> Iterator[Run]:
    """Writes a file and runs it; it is put in its place when the block ends without an error."""
    check_target(path, format, quantize=calibration is not None)
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"{path}: exporting needs the TensorFlow backend, Keras runs on {keras.backend.backend()}; "
            "set KERAS_BACKEND=tensorflow before Python starts (a weights file is the same on every backend)"
        )
    about = ExportInfo(info.network, info.dataset, info.origin)
    plan = _FORMATS[format]
    with plan.whole(path) as temporary:
        try:
            with _quiet():
                serving = serving_network(network, info.network.input_size)
                with plain_layers(serving):
                    plan.write(serving, temporary, about, *(() if calibration is None else (calibration,)))
                run = plan.open(temporary)
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever a converter raises: an operation that it does not know, a full disk
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise UserError(
                f"{path}: this network could not be written as {format} ({type(error).__name__}: {reason}); "
                "nothing was kept; try another --format, or --debug for the traceback"
            ) from error
        yield run


def check_target(path: str | Path, format: str, quantize: bool = False) -> None:
    """Refuses a target that could not be written or not be checked, before anything is computed.

    Raises:
        UserError: an unknown format, a SavedModel in 8 bits, a package that is not installed, a name without the
            format's ending, a folder that is no SavedModel.
    """
    if format not in _FORMATS:
        raise UserError(f"format: expected one of {', '.join(_FORMATS)}, received {format!r}")
    if quantize and not _FORMATS[format].quantizes:
        able = " or ".join(name for name, plan in _FORMATS.items() if plan.quantizes)
        raise UserError(f"--quantize int8: expected --format {able}, received {format}")
    plan = _FORMATS[format]
    if lacking := [name for name in plan.packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format {format}: {' and '.join(lacking)} not installed here, to write the file and to check it; "
            "run: pip install -r requirements-export.txt"
        )
    path = Path(path)
    if format == "saved_model":
        if path.exists() and not is_saved_model(path):
            raise UserError(
                f"{path}: expected a new folder or a SavedModel to replace, found something else; name another --output"
            )
    elif path.suffix != plan.ending:
        raise UserError(f"{path}: expected a name that ends with {plan.ending}")
    elif path.is_dir():
        raise UserError(f"{path}: expected a file to write, found a folder; name another --output")


def default_path(weights: str | Path, format: str, quantize: bool = False) -> Path:
    """Where an export goes by default: beside its weights, whose name it has, with the format's ending.

    Every run's weights have one name, so that the exports of two runs would replace each other anywhere else. What
    comes from the Hub is exported to the current folder, because the Hub's cache is no place of the user's.
    """
    name = Path(weights).name
    for ending in (".weights.h5", ".h5", ".keras"):
        name = name.removesuffix(ending)
    folder = Path() if hub.is_address(weights) else Path(weights).parent
    return folder / (name + ("_int8" if quantize else "") + _FORMATS[format].ending)


def compare(run: Run, network: keras.Model, size: int, seed: int = 0) -> dict[str, float]:
    """The largest absolute difference between a runtime's outputs and the network's.

    Args:
        run: the runtime.
        network: the network that was exported.
        size: its side in pixels.
        seed: of the images: coarse random patterns, because a network hardly distinguishes images of pure noise.

    Returns:
        ``probabilities`` and ``embeddings``; infinite where the shapes differ, NaN where a number is.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (_NUM_IMAGES, 6, 6, 3), np.uint8)
    images = np.stack([resize_image(image, size) for image in coarse])
    expected = evaluation.predict(network, images)
    pixels = images.astype(np.float32)
    all_found, first_found = run(pixels), run(pixels[:1])
    return {
        name: float(np.max((_difference(all_found[i], expected[i]), _difference(first_found[i], expected[i][:1]))))
        for i, name in enumerate(("probabilities", "embeddings"))
    }


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the converters' notices; errors still come back as exceptions."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), runtime.notices_hidden():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ONNX


def _write_onnx(serving: keras.Model, path: Path, info: ExportInfo, calibration: np.ndarray | None = None) -> None:
    import onnx

    # Keras would take the signature from the model's last call, and there was none.
    signature = [keras.InputSpec(shape=serving.input.shape, dtype="float32", name="pixels")]
    with onnx_layers(serving):
        serving.export(path, format="onnx", verbose=False, input_signature=signature)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"  # the converter writes a number
    onnx.helper.set_model_props(model, {ATTRIBUTE: to_json(info)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    if calibration is not None:
        quantize_onnx(path, calibration)


def _open_onnx(path: Path) -> Run:
    return OnnxNetwork(path, gpu=False).run


# TensorFlow Lite


def _write_tflite(serving: keras.Model, path: Path, info: ExportInfo, calibration: np.ndarray | None = None) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        serving.export(folder, format="tf_saved_model", verbose=False)
        if calibration is None:
            path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
        else:
            path.write_bytes(quantized_tflite(folder, calibration))
    with zipfile.ZipFile(path, "a") as behind:
        behind.writestr(INFO_NAME, to_json(info))


def _open_tflite(path: Path) -> Run:
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(str(path))
    interpreter.allocate_tensors()  # now, while its notices are hidden
    runner = interpreter.get_signature_runner("serving_default")
    return lambda pixels: _in_order(runner(pixels=pixels))


# SavedModel


def is_saved_model(path: Path) -> bool:
    return (path / "saved_model.pb").is_file()


def _write_saved_model(serving: keras.Model, folder: Path, info: ExportInfo) -> None:
    serving.export(folder, format="tf_saved_model", verbose=False)
    extra = folder / "assets.extra"  # TensorFlow's name for a user's own files
    extra.mkdir()
    (extra / INFO_NAME).write_text(to_json(info), encoding="utf-8")


def _open_saved_model(folder: Path) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["serving_default"]

    def run(pixels):
        loaded  # the signature does not keep its variables alive  # noqa: B018
        return _in_order({name: value.numpy() for name, value in serve(pixels=tf.constant(pixels)).items()})

    return run


def _in_order(outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return outputs["probabilities"], outputs["embeddings"]


@dataclasses.dataclass(frozen=True)
class _Format:
    """How a format is written and run.

    Attributes:
        ending: of its names.
        packages: what it needs besides TensorFlow.
        whole: makes the temporary file or folder.
        write: writes a `serving_network` to that place.
        open: makes what runs it.
        quantizes: ``write`` also takes calibration images, uint8 (M, S, S, 3), and then writes 8-bit integers.
    """

    ending: str
    packages: tuple[str, ...]
    whole: Callable[[str | Path], contextlib.AbstractContextManager[Path]]
    write: Callable[..., None]
    open: Callable[[Path], Run]
    quantizes: bool = False


_FORMATS = {
    "onnx": _Format(".onnx", ("tf2onnx", "onnx", "onnxruntime"), whole_file, _write_onnx, _open_onnx, True),
    "tflite": _Format(".tflite", (), whole_file, _write_tflite, _open_tflite, True),
    "saved_model": _Format("_saved_model", (), whole_folder, _write_saved_model, _open_saved_model),
}


def open_export(path: str | Path, format: str) -> Run:
    """A function that runs an exported file, one batch per call (`OnnxNetwork.run`); on the CPU but for SavedModels."""
    with _quiet():
        return _FORMATS[format].open(Path(path))
