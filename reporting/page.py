"""How is a report read? As one HTML page that needs nothing beside it, and as Markdown."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence

from reporting.figures import Picture
from reporting.formats import Table, html_table, markdown_code, markdown_table, markdown_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6570; --line: #d9dee3; --tint: #f4f6f8;
  --link: #0b5fa5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #15181c; --soft: #9aa4ae; --line: #333a42;
  --tint: #1e2329; --link: #7cc0ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 2.8rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: var(--link); }
.about { font-size: 1.1rem; color: var(--soft); margin: 0 0 1.2rem; }
.finding { background: var(--tint); border-left: 4px solid #0072b2; border-radius: 4px; padding: .7rem 1rem; }
pre { background: var(--tint); border-radius: 6px; padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; }
nav ul { padding-left: 1.2rem; margin: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 0 0 .4rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; min-width: 5rem;
  border-bottom: 2px solid var(--soft); }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
.text { text-align: left; }
.muted { color: var(--soft); font-style: italic; }
.notes { color: var(--soft); font-size: .82rem; padding-left: 1.1rem; margin: .4rem 0 0; }
figure { margin: 1rem 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  tbody th { min-width: 7rem; max-width: 9rem; white-space: normal; } }
@media (prefers-color-scheme: dark) { figure img { padding: .3rem; } }
""".strip()


@dataclasses.dataclass(frozen=True)
class Section:
    """What a report says of one data set.

    Attributes:
        dataset: its name in files.
        title: its name for people.
        finding: the result in a sentence.
        facts: names and texts of what the numbers rest on.
        tables: in the order of reading, the accuracy first.
        pictures: in the order of reading; their files are there.
    """

    dataset: str
    title: str
    finding: str
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    pictures: Sequence[Picture]


def markdown_page(name: str, about: str, command: str, sections: Sequence[Section], raw: Sequence[str]) -> str:
    """The report as Markdown; its pictures lie in ``figures/`` and the files ``raw`` beside it."""
    blocks = [f"# {markdown_text(name)}", markdown_text(about), "Made with", _markdown_block(command)]
    blocks.append("Raw numbers: " + ", ".join(f"[{file}]({file})" for file in raw))
    for section in sections:
        blocks += [f"## {markdown_text(section.title)}", markdown_text(section.finding)]
        blocks.append("\n".join(f"- {markdown_text(title)}: {markdown_code(text)}" for title, text in section.facts))
        blocks += map(markdown_table, section.tables)
        for picture in section.pictures:
            blocks.append(f"### {markdown_text(picture.title)}")
            blocks.append(f"![{markdown_text(picture.title)}](figures/{picture.path.name})")
            blocks.append(markdown_text(picture.caption))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_block(code: str) -> str:
    return "\n".join("    " + line for line in code.splitlines())


def html_page(name: str, about: str, command: str, sections: Sequence[Section], raw: Sequence[str]) -> str:
    """The report as one page: style and pictures are inside, nothing is fetched; links to ``raw`` beside it."""
    files = ", ".join(f'<a href="{html.escape(file)}">{html.escape(file)}</a>' for file in raw)
    links = "".join(f'<li><a href="#{i}">{html.escape(s.title)}</a></li>' for i, s in enumerate(sections))
    contents = f'<nav aria-label="Data sets"><ul>{links}</ul></nav>\n' if len(sections) > 1 else ""
    body = "".join(_html_section(section, i) for i, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(name)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(name)}</h1>\n<p class="about">{html.escape(about)}</p>\n'
        f"<p>Made with</p>\n<pre><code>{html.escape(command)}</code></pre>\n<p>Raw numbers: {files}</p>\n"
        f"{contents}{body}</body>\n</html>\n"
    )


def _html_section(section: Section, number: int) -> str:
    facts = "".join(f"<dt>{html.escape(title)}</dt><dd>{html.escape(text)}</dd>" for title, text in section.facts)
    return (
        f'<section>\n<h2 id="{number}">{html.escape(section.title)}</h2>\n'
        f'<p class="finding">{html.escape(section.finding)}</p>\n<dl>{facts}</dl>\n'
        + "".join(map(html_table, section.tables))
        + "".join(map(_html_picture, section.pictures))
        + "</section>\n"
    )


def _html_picture(picture: Picture) -> str:
    encoded = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    title = html.escape(picture.title)
    return (
        f'<h3>{title}</h3>\n<figure><img alt="{title}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
    )
