"""Reads CSV tables of a release: a file, a .csv.gz, or a member of a folder, zip or tar."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from datasets.shared.archives import SourceFiles, bounded, is_zip
from files import UserError
from reading import limits
from reading.text import printable

_GZIP = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file, which may lie in an archive.

    Attributes:
        path: the file, or the archive around it.
        name: its name in messages.
        open: opens its bytes; limits them and reports damage (`archives.SourceFiles.open`).
    """

    path: Path
    name: str
    open: Callable[[], BinaryIO]

    def lines(self, expected: str) -> Iterator[tuple[str, list[str]]]:
        """Yields the place of each row, for messages, and its cells; empty lines are ignored.

        Args:
            expected: ends the message about a file that is no table.

        Raises:
            UserError: not a CSV table, a damaged archive, or longer than the `limits` of a table.
        """
        line = 0
        try:
            with io.TextIOWrapper(self.open(), encoding="utf-8-sig", newline="") as text:
                rows = csv.reader(self._short_lines(text))
                for row in filter(None, rows):
                    line = rows.line_num
                    yield f"{self.name}, line {line}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.name}, after line {line}: expected a CSV table ({printable(error, 200)}); {expected}"
            ) from None

    def _short_lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        number = 0
        while line := text.readline(limits.TABLE_LINE + 1):
            number += 1
            if len(line) > limits.TABLE_LINE or number > limits.TABLE_LINES:
                raise UserError(
                    f"{self.name}, line {number}: expected a table of at most {limits.TABLE_LINES:,} lines of at most "
                    f"{limits.TABLE_LINE:,} characters, found more; is it the right file?"
                )
            yield line

    def rows(
        self, check_columns: Callable[[Sequence[str], str], None], expected: str
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields the place of each row, for messages, and its cells by column; the first row names the columns.

        Args:
            check_columns: called with the columns and `name`; raises for a header that it cannot use.
            expected: as for `lines`.

        Raises:
            UserError: as `lines`, or a row of another length, or a column twice.
        """
        lines = self.lines(expected)
        _, header = next(lines, ("", []))
        columns = [column.strip() for column in header]
        check_columns(columns, self.name)
        if len(set(columns)) < len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            raise UserError(f"{self.name}: expected every column once, found {printable(twice, 40)!r} twice")
        for where, row in lines:
            if len(row) != len(columns):
                raise UserError(f"{where}: expected {len(columns)} columns, found {len(row)}; is the file cut off?")
            yield where, dict(zip(columns, row, strict=True))


def find_table(source: Path, names: Sequence[str]) -> Table | None:
    """The first of ``names`` that a folder or archive holds; a file that is no archive is taken as the table.

    A name with ``.gz`` behind it counts as well.
    """
    if source.is_file() and not is_archive(source):
        return Table(source, str(source), lambda: _opened(open(source, "rb"), source))
    files = SourceFiles(source, ("*.csv", "*.csv.gz"))
    wanted = (f"{name}{ending}" for name in names for ending in ("", ".gz"))
    found = next((name for want in wanted for name in files.names if PurePosixPath(name).name == want), None)
    if found is None:
        return None
    path = source / found if source.is_dir() else source
    return Table(path, f"{source}/{printable(found)}", lambda: _opened(files.open(found), path))


def _opened(file: BinaryIO, path: Path) -> BinaryIO:
    """A table's bytes, unpacked if they are gzip's."""
    plain = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
    if plain.peek(2)[:2] == _GZIP:
        return bounded(gzip.GzipFile(fileobj=plain), path, path.name, kind="gzip file")
    return bounded(plain, path, path.name)


def is_archive(path: Path) -> bool:
    """True for a zip and for a tar, compressed or not; a .csv.gz is none."""
    if not path.is_file() or path.name.lower().endswith(".csv.gz"):
        return False
    try:
        return is_zip(path) or tarfile.is_tarfile(path)
    except Exception:  # a damaged compressed file: zlib.error, EOFError, LZMAError and more
        return False


def found_in(source: Path) -> str:
    """The first names in a folder or archive, for a message."""
    return few_names(
        sorted(file.name for file in source.iterdir()) if source.is_dir() else SourceFiles(source, ()).names
    )


def few_names(names: Sequence[str]) -> str:
    """The first three names, quoted, for a message."""
    return ", ".join(f"'{printable(name, 40)}'" for name in names[:3]) + ", ..." * (len(names) > 3) or "nothing"
