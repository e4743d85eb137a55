"""Reader of AffectNet: recognises the release, crops by its face boxes, holds out val, knows the official counts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tqdm import tqdm

from command_line import Range
from datasets.shared.annotations import (
    NOT_EXPRESSIONS,
    annotated_folders,
    drop_reason,
    expression_code,
    few,
    read_annotated,
)
from datasets.shared.archives import SourceFiles
from datasets.shared.dataset import DataSet
from datasets.shared.decoding import ImageFile
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.release import ImageRelease, PrepareOptions, find_prepared, stratified_hold_out, write_images
from datasets.shared.tables import Table
from files import UserError
from reading.text import printable, quoted


@dataclasses.dataclass(frozen=True)
class PrepareAffectnetConfig(PrepareOptions):
    """AffectNet: the 2021 release (train_set/, val_set/) or the first one (training.csv, validation.csv)."""

    classes: Literal[7, 8] = 7
    """8 keeps contempt."""
    size: Annotated[int, Range(1, 4_096)] = 224
    """Side of the prepared images in pixels."""
    margin: Annotated[float, Range(0, 10)] = 0.0
    """Share of the face box added on each side (first release)."""
    val_share: Annotated[float, Range(0, 0.9)] = 0.05
    """Share of the training part held out for validation, stratified by class; the official validation is test."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the hold-out."""


# Images per class in the official releases, in the order of `CLASS_NAMES`; the hold-out "val" is part of "train" here.
_OFFICIAL_TRAIN = (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750)
OFFICIAL_COUNTS = {
    "2021": {"train": _OFFICIAL_TRAIN, "test": (500, 500, 500, 500, 500, 500, 500, 499)},
    "first": {"train": _OFFICIAL_TRAIN, "test": (500, 500, 500, 500, 500, 500, 500, 500)},
}

_FOLDERS = {"train_set": "train", "val_set": "test"}
_TABLES = {"training.csv": "train", "validation.csv": "test"}
_COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
_FORMS = (
    "expected the 2021 release (train_set/ and val_set/, each with images/<id>.jpg and annotations/<id>_exp.npy) or "
    "the first one (training.csv, validation.csv and their images), in a folder, zip or tar, or one folder deeper"
)
_TABLE_PATTERNS = [f"{depth}{table}" for depth in ("", "*/", "*/*/") for table in _TABLES]
_FOLDER_PATTERNS = [
    f"{depth}{folder}/{files}"
    for depth in ("", "*/")
    for folder in _FOLDERS
    for files in ("images/*", "annotations/*_exp.npy")
]


class _Labelled(NamedTuple):
    """An image of a release: its name, its code 0..10 and, in the first release, its face box."""

    name: str
    code: int
    box: tuple[float, float, float, float] | None = None


def prepare_affectnet(settings: PrepareAffectnetConfig) -> dict[str, dict[str, Any]]:
    """Prepares AffectNet from either official release, which is recognised automatically, with progress bars.

    Left out are codes 8 (none), 9 (uncertain) and 10 (non-face), contempt when 7 classes are asked for, and in the
    first release boxes without an area; `meta.json` counts them (options, ``left_out``, by official part).

    Args:
        settings: where from, where to and what is kept; writes ``affectnet/{train,val,test}``, uint8
            (N, size, size, 3) RGB. ``test`` is the official validation part, ``val`` the hold-out of the training
            part. Images of the first release are cropped by their face boxes.

    Returns:
        Split -> the content of its `meta.json`; a split that the source lacks is absent, and an earlier one stays.

    Raises:
        UserError: the source is missing, of no known form, incomplete or damaged; what was prepared stays untouched.
    """
    files = _open(Path(settings.source))
    sources = [files.stamp()]
    chosen = {"classes": settings.classes, "val_share": settings.val_share, "seed": settings.seed}
    known = {**chosen, "size": settings.size, "margin": settings.margin}
    known |= {"pictures_without_annotation": 0} if settings.strict else {}
    if found := find_prepared(settings.data_dir, "affectnet", sources, known, strict=settings.strict):
        return found
    form, labelled, bare = _read(files, settings.strict)
    if form == "2021" and settings.margin:
        raise UserError("--margin: expected 0 for the 2021 release, whose images are cut out already")
    images, left_out = _kept(labelled, settings)
    options = {"form": form, **chosen, "pictures_without_annotation": bare, "left_out": left_out}
    class_names = CLASS_NAMES[: settings.classes]
    release = ImageRelease(files, images, settings.size, 3, class_names, sources, options, settings.margin)
    return write_images(settings.data_dir, "affectnet", release, strict=settings.strict, workers=settings.workers)


def _open(source: Path) -> SourceFiles:
    """Opens a source; of a folder it lists no more than the form needs: a release has over a million files."""
    is_first = source.is_dir() and SourceFiles(source, _TABLE_PATTERNS).names
    return SourceFiles(source, ["**/*"] if is_first else _FOLDER_PATTERNS)


def _read(files: SourceFiles, strict: bool) -> tuple[str, dict[str, list[_Labelled]], int]:
    """Finds out which release a source holds and reads its labels.

    Returns:
        The key of `OFFICIAL_COUNTS`, ``train`` and ``test`` with their images, and the number of images that no
        annotation names.
    """
    folders = {name: folder for name, folder in annotated_folders(files.names).items() if _last(name) in _FOLDERS}
    tables = [name for name in files.names if _last(name) in _TABLES]
    if folders and tables:
        raise UserError(f"{files.path}: expected one release, found both ({few([*folders, *tables])}); give one alone")
    if not folders and not tables:
        found = sorted(path.name for path in files.path.iterdir()) if files.path.is_dir() else files.names
        raise UserError(f"{files.path}: found {few(found)}; {_FORMS}")
    if tables:
        return "first", _read_tables(files, _by_split(files.path, tables, _TABLES)), 0
    labelled, bare = {}, 0
    for split, name in _by_split(files.path, folders, _FOLDERS).items():
        pairs, bare_here = read_annotated(folders[name], f"{files.path}/{name}", files.read, strict)
        labelled[split] = [_Labelled(*pair) for pair in pairs]
        bare += bare_here
    return "2021", labelled, bare


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _by_split(source: Path, names: Iterable[str], splits: dict[str, str]) -> dict[str, str]:
    """Split -> the one name among ``names`` that holds it, ``train`` first."""
    found: dict[str, str] = {}
    for name in names:
        split = splits[_last(name)]
        if split in found:
            raise UserError(f"{source}: expected one {_last(name)}, found {found[split]} and {name}; give one alone")
        found[split] = name
    return dict(sorted(found.items(), reverse=True))


def _kept(
    labelled: dict[str, list[_Labelled]], settings: PrepareAffectnetConfig
) -> tuple[list[ImageFile], dict[str, dict[str, int]]]:
    """Leaves out images of other classes than the chosen ones, and holds out the validation split.

    Returns:
        The images of ``train``, ``val`` and ``test``, and official part -> reason -> number of what is left out.
    """
    images, left_out = [], {}
    for split, found in labelled.items():
        reasons = [_reason(image, settings.classes) for image in found]
        left_out[split] = dict(collections.Counter(filter(None, reasons)))
        kept = [image for image, reason in zip(found, reasons, strict=True) if reason is None]
        if not kept:
            raise UserError(f"{settings.source}: no image of the {settings.classes} classes is left for {split}")
        splits = [split] * len(kept)
        if split == "train":
            held_out = stratified_hold_out([image.code for image in kept], settings.val_share, settings.seed)
            splits = ["val" if out else "train" for out in held_out]
        images += [ImageFile(into, *image) for into, image in zip(splits, kept, strict=True)]
    return images, left_out


def _reason(image: _Labelled, num_classes: int) -> str | None:
    has_area = image.box is None or min(image.box[2:]) > 0
    return drop_reason(image.code, num_classes) or (None if has_area else "no face box")


# --- the first release ----------------------------------------------------------------------------------------------


def _read_tables(files: SourceFiles, tables: dict[str, str]) -> dict[str, list[_Labelled]]:
    """Reads the tables and finds, somewhere below the source, the images of the rows with an expression."""
    rows = {split: list(_rows(files, table)) for split, table in tables.items()}
    wanted = {row.name for found in rows.values() for row in found if row.code not in NOT_EXPRESSIONS}
    places = _places(files, wanted)
    if missing := sorted(wanted - places.keys()):
        raise UserError(
            f"{files.path}: {len(missing):,} of the {len(wanted):,} images that {' and '.join(tables.values())} name "
            f"are missing ({few(missing)}); searched {files.path} for names that end like that, as in "
            f"Manually_Annotated_Images/{printable(missing[0], 80)}; is the release unpacked whole, with the tables "
            "beside it?"
        )
    return {
        split: [row._replace(name=places.get(row.name, row.name)) for row in found] for split, found in rows.items()
    }


def _places(files: SourceFiles, wanted: Collection[str]) -> dict[str, str]:
    """``<subdir>/<file>`` -> its name in the source, whatever folders it lies in."""
    places: dict[str, str] = {}
    for name in files.names:
        for tail in _tails(name):
            if tail in wanted:
                if tail in places:
                    raise UserError(
                        f"{files.path}: expected each image once, found {places[tail]} and {name}; "
                        "leave only the release's own images there"
                    )
                places[tail] = name
    return places


def _tails(name: str) -> Iterator[str]:
    """``a/b/c``, ``b/c`` and ``c`` of ``a/b/c``."""
    yield name
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def _rows(files: SourceFiles, table: str) -> Iterator[_Labelled]:
    """Yields the rows of a table, with or without a header; those without an expression come without a box."""
    name = f"{files.path}/{printable(table)}"
    lines = Table(files.path, name, lambda: files.open(table)).lines(_FORMS)
    columns: list[str] = []
    for where, row in tqdm(lines, f"reading {printable(table)}", unit="row", disable=None):
        if not columns:
            columns = _columns(row, name)
            if columns[0] == row[0].strip():
                continue
        yield _labelled(row, columns, where)
    if not columns:
        raise UserError(f"{name}: the table is empty; expected one row per image; download it again")


def _columns(row: Sequence[str], name: str) -> list[str]:
    """The table's columns, from its first row; some copies of validation.csv begin with an image's row instead."""
    columns = [cell.strip() for cell in row]
    if len(row) == len(_COLUMNS) and _is_number(row[_COLUMNS.index("expression")]):
        return list(_COLUMNS)
    if missing := [column for column in _COLUMNS if column not in columns]:
        raise UserError(
            f"{name}: expected the columns {', '.join(_COLUMNS)}, or rows of them without a header, "
            f"found {few(columns)} (no {', '.join(missing)}); {_FORMS}"
        )
    return columns


def _labelled(row: Sequence[str], columns: Sequence[str], where: str) -> _Labelled:
    if len(row) != len(columns):
        raise UserError(f"{where}: expected {len(columns)} columns, found {len(row)}; is the file cut off?")
    cells = dict(zip(columns, row, strict=True))
    name, code = cells["subDirectory_filePath"].strip(), expression_code(cells["expression"].strip(), where)
    if code in NOT_EXPRESSIONS:
        return _Labelled(name, code)
    # Valence and arousal are not used; a table that is cut off lacks them first.
    for column in ("face_x", "face_y", "face_width", "face_height", "valence", "arousal"):
        if not _is_number(cells[column]):
            raise UserError(
                f"{where}: expected a number in {column}, found {quoted(cells[column])}; is the file cut off?"
            )
    x, y, width, height = (float(cells[column]) for column in _COLUMNS[1:5])
    return _Labelled(name, code, (x, y, width, height))


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < 1e6  # pixels, of which no image has so many; false for NaN
    except ValueError:
        return False


DATASET = DataSet(
    name="affectnet",
    title="AffectNet",
    options=PrepareAffectnetConfig,
    prepare=prepare_affectnet,
    paper="Mollahosseini, Hasani and Mahoor, AffectNet: A Database for Facial Expression, Valence, and Arousal "
    "Computing in the Wild, IEEE Transactions on Affective Computing 2019",
    request="by a professor or lab manager, http://mohammadmahoor.com/pages/databases/affectnet/",
    official_counts=lambda meta: OFFICIAL_COUNTS.get(meta["options"].get("form"), {}),
    paper_key=lambda num_classes: "affectnet_7" if num_classes == 7 else None,
)
