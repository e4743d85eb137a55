"""Reads our JSON files (meta, config, result, error, journal) with checked types."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from files import UserError
from reading import limits
from reading.text import printable

Schema = TypeVar("Schema")

# For a TypedDict that describes a file of ours: `__pydantic_config__ = OPEN`. A later version may add entries.
OPEN = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


def read_json(path: str | Path, schema: type[Schema] | Any = Any) -> Schema:
    """Reads a JSON file and checks it against a schema.

    Args:
        path: the file.
        schema: what the file must hold: any type that pydantic knows, such as a ``TypedDict`` (of `typing_extensions`)
            or ``dict[str, float]``. No text is taken for a number, and no number for a bool. Any value passes ``Any``.

    Raises:
        UserError: the file is larger than `limits.JSON_BYTES`, no JSON, or of other types than the schema's.
    """
    return parse_json(limits.read_bytes(path, limits.JSON_BYTES, "a JSON file"), path, schema)


def parse_json(data: bytes | str, name: str | Path, schema: type[Schema] | Any = Any) -> Schema:
    """As `read_json`, of JSON in memory; ``name`` is what messages call it."""
    try:
        return _adapter(schema).validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(f"{name}: {_fault(error)}") from None


def check_value(value: Any, name: str | Path, schema: type[Schema] | Any) -> Schema:
    """As `parse_json`, of what JSON has become in Python."""
    try:
        return _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"{name}: {_fault(error)}") from None


def _fault(error: ValidationError) -> str:
    """The first thing that is wrong: its place, what was expected, what was found."""
    found = error.errors(include_url=False)[0]
    if found["type"] == "json_invalid":
        return f"expected JSON, found something else ({printable(found['msg'], 200)})"
    place = ".".join(printable(part, 40) for part in found["loc"])
    wanted = found["msg"].replace("Input should be ", "expected ", 1).removeprefix("Value error, ")
    complete = found["type"] == "missing" or ", found " in wanted
    value = "" if complete else f", found {printable(repr(found['input']), 80)}"
    return f"{place + ': ' if place else ''}{wanted}{value}"


@functools.cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)
