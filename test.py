"""Recognise expressions, measure, convert and export models: ``python test.py --help`` lists the commands."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

import runtime
from command_line import Range, parse_command
from config import Backend, DatasetName, preferred_backend
from data_helper import Split
from files import UserError, copy_file, run_command
from measuring.views import Views
from reading.text import printable
from recognition.recognize_command import RecognizeConfig, recognize
from recognition.video_command import VideoConfig, video
from test_model import DEFAULT_WEIGHTS, Recognition, TestModels, is_exported

__all__ = ["Recognition", "TestModels"]  # kept for code that was written for the published repository


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnSplitConfig:
    """The options of every command that runs networks over a prepared split."""

    data_dir: str = "data"
    """Folder of the prepared data sets."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 256
    """Images per batch; the result depends on it by rounding only."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras computes with; the results are the same to rounding."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(_OnSplitConfig):
    """Measures a weights file on a prepared split and writes result.json, predictions and figures."""

    weights: str
    """Model file to measure: ours, a published .h5, one of keras.Model.save, or hf://owner/repo/file.weights.h5."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set to measure on."""
    split: Split = "val"
    """Its split to measure on."""
    run_dir: str | None = None
    """Where the report goes; None is runs/evaluate-<run>-<weights>-<dataset>-<split>[-<views>]-<8 hex digits>."""
    views: Views = "none"
    """Average the probabilities over views of each image: flip is it and its mirror image; ten-crop is five crops of
    7/8 of the side (corners, centre) and their mirror images."""
    flip: bool = False
    """Short for --views flip."""
    explain: bool = False
    """Add explain.png: mean Grad-CAM (of the images as they are) by class and vector; and the maps' mean overlap."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the bootstrap intervals and of the t-SNE figure."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Writes a model file in our own form: a published .h5, or what keras.Model.save wrote of a network of ours.

    It also makes a file smaller (half precision), cuts it into parts, and joins such parts.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Model file to read; or a folder of parts, or their manifest, to join."""
    target: Annotated[str, tyro.conf.Positional]
    """Model file to write (.weights.h5); with --parts a folder."""
    half: bool = False
    """Write the kernels in half precision (float16): half the size. Networks are float32 when loaded."""
    parts: Annotated[int | None, Range(1, 1_000_000)] = None
    """Write the file as parts of at most so many MiB, with a manifest that holds their SHA-256."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    debug: bool = False
    """Show tracebacks."""


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
    """File or folder to write; None is <weights>.onnx, <weights>.tflite or <weights>_saved_model, here; with int8
    <weights>_int8.onnx or <weights>_int8.tflite."""
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


@dataclasses.dataclass(frozen=True)
class CalibrateConfig(_OnSplitConfig):
    """Calibrates a model file's probabilities on a prepared split, and keeps the two fitted numbers in the file.

    They act wherever the file is used, and in its exports. No label changes.
    """

    weights: Annotated[str, tyro.conf.Positional]
    """Model file to calibrate, in our own form (train.py and test.py convert write it)."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set to fit on."""
    split: Split = "val"
    """Its split to fit on; do not measure the calibration on the same one."""


@dataclasses.dataclass(frozen=True)
class TeachConfig(_OnSplitConfig):
    """Writes the mean probabilities of one or more models on a split, as a file for train.py --teacher."""

    weights: tuple[str, ...]
    """Model files of the teachers, as for evaluate."""
    output: str = "teacher.npz"
    """File to write (.npz)."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set that the student will train on."""
    split: Split = "train"
    """Its split."""


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    """Describes a model file, and names code in it that was ignored."""

    file: Annotated[str, tyro.conf.Positional]
    """Model file: ours, a published one, one of keras.Model.save, or hf://owner/repo/file.weights.h5."""
    json: bool = False
    """Print one JSON object instead of lines."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras reads the file with; the facts are the same."""
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

    if is_exported(settings.weights):
        raise UserError(
            f"{settings.weights}: evaluate measures weights files, not exported ones; name the file that it was made "
            "from (python test.py export --quantize int8 prints the accuracy of the file that it writes)"
        )
    if settings.flip and settings.views == "ten-crop":
        raise UserError("--flip: expected to be used without --views ten-crop, whose crops are mirrored already")
    views = "flip" if settings.flip else settings.views
    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    network, info = model_file.load_model(settings.weights)
    folder = settings.run_dir or evaluation.default_folder(settings.weights, split, views, settings.seed)
    if (Path(folder) / "config.json").exists():
        raise UserError(f"--run-dir {folder}: holds a training run, whose result this would replace; choose another")
    chosen = evaluation.selected_on(info.dataset, info.metrics, split)
    result = evaluation.evaluate(
        network,
        split,
        folder,
        batch_size=settings.batch_size,
        seed=settings.seed,
        views=views,
        with_maps=settings.explain,
        extra={
            "weights": str(settings.weights),
            "trained_on": info.dataset,
            **({"selected_on": chosen} if chosen else {}),
            **evaluation.calibration(info),
        },
    )
    print(evaluation.format_table(result))
    print(f"\nwrote {folder}/")
    return result


def convert(settings: ConvertConfig) -> None:
    """Writes any model file in our own form, whole or in parts; or joins the parts of one. Whole or not at all.

    Parts are joined to the very file that was cut, unless ``half`` asks for another one.

    Raises:
        UserError: a source that cannot be read (`model_file.load_model`, `parts.join`), a target without
            ``.weights.h5``, numbers beyond half precision.
    """
    from model_files import model_file, parts

    target = settings.target
    if settings.parts is None:
        model_file.check_target(target)
    elif target.endswith(".h5") or Path(target).is_file():
        raise UserError(f"{target}: expected a folder for the parts, received the name of a file")
    joins = parts.is_in_parts(settings.source)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "joined.weights.h5" if joins else settings.source
        if joins:
            parts.join(settings.source, file)
        network, info = model_file.load_model(file)
        if settings.half or not joins:
            file = Path(folder) / "converted.weights.h5"
            origin = f"{info.origin}; converted from {Path(settings.source).name}"
            model_file.save_model(file, network, dataclasses.replace(info, origin=origin), settings.half)
        if settings.parts is None:
            copy_file(file, target)
        else:
            number = len(parts.split(file, target, settings.parts << 20))
            target = f"{target}/{parts.MANIFEST} and {number} parts"
    print(f"wrote {target}: {info.network.arch}, {len(info.network.class_names)} classes")


def export(settings: ExportConfig) -> None:
    """Writes a network for another runtime, whole or not at all, and prints how far the file differs from it.

    Raises:
        UserError: see `model_file.load_model`, `export.export_network` and `export.export_quantized`; or data that
            is not prepared.
    """
    from model_files import model_file
    from model_files.export import check_target, default_path, export_network

    weights, quantize = settings.weights or DEFAULT_WEIGHTS, settings.quantize == "int8"
    output = Path(settings.output) if settings.output else default_path(weights, settings.format, quantize)
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
    evaluation.check_classes(network, measured)
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


def calibrate(settings: CalibrateConfig) -> None:
    """Calibrates a model file, writes it whole or not at all, and prints what changes.

    Raises:
        UserError: a file of another form or on the Hub, classes that do not fit, or too few images.
    """
    from data_helper import open_split
    from model_files import calibrate as calibrating
    from model_files import hub

    if hub.is_address(settings.weights):
        raise UserError(f"{settings.weights}: expected a file on this machine to write to; download it first")
    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    found = calibrating.measure(settings.weights, split, settings.batch_size)
    _, info = calibrating.calibrate(settings.weights, split, settings.batch_size)
    fitted = f"temperature {info.network.temperature:.4f}, exponent {info.network.exponent:.4f}"
    print(f"{fitted}, fitted on {split.name}, {found.n:,} images\n")
    print(calibrating.format_table(found))
    print("\nafter: too low, because the same images fitted the calibration")
    print("cross-fitted: each half of the images with the calibration that fits the other half")
    print(f"\nwrote {settings.weights}")


def teach(settings: TeachConfig) -> None:
    """Writes the teachers' probabilities on a split.

    Raises:
        UserError: data not prepared, or see `distillation.write_teacher`.
    """
    from data_helper import open_split
    from training import distillation

    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    distillation.write_teacher(settings.output, settings.weights, split, settings.batch_size)


def describe(settings: DescribeConfig) -> None:
    """Prints the facts of a model file, one per line or as one JSON object."""
    from model_files import model_file

    facts = model_file.describe(settings.file)
    if settings.json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {printable(value)}")


_COMMANDS = {
    "recognize": (RecognizeConfig, recognize),
    "video": (VideoConfig, video),
    "evaluate": (EvaluateConfig, evaluate),
    "convert": (ConvertConfig, convert),
    "export": (ExportConfig, export),
    "calibrate": (CalibrateConfig, calibrate),
    "describe": (DescribeConfig, describe),
    "teach": (TeachConfig, teach),
}


def main() -> None:
    settings = parse_command({name: cls for name, (cls, _) in _COMMANDS.items()}, description=__doc__)
    if isinstance(settings, VideoConfig):  # it chooses the backend itself, after its clip or camera is open
        return video(settings)
    if isinstance(settings, RecognizeConfig) and not settings.images:
        raise UserError("recognize: expected one or more images, received none")
    if not (isinstance(settings, RecognizeConfig) and is_exported(settings.weights)):
        runtime.choose_backend(settings.backend)
    run = next(run for cls, run in _COMMANDS.values() if isinstance(settings, cls))
    run(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
