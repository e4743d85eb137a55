"""Reader of FER+: ten people's votes on each image of FER-2013, the majority rule, and FER-2013's pixels.

`fer2013new.csv` holds votes only, one row per image of FER-2013's CSV, in its order.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from datasets.fer2013 import IMAGE_SHAPE, SPLITS, check_usage, csv_rows
from datasets.shared.archives import file_identity
from datasets.shared.dataset import DataSet
from datasets.shared.expressions import ANGER, CLASS_NAMES, CONTEMPT, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from datasets.shared.release import Release, ReleaseOptions, write_release
from datasets.shared.tables import Table, find_table, found_in, is_archive
from files import UserError
from reading.text import quoted


@dataclasses.dataclass(frozen=True)
class PrepareFerplusConfig(ReleaseOptions):
    """FER+: fer2013new.csv beside fer2013.csv (majority rule; votes.npy keeps the distribution)."""

    source: str
    """fer2013.csv or icml_face_data.csv, or a folder, zip or tar that holds one of them."""
    labels: str | None = None
    """fer2013new.csv; None looks for it in the source, then beside it."""
    classes: Literal[7, 8] = 8
    """8 keeps contempt."""


# Images per class that the majority rule keeps, in the order of `CLASS_NAMES`.
OFFICIAL_COUNTS = {
    "train": (8740, 7287, 3014, 3149, 532, 119, 2100, 119),
    "val": (1182, 865, 351, 415, 62, 24, 287, 13),
    "test": (1090, 893, 384, 396, 83, 18, 273, 16),
}

UNKNOWN, NOT_A_FACE = len(CLASS_NAMES), len(CLASS_NAMES) + 1  # other options that people can vote for
_COLUMNS = {  # of the votes; by name, because their order is not that of our codes
    "neutral": NEUTRAL,
    "happiness": HAPPY,
    "surprise": SURPRISE,
    "sadness": SAD,
    "anger": ANGER,
    "disgust": DISGUST,
    "fear": FEAR,
    "contempt": CONTEMPT,
    "unknown": UNKNOWN,
    "NF": NOT_A_FACE,
}
_NO_MAJORITY = -1
_REASONS = {_NO_MAJORITY: "no majority", CONTEMPT: "contempt", UNKNOWN: "unknown", NOT_A_FACE: "not a face"}

_LABELS = "fer2013new.csv"
_PIXEL_TABLES = ("fer2013.csv", "icml_face_data.csv")
_FORMS = f"expected {_LABELS} of FER+: the columns Usage, Image name, {', '.join(_COLUMNS)}, one row per image"


def prepare_ferplus(settings: PrepareFerplusConfig) -> dict[str, dict[str, Any]]:
    """Prepares FER+ from FER-2013's CSV and `fer2013new.csv` by the majority rule, with a progress bar.

    `meta.json` counts what the rule leaves out (options, ``left_out``, by split).

    Args:
        settings: where from, where to and how many classes; writes ``ferplus/{train,val,test}``, uint8
            (N, 48, 48, 1), in the order of the CSV, and in each `votes.npy`, float32 (N, C): the shares of the
            classes in the votes (`vote_shares`).

    Returns:
        Split -> the content of its `meta.json`.

    Raises:
        UserError: a file is missing, of another form, or damaged; the two files are not of the same images in
            the same order. What was prepared earlier is untouched.
    """
    source = Path(settings.source)
    pixels = _find_pixels(source)
    ballots = _find_ballots(source, settings.labels)
    splits, votes = read_votes(ballots)
    winners = majority(votes)
    kept = (winners >= 0) & (winners < settings.classes)
    counts, shares, left_out = {}, {}, {}
    for split in SPLITS.values():
        here = splits == split
        counts[split] = int(np.sum(here & kept))
        if not counts[split]:
            raise UserError(f"{ballots.name}: the majority rule leaves no image for {split}; {_FORMS}")
        shares[split] = vote_shares(votes[here & kept], settings.classes)
        left_out[split] = dict(collections.Counter(_REASONS[winner] for winner in winners[here & ~kept].tolist()))
    examples = _examples(pixels, ballots.name, splits, np.where(kept, winners, _NO_MAJORITY))
    bar = tqdm(examples, "preparing ferplus", sum(counts.values()), unit="image", disable=None)
    sources = [file_identity(path) for path in dict.fromkeys((pixels.path, ballots.path))]
    options = {"form": "csv", "rule": "majority", "classes": settings.classes, "left_out": left_out}
    release = Release(counts, bar, IMAGE_SHAPE, CLASS_NAMES[: settings.classes], sources, options, shares)
    return write_release(settings.data_dir, "ferplus", release)


# --- the majority rule ----------------------------------------------------------------------------------------------


def majority(votes: np.ndarray) -> np.ndarray:
    """The expression that the majority saw in each image.

    An option with a single vote does not count. The winner needs more than half of the votes that are left, including
    those for unknown and for no face. On the official file this keeps 25,060, 3,199 and 3,153
    images, the published counts, where exactly half would keep 25,841 and half of all ten votes 21,811.

    Args:
        votes: int (N, 10), in the order of `CLASS_NAMES`, then unknown and not a face.

    Returns:
        int64 (N,), the winner's column, or -1 where nothing has a majority.
    """
    counted = _counted(votes)
    return np.where(2 * counted.max(axis=1) > counted.sum(axis=1), counted.argmax(axis=1), _NO_MAJORITY)


def vote_shares(votes: np.ndarray, num_classes: int) -> np.ndarray:
    """The shares of the first classes in the votes that `majority` counts, of images that one of them has won.

    Args:
        votes: int (N, 10), as for `majority`.
        num_classes: C, 7 or 8.

    Returns:
        float32 (N, C), rows sum to 1; the winner's share is above a half.
    """
    counted = _counted(votes)[:, :num_classes]
    return (counted / counted.sum(axis=1, keepdims=True)).astype(np.float32)


def _counted(votes: np.ndarray) -> np.ndarray:
    return np.where(votes > 1, votes, 0)


# --- the two tables -------------------------------------------------------------------------------------------------


def _find_pixels(source: Path) -> Table:
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected {' or '.join(_PIXEL_TABLES)}, or where it lies")
    if table := find_table(source, _PIXEL_TABLES):
        return table
    raise UserError(
        f"{source}: expected {' or '.join(_PIXEL_TABLES)}, found {found_in(source)}; the votes of FER+ belong to the "
        "rows of that file, and the folder form of FER-2013 (train/<class>/Training_*.jpg) does not tell which row a "
        "image was"
    )


def _find_ballots(source: Path, labels: str | None) -> Table:
    """Looks where ``labels`` says, otherwise in the source and then beside it."""
    places = [Path(labels)] if labels else [source, source.parent / _LABELS]
    for place in places:
        # A file given by --labels is the table whatever its name; the source, if no archive, is the table of pixels.
        may_hold = place.is_dir() or is_archive(place) or (place != source and place.is_file())
        if may_hold and (table := find_table(place, [_LABELS])):
            return table
    raise UserError(
        f"{_LABELS}: expected the votes of FER+ in {' or '.join(map(str, places))}, found none; download it from the "
        f"repository microsoft/FERPlus and name it with --labels"
    )


def _check_columns(columns: Sequence[str], name: str) -> None:
    if missing := [column for column in ("Usage", *_COLUMNS) if column not in columns]:
        raise UserError(f"{name}: expected the columns Usage and {', '.join(_COLUMNS)}, no {missing[0]!r} is there")


def read_votes(ballots: Table) -> tuple[np.ndarray, np.ndarray]:
    """The split of each row, str (N,), and its votes, int64 (N, 10) as `majority` wants them."""
    splits, votes = [], []
    for where, cells in ballots.rows(_check_columns, _FORMS):
        usage = cells["Usage"].strip()
        check_usage(usage, where)
        row = [0] * len(_COLUMNS)
        for column, option in _COLUMNS.items():
            text = cells[column].strip()
            if not (text.isascii() and text.isdigit() and len(text) < 4):
                raise UserError(f"{where}: expected a number of votes in {column}, found {quoted(text)}")
            row[option] = int(text)
        splits.append(SPLITS[usage])
        votes.append(row)
    return np.array(splits, str), np.array(votes, np.int64).reshape(-1, len(_COLUMNS))


def _examples(
    pixels: Table, ballots: str, splits: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (split, image, label) of each row whose label is not -1, and checks that both tables fit together."""
    rows = csv_rows(pixels)
    number = 0
    # The rows come last, because zip must not take one row more than there are votes.
    for number, (split, label, row) in enumerate(zip(splits.tolist(), labels.tolist(), rows, strict=False), start=1):
        if row.split != split:
            usages = {split: usage for usage, split in SPLITS.items()}
            raise UserError(
                f"{row.where}: expected a {usages[split]} image, as in row {number:,} of {ballots}, found "
                f"{usages[row.split]}; both files must hold the same images in the same order"
            )
        if label != _NO_MAJORITY:
            yield split, row.image(), label
    more = sum(1 for _ in rows)
    if more or number != len(splits):
        raise UserError(
            f"{pixels.name}: expected {len(splits):,} images, as {ballots} has rows, found {number + more:,}; "
            f"take the whole {' or '.join(_PIXEL_TABLES)}, whose rows the votes belong to"
        )


DATASET = DataSet(
    name="ferplus",
    title="FER+",
    options=PrepareFerplusConfig,
    prepare=prepare_ferplus,
    paper="Barsoum et al., Training Deep Networks for Facial Expression Recognition with Crowd-Sourced Label "
    "Distribution, ICMI 2016",
    request="FER-2013, and its votes from https://github.com/microsoft/FERPlus",
    official_counts=lambda meta: OFFICIAL_COUNTS,
)
