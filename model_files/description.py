"""The description of a network that is stored in every model file and export. Needs no Keras."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from files import UserError
from measuring.calibration import EXPONENTS, TEMPERATURES
from reading.text import check_class_names, printable

ATTRIBUTE = "ad_corre"  # the name under which every file keeps its description
FORMAT_VERSION = 1
LARGEST_INPUT = 4096


@dataclasses.dataclass(frozen=True)
class NetworkDescription:
    """All that rebuilds a network, apart from its weights.

    Every field but ``class_names`` is an argument of `cnn_model.build_model`. A field that has an option has the
    option's name (`config.ModelConfig`). So a new property of a network is a field here, an argument there, and
    perhaps an option.

    Attributes:
        arch: see `cnn_model.build_model`.
        class_names: C names, in the order of the logits.
        num_embeddings: k.
        embedding_size: d.
        input_size: side in pixels that the backbone sees; None is the architecture's own.
        scaling: range of the backbone's input (see `cnn_model.PixelInput`); None is the architecture's own.
        logit_scale: see `cnn_model.build_model`.
        temperature: of the calibration of the logits (`calibration.Calibration`); 1 where none was fitted, and in files
            from before it existed. It is no option: a training starts with 1 and fits it at its end.
        exponent: of the same.
    """

    arch: str
    class_names: tuple[str, ...]
    num_embeddings: int = 7
    embedding_size: int = 256
    input_size: int | None = None
    scaling: str | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    exponent: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """The arguments of `cnn_model.build_model`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"num_classes": len(values.pop("class_names")), **values}

    def check(self) -> None:
        """Checks types and sizes, before anything is built.

        Raises:
            ValueError: an implausible value, with its name.
        """
        plausible = {
            "arch": isinstance(self.arch, str),
            "class_names": len(self.class_names) >= 2,
            "num_embeddings": type(self.num_embeddings) is int and self.num_embeddings >= 1,
            "embedding_size": type(self.embedding_size) is int and self.embedding_size >= 3,
            "input_size": self.input_size is None
            or (type(self.input_size) is int and 1 <= self.input_size <= LARGEST_INPUT),
            "scaling": self.scaling is None or isinstance(self.scaling, str),
            "logit_scale": type(self.logit_scale) in (int, float) and 0 < self.logit_scale < math.inf,
            "temperature": _is_within(self.temperature, TEMPERATURES),
            "exponent": _is_within(self.exponent, EXPONENTS),
        }
        for name, fine in plausible.items():
            if not fine:
                raise ValueError(f"{name} is {printable(repr(getattr(self, name)), 80)}")
        check_class_names(self.class_names)

    def smallest_size(self) -> int:
        """Bytes that the classifier takes at least: that of half precision."""
        return 2 * self.num_embeddings * self.embedding_size * len(self.class_names)


def _is_within(value: Any, limits: tuple[float, float]) -> bool:
    return type(value) in (int, float) and limits[0] <= value <= limits[1]


@dataclasses.dataclass(frozen=True)
class ExportInfo:
    """What an exported file says of its network.

    Attributes:
        network: the network; in an export its ``input_size`` is a number.
        dataset: what it was trained on, as ``fer2013/train``; empty when unknown.
        origin: where the weights come from.
    """

    network: NetworkDescription
    dataset: str = ""
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a model file says of its network.

    Attributes:
        network: the network.
        dataset: what it was trained on, as ``fer2013/train``; empty when unknown.
        metrics: what was measured on which split, free-form and JSON-ready.
        versions: of what trained it (`runtime.versions`).
        origin: where the weights come from.
        calibrated_on: the split that the network's calibration was fitted on, as ``fer2013/val``; empty when on none.
    """

    network: NetworkDescription
    dataset: str = ""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "train.py"
    calibrated_on: str = ""


Info = TypeVar("Info", ExportInfo, ModelInfo)


def to_json(info: ExportInfo | ModelInfo) -> str:
    """A description as one flat JSON object: the network's properties are on the same level as the others."""
    values = dataclasses.asdict(info)
    return json.dumps({"format_version": FORMAT_VERSION, **values.pop("network"), **values})


def from_json(kind: type[Info], text: Any, path: str | Path, **known: Any) -> Info:
    """Reads what `to_json` wrote. Properties that the file lacks take their defaults.

    Args:
        kind: `ModelInfo` or `ExportInfo`.
        text: the JSON.
        path: what messages call the file.
        known: properties that the rest of the file gives, for one that lacks them.

    Raises:
        UserError: no JSON object, another version, unknown names, or an implausible value.
    """
    try:
        values = json.loads(text)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format version {FORMAT_VERSION}")
        names = [field.name for field in dataclasses.fields(NetworkDescription)]
        own = {**known, **{name: values.pop(name) for name in names if name in values}}
        network = NetworkDescription(**{**own, "class_names": tuple(own["class_names"])})
        network.check()
        info = kind(network, **values)
        for name, default in vars(kind(network)).items():
            if not isinstance(getattr(info, name), type(default)):
                raise ValueError(f"{name} is {printable(repr(getattr(info, name)), 80)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the description of its network ({printable(error, 300)})") from None
    return info
