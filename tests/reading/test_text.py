"""Tests of text: nothing from a file moves a terminal's cursor, ends a print in an error or becomes a formula."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reading.text import check_class_names, csv_cell, printable, printable_lines


def test_what_is_visible_stays():
    for text in ("Happy", "Überraschung", "驚き", "a b", "$x^$", "🙂", "it's \\ fine"):
        assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("a\u202eb", r"a\u202eb"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\udce9.jpg"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_what_is_not_visible_is_written_as_its_code(text, expected):
    assert printable(text) == expected


def test_long_text_is_cut():
    assert printable("x" * 100, 10) == "xxxxxxx..." and printable(12345, 10) == "12345"


def test_lines_and_tabs_of_a_table_stay():
    assert printable_lines("a\tb\nc\x1b") == "a\tb\nc\\x1b"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_any_text_can_be_printed(text):
    found = printable(text)
    assert found.isprintable()
    found.encode()


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+cmd", "@SUM(A1)", "\t=1", "=\udce9"])
def test_a_cell_is_no_formula(text):
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text)])
    (cell,) = next(csv.reader(io.StringIO(file.getvalue())))
    assert cell.startswith("'") and cell.encode()


def test_numbers_and_other_cells_stay():
    for value in ("-1.5", "+2e3", "1", "", "a=b", -1.5, None, True):
        assert csv_cell(value) is value or csv_cell(value) == value


@pytest.mark.parametrize(
    ("names", "facts"),
    [
        (["a", "b", "a"], "'a' twice"),
        (["a", ""], "1 to 64"),
        (["a" * 65], "1 to 64"),
        (["a\nb"], "printable"),
        ([3], "found 3"),
        (["a\ud800"], "printable"),
    ],
)
def test_class_names_are_unique_short_and_printable(names, facts):
    with pytest.raises(ValueError, match=facts) as caught:
        check_class_names(names)
    assert json.dumps(str(caught.value)).isascii() and str(caught.value).isprintable()
    check_class_names(["Neutral", "驚き", "$x^$"])
