"""Tests of the readers of a run's folder; what is wrong in a result is in reporting/test_rows.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

import config
from files import UserError
from reading import limits, run_files


@pytest.fixture
def options():
    return {**config.to_dict(config.TrainConfig()), "digests": {"train": "0" * 64}}


def test_the_options_of_a_run_and_of_older_and_younger_ones_are_read(options, tmp_path):
    path = tmp_path / "config.json"
    for changes in ({"loss": {}}, {"loss": None}, {"later": [1]}, {"w_fd": 2}, {"seed": None}):
        changed = {**options, **changes}
        path.write_text(json.dumps(changed))
        assert run_files.read_options(path) == changed


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"loss": 5}, "loss: expected an object, found 5"),
        ({"loss": {"w_fd": "1"}}, "w_fd: expected a number, found '1'"),
        ({"seed": 1e300}, "seed: "),
        ({"balanced": 1}, "balanced: expected a valid boolean, found 1"),
        ({"dataset": "\x1b[31m"}, r"dataset: expected printable text, found .*x1b"),
        ({"digests": {"train": 5}}, r"digests\.train: expected a valid string, found 5"),
    ],
)
def test_options_of_other_types_are_named(options, tmp_path, changes, fact):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**options, **changes}))
    with pytest.raises(UserError, match=rf"config\.json: .*{fact}") as caught:
        run_files.read_options(path)
    assert len(str(caught.value)) < 300


def test_a_history_has_columns_of_numbers(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text('epoch,loss\n1,2.0000000000000004\n\n2,""\n')
    found = run_files.read_history(path)
    np.testing.assert_array_equal(found["epoch"], [1, 2])
    np.testing.assert_array_equal(found["loss"], [2.0000000000000004, np.nan])
    for text, columns in (("", []), ("epoch,loss\n", ["epoch", "loss"])):
        path.write_text(text)
        assert [(name, len(column)) for name, column in run_files.read_history(path).items()] == [
            (name, 0) for name in columns
        ]


@pytest.mark.parametrize(
    "data",
    [
        b"epoch\nsoon",
        b"epoch,loss\n1",
        b"epoch\n1,2",
        b"a,a\n1,2",
        b"a\n\xff",
        b"a\n\0",
        b'a\n"1',
        b"a\n" + b"1" * 200_000,
    ],
)
def test_a_damaged_history_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr(limits, "HISTORY_BYTES", 199_999)
    path = tmp_path / "history.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"history\.csv: expected") as caught:
        run_files.read_history(path)
    assert str(caught.value).isprintable()


def test_the_message_of_a_failed_run_is_printable(tmp_path):
    path = tmp_path / "error.json"
    path.write_text(json.dumps({"command": "x", "exit_code": 1, "message": "two\nlines\x1b[31m"}))
    assert run_files.read_error(path) == "two\nlines\\x1b[31m"
    for value in ([], {}, {"message": None}):
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"error\.json: "):
            run_files.read_error(path)
