"""The data sets, one module each; `datasets.shared` has what they share.

A module of this folder is a data set and has `DATASET`, a `datasets.shared.dataset.DataSet` with the module's name.
Nothing else lists the data sets: the commands, ``--help``, the tables and `config.DatasetName` iterate over `NAMES`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from datasets.shared.expressions import CLASS_NAMES

__all__ = ["CLASS_NAMES", "NAMES", "get", "title"]

if TYPE_CHECKING:
    from datasets.shared.dataset import DataSet

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def get(name: str) -> DataSet:
    """The data set of a name in `NAMES`."""
    return importlib.import_module(f"datasets.{name}").DATASET


def title(name: str) -> str:
    """The name of a data set in tables and figures; ``name`` itself where no module has it."""
    return get(name).title if name in NAMES else name
