"""Does any text come through whole in Markdown, LaTeX, HTML and CSV?"""

from __future__ import annotations

import csv
import html.parser
import io
import re

import pytest
from markdown_it import MarkdownIt

from reporting.formats import (
    Table,
    csv_text,
    html_table,
    latex_tables,
    latex_text,
    markdown_code,
    markdown_table,
    markdown_text,
)

ODD = (
    "keras:Mobile_Net*V2* | a_b_c <b>bold</b> &amp; [link](http://x) `code` \\ ~~x~~ # $y$ {z}",
    "<script>alert('x')</script>",
    "- a list",
    "12. a list",
    "+ a list",
    "---",
    "===",
    "# a head",
    "> a quote",
    "-1",
    "73.87 \u00b1 1.30",
    "!\\[x]",
)


class Text(html.parser.HTMLParser):
    """The text of an HTML fragment, and the tags it used."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.mark.parametrize("text", ODD)
def test_markdown_shows_any_text_as_it_is(text):
    page = Text(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown_text(text)))
    assert (page.texts, page.tags) == ([text], ["p"])


def test_markdown_leaves_numbers_readable():
    assert markdown_text("73.87 \u00b1 1.30") == "73.87 \u00b1 1.30"
    assert markdown_text("\u22121.20 to +0.30") == "\u22121.20 to +0.30"


@pytest.mark.parametrize("text", ["--w-fd 0", "a `b` c", "``", "x <b> | *y*"])
def test_markdown_code_holds_any_text(text):
    page = Text(MarkdownIt().render(markdown_code(text)))
    assert (page.texts, page.tags) == ([text], ["p", "code"])


def test_markdown_table_has_every_cell():
    table = Table("t", "A title", ("Row", "x|y"), tuple((text, "1.5") for text in ODD), ("a *note*",))
    page = Text(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown_table(table)))
    cells = [text for odd in ODD for text in (odd, "1.5")]
    assert page.texts == ["A title", "Row", "x|y", *cells, "a *note*"]
    assert page.tags.count("td") == 2 * len(ODD)


def test_html_table_has_every_cell_and_no_tag_of_its_own():
    table = Table("t", "A <title>", ("Row", "x"), tuple((text, "not run") for text in ODD), ("a <note>",))
    page = Text(html_table(table))
    assert page.texts == ["A <title>", "Row", "x", *(text for odd in ODD for text in (odd, "not run")), "a <note>"]
    assert set(page.tags) == {"h3", "div", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert html_table(table).count('<td class="muted">not run</td>') == len(ODD)


# What TeX gives a meaning to.
SPECIAL = re.compile(r"(?<!\\)[&%#_]")


def test_latex_text_escapes_what_tex_reads():
    assert latex_text("100% of a_b & {c} #1") == r"100\% of a\_b \& \{c\} \#1"
    assert latex_text("\\ ~ ^ < |") == r"\textbackslash{} \textasciitilde{} \textasciicircum{} $<$ \textbar{}"
    assert latex_text("1.5 \u00b1 0.2 \u2192 \u22123\u2020\u2021") == (
        r"1.5 $\pm$ 0.2 $\to$ $-$3\textsuperscript{\textdagger}\textsuperscript{\textdaggerdbl}"
    )
    assert latex_text("two\nlines, na\u00efve \U0001f600") == "two lines, na\u00efve ?"
    # a row that began with [ or * would be an option of the line break before it
    assert latex_text("[x]*") == "{[}x{]}{*}"
    for text in ODD:
        assert not SPECIAL.search(latex_text(text))
        assert len(re.findall(r"(?<!\\)\$", latex_text(text))) % 2 == 0


def test_latex_tables_are_booktabs():
    tables = [
        Table("t", "50% & more", ("Row", "x", "Source"), (("a_b", "1", "s"), ("c", "2", "")), ("n_1",), (0, 2))
    ] * 2
    text = latex_tables(tables, ["Name-fer2013-t", "name x"])
    assert text.count(r"\begin{tabular}{lrl}") == text.count(r"\end{tabular}") == 2
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [2, 2, 2]
    assert r"\caption{50\% \& more}\label{tab:name-fer2013-t}" in text and r"\label{tab:name-x}" in text
    assert "Row & x & Source \\\\\n" in text and "a\\_b & 1 & s \\\\\n" in text and "c & 2 &  \\\\\n" in text
    assert r"\par n\_1" in text
    depth = 0
    for character in re.sub(r"\\[{}]", "", text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0


def test_csv_keeps_every_digit_and_every_key():
    records = [{"row": 'a, "b"', "x": 0.1 + 0.2}, {"row": "c\nd", "y": 1 / 3, "x": None}]
    rows = list(csv.DictReader(io.StringIO(csv_text(records))))
    assert [list(row) for row in rows] == [["row", "x", "y"]] * 2
    assert rows[0]["row"] == 'a, "b"' and float(rows[0]["x"]) == 0.1 + 0.2 and rows[0]["y"] == ""
    assert rows[1]["row"] == "c\nd" and rows[1]["x"] == "" and float(rows[1]["y"]) == 1 / 3
