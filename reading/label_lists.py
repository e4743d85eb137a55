"""Reads and writes lists of labels: a CSV file that names images of a split by row and by digest."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from files import UserError, write_text
from reading import limits
from reading.text import csv_cell, printable

NEEDED = ("row", "image", "label")
_REMEDY = "expected a list of test.py suspects, or a part of one"


class ListedLabel(NamedTuple):
    """One line of a list.

    Attributes:
        row: of the image in its split, from 0.
        image: the image's digest (`image_digests.image_digest`).
        label: the name of its label.
    """

    row: int
    image: str
    label: str


def write_list(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a list, whole or not at all.

    Args:
        path: the CSV file.
        columns: name to values, one per line; ``row``, ``image`` and ``label`` are among them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    for line in zip(*columns.values(), strict=True):
        writer.writerow(map(csv_cell, line))
    write_text(path, text.getvalue())


def read_list(path: str | Path) -> list[ListedLabel]:
    """Reads a list; columns other than ``row``, ``image`` and ``label`` may be there and are ignored.

    Raises:
        UserError: no such file, larger than `limits.LIST_BYTES`, no such table, no line, or a row that appears twice.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {_REMEDY}")
    try:
        text = limits.read_bytes(path, limits.LIST_BYTES, "a list of labels").decode("utf-8-sig")
        header, *lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV table ({printable(error, 200)}); {_REMEDY}") from None
    if missing := [name for name in NEEDED if header.count(name) != 1]:
        raise UserError(f"{path}: expected one column {missing[0]!r}, found {printable(header, 80)}; {_REMEDY}")
    places = [header.index(name) for name in NEEDED]
    found: dict[int, ListedLabel] = {}
    for number, line in enumerate(lines, start=2):
        row, image, label = (line[place] for place in places) if len(line) == len(header) else ("", "", "")
        if not (row.isascii() and row.isdigit() and len(row) < 16):
            raise UserError(f"{path}, line {number}: expected a row, an image and a label, found {printable(line, 80)}")
        if int(row) in found:
            raise UserError(f"{path}, line {number}: expected every row once, found row {int(row)} twice")
        found[int(row)] = ListedLabel(int(row), image, label)
    if not found:
        raise UserError(f"{path}: the list has no lines; {_REMEDY}")
    return list(found.values())
