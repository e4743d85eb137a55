"""Tests of datasets.shared.tables: a CSV table is read line by line, wherever it lies, within its limits."""

from __future__ import annotations

import gzip
import zipfile

import pytest

from datasets.shared.tables import find_table
from files import UserError
from reading import limits


def rows_of(source):
    return list(find_table(source, ["a.csv"]).lines("expected a.csv"))


def write_gz(path, data):
    path.with_name("a.csv.gz").write_bytes(gzip.compress(data))
    return path.with_name("a.csv.gz")


def write_file(path, data):
    path.write_bytes(data)
    return path


def write_zip(path, data):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/a.csv", data)
    return path.with_suffix(".zip")


WRITERS = pytest.mark.parametrize("write", [write_file, write_gz, write_zip])


@WRITERS
def test_rows_come_with_their_places(tmp_path, write):
    source = write(tmp_path / "a.csv", b'\xef\xbb\xbfx,y\r\n\r\n1,"2\n3"\r\n4,5')
    found = rows_of(source)
    assert [row for _, row in found] == [["x", "y"], ["1", "2\n3"], ["4", "5"]]
    assert [where.rpartition(", ")[2] for where, _ in found] == ["line 1", "line 4", "line 5"]
    assert all("a.csv" in where for where, _ in found)


@WRITERS
@pytest.mark.parametrize(
    ("limit", "value", "data"),
    [
        ("TABLE_LINE", 100, b"x,y\n" + b"1" * 200),
        ("TABLE_LINES", 50, b"\n" * 100),
    ],
)
def test_lines_without_end_and_lines_without_number_are_refused(tmp_path, monkeypatch, write, limit, value, data):
    monkeypatch.setattr(limits, limit, value)
    with pytest.raises(UserError, match=rf"a\.csv.*, line \d+: expected a table of at most .*{value}"):
        rows_of(write(tmp_path / "a.csv", data))


@WRITERS
def test_what_is_no_table_is_one_message(tmp_path, write):
    for data in (b"a,\xff\n", b'"' + b"x" * 200_000):
        with pytest.raises(UserError, match=r"a\.csv.*: expected a CSV table .*; expected a\.csv"):
            rows_of(write(tmp_path / "a.csv", data))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = find_table(write_file(tmp_path / "a.csv", b"x,x\n1,2\n"), ["a.csv"])
    with pytest.raises(UserError, match=r"a\.csv: expected every column once, found 'x' twice"):
        list(table.rows(lambda columns, name: None, ""))
