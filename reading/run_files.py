"""Reads the files of a run's folder with checked types: options, result, failure and history; needs no Keras."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator
from typing_extensions import TypedDict

import config
from files import UserError
from reading import limits
from reading.json_files import OPEN, check_value, read_json
from reading.text import printable, printable_lines

CONFIG, RESULT, ERROR, HISTORY = "config.json", "result.json", "error.json", "history.csv"
CORRELATIONS = ("same_class", "different_classes", "between_class_means", "between_embeddings")


def read_options(path: str | Path) -> dict[str, Any]:
    """The options of a run, from its `config.json`: in sections, with ``digests``; what its version lacked is absent.

    Raises:
        UserError: no JSON, or an option of another type than train.py's.
    """
    return read_json(path, _options_type())


def read_result(path: str | Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a `result.json` (`evaluation.evaluate`); entries that its version lacked are absent or None.

    Args:
        path: the file.
        needed: entries that must be there.

    Raises:
        UserError: no JSON, an entry of another type, a matrix that does not fit the classes, a needed one is missing.
    """
    result = read_json(path, _result_type())
    if missing := [name for name in needed if result.get(name) is None]:
        raise UserError(f"{path}: expected the result of a run, found none of {', '.join(missing)}")
    if fault := _wrong_size(result):
        raise UserError(f"{path}: {fault}")
    return result


def read_correlations(path: str | Path) -> dict[str, Any]:
    """What `metrics.correlations` returned, from a JSON file.

    Raises:
        UserError: no JSON, or an entry of another type.
    """
    return read_json(path, _correlations_type())


def read_error(path: str | Path) -> str:
    """The message of an `error.json`: why the run failed; printable, of one line or more.

    Raises:
        UserError: no JSON, or no such message.
    """
    return printable_lines(read_json(path, _open("RunError", {"message": str}, total=True))["message"])


def read_history(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a `history.csv` by name, float64 (epochs,); NaN where a cell is blank.

    Raises:
        FileNotFoundError: there is none.
        UserError: larger than `limits.HISTORY_BYTES`, or no table of numbers.
    """
    text = limits.read_bytes(path, limits.HISTORY_BYTES, "a history")
    try:
        names, *rows = [row for row in csv.reader(text.decode("utf-8").splitlines(), strict=True) if row] or [[]]
        if len(set(names)) < len(names):
            raise ValueError("two columns of one name")
        if odd := next((row for row in rows if len(row) != len(names)), None):
            raise ValueError(f"a line of {len(odd)} cells, expected {len(names)}")
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        return {
            name: np.array([float(cell) if cell.strip() else np.nan for cell in column], np.float64)
            for name, column in zip(names, columns, strict=True)
        }
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(
            f"{path}: expected numbers, one line per epoch, found something else ({printable(error, 200)})"
        ) from None


def unfolded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as one flat dictionary."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= unfolded(value) if isinstance(value, Mapping) else {name: value}
    return flat


# --- schemas; null passes everywhere, because some version may have written it


def _checked_text(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"expected printable text, found {printable(text, 80)!r}")
    return text


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuses options of other types than train.py's, in whichever section an old version had them."""
    try:
        check_value(unfolded(options), "options", _flat_options_type())
    except (UserError, RecursionError) as error:
        raise ValueError(f"{error}" if isinstance(error, UserError) else "found sections in sections") from None
    return options


def _checked_number(value: Any) -> int | float:
    # A count of parameters or seconds is smaller.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e18:
        raise ValueError(f"expected a number, found {printable(repr(value), 80)}")
    return value


_Number = Annotated[Any, AfterValidator(_checked_number)]
_Text = Annotated[str, AfterValidator(_checked_text)]
_Matrix = list[list[_Number | None] | None]
_Digests = dict[str, str]


def _open(name: str, entries: Mapping[str, Any], total: bool = False) -> Any:
    """A TypedDict of entries that may be absent or null (with ``total`` neither), beside any others."""
    schema = TypedDict(name, {key: kind if total else kind | None for key, kind in entries.items()}, total=total)
    schema.__pydantic_config__ = OPEN
    return schema


@functools.cache
def _flat_options_type() -> Any:
    """The types of train.py's options: those of their defaults; of those that default to None nothing is known."""
    kinds = {bool: bool, int: _Number, float: _Number, str: _Text}
    options = config.options_by_name(config.TrainConfig())
    return _open("Options", {name: kinds.get(type(value), Any) for name, value in options.items()})


@functools.cache
def _options_type() -> Any:
    sections = [name for name, value in config.to_dict(config.TrainConfig()).items() if isinstance(value, dict)]
    sectioned = _open("RunOptions", {**dict.fromkeys(sections, dict[str, Any]), "digests": _Digests})
    return Annotated[sectioned, AfterValidator(_checked_options)]


@functools.cache
def _correlations_type() -> Any:
    return _open("Correlations", dict.fromkeys(CORRELATIONS, _Number) | {"class_means": _Matrix})


@functools.cache
def _result_type() -> Any:
    from metrics import MEASURES  # late, because scikit-learn takes a second

    return _open(
        "Result",
        {
            **dict.fromkeys(("dataset", "split", "selected_on", "commit"), _Text),
            **dict.fromkeys(("n", "seed", "best_epoch", "parameters"), int),
            **dict.fromkeys(("accuracy", "train_seconds", *MEASURES), _Number),
            "class_names": list[_Text],
            "per_class": dict[str, dict[str, _Number | None] | None],
            "intervals": dict[str, list[_Number | None] | None],
            "confusion_matrix": _Matrix,
            **dict.fromkeys(("correlations", "correlations_untrained"), _correlations_type()),
            "config": _options_type(),
            "digests": _Digests,
            "flip": bool,  # of results from before "views"
            "views": _Text,
        },
    )


def _wrong_size(result: Mapping[str, Any]) -> str | None:
    """Which matrix does not have one row and one column per class; None if none."""
    if (names := result.get("class_names")) is None:
        return None
    size = len(names)
    matrices = {"confusion_matrix": result.get("confusion_matrix")}
    for name in ("correlations", "correlations_untrained"):
        matrices[f"{name}.class_means"] = (result.get(name) or {}).get("class_means")
    for name, matrix in matrices.items():
        if matrix is not None and [len(row or ()) for row in matrix] != [size] * size:
            return f"{name}: expected {size} rows and columns, one per class"
    return None
