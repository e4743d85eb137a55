"""How does a table look as Markdown, LaTeX, HTML and CSV? Escaping included: any text may stand in any cell."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

DAGGER, DOUBLE_DAGGER = "\u2020", "\u2021"
_MUTED = ("not run", "failed", "")  # cells that say why there is no number


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for people: text in every cell.

    Attributes:
        name: of its files, such as ``accuracy``.
        title: a line above.
        columns: the heads; the first column names the rows, the others are numbers.
        rows: a list of texts each, as long as ``columns``.
        notes: sentences below.
        text_columns: places of further columns that hold words.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: tuple[int, ...] = (0,)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV with every key that occurs, in order of appearance; None and absent entries are empty.

    Numbers are written with all their digits (the shortest text that reads back as the same number).
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    target = io.StringIO()
    writer = csv.DictWriter(target, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return target.getvalue()


def markdown_text(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line, in a table too."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
    # At the start of a line these would make a list or a rule.
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)


def markdown_code(text: str) -> str:
    """Text as a code span, whatever backticks it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def markdown_table(table: Table) -> str:
    """Title, table and notes."""
    ruler = ["---" if i in table.text_columns else "---:" for i in range(len(table.columns))]
    lines = [table.columns, *table.rows]
    head, *body = ("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
    blocks = [f"**{markdown_text(table.title)}**", "\n".join([head, "| " + " | ".join(ruler) + " |", *body])]
    return "\n\n".join([*blocks, *map(markdown_text, table.notes)])


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
    """Plain text as LaTeX, on one line; letters outside ASCII stay (LaTeX reads UTF-8), other signs become ``?``."""
    out = []
    for character in " ".join(text.split()):
        plain = character.isascii() or (character.isalpha() and ord(character) < 0x250)
        out.append(_LATEX.get(character, character if plain else "?"))
    return "".join(out)


def latex_tables(tables: Sequence[Table], labels: Sequence[str]) -> str:
    """A file of ``table`` environments to ``\\input``; a table wider than the line is scaled down to it.

    Args:
        tables: usually one a data set.
        labels: what ``\\ref`` calls each.
    """
    head = "% Written by reproduce.py report. Needs \\usepackage{booktabs,graphicx}.\n"
    return head + "\n".join(_latex_table(table, label) for table, label in zip(tables, labels, strict=True))


def _latex_table(table: Table, label: str) -> str:
    kinds = "".join("l" if i in table.text_columns else "r" for i in range(len(table.columns)))
    lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (table.columns, *table.rows)]
    notes = "".join(f"\\par {latex_text(note)}\n" for note in table.notes)
    return "\n".join(
        [
            r"\begin{table*}[tbp]\centering",
            rf"\caption{{{latex_text(table.title)}}}\label{{tab:{re.sub('[^a-z0-9-]', '-', label.lower())}}}",
            rf"\sbox0{{\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            *([rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"] * bool(notes)),
            r"\end{table*}",
            "",
        ]
    )


def html_table(table: Table) -> str:
    """Title, table and notes; wide tables scroll by themselves, their first column stays."""

    def row(cells: Sequence[str], head: bool = False) -> str:
        texts = []
        for i, cell in enumerate(cells):
            kinds = ["text"] * (i in table.text_columns) + ["muted"] * (not head and cell in _MUTED)
            attributes = f' class="{" ".join(kinds)}"' if kinds else ""
            attributes += ' scope="col"' if head else ' scope="row"' if i == 0 else ""
            tag = "th" if head or i == 0 else "td"
            texts.append(f"<{tag}{attributes}>{html.escape(cell)}</{tag}>")
        return "<tr>" + "".join(texts) + "</tr>"

    body = "\n".join(row(cells) for cells in table.rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    title = html.escape(table.title)  # outside the table: it must not scroll with it
    return (
        f"<h3>{title}</h3>\n"
        f'<div class="table" tabindex="0" role="region" aria-label="{title}"><table>\n'
        f"<thead>{row(table.columns, head=True)}</thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>\n" + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
    )
