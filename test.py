"""Recognise expressions, measure, convert and export models: ``python test.py --help`` lists the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

import faces
import runtime
from command_line import Range, parse_command
from config import Backend, DatasetName
from data_helper import Split
from files import UserError, run_command
from test_model import DEFAULT_WEIGHTS, Recognition, TestModels, is_onnx

__all__ = ["Recognition", "TestModels"]  # as the published repository's users import them


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measures a weights file on a prepared split and writes result.json, predictions and figures."""

    weights: str
    """Model file to measure: ours, a published .h5, or one of keras.Model.save."""
    dataset: DatasetName = DatasetName.fer2013
    split: Split = "val"
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    run_dir: str | None = None
    """Where the report goes; None is runs/evaluate-<weights>-<dataset>-<split>."""
    flip: bool = False
    """Average the probabilities of each image and its mirror image (test-time augmentation)."""
    batch_size: int = 256
    seed: int = 0
    """Seed of the bootstrap intervals and of the t-SNE figure."""
    backend: Backend = "tensorflow"
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class RecognizeConfig:
    """Names the expression of each face in images, best face first."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders (without their subfolders), or patterns in quotes ('photos/**/*.jpg')."""
    weights: str | None = None
    """Model file, as for evaluate, or an exported .onnx; None is trained_models/fer2013_mini_xcp.weights.h5."""
    json: bool = False
    """Print one JSON object per face instead of a table."""
    save: str | None = None
    """Folder for copies of the images with boxes and labels."""
    explain: str | None = None
    """PNG to write that shows which parts of the face speak for its label; a folder for several images."""
    require_face: bool = False
    """End with exit code 2 when an image has no face."""
    detect_face: bool = True
    """Find the faces first; an image that is a face crop already is used whole. Without, every image is."""
    detector: faces.DetectorName = "auto"
    """What finds the faces (docs/faces.md); auto is mtcnn where it is installed, else haar."""
    detector_file: str | None = None
    """Model file of yunet; None fetches it once."""
    align: bool = False
    """Turn the eyes level, where the detector gives landmarks."""
    batch_size: Annotated[int, Range(1, None)] = 64
    """Faces per step of the network."""
    backend: Backend = "tensorflow"
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Writes a model file in our own form: a published .h5, or what keras.Model.save wrote of a network of ours."""

    source: Annotated[str, tyro.conf.Positional]
    """Model file to read."""
    target: Annotated[str, tyro.conf.Positional]
    """Model file to write (.weights.h5)."""
    backend: Backend = "tensorflow"
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a network for another runtime, and keeps the file only if it agrees with the network to 1e-4.

    Input: pixels, float32 (N, S, S, 3), RGB in 0..255; outputs: probabilities (N, C) and embeddings (N, k, d).
    """

    weights: str | None = None
    """Model file, as for evaluate; None is trained_models/fer2013_mini_xcp.weights.h5."""
    format: Literal["onnx", "tflite", "saved_model"] = "onnx"
    """onnx (ONNX Runtime), tflite (LiteRT, phones) or saved_model (TensorFlow Serving)."""
    output: str | None = None
    """File or folder to write; None is <weights>.onnx, <weights>.tflite or <weights>_saved_model, here."""
    debug: bool = False
    """Show tracebacks."""
    backend: ClassVar[Backend] = "tensorflow"  # all converters are TensorFlow's; weights files are the same on each


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    """Describes a model file, and names code in it that was ignored."""

    file: Annotated[str, tyro.conf.Positional]
    """Model file: ours, a published one, or one of keras.Model.save."""
    json: bool = False
    """Print one JSON object instead of lines."""
    backend: Backend = "tensorflow"
    debug: bool = False
    """Show tracebacks."""


def evaluate(settings: EvaluateConfig) -> dict[str, Any]:
    """Measures a weights file on a prepared split and writes the report.

    Returns:
        What `result.json` holds (`evaluation.evaluate`).

    Raises:
        UserError: no such weights or data, or classes that do not fit.
    """
    import evaluation
    from data_helper import open_split
    from model_files import model_file

    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    network, info = model_file.load_model(settings.weights)
    name = Path(settings.weights).stem.removesuffix(".weights")
    folder = Path(settings.run_dir or f"runs/evaluate-{name}-{split.name.replace('/', '-')}")
    result = evaluation.evaluate(
        network,
        split,
        folder,
        batch_size=settings.batch_size,
        seed=settings.seed,
        flip=settings.flip,
        extra={"weights": str(settings.weights), "trained_on": info.dataset},
    )
    print(evaluation.format_table(result))
    print(f"\nwrote {folder}/")
    return result


def recognize(settings: RecognizeConfig) -> None:
    """Prints the expression of each face, as a table or as one JSON object per line.

    Raises:
        UserError: after everything else is printed: an image that cannot be read, or without a face that is required.
    """
    import recognize_command

    model = TestModels(
        settings.weights,
        GPU=is_onnx(settings.weights) or runtime.has_gpu(),
        detector=settings.detector,
        detector_file=settings.detector_file,
    )
    recognize_command.run(model, settings)


def convert(settings: ConvertConfig) -> None:
    """Writes any model file in our own form, whole or not at all.

    Raises:
        UserError: a source that cannot be read (`model_file.load_model`), a target without ``.weights.h5``.
    """
    from model_files import model_file

    model_file.check_target(settings.target)
    network, info = model_file.load_model(settings.source)
    origin = f"{info.origin}; converted from {Path(settings.source).name}"
    model_file.save_model(settings.target, network, dataclasses.replace(info, origin=origin))
    print(f"wrote {settings.target}: {info.network.arch}, {len(info.network.class_names)} classes")


def export(settings: ExportConfig) -> None:
    """Writes a network for another runtime, whole or not at all, and prints how far the file differs from it.

    Raises:
        UserError: see `model_file.load_model` and `export.export_network`.
    """
    from model_files import model_file
    from model_files.export import check_target, default_path, export_network

    weights = settings.weights or DEFAULT_WEIGHTS
    output = Path(settings.output) if settings.output else default_path(weights, settings.format)
    check_target(output, settings.format)
    network, info = model_file.load_model(weights)
    differences = export_network(network, info, output, settings.format)
    print(f"wrote {output}: {info.network.arch}, {len(info.network.class_names)} classes, {_size(output):,} bytes")
    for name, value in differences.items():
        print(f"largest difference from Keras: {value:.1e} in the {name}")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def describe(settings: DescribeConfig) -> None:
    """Prints the facts of a model file, one per line or as one JSON object."""
    from model_files import model_file

    facts = model_file.describe(settings.file)
    if settings.json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


_COMMANDS = {
    "recognize": (RecognizeConfig, recognize),
    "evaluate": (EvaluateConfig, evaluate),
    "convert": (ConvertConfig, convert),
    "export": (ExportConfig, export),
    "describe": (DescribeConfig, describe),
}


def main() -> None:
    settings = parse_command({name: cls for name, (cls, _) in _COMMANDS.items()}, description=__doc__)
    if isinstance(settings, RecognizeConfig) and not settings.images:
        raise UserError("recognize: expected one or more images, received none")
    if not (isinstance(settings, RecognizeConfig) and is_onnx(settings.weights)):
        runtime.choose_backend(settings.backend)
    run = next(run for cls, run in _COMMANDS.values() if isinstance(settings, cls))
    run(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
