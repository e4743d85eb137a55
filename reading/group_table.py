"""Reads the table of image groups, a CSV file with the columns image and group."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from files import UserError
from reading import limits
from reading.text import printable, quoted

_COLUMNS = ("image", "group")
_FORM = "expected a CSV file with the columns image (a row number of the split, 0 for the first) and group (a name)"
_LONGEST_NAME = 40  # characters
MOST_GROUPS = 50


def read_groups(path: str | Path, num_images: int, split: str) -> dict[int, str]:
    """Row number -> group, in the order of the file.

    Columns beside image and group are ignored, and so are empty lines. Spaces around a cell do not count. An image
    that is not in the file has no group.

    Args:
        path: the file.
        num_images: N, of the split; row numbers are 0..N-1.
        split: its name in messages.

    Raises:
        UserError: no such file, no CSV table in UTF-8, a missing or repeated column, a line of another length, a row
            number that is none of the split's or appears twice, a group without a name or with one of more than 40
            characters or not printable, fewer than two groups or more than `MOST_GROUPS`.
    """
    if not Path(path).is_file():
        raise UserError(f"--groups {path}: no such file; {_FORM}")
    found: dict[int, tuple[str, int]] = {}
    for line, image, group in _rows(path):
        where = f"{path}, line {line}"
        if not (image.isascii() and image.isdigit() and len(image) < 16 and int(image) < num_images):
            raise UserError(
                f"{where}: expected the row number of an image of {split}, 0 to {num_images - 1}, found {quoted(image)}"
            )
        if int(image) in found:
            raise UserError(f"{where}: expected every image once, image {image} is on line {found[int(image)][1]} too")
        if not (1 <= len(group) <= _LONGEST_NAME and group.isprintable()):
            raise UserError(
                f"{where}: expected the name of a group, 1 to {_LONGEST_NAME} printable characters, "
                f"found {quoted(group)}"
            )
        found[int(image)] = (group, line)
    names = list(dict.fromkeys(group for group, _ in found.values()))
    if not 2 <= len(names) <= MOST_GROUPS:
        few = ", ".join(map(quoted, names[:3])) + ", ..." * (len(names) > 3) or "none"
        raise UserError(f"{path}: expected 2 to {MOST_GROUPS} groups to compare, found {len(names)} ({few})")
    return {image: group for image, (group, _) in found.items()}


def _rows(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, image and group of every row."""
    data = limits.read_bytes(path, limits.LIST_BYTES, "a table of groups")
    line = 0
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = [column.strip() for column in next(filter(None, reader), [])]
        if missing := [name for name in _COLUMNS if columns.count(name) != 1]:
            found = f"{columns.count(missing[0]) or 'no'} columns {missing[0]!r}"
            raise UserError(f"{path}, line 1: {_FORM}, found {found}")
        for row in filter(None, reader):
            line = reader.line_num
            if len(row) != len(columns):
                raise UserError(f"{path}, line {line}: expected {len(columns)} columns, found {len(row)}")
            cells = dict(zip(columns, row, strict=True))
            yield line, cells["image"].strip(), cells["group"].strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_FORM}, found text that is not UTF-8 ({printable(error, 200)})") from None
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {line}: {_FORM}, found a damaged table ({printable(error, 200)})"
        ) from None
