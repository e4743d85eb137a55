"""What a data set is to the rest of the project."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Everything that the project knows about one data set.

    Attributes:
        name: the module's name, the sub-command of prepare_data.py, and the folder of the prepared data.
        title: its name in tables and figures.
        options: the dataclass of its preparation's options.
        prepare: reads the release that the options name and writes the prepared splits; split -> its `meta.json`.
    """

    name: str
    title: str
    options: type
    prepare: Callable[[Any], dict[str, dict[str, Any]]]
