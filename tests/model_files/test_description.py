"""A description goes to flat JSON and back; an implausible one is refused with its file's name."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

import cnn_model
from files import UserError
from model_files.description import ExportInfo, ModelInfo, NetworkDescription, from_json, to_json

NETWORK = NetworkDescription("toy", ("Dark", "Bright"), 2, 3, 48, "unit", 4.0)
INFOS = (ModelInfo(NETWORK, "toy/train", {"accuracy": 0.5}, {"keras": "3"}), ExportInfo(NETWORK, "toy/train", "a test"))


@pytest.mark.parametrize("info", INFOS)
def test_the_json_is_flat_and_comes_back(info):
    text = to_json(info)
    values = json.loads(text)
    assert (values["format_version"], values["arch"], values["dataset"]) == (1, "toy", "toy/train")
    assert "network" not in values and from_json(type(info), text, "a") == info


def test_properties_that_an_older_file_lacks_have_their_defaults_or_what_the_file_shows():
    text = json.dumps({"format_version": 1, "arch": "toy", "class_names": ["a", "b"], "input_size": 2})
    expected = NetworkDescription("toy", ("a", "b"), num_embeddings=5, input_size=2)
    assert from_json(ExportInfo, text, "a", num_embeddings=5) == ExportInfo(expected)
    assert from_json(ExportInfo, to_json(INFOS[1]), "a", num_embeddings=5).network == NETWORK


def test_every_property_is_an_argument_of_the_network():
    """So that a new one is built in, saved and read once it is a field."""
    arguments = NETWORK.arguments()
    assert set(arguments) <= set(inspect.signature(cnn_model.build_model).parameters)
    assert arguments["num_classes"] == 2 and len(arguments) == len(dataclasses.fields(NETWORK))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"arch": None},
        {"arch": 7},
        {"class_names": None},
        {"class_names": 7},
        {"class_names": ["alone"]},
        {"class_names": [1, 2]},
        {"num_embeddings": 0},
        {"num_embeddings": "two"},
        {"embedding_size": 2},
        {"input_size": 0},
        {"input_size": 10**9},
        {"input_size": True},
        {"scaling": 7},
        {"logit_scale": 0},
        {"logit_scale": "4"},
        {"temperature": 0},
        {"temperature": True},
        {"exponent": 1e9},
        {"exponent": "2"},
        {"calibrated_on": 7},
        {"metrics": []},
        {"origin": 7},
        {"colour": "red"},
    ],
    ids=json.dumps,
)
def test_an_implausible_value_is_refused_by_name(change):
    values = {**json.loads(to_json(INFOS[0])), **change}
    text = json.dumps({name: value for name, value in values.items() if value is not None})
    with pytest.raises(UserError, match=rf"a\.h5: .*({next(iter(change))}|format version|class_names|int)"):
        from_json(ModelInfo, text, "a.h5")


def test_a_file_from_before_calibration_existed_has_none():
    values = json.loads(to_json(INFOS[0]))
    for name in ("temperature", "exponent", "calibrated_on"):
        values.pop(name, None)
    network = from_json(ModelInfo, json.dumps(values), "a.h5").network
    assert (network.temperature, network.exponent) == (1.0, 1.0)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, 7])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(UserError, match=r"a\.onnx: "):
        from_json(ExportInfo, text, "a.onnx")
