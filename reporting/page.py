"""The report as one HTML page that needs no other file, and as Markdown."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2

from reporting.figures import ReportFigure
from reporting.formats import Table, markdown_code, markdown_table, markdown_text

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # row names and messages come from users
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclasses.dataclass(frozen=True)
class Section:
    """The part of a report about one data set.

    Attributes:
        dataset: its name in files.
        title: its name for people.
        finding: the result in one sentence.
        facts: names and texts of what the numbers are based on.
        tables: in the order of reading, the accuracy first.
        figures: in the order of reading; their files exist.
    """

    dataset: str
    title: str
    finding: str
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    figures: Sequence[ReportFigure]


def markdown_page(name: str, about: str, command: str, sections: Sequence[Section], raw: Sequence[str]) -> str:
    """The report as Markdown; its figures are in ``figures/``, the files ``raw`` beside it."""
    blocks = [f"# {markdown_text(name)}", markdown_text(about), "Made with", _markdown_block(command)]
    blocks.append("Raw numbers: " + ", ".join(f"[{file}]({file})" for file in raw))
    for section in sections:
        blocks += [f"## {markdown_text(section.title)}", markdown_text(section.finding)]
        blocks.append("\n".join(f"- {markdown_text(title)}: {markdown_code(text)}" for title, text in section.facts))
        blocks += map(markdown_table, section.tables)
        for figure in section.figures:
            blocks.append(f"### {markdown_text(figure.title)}")
            blocks.append(f"![{markdown_text(figure.title)}](figures/{figure.path.name})")
            blocks.append(markdown_text(figure.caption))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_block(code: str) -> str:
    return "\n".join("    " + line for line in code.splitlines())


def html_page(name: str, about: str, command: str, sections: Sequence[Section], raw: Sequence[str]) -> str:
    """The report as one page (`page.html.j2`): style and figures are inside it, links go to ``raw`` beside it."""
    return _TEMPLATES.get_template("page.html.j2").render(
        name=name, about=about, command=command, sections=sections, raw=raw, base64_png=_base64_png
    )


def _base64_png(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
