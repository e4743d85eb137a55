"""The output of ``python test.py recognize``: a table or JSON lines, annotated copies, explanations."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

import faces
import runtime
from command_line import Range
from config import Backend, preferred_backend
from files import UserError
from measuring.views import VIEW_TITLES, Views
from reading.text import printable
from recognition.inputs import IMAGE_ENDINGS, Inputs, open_inputs
from recognition.results import ImageResult, Recognition, unique_names
from test_model import TestModels, is_exported


@dataclasses.dataclass(frozen=True)
class RecognizeConfig:
    """Names the expression of each face in images, best face first."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders (without their subfolders), or patterns in quotes ('photos/**/*.jpg')."""
    weights: str | None = None
    """Model file, hf://owner/repo/file.weights.h5 or an exported .onnx or .tflite; None is the project's own model."""
    json: bool = False
    """Print one JSON object per face instead of a table."""
    save: str | None = None
    """Folder for copies of the images with boxes and labels."""
    explain: str | None = None
    """PNG to write that shows which parts of the face support its label; a folder for several images."""
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
    views: Views = "none"
    """Average the probabilities over views of each face: none, flip (its mirror image) or ten-crop."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 64
    """Faces per step of the network."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras computes with; an exported file needs no Keras."""
    debug: bool = False
    """Show tracebacks."""


def recognize(settings: RecognizeConfig) -> None:
    """Prints the expression of each face, as a table or as one JSON object per line.

    Raises:
        UserError: after everything else is printed: an image that cannot be read, or without a face that is required.
    """
    model = TestModels(
        settings.weights,
        GPU=is_exported(settings.weights) or runtime.has_gpu(),
        detector=settings.detector,
        detector_file=settings.detector_file,
        views=settings.views,
    )
    run(model, settings)


def run(model: TestModels, settings: RecognizeConfig) -> None:
    """Prints a row per face as the results come, and writes what the options ask for.

    Raises:
        UserError: options that cannot be followed; or, after everything else, images that could not be read or have no
            face although one is required.
    """
    inputs = open_inputs(settings.images)
    if settings.save:
        _check_folder("--save", settings.save, ".jpg", inputs)
    explained = _explanations(model, settings.explain, inputs) if settings.explain else None
    saved = unique_names(".jpg")
    if settings.json:
        write = partial(_json_lines, views=settings.views)
    else:
        write = _table([image.name for image in inputs.images], model.class_names)
    if settings.views != "none":
        averaged = f"every probability is the mean over {VIEW_TITLES[settings.views]} (--views {settings.views})"
        tqdm.write(averaged, file=sys.stderr)
    unreadable, without_face = [], []
    for result in model.stream(inputs, settings.detect_face, align=settings.align, batch_size=settings.batch_size):
        for line in write(result):
            tqdm.write(printable(line), file=sys.stdout)
        if result.error is not None:
            unreadable.append(result.name)
            tqdm.write(printable(result.error), file=sys.stderr)
            continue
        if not result.faces:
            without_face.append(result.name)
            tqdm.write(printable(f"{result.name}: no face found"), file=sys.stderr)
        if settings.save:
            result.save(Path(settings.save) / saved(result.name))
        if explained:
            explained(result)
    if unreadable:
        raise UserError(f"could not read {_some(unreadable)} of {inputs.count:,} images")
    if without_face and settings.require_face:
        raise UserError(f"--require-face: found no face in {_some(without_face)} of {inputs.count:,} images")


def _check_folder(option: str, folder: str | Path, ending: str, inputs: Inputs) -> None:
    """Refuses to write files of an ending into a folder from which images of it come: one could be replaced."""
    for path in (Path(image.name) for image in inputs.images):
        if path.suffix.lower() == ending and os.path.realpath(path.parent) == os.path.realpath(folder):
            raise UserError(f"{option} {folder}: expected another folder than that of {path}, which could be replaced")


def _some(names: Sequence[str]) -> str:
    return f"{len(names):,} ({names[0]}{', ...' if len(names) > 1 else ''})"


def _json_lines(result: ImageResult, views: Views) -> list[str]:
    averaged = {} if views == "none" else {"views": views}
    if not result.faces:
        nothing = {
            "image": printable(result.name),
            "face": None,
            "label": None,
            "score": None,
            "box": None,
            "probabilities": None,
        }
        return [json.dumps(nothing | ({"error": printable(result.error)} if result.error is not None else {}))]
    return [
        json.dumps(_fields(result.name, number, face) | averaged, allow_nan=False)
        for number, face in enumerate(result.faces, 1)
    ]


def _fields(name: str, number: int, face: Recognition) -> dict:
    found = {"image": printable(name), "face": number, "label": face.label, "score": face.score, "box": face.box}
    return found | {"probabilities": face.probabilities}


def terminal_columns() -> int | None:
    """Width of the terminal that the rows go to; None when they go to a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _table(names: Sequence[str], class_names: Sequence[str]) -> Callable[[ImageResult], list[str]]:
    """A function from a result to its rows; the first ones come with the table's head.

    A terminal that is too narrow for a column per class gets the label's probability only.
    """
    widths = {
        "image": max(map(len, ("image", *map(printable, names)))),
        "label": max(map(len, ("unreadable", *class_names))),
    }
    cells = [max(6, len(name)) for name in class_names]
    width = sum(widths.values()) + sum(cells) + 2 * len(cells) + len("    score  1234,1234 1234x1234")
    columns = terminal_columns()
    is_narrow = columns is not None and columns < width
    if is_narrow:
        class_names, widths["label"] = (), widths["label"] + len(" 100%")

    def row(image: str, label: str, score: str = "", box: str = "", values: Sequence[str] = ()) -> str:
        line = (f"{printable(image):<{widths['image']}}", f"{label:<{widths['label']}}", f"{score:>5}", f"{box:<19}")
        return "  ".join((*line, *(f"{value:>{cell}}" for value, cell in zip(values, cells, strict=False)))).rstrip()

    head = [row("image", "label", "score", "box", class_names)]

    def rows(result: ImageResult) -> list[str]:
        lines, head[:] = list(head), []
        for face in result.faces:
            x, y, width, height = face.box
            score = "" if face.score is None else f"{face.score:.2f}"
            values = [f"{face.probabilities[name]:.1%}" for name in class_names]
            label = face.text if is_narrow else face.label
            lines.append(row(result.name, label, score, f"{x},{y} {width}x{height}", values))
        return lines if result.faces else [*lines, row(result.name, "unreadable" if result.error else "no face")]

    return rows


def _explanations(model: TestModels, target: str, inputs: Inputs) -> Callable[[ImageResult], None]:
    """A function that draws each face of a result: into the file for one image, into the folder for several."""
    path = Path(target)
    is_file = path.suffix.lower() == ".png"
    if is_file and inputs.count != 1:
        raise UserError(f"--explain {target}: expected a folder for {inputs.count:,} images, received a PNG's name")
    if not is_file and path.suffix.lower() in IMAGE_ENDINGS:
        raise UserError(f"--explain {target}: expected a name that ends with .png, or a folder")
    if is_file and any(os.path.realpath(image.name) == os.path.realpath(path) for image in inputs.images):
        raise UserError(f"--explain {target}: this is the image itself; name another file")
    if not is_file:
        _check_folder("--explain", path, ".png", inputs)
    model.check_explains()
    name_for = unique_names("")

    def draw(result: ImageResult) -> None:
        if not result.faces:
            return
        folder, stem = (path.parent, path.stem) if is_file else (path, name_for(result.name))
        folder.mkdir(parents=True, exist_ok=True)
        explanation = model.explain(result.faces)
        for i in range(len(result.faces)):
            name = f"{stem}{f'-face{i + 1}' if i else ''}.png"
            explanation.save_figure(folder / name, i, model.class_names)

    return draw
