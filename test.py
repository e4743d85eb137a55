"""Recognise expressions, measure, convert and export models: ``python test.py --help`` lists the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

import runtime
from command_line import Range, option, parse_command
from config import Backend, DatasetName, OnSplitConfig, preferred_backend
from data_helper import PreparedSplit, Split
from files import UserError, copy_file, only_writer, run_command, sha256
from labels.suspects_command import SuspectsConfig, suspects
from measuring.study import Study
from measuring.views import Views
from model_files.average_command import AverageConfig, average
from model_files.export_command import ExportConfig, export
from reading.text import printable
from recognition.recognize_command import RecognizeConfig, recognize
from recognition.video_command import VideoConfig, video
from test_model import Recognition, TestModels, is_exported

__all__ = ["Recognition", "TestModels"]  # kept for code that was written for the published repository


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(OnSplitConfig):
    """Measures a weights file on a prepared split and writes result.json, predictions and figures."""

    weights: str
    """Model file to measure: ours, a published .h5, one of keras.Model.save, or hf://owner/repo/file.weights.h5."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set to measure on."""
    split: Split = "val"
    """Its split to measure on."""
    run_dir: str | None = None
    """Where the report goes; None is runs/evaluate-<run>-<weights>-<dataset>-<split>[-<views>]-<8 hex digits>, and
    behind it what else is measured (-corruptions, -groups-..., -also-..., -explain)."""
    views: Views = "none"
    """Average the probabilities over views of each image: flip is it and its mirror image; ten-crop is five crops of
    7/8 of the side (corners, centre) and their mirror images."""
    flip: bool = False
    """Short for --views flip."""
    corruptions: bool = False
    """Add the accuracy under 13 corruptions (light, blur, noise, JPEG, moves) and corruptions.png; takes 14 times as
    long (docs/robustness.md)."""
    groups: str | None = None
    """CSV file with the columns image (row number of the split, from 0) and group: add the measures of each group, a
    test of the largest gap, and groups.png (docs/robustness.md)."""
    explain: bool = False
    """Add explain.png: mean Grad-CAM (of the images as they are) by class and vector; and the maps' mean overlap."""
    also: DatasetName | None = None
    """Another prepared data set with the same images (ferplus for fer2013): score against its labels too."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the bootstrap intervals, the t-SNE figure, the corruptions and the test of groups."""


@dataclasses.dataclass(frozen=True)
class EvaluateCommand(EvaluateConfig):
    """Measures a weights file on a prepared split and writes result.json, predictions and figures.

    Several weights files or data sets give a matrix: every file on every data set (docs/robustness.md).
    """

    weights: tuple[str, ...]
    """Model files to measure: ours, a published .h5, one of keras.Model.save, or hf://owner/repo/file.weights.h5."""
    dataset: tuple[DatasetName, ...] = (DatasetName.fer2013,)
    """Prepared data sets to measure on."""


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
class CalibrateConfig(OnSplitConfig):
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
class TeachConfig(OnSplitConfig):
    """Writes the mean probabilities of one or more models on a split, as a file for train.py --teacher."""

    weights: tuple[str, ...]
    """Model files of the teachers, as for evaluate."""
    output: str
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

    views = _views(settings)
    _check_not_exported(settings.weights)
    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    more, studies = _studies(settings, split)
    network, info = model_file.load_model(settings.weights)
    evaluation.check_classes(network, split, info.network.class_names)
    folder = settings.run_dir or f"{evaluation.default_folder(settings.weights, split, views, settings.seed)}{more}"
    evaluation.check_free(folder)
    chosen = evaluation.selected_on(info.dataset, info.metrics, split)
    extra = {
        "weights": str(settings.weights),
        "trained_on": info.dataset,
        **({"selected_on": chosen} if chosen else {}),
        **evaluation.calibration(info),
    }
    with only_writer(folder):
        result = evaluation.evaluate(
            network,
            split,
            folder,
            batch_size=settings.batch_size,
            seed=settings.seed,
            views=views,
            with_maps=settings.explain,
            studies=studies,
            extra=extra,
        )
    print(evaluation.format_table(result))
    print(f"\nwrote {folder}/")
    return result


def _studies(settings: EvaluateConfig, split: PreparedSplit) -> tuple[str, list[Study]]:
    """What else is measured, and the end of the folder's name: a report of more never replaces one of less."""
    from labels.second_labels import find_second_labels
    from labels.second_ruler import SecondRuler
    from measuring.groups import open_groups
    from reporting.robustness import Robustness

    name, studies = "", []
    if settings.corruptions:
        studies.append(Robustness(split, settings.seed))
        name += "-corruptions"
    if settings.groups is not None:
        studies.append(open_groups(settings.groups, split, settings.seed))
        name += f"-groups-{sha256(settings.groups)[:8]}"
    if settings.also is not None:
        second = find_second_labels(settings.data_dir, settings.also.value, split)
        studies.append(SecondRuler(split, second, settings.seed))
        name += f"-also-{second.dataset}-{second.digest[:8]}"
    if settings.explain:
        name += "-explain"
    return name, studies


def evaluate_all(settings: EvaluateCommand) -> dict[str, Any]:
    """`evaluate` for one weights file and one data set; for more, measures every file on every data set.

    Returns:
        What `result.json` or `matrix.json` holds.

    Raises:
        UserError: see `evaluate` and `matrix_command.measure_matrix`; no file or data set; or an option that a matrix
            does not have.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(EvaluateConfig)}
    for name in ("weights", "dataset"):
        if not values[name]:
            raise UserError(f"--{name}: expected one or more, received none")
    if len(settings.weights) == len(settings.dataset) == 1:
        return evaluate(EvaluateConfig(**{**values, "weights": settings.weights[0], "dataset": settings.dataset[0]}))
    for field in dataclasses.fields(EvaluateConfig):
        if field.name not in _OF_A_MATRIX and values[field.name] != field.default:
            raise UserError(f"{option(field.name)}: expected one of --weights and one of --dataset, received several")
    from model_files.matrix_command import measure_matrix

    for weights in settings.weights:
        _check_not_exported(weights)
    return measure_matrix(settings, [dataset.value for dataset in settings.dataset], _views(settings))


# The options of `evaluate` that a matrix has too.
_OF_A_MATRIX = {*OnSplitConfig.__dataclass_fields__, "weights", "dataset", "split", "run_dir", "views", "flip", "seed"}


def _check_not_exported(weights: str) -> None:
    if is_exported(weights):
        raise UserError(
            f"{weights}: evaluate measures weights files, not exported ones; name the file that it was made from "
            "(python test.py export --quantize int8 prints the accuracy of the file that it writes)"
        )


def _views(settings: EvaluateConfig) -> Views:
    if settings.flip and settings.views == "ten-crop":
        raise UserError("--flip: expected to be used without --views ten-crop, whose crops are mirrored already")
    return "flip" if settings.flip else settings.views


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
    source = Path(os.path.realpath(settings.source))
    if joins and settings.parts is not None and Path(os.path.realpath(target)) in (source, source.parent):
        raise UserError(f"{target}: expected another folder than that of the source: a failure would lose the file")
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
    "evaluate": (EvaluateCommand, evaluate_all),
    "convert": (ConvertConfig, convert),
    "export": (ExportConfig, export),
    "average": (AverageConfig, average),
    "calibrate": (CalibrateConfig, calibrate),
    "describe": (DescribeConfig, describe),
    "teach": (TeachConfig, teach),
    "suspects": (SuspectsConfig, suspects),
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
