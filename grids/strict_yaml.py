"""Reads YAML without its traps: no aliases, no dates, no repeated or other than text keys, limited size and depth."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from files import UserError
from reading import limits
from reading.text import printable

_DEEPEST = 20
_LARGEST = 2**63
_NOT_DECIMAL = re.compile(r"^[-+]?0[0-9_xb]|:")  # YAML 1.1: 010 is 8, 1:30 is 90
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Checks every node before it becomes a value."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal(event, "expected no anchors (&) and aliases (*), which can multiply without end")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _refusal(event, f"expected at most {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in _TAGS:
            what = node.tag.rpartition(":")[2]
            raise _refusal(node, f"expected text, a number, true, false or null, found a {what}; quote a text")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(key_node, f"expected a text as key, found {key!r}; quote it")
            if key in mapping:
                raise _refusal(key_node, f"found the key {key!r} twice")
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, (int, float)) and _NOT_DECIMAL.search(node.value):
            raise _refusal(node, f"expected a decimal number, found {node.value[:40]}, which YAML reads as {value}")
        if (isinstance(value, int) and abs(value) >= _LARGEST) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise _refusal(node, f"expected a finite number below {_LARGEST:,}, found {node.value[:40]}")
        return value


def _refusal(place: yaml.Node | yaml.Event, message: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, place.start_mark)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: dicts with text as keys, lists, text, finite numbers, bools and None.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is larger than `limits.YAML_BYTES`, no YAML in UTF-8, or holds something else.
    """
    data = limits.read_bytes(path, limits.YAML_BYTES, "a YAML file")
    try:
        return yaml.load(data.decode(), Loader=_Loader)
    except Exception as error:  # besides its own errors, PyYAML lets through those of int, datetime and the recursion
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 300)
        raise UserError(f"{path}: expected YAML, found something else ({reason})") from None
