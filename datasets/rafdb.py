"""Reader of RAF-DB basic: aligned faces or originals, its label codes and official counts."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from command_line import Range
from datasets.shared.annotations import few
from datasets.shared.archives import SourceFiles
from datasets.shared.dataset import DataSet
from datasets.shared.decoding import Box, ImageFile
from datasets.shared.expressions import ANGER, CLASS_NAMES, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from datasets.shared.release import ImageRelease, PrepareOptions, find_prepared, stratified_hold_out, write_images
from files import UserError
from reading import limits
from reading.text import printable


@dataclasses.dataclass(frozen=True)
class PrepareRafdbConfig(PrepareOptions):
    """RAF-DB basic: EmoLabel/list_patition_label.txt and Image/aligned/ or Image/original/."""

    images: Literal["aligned", "original"] = "aligned"
    """original cuts the faces out by Annotation/boundingbox/."""
    size: Annotated[int, Range(1, 4_096)] = 100
    """Side of the prepared images in pixels."""
    val_share: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of the training part held out for validation, stratified by class."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the hold-out."""


CODES = {"1": SURPRISE, "2": FEAR, "3": DISGUST, "4": HAPPY, "5": SAD, "6": ANGER, "7": NEUTRAL}  # the list's
# Images per class in the official release, in the order of `CLASS_NAMES`; the hold-out "val" is part of "train" here.
OFFICIAL_COUNTS = {
    "train": (2524, 4772, 1982, 1290, 281, 717, 705),
    "test": (680, 1185, 478, 329, 74, 160, 162),
}

LIST = "EmoLabel/list_patition_label.txt"  # spelt like that in the release
_ALIGNED, _ORIGINAL, _BOXES = "Image/aligned", "Image/original", "Annotation/boundingbox"
_PATTERNS = [f"{depth}{files}" for depth in ("", "*/") for files in (LIST, f"{_ALIGNED}/*")]
_PATTERNS_ORIGINAL = [f"{depth}{files}" for depth in ("", "*/") for files in (LIST, f"{_ORIGINAL}/*", f"{_BOXES}/*")]
# Some copies name the aligned files, or have a third column, which is not used.
_ROW = re.compile(r"((?:train|test)_[0-9]+)(?:_aligned)?(\.jpg)\s+([0-9]+)(?:\s+[0-9]+)?")
# A form in circulation: the aligned faces in one folder per code, without the list.
_CODE_FOLDERS = [f"{depth}{part}/[1-7]/*" for depth in ("", "*/") for part in ("train", "test")]
_IN_FOLDER = re.compile(r"((?:.*/)?)(train|test)/([1-7])/[^/]+\.(?:jpe?g|png)$", re.IGNORECASE)

Labelled = tuple[str, int]  # train_00001.jpg, canonical code


def prepare_rafdb(settings: PrepareRafdbConfig) -> dict[str, dict[str, Any]]:
    """Prepares RAF-DB basic from the official release: a folder, zip or tar of ``basic/`` or of what is in it.

    Also read is the form in circulation with the aligned faces as ``{train,test}/<code>/*.jpg``.

    The release has aligned faces (100 x 100 pixels), and originals with one bounding box each, from which the faces
    are cut out. An image that the list does not name is left out, and counted in `meta.json` (options, ``unlisted``).

    Args:
        settings: where from, where to and what; writes ``rafdb/{train,val,test}``, uint8 (N, size, size, 3) RGB, in
            the order of the list. ``test`` is the official test part, ``val`` the hold-out of the training part.

    Returns:
        Split -> the content of its `meta.json`.

    Raises:
        UserError: the source is missing, of another layout, incomplete or damaged; what was prepared stays untouched.
    """
    original = settings.images == "original"
    files = SourceFiles(settings.source, _PATTERNS_ORIGINAL if original else [*_PATTERNS, *_CODE_FOLDERS])
    sources = [files.stamp()]
    options = {"images": settings.images, "val_share": settings.val_share, "seed": settings.seed}
    known = {**options, "size": settings.size}
    if prepared := find_prepared(settings.data_dir, "rafdb", sources, known, strict=settings.strict):
        return prepared
    names = set(files.names)
    if not original and (images := _in_code_folders(files, settings)):
        options["unlisted"] = 0
    else:
        top = _top(files.path, names)
        rows = _read_list(files.read(top + LIST, limits.LIST_BYTES), f"{files.path}/{top}{LIST}")
        images = _images(files, top, rows, original, settings)
        options["unlisted"] = _report_unlisted(names, top + (_ORIGINAL if original else _ALIGNED), images)
    release = ImageRelease(files, images, settings.size, 3, CLASS_NAMES[: len(CODES)], sources, options)
    return write_images(settings.data_dir, "rafdb", release, strict=settings.strict, workers=settings.workers)


def _top(source: Path, names: set[str]) -> str:
    """The folder of the release inside the source, ending in ``/``, or nothing."""
    found = sorted(name.removesuffix(LIST) for name in names if f"/{name}".endswith(f"/{LIST}"))
    if len(found) != 1:
        what = " and ".join(top or "one at the top" for top in found[:3]) or f"no {LIST}"
        raise UserError(
            f"{source}: expected one RAF-DB basic release, with {LIST} and Image/, found {what}; give its folder "
            "basic/, or a zip or tar of that"
        )
    return found[0]


def _read_list(data: bytes, path: str) -> list[Labelled]:
    """The images and canonical codes of the list, in its order."""
    text = data.decode("utf-8", errors="replace").removeprefix("\ufeff")
    rows: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _ROW.fullmatch(line.strip())
        if row is None:
            raise UserError(
                f"{where}: expected an image and a code, as 'train_00001.jpg 5', found {line[:60]!r}; "
                "is the file cut off? Take it from the release again"
            )
        stem, ending, code = row.groups()
        name = stem + ending
        if code not in CODES:
            raise UserError(
                f"{where}: expected a code 1..7, found {printable(code, 20)}; take the list from the release again"
            )
        if name in rows:
            raise UserError(f"{where}: {name} is in the list for the second time; take it from the release again")
        rows[name] = CODES[code]
    for part in ("train", "test"):
        if not any(name.startswith(part) for name in rows):
            raise UserError(f"{path}: the list has no {part} images; is it cut off? Take it from the release again")
    return list(rows.items())


def _images(
    files: SourceFiles, top: str, rows: Sequence[Labelled], original: bool, settings: PrepareRafdbConfig
) -> list[ImageFile]:
    """The listed images with their splits and boxes, all files exist."""
    stems = [PurePosixPath(name).stem for name, _ in rows]
    paths = [f"{top}{_ORIGINAL}/{stem}.jpg" if original else f"{top}{_ALIGNED}/{stem}_aligned.jpg" for stem in stems]
    _check_there(files, paths, "images", "Image/original/" if original else "Image/aligned/")
    boxes: list[Box | None] = [None] * len(rows)
    if original:
        box_paths = [f"{top}{_BOXES}/{stem}_boundingbox.txt" for stem in stems]
        _check_there(files, box_paths, "bounding boxes", f"{_BOXES}/")
        boxes = [_read_box(files.read(path, limits.ANNOTATION_BYTES), f"{files.path}/{path}") for path in box_paths]
    labels = [label for _, label in rows]
    splits = _splits([stem.partition("_")[0] for stem in stems], labels, settings)
    return [ImageFile(*row) for row in zip(splits, paths, labels, boxes, strict=True)]


def _splits(parts: Sequence[str], labels: Sequence[int], settings: PrepareRafdbConfig) -> list[str]:
    """The split of each image from its official part, ``train`` or ``test``."""
    train = [place for place, part in enumerate(parts) if part == "train"]
    held_out = stratified_hold_out([labels[place] for place in train], settings.val_share, settings.seed)
    splits = ["test"] * len(parts)
    for place, is_val in zip(train, held_out.tolist(), strict=True):
        splits[place] = "val" if is_val else "train"
    return splits


def _in_code_folders(files: SourceFiles, settings: PrepareRafdbConfig) -> list[ImageFile]:
    """The images of ``{train,test}/<code>/``, in the order of their names; none where the list is there."""
    found = [(match, name) for name in files.names if (match := _IN_FOLDER.match(name))]
    tops = sorted({match[1] for match, _ in found})
    if not found or any(name.endswith(LIST) for name in files.names):
        return []
    parts = [match[2].lower() for match, _ in found]
    if len(tops) > 1 or len(set(parts)) < 2:
        raise UserError(
            f"{files.path}: expected train/<code>/*.jpg and test/<code>/*.jpg in one folder, found {len(tops)} folders "
            f"with {' and '.join(sorted(set(parts)))}; give the folder that holds both"
        )
    labels = [CODES[match[3]] for match, _ in found]
    splits = _splits(parts, labels, settings)
    return [ImageFile(split, name, label) for split, (_, name), label in zip(splits, found, labels, strict=True)]


def _check_there(files: SourceFiles, paths: Sequence[str], what: str, folder: str) -> None:
    names = set(files.names)
    missing = [path for path in paths if path not in names]
    if missing:
        raise UserError(
            f"{files.path}: {len(missing):,} of the {len(paths):,} {what} that the list needs are missing "
            f"({few(missing)}); expected all of them in {folder}: unpack or download the release again"
        )


def _read_box(data: bytes, path: str) -> Box:
    """x, y, width, height from a file of x1 y1 x2 y2."""
    try:
        left, top, right, bottom = map(float, data.decode("utf-8", errors="replace").split())
    except ValueError:
        left = top = right = bottom = 0.0
    if not (left < right and top < bottom and max(map(abs, (left, top, right, bottom))) < 1e6):
        raise UserError(
            f"{path}: expected four numbers x1 y1 x2 y2 in pixels, x1 < x2 and y1 < y2, found {data[:60]!r}; "
            "take the file from the release again"
        )
    return left, top, right - left, bottom - top


def _report_unlisted(names: set[str], folder: str, images: Sequence[ImageFile]) -> int:
    """Prints on standard error how many images the list does not name, and the first three."""
    listed = {image.name for image in images}
    pattern = re.compile(rf"{re.escape(folder)}/[^/.][^/]*\.jpe?g", re.IGNORECASE)
    bare = sorted(name for name in names if name not in listed and pattern.fullmatch(name))
    if bare:
        print(f"left out {len(bare):,} images that {LIST} does not name ({few(bare)})", file=sys.stderr)
    return len(bare)


DATASET = DataSet(
    name="rafdb",
    title="RAF-DB",
    options=PrepareRafdbConfig,
    prepare=prepare_rafdb,
    paper="Li, Deng and Du, Reliable Crowdsourcing and Deep Locality-Preserving Learning for Expression Recognition in "
    "the Wild, CVPR 2017",
    request="by e-mail, http://www.whdeng.cn/RAF/model1.html",
    official_counts=lambda meta: OFFICIAL_COUNTS,
    paper_key=lambda num_classes: "rafdb",
)
