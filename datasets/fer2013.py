"""Reader of FER-2013: every form of the official release, its label codes, splits and official counts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from command_line import Range
from datasets.shared.archives import SourceFiles, file_identity
from datasets.shared.dataset import DataSet
from datasets.shared.expressions import ANGER, CLASS_NAMES, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from datasets.shared.release import Release, ReleaseOptions, stratified_hold_out, write_release
from datasets.shared.tables import Table, few_names, find_table, found_in
from files import UserError
from images import decode_image
from reading.text import quoted


@dataclasses.dataclass(frozen=True)
class PrepareFer2013Config(ReleaseOptions):
    """FER-2013: fer2013.csv, icml_face_data.csv, train.csv or the train/ and test/ folders; a zip of any of these."""

    source: str
    """The official release: a CSV file, a folder, a zip or a tar."""
    val_share: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of train held out for validation, stratified by class, of a source without PublicTest (train.csv)."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the hold-out."""


IMAGE_SHAPE = (48, 48, 1)
CODES = {"0": ANGER, "1": DISGUST, "2": FEAR, "3": HAPPY, "4": SAD, "5": SURPRISE, "6": NEUTRAL}  # the CSV's emotion
FOLDERS = {  # by name: the folders' alphabetical order is not the order of the CSV's codes
    "angry": ANGER,
    "disgust": DISGUST,
    "fear": FEAR,
    "happy": HAPPY,
    "neutral": NEUTRAL,
    "sad": SAD,
    "surprise": SURPRISE,
}
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
# Images per class in the official release, in the order of `CLASS_NAMES`.
OFFICIAL_COUNTS = {
    "train": (4965, 7215, 4830, 3171, 4097, 436, 3995),
    "val": (607, 895, 653, 415, 496, 56, 467),
    "test": (626, 879, 594, 416, 528, 55, 491),
}

_FORMS = (
    "expected fer2013.csv, icml_face_data.csv or train.csv, a folder, zip or tar that holds one of them, or one with "
    "train/<class>/Training_*.jpg and test/<class>/{PublicTest,PrivateTest}_*.jpg"
)
# The more complete first; test.csv has no labels, and is read only to say so.
_CSV_NAMES = ("fer2013.csv", "icml_face_data.csv", "train.csv", "test.csv")
_PATTERNS = ("train/*/*", "test/*/*")
_IMAGE = re.compile(r"(?:^|/)(train|test)/([^/]+)/([^/]+)$")
_USAGES = {"train": ("Training",), "test": ("PublicTest", "PrivateTest")}
_PIXELS = {str(value): value for value in range(256)}


def prepare_fer2013(settings: PrepareFer2013Config) -> dict[str, dict[str, Any]]:
    """Prepares FER-2013 from any form of the official release, with a progress bar.

    The CSV forms hold the exact pixels; the folder form holds them as JPEG, which `meta.json` says (``form``).

    Args:
        settings: where from (``fer2013.csv``, ``icml_face_data.csv``, ``train.csv``, the folder form, or a folder, zip
            or tar of these) and where to; writes ``fer2013/{train,val,test}``, uint8 (N, 48, 48, 1), in the order of
            the CSV or of the file names.

    Returns:
        Split -> the content of its `meta.json`; a split that the source lacks is absent, and an earlier one stays.

    Raises:
        UserError: the source is missing, of no known form, or damaged; what was prepared earlier is untouched.
    """
    return write_release(settings.data_dir, "fer2013", _read(Path(settings.source), settings))


def _read(source: Path, settings: PrepareFer2013Config) -> Release:
    """Finds out which form the source has, and reads it."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; {_FORMS}")
    if table := find_table(source, _CSV_NAMES):
        return _read_csv(table, settings)
    files = SourceFiles(source, _PATTERNS)
    images = [name for name in files.names if _IMAGE.search(name)]
    if images:
        return _read_folders(files, images, settings)
    raise UserError(f"{source}: found {found_in(source)}; {_FORMS}")


def _release(
    counts: collections.Counter[str], examples: Iterator, source: dict[str, Any], options: dict[str, Any]
) -> Release:
    bar = tqdm(examples, "preparing fer2013", counts.total(), unit="image", disable=None)
    present = {split: counts[split] for split in SPLITS.values() if counts[split]}
    return Release(present, bar, IMAGE_SHAPE, CLASS_NAMES[: len(CODES)], [source], options)


def _with_validation(
    found: Sequence[tuple[str, int]], settings: PrepareFer2013Config, name: str
) -> tuple[list[str], dict[str, Any]]:
    """The split of each image, with ``--val-share`` of train as val; and the options that are then recorded.

    Args:
        found: split and label of each image.
        settings: of which ``val_share`` and ``seed`` are read.
        name: of the source, for messages.
    """
    splits = [split for split, _ in found]
    if not settings.val_share:
        return splits, {}
    if set(splits) != {"train"}:
        raise UserError(
            f"--val-share {settings.val_share:g}: expected a source with Training images only, which has no "
            f"validation part; {name} has {' and '.join(sorted(set(splits)))}"
        )
    held_out = stratified_hold_out([label for _, label in found], settings.val_share, settings.seed)
    options = {"val_share": settings.val_share, "seed": settings.seed}
    return ["val" if out else "train" for out in held_out], options


# --- CSV ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An image of a CSV form: its place, for messages, its split, canonical label and pixels as text."""

    where: str
    split: str
    label: int
    pixels: str

    def image(self) -> np.ndarray:
        """uint8 (48, 48, 1) from 2304 numbers 0..255 row by row."""
        values = self.pixels.split()
        if len(values) != np.prod(IMAGE_SHAPE):
            raise UserError(f"{self.where}: expected 2304 pixels (48 x 48), found {len(values)}; is the file cut off?")
        try:
            image = bytes(map(_PIXELS.__getitem__, values))
        except KeyError as error:
            raise UserError(
                f"{self.where}: expected pixels as whole numbers 0..255, found {quoted(error.args[0])}"
            ) from None
        return np.frombuffer(image, np.uint8).reshape(IMAGE_SHAPE)


def csv_rows(table: Table) -> Iterator[Row]:
    """Yields the images of a CSV form; without a column Usage all are Training."""
    for where, cells in table.rows(_check_columns, _FORMS):
        usage, code = cells.get("Usage", "Training").strip(), cells["emotion"].strip()
        check_usage(usage, where)
        if code not in CODES:
            raise UserError(f"{where}: expected an emotion 0..6, found {quoted(code)}")
        yield Row(where, SPLITS[usage], CODES[code], cells["pixels"])


def check_usage(usage: str, where: str) -> None:
    """Refuses any other value than a key of `SPLITS`."""
    if usage not in SPLITS:
        raise UserError(f"{where}: expected Usage {', '.join(SPLITS)}, found {quoted(usage)}")


def _read_csv(table: Table, settings: PrepareFer2013Config) -> Release:
    """Reads a CSV form twice: first counting, then, as the release is written, the pixels."""
    found = [(row.split, row.label) for row in csv_rows(table)]
    if not found:
        raise UserError(f"{table.name}: the table has no rows; expected one per image; download it again")
    splits, options = _with_validation(found, settings, table.name)
    # Without an end, so that a row that was not counted reaches the writer, which reports it.
    into = itertools.chain(splits, itertools.repeat("train"))
    examples = ((split, row.image(), row.label) for row, split in zip(csv_rows(table), into, strict=False))
    return _release(collections.Counter(splits), examples, file_identity(table.path), {"form": "csv", **options})


def _check_columns(columns: Sequence[str], name: str) -> None:
    if not columns:
        raise UserError(f"{name}: the file is empty; {_FORMS}")
    if "pixels" in columns and "emotion" not in columns:
        raise UserError(
            f"{name}: this file has pixels but no labels (found columns {few_names(columns)}); the same images with "
            "labels are in fer2013.csv and in icml_face_data.csv (PublicTest and PrivateTest): give one of those"
        )
    if not {"emotion", "pixels"} <= set(columns):
        raise UserError(
            f"{name}: expected columns 'emotion', 'pixels' and 'Usage', found {few_names(columns)}; {_FORMS}"
        )


# --- folders --------------------------------------------------------------------------------------------------------


def _read_folders(files: SourceFiles, names: Sequence[str], settings: PrepareFer2013Config) -> Release:
    """Reads the folder form, in the order of the names."""
    places = [_place(files, name) for name in names]
    splits, options = _with_validation(places, settings, str(files.path))
    examples = (
        (split, _folder_image(files, name), label)
        for name, split, (_, label) in zip(names, splits, places, strict=True)
    )
    return _release(collections.Counter(splits), examples, files.identity(names), {"form": "folders", **options})


def _place(files: SourceFiles, name: str) -> tuple[str, int]:
    """The split and canonical label, from an image's path."""
    part, folder, file = _IMAGE.search(name).groups()
    usage = file.split("_")[0]
    if folder.lower() not in FOLDERS:
        raise UserError(f"{files.path}/{name}: expected a class folder {', '.join(FOLDERS)}, found {quoted(folder)}")
    if usage not in _USAGES[part]:
        expected = " or ".join(f"{usage}_*.jpg" for usage in _USAGES[part])
        raise UserError(f"{files.path}/{name}: expected {expected} in {part}/, found {quoted(file)}")
    return SPLITS[usage], FOLDERS[folder.lower()]


def _folder_image(files: SourceFiles, name: str) -> np.ndarray:
    image = decode_image(files.read(name), f"{files.path}/{name}")
    if image.shape != IMAGE_SHAPE:
        height, width, channels = image.shape
        kind = "gray" if channels == 1 else "colour"
        raise UserError(f"{files.path}/{name}: expected a gray image of 48 x 48, found {width} x {height} {kind}")
    return image


DATASET = DataSet(
    name="fer2013",
    title="FER-2013",
    options=PrepareFer2013Config,
    prepare=prepare_fer2013,
    paper="Goodfellow et al., Challenges in Representation Learning: A report on three machine learning contests, "
    "ICONIP 2013",
    request="https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
    official_counts=lambda meta: OFFICIAL_COUNTS,
    paper_key=lambda num_classes: "fer2013",
)
