"""Tests of command_line: what --help shows of every command."""

from __future__ import annotations

import dataclasses
import typing

import docstring_parser
import pytest

import datasets
from config import TrainConfig
from demo import DemoConfig
from grids.options import ListGridConfig, ReportGridConfig, RunGridConfig
from prepare_data import InspectConfig
from recognition.recognize_command import RecognizeConfig
from recognition.video_command import VideoConfig
from test import DescribeConfig, EvaluateConfig, ExportConfig

COMMANDS = (
    TrainConfig,
    *(RunGridConfig, ListGridConfig, ReportGridConfig),
    *(RecognizeConfig, VideoConfig, EvaluateConfig, ExportConfig, DescribeConfig, DemoConfig),
    *(datasets.get(name).options for name in datasets.NAMES),
    InspectConfig,
)


def undescribed(config_class: type) -> list[str]:
    """The options of a command that have no description."""
    described = {
        param.arg_name
        for parent in config_class.__mro__[:-1]
        for param in docstring_parser.parse_from_object(parent).params
        if param.description
    }
    names = []
    for name, hint in typing.get_type_hints(config_class, include_extras=True).items():
        in_hint = any(getattr(extra, "help", None) for extra in typing.get_args(hint)[1:])
        if dataclasses.is_dataclass(hint):
            names += undescribed(hint)
        elif not in_hint and name not in described and typing.get_origin(hint) is not typing.ClassVar:
            names.append(name)
    return names


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_option_has_a_description(command):
    assert undescribed(command) == []


def test_an_option_without_a_description_is_found():
    @dataclasses.dataclass(frozen=True)
    class Config:
        one: int = 1
        two: int = 2

    assert undescribed(Config) == ["one", "two"]
