"""Reader of a data set of one's own: one folder of images per class, below train/ and optionally val/ and test/."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from command_line import Range
from datasets.shared.annotations import few
from datasets.shared.archives import SourceFiles
from datasets.shared.dataset import DataSet
from datasets.shared.decoding import ImageFile
from datasets.shared.expressions import ANGER, CLASS_NAMES, CONTEMPT, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from datasets.shared.release import ImageRelease, PrepareOptions, find_prepared, stratified_hold_out, write_images
from files import UserError
from reading.text import printable


@dataclasses.dataclass(frozen=True)
class PrepareFoldersConfig(PrepareOptions):
    """A data set of your own: train/<class>/*.jpg, and val/ and test/ where it has them."""

    classes: Literal[7, 8] = 7
    """8 keeps contempt."""
    mapping: str = ""
    """Folders whose names are not the classes': folder=Class, with commas; folder=none leaves one out."""
    size: Annotated[int, Range(1, 4_096)] = 224
    """Side of the prepared images in pixels."""
    val_share: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of train held out for validation, stratified by class, where there is no folder val/."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the hold-out."""


_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAMES = {
    NEUTRAL: ("neutral",),
    HAPPY: ("happy", "happiness", "joy"),
    SAD: ("sad", "sadness"),
    SURPRISE: ("surprise", "surprised"),
    FEAR: ("fear", "fearful"),
    DISGUST: ("disgust", "disgusted"),
    ANGER: ("anger", "angry"),
    CONTEMPT: ("contempt", "contemptuous"),
}
_CODES = {name: code for code, names in _NAMES.items() for name in names}
_LEFT_OUT = "none"  # the class of a folder that `mapping` leaves out
_PATTERNS = ["*/*/*", "*/*/*/*", "*/*/*/*/*"]
_IMAGE = re.compile(rf"(?:^|.*/)({'|'.join(_SPLITS)})/([^/]+)/[^/]+\.(?:jpe?g|png|bmp|tiff?|webp|gif)$", re.IGNORECASE)


def prepare_folders(settings: PrepareFoldersConfig) -> dict[str, dict[str, Any]]:
    """Prepares one folder of images per class, with a progress bar.

    A folder's class is the one it is named after, in English and in upper or lower case (``happy``, ``Happiness``), or
    the one that ``mapping`` gives it. Contempt is left out, and counted in `meta.json`, with 7 classes.

    Args:
        settings: where from, where to and what; writes ``folders/{train,val,test}``, uint8 (N, size, size, 3) RGB,
            in the order of the file names. Without a folder ``val`` (or ``valid``, ``validation``) it is held out of
            train.

    Returns:
        Split -> the content of its `meta.json`; a split that the source lacks is absent, and an earlier one stays.

    Raises:
        UserError: the source is missing, of another layout or damaged, or a folder is named after no class.
    """
    files = SourceFiles(settings.source, _PATTERNS)
    sources = [files.stamp()]
    mapping = _read_mapping(settings.mapping)
    chosen = {"classes": settings.classes, "mapping": mapping, "val_share": settings.val_share, "seed": settings.seed}
    known = {**chosen, "size": settings.size}
    if found := find_prepared(settings.data_dir, "folders", sources, known, strict=settings.strict):
        return found
    labelled = [(match, name) for name in files.names if (match := _IMAGE.match(name))]
    if not labelled:
        raise UserError(
            f"{settings.source}: expected images as train/<class>/*.jpg, and val/ and test/ beside train/ if there are "
            f"any, in a folder, zip or tar; found {few(list(map(printable, files.names)))}"
        )
    codes = _codes({match[2] for match, _ in labelled}, mapping, settings.source)
    left_out: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    images = []
    for match, name in labelled:
        split, code = _SPLITS[match[1].lower()], codes[match[2]]
        if code is None or code >= settings.classes:
            left_out[split]["contempt" if code == CONTEMPT else _LEFT_OUT] += 1
        else:
            images.append(ImageFile(split, name, code))
    if not any(image.split == "train" for image in images):
        raise UserError(f"{settings.source}: no image of the {settings.classes} classes is left for train")
    options = {**chosen, "left_out": {split: dict(reasons) for split, reasons in left_out.items()}}
    images = _with_validation(images, settings.val_share, settings.seed)
    release = ImageRelease(files, images, settings.size, 3, CLASS_NAMES[: settings.classes], sources, options)
    return write_images(settings.data_dir, "folders", release, strict=settings.strict, workers=settings.workers)


def _read_mapping(text: str) -> dict[str, str]:
    """``folder=Class,...`` as folder -> class name or ``none``, both in lower case."""
    mapping: dict[str, str] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        folder, _, name = (part.strip().lower() for part in entry.rpartition("="))
        if not folder or folder in mapping or name not in (*_CODES, _LEFT_OUT):
            raise UserError(
                f"--mapping: expected folder=Class with commas, each folder once, Class one of "
                f"{', '.join(CLASS_NAMES)} or {_LEFT_OUT}, received {entry!r}"
            )
        mapping[folder] = name
    return mapping


def _codes(folders: set[str], mapping: dict[str, str], source: str) -> dict[str, int | None]:
    """Folder -> canonical code, None for one that is left out."""
    if absent := sorted(mapping.keys() - {folder.lower() for folder in folders}):
        raise UserError(
            f"--mapping {printable(absent[0], 40)}=...: expected the name of a folder in {source}, found "
            f"{few(sorted(printable(folder, 40) for folder in folders))}"
        )
    names = {folder: mapping.get(folder.lower(), folder.lower()) for folder in folders}
    unknown = sorted(printable(folder, 40) for folder, name in names.items() if name not in (*_CODES, _LEFT_OUT))
    if unknown:
        raise UserError(
            f"{source}: expected folders named after {', '.join(CLASS_NAMES)}, found {few(unknown)}; say what they are "
            f"with --mapping {unknown[0]}=Happy, or leave them out with --mapping {unknown[0]}={_LEFT_OUT}"
        )
    return {folder: _CODES.get(name) for folder, name in names.items()}


def _with_validation(images: Sequence[ImageFile], share: float, seed: int) -> list[ImageFile]:
    """Holds ``val`` out of train, unless there is one."""
    if any(image.split == "val" for image in images):
        return list(images)
    train = [image for image in images if image.split == "train"]
    held_out = dict(zip(train, stratified_hold_out([image.label for image in train], share, seed), strict=True))
    return [dataclasses.replace(image, split="val") if held_out.get(image) else image for image in images]


DATASET = DataSet(
    name="folders",
    title="class folders",
    options=PrepareFoldersConfig,
    prepare=prepare_folders,
    request="a folder of your own",
)
