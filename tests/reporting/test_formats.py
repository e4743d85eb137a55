"""Any text is shown as it is in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import html.parser
import io
import re

from markdown_it import MarkdownIt

from reporting.formats import (
    Table,
    csv_text,
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
    """The texts and the tags of an HTML fragment."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def rendered(markdown):
    return Text(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def test_markdown_shows_any_text_as_it_is():
    for text in ODD:
        page = rendered(markdown_text(text))
        assert (page.texts, page.tags) == ([text], ["p"])
    for number in ("73.87 \u00b1 1.30", "\u22121.20 to +0.30"):
        assert markdown_text(number) == number


def test_markdown_code_holds_any_text():
    for text in ("--w-fd 0", "a `b` c", "``", "x <b> | *y*"):
        page = rendered(markdown_code(text))
        assert (page.texts, page.tags) == ([text], ["p", "code"])


def test_markdown_table_has_every_cell():
    table = Table("t", "A title", ("Row", "x|y"), tuple((text, "1.50") for text in ODD), ("a *note*",))
    page = rendered(markdown_table(table))
    cells = [text for odd in ODD for text in (odd, "1.50")]
    assert page.texts == ["A title", "Row", "x|y", *cells, "a *note*"]
    assert page.tags.count("td") == 2 * len(ODD)


# Characters that TeX gives a meaning to.
SPECIAL = re.compile(r"(?<!\\)[&%#_]")


def test_latex_text_escapes_what_tex_reads():
    assert latex_text("100% of a_b & {c} #1") == r"100\% of a\_b \& \{c\} \#1"
    assert latex_text("\\ ~ ^ < |") == r"\textbackslash{} \textasciitilde{} \textasciicircum{} $<$ \textbar{}"
    assert latex_text("1.5 \u00b1 0.2 \u2192 \u22123\u2020\u2021") == (
        r"1.5 $\pm$ 0.2 $\to$ $-$3\textsuperscript{\textdagger}\textsuperscript{\textdaggerdbl}"
    )
    # Greek and Chinese letters stay, control characters do not
    assert (
        latex_text("two\nlines, na\u00efve \u03b1 = \u8868\u60c5\x07") == "two lines, na\u00efve \u03b1 = \u8868\u60c5"
    )
    # at the start of a row, [ and * would be an option of the line break before it
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


def test_csv_cells_are_no_formulas():
    text = csv_text([{"row": "=1+1", "@x": -1.5}, {"row": "-2.5"}])
    assert text == "row,'@x\n'=1+1,-1.5\n-2.5,\n"


def test_csv_keeps_every_digit_and_every_key():
    records = [{"row": 'a, "b"', "x": 0.1 + 0.2, "n": 3}, {"row": "c\nd", "y": 1 / 3, "x": None}]
    rows = list(csv.DictReader(io.StringIO(csv_text(records))))
    assert [list(row) for row in rows] == [["row", "x", "n", "y"]] * 2
    assert rows[0]["row"] == 'a, "b"' and float(rows[0]["x"]) == 0.1 + 0.2 and rows[0]["y"] == ""
    assert rows[0]["n"] == "3" and rows[1]["n"] == ""  # a whole number stays one
    assert rows[1]["row"] == "c\nd" and rows[1]["x"] == "" and float(rows[1]["y"]) == 1 / 3
