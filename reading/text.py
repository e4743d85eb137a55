"""Makes text from files, archives and class names safe to print, to draw and to keep in tables."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_NAME = 64  # characters of a class name
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the begin of a formula


def printable(text: object, longest: int | None = None) -> str:
    """The text on one line, with everything that is not a visible character or a space written as its escape code.

    Escape codes of a terminal, line breaks, marks that reverse the direction of writing and lone surrogates (of a file
    name that is not UTF-8) come out as ``\\x1b``, ``\\n``, ``\\u202e`` and ``\\udce9``.

    Args:
        text: anything; other types than str are converted.
        longest: characters that are kept; None keeps all.

    Returns:
        Text that every terminal and every file in UTF-8 takes.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    text = str(text)
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 3]}..."
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def quoted(text: object) -> str:
    """A short piece of foreign text for a message: printable, in quotation marks, at most 60 characters."""
    return f"'{printable(text, 60)}'"


def printable_lines(text: str) -> str:
    """As `printable`, for a text of several lines: keeps its line breaks and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal: every column as wide as its longest cell, the first one flush left.

    >>> aligned([["", "Happy", "Sad"], ["Happy", "1,071", "9"]])
    ['       Happy  Sad', 'Happy  1,071    9']
    """
    from tabulate import tabulate  # imported late: recognising does not wait for it

    alignments = ["left"] + ["right"] * (len(rows[0]) - 1)
    return tabulate(rows, tablefmt="plain", colalign=alignments, disable_numparse=True).splitlines()


def csv_cell(value: object) -> object:
    """A cell of a CSV file that holds foreign text: a spreadsheet must not take it for a formula.

    Text that begins with ``=``, ``+``, ``-`` or ``@`` and is no number gets a leading apostrophe; numbers stay.
    """
    if not isinstance(value, str):
        return value
    if value.startswith(_FORMULA) and not _is_number(value):
        value = f"'{value}"
    return printable_lines(value)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def check_class_names(names: Sequence[str]) -> None:
    """Checks the class names of a prepared data set or a model file.

    Raises:
        ValueError: a name is no text, empty, longer than 64 characters or not printable, or appears twice.
    """
    for name in names:
        if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
            raise ValueError(
                f"expected class names of 1 to {_LONGEST_NAME} printable characters, found {printable(repr(name), 80)}"
            )
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"expected every class name once, found {twice!r} twice")
