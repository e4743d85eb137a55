"""Tests of json_files: types are checked, and whatever is wrong is one message with the place in the file."""

from __future__ import annotations

from typing import Any

import pytest
from typing_extensions import NotRequired, TypedDict

from files import UserError
from reading import limits
from reading.json_files import OPEN, parse_json, read_json


class Inner(TypedDict):
    __pydantic_config__ = OPEN
    accuracy: float


class Result(TypedDict):
    __pydantic_config__ = OPEN
    n: int
    names: list[str]
    inner: NotRequired[Inner]


def test_a_file_of_a_later_version_is_read_with_what_it_adds(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"n": 3, "names": ["é"], "inner": {"accuracy": 1, "more": [1]}, "later": null}')
    value = {"n": 3, "names": ["é"], "inner": {"accuracy": 1, "more": [1]}, "later": None}
    assert read_json(path, Result) == read_json(path) == value
    assert isinstance(read_json(path, Result)["inner"]["accuracy"], float)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[1]", "expected an object, found .1."),
        ('{"names": []}', "n: Field required"),
        ('{"n": "3", "names": []}', "n: expected a valid integer, found '3'"),
        ('{"n": 3.0, "names": []}', "n: expected a valid integer, found 3.0"),
        ('{"n": true, "names": []}', "n: expected a valid integer, found True"),
        ('{"n": 3, "names": "ab"}', "names: expected a valid array, found 'ab'"),
        ('{"n": 3, "names": [1]}', r"names\.0: expected a valid string, found 1"),
        ('{"n": 3, "names": [], "inner": {"accuracy": NaN}}', r"inner\.accuracy: expected a finite number, found nan"),
        ('{"n": 3, "names": ["\\ud800"]}', "expected JSON"),
        ('{"n": 3, "names": ["\x1b[31m', "expected JSON"),
        ('{"\\u001b[31m": 1, "n": "\\u001b[31m", "names": []}', r"n: .*x1b"),
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"n": ' + "9" * 100_000 + "}", "n: |expected JSON"),
    ],
)
def test_what_is_wrong_is_one_message_with_its_place(text, facts):
    with pytest.raises(UserError, match=f"a/result.json: .*{facts}") as caught:
        parse_json(text, "a/result.json", Result)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_no_schema_still_refuses_what_is_no_json(tmp_path):
    for data in (b"\xff\xfe", b"{", b"[" * 100_000):
        with pytest.raises(UserError, match="expected JSON"):
            parse_json(data, tmp_path / "x.json", Any)


def test_a_file_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON_BYTES", 10)
    (tmp_path / "x.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(UserError, match=r"x\.json: expected a JSON file of at most 10 bytes"):
        read_json(tmp_path / "x.json")
