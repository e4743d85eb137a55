"""The description of a data set that the rest of the project uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Meta = Mapping[str, Any]  # the content of a `meta.json`


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Everything that the project knows about one data set.

    Attributes:
        name: the module's name, the sub-command of prepare_data.py, and the folder of the prepared data.
        title: its name in tables and figures.
        options: the dataclass of its preparation's options.
        prepare: reads the release that the options name and writes the prepared splits; split -> its `meta.json`.
        paper: the publication to cite; empty for a data set of this project.
        request: where to get the release; empty for a generated data set.
        official_counts: `meta.json` of a prepared split -> part of the official release (``train``, ``val``,
            ``test``) -> images per class, in the order of `CLASS_NAMES`, of all classes that the release has. A part
            ``train`` includes what was held out of it as ``val``. Empty for a data set without official counts.
        paper_key: number of prepared classes -> the key of this data set in `reporting/paper_results.json`; None
            where nothing was published.
    """

    name: str
    title: str
    options: type
    prepare: Callable[[Any], dict[str, dict[str, Any]]]
    paper: str = ""
    request: str = ""
    official_counts: Callable[[Meta], Mapping[str, Sequence[int]]] = lambda meta: {}
    paper_key: Callable[[int], str | None] = lambda num_classes: None

    @property
    def has_source(self) -> bool:
        """False for a generated data set, which reads no release."""
        return any(field.name == "source" for field in dataclasses.fields(self.options))

    @property
    def about(self) -> str:
        """What the help of its sub-command prints above the options."""
        parts = [
            self.options.__doc__,
            self.paper and f"Paper: {self.paper}",
            self.request and f"Get it: {self.request}",
        ]
        return "\n\n".join(filter(None, parts))
