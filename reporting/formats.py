"""Tables as Markdown, LaTeX and CSV; special characters in cells are escaped."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from reading.text import csv_cell

DAGGER, DOUBLE_DAGGER = "\u2020", "\u2021"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for people: text in every cell.

    Attributes:
        name: of its files, such as ``accuracy``.
        title: one line above.
        columns: the heads; the first column names the rows, the others are numbers.
        rows: the texts of each row, as many as ``columns``.
        notes: sentences below.
        text_columns: places of the columns that hold words.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: tuple[int, ...] = (0,)

    def frame(self, escape: Callable[[str], str]) -> pd.DataFrame:
        """The table with every text changed by ``escape``."""
        return pd.DataFrame([list(map(escape, row)) for row in self.rows], columns=list(map(escape, self.columns)))

    def alignments(self, text: str, number: str) -> list[str]:
        """One entry per column: ``text`` for words, ``number`` for numbers."""
        return [text if i in self.text_columns else number for i in range(len(self.columns))]


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV with every key that occurs, in order of appearance; None and absent entries are empty.

    Text that a spreadsheet would take for a formula gets an apostrophe (`text.csv_cell`).
    Numbers have all their digits (the shortest text that reads back as the same number).
    """
    # As objects: a column of whole numbers with a gap would turn into floats.
    cells = [{csv_cell(name): csv_cell(value) for name, value in record.items()} for record in records]
    return pd.DataFrame(cells, dtype=object).to_csv(index=False, lineterminator="\n")


def markdown_text(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line, also in a table."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
    # At the start of a line these would make a list or a rule.
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)


def markdown_code(text: str) -> str:
    """Text as a code span, with any backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def markdown_table(table: Table) -> str:
    """Title, table and notes."""
    # Without disable_numparse, tabulate rewrites numbers such as 58.10.
    grid = table.frame(markdown_text).to_markdown(
        index=False, colalign=table.alignments("left", "right"), disable_numparse=True
    )
    return "\n\n".join([f"**{markdown_text(table.title)}**", grid, *map(markdown_text, table.notes)])


def plain_table(table: Table, columns: Sequence[int], width: int = 80) -> str:
    """Title, some columns of the table and its notes for a terminal.

    Args:
        table: what is shown.
        columns: places of the columns; the first is wrapped to what the others leave of the width, and an empty one
            is left out.
        width: characters per line.
    """
    columns = [place for place in columns if any(row[place] for row in table.rows)]
    heads = [table.columns[place].replace("\u00a0", " ").replace(" ", "\n") for place in columns]
    rows = [[row[place] for place in columns] for row in table.rows]
    # tabulate leaves 2 between columns, and 2 more beside a head.
    widths = [max(2 + max(map(len, head.split("\n"))), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    first = max(12, width - sum(2 + each for each in widths[1:]))
    alignments = table.alignments("left", "right")
    grid = tabulate(
        rows,
        headers=heads,
        tablefmt="simple",
        colalign=[alignments[place] for place in columns],
        disable_numparse=True,
        maxcolwidths=[first] + [None] * (len(columns) - 1),
    )
    return "\n".join([table.title, "", grid, "", *(textwrap.fill(note, width) for note in table.notes)])


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': "''",
    # In braces: at the start of a row they would be an option of the line break before.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",
    DAGGER: r"\textsuperscript{\textdagger}",
    DOUBLE_DAGGER: r"\textsuperscript{\textdaggerdbl}",
    "\u00b1": r"$\pm$",
    "\u2212": "$-$",
    "\u2013": "--",
    "\u2192": r"$\to$",
    "\u00d7": r"$\times$",
} | {character: "\\" + character for character in "&%$#_"}


def latex_text(text: str) -> str:
    """Plain text as LaTeX (UTF-8), on one line; letters and signs outside ASCII stay, control characters do not."""
    return "".join(
        _LATEX.get(character, character)
        for character in " ".join(text.split())
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
    )


_LATEX_HEAD = r"""% Written by reproduce.py report. Needs \usepackage{booktabs,graphicx}.
% Names in Greek, Chinese, Japanese or Korean need XeLaTeX or LuaLaTeX and a font that has these letters.
"""


def latex_tables(tables: Sequence[Table], labels: Sequence[str]) -> str:
    """A file of ``table`` environments to ``\\input``; a table wider than the line is scaled down to it.

    Args:
        tables: usually one per data set.
        labels: the name of each for ``\\ref``.
    """
    return _LATEX_HEAD + "\n".join(_latex_table(table, label) for table, label in zip(tables, labels, strict=True))


def _latex_table(table: Table, label: str) -> str:
    columns = "".join(table.alignments("l", "r"))
    tabular = table.frame(latex_text).to_latex(index=False, escape=False, column_format=columns).rstrip("\n")
    notes = "".join(f"\\par {latex_text(note)}\n" for note in table.notes)
    return "\n".join(
        [
            r"\begin{table*}[tbp]\centering",
            rf"\caption{{{latex_text(table.title)}}}\label{{tab:{re.sub('[^a-z0-9-]', '-', label.lower())}}}",
            rf"\sbox0{{{tabular}}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            *([rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"] * bool(notes)),
            r"\end{table*}",
            "",
        ]
    )
