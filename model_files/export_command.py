"""The command ``python test.py export``: writes a network for another runtime, and prints how far the file differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from command_line import Range
from config import Backend, DatasetName
from data_helper import Split
from test_model import DEFAULT_WEIGHTS


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a network for another runtime, and keeps the file only if it agrees with the network to 1e-4.

    Input: pixels, float32 (N, S, S, 3), RGB in 0..255; outputs: probabilities (N, C) and embeddings (N, k, d).
    With --quantize int8 the file computes with 8-bit integers, and is kept only if its accuracy is about the same.
    """

    weights: str | None = None
    """Model file or hf://owner/repo/file.weights.h5; None is the model that comes with the project."""
    format: Literal["onnx", "tflite", "saved_model"] = "onnx"
    """onnx (ONNX Runtime), tflite (LiteRT, phones) or saved_model (TensorFlow Serving)."""
    output: str | None = None
    """File or folder to write; None is <weights>.onnx, <weights>.tflite or <weights>_saved_model, with int8
    <weights>_int8.onnx or <weights>_int8.tflite: beside --weights, or here for the project's model and hf://."""
    quantize: Literal["none", "int8"] = "none"
    """int8 is for onnx and tflite: a third of the size, and faster. The options below are for int8 only."""
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set: images of its split train give the ranges of the integers."""
    split: Split = "val"
    """Its split to measure the accuracy on, before and after."""
    calibration_images: Annotated[int, Range(1, 100_000)] = 512
    """Number of images of the split train."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the choice of these images."""
    max_drop: Annotated[float, Range(0, 100)] = 0.3
    """Percentage points of accuracy that int8 may cost; with a larger loss no file is kept."""
    debug: bool = False
    """Show tracebacks."""
    backend: ClassVar[Backend] = "tensorflow"  # all converters are TensorFlow's; weights files are the same on each


def export(settings: ExportConfig) -> None:
    """Writes a network for another runtime, whole or not at all, and prints how far the file differs from it.

    Raises:
        UserError: see `model_file.load_model`, `export.export_network` and `export.export_quantized`; or data that
            is not prepared.
    """
    from model_files import model_file
    from model_files.export import check_target, default_path, export_network

    weights, quantize = settings.weights or DEFAULT_WEIGHTS, settings.quantize == "int8"
    beside = default_path(weights, settings.format, quantize)
    output = Path(settings.output or (beside if settings.weights else beside.name))
    check_target(output, settings.format, quantize)
    if quantize:
        return _export_quantized(settings, weights, output)
    network, info = model_file.load_model(weights)
    differences = export_network(network, info, output, settings.format)
    print(f"wrote {output}: {info.network.arch}, {len(info.network.class_names)} classes, {_size(output):,} bytes")
    for name, value in differences.items():
        print(f"largest difference from Keras: {value:.1e} in the {name}")


def _export_quantized(settings: ExportConfig, weights: str | Path, output: Path) -> None:
    import evaluation
    from data_helper import open_split
    from model_files import export as exporting
    from model_files import model_file, quantization

    train = open_split(settings.data_dir, settings.dataset.value, "train")
    measured = open_split(settings.data_dir, settings.dataset.value, settings.split)
    network, info = model_file.load_model(weights)
    evaluation.check_classes(network, measured, info.network.class_names)
    images, source = quantization.calibration_images(
        train, info.network.input_size, settings.calibration_images, settings.seed
    )
    data = quantization.Quantization(images, measured, source, settings.max_drop)
    found = exporting.export_quantized(network, info, output, settings.format, data)
    print(
        f"wrote {output}: {info.network.arch}, {len(info.network.class_names)} classes, {_size(output):,} bytes, int8"
    )
    print(f"calibrated on {source}")
    print(f"accuracy on {measured.name}, n = {found.n:,}: {found.before:.2%} before, {found.after:.2%} after")
    print(f"change: {found.points:+.2f} points (a loss of {settings.max_drop:g} is allowed)")
    print(f"same label for {found.same_label:.2%} of the images; mean cosine of the embeddings {found.cosine:.4f}")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
