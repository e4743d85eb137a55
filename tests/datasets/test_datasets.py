"""Tests of the data sets' descriptions: they agree with each other, with the paper's numbers and with docs/data.md."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

import datasets

META = {"class_names": ["a"] * 7, "options": {"form": "2021"}}


@pytest.mark.parametrize("name", datasets.NAMES)
def test_a_data_set_describes_itself(name):
    data_set = datasets.get(name)
    assert data_set.name == name and data_set.title and data_set.options.__doc__
    document = " ".join((ROOT / "docs/data.md").read_text(encoding="utf-8").split())
    if data_set.official_counts(META):
        assert data_set.paper in document, "cited there in the same words"
        assert all(address in document for address in re.findall(r"https?://\S+", data_set.request))
        assert data_set.paper in data_set.about and data_set.request in data_set.about


def test_the_published_numbers_are_found():
    published = json.loads((ROOT / "reporting/paper_results.json").read_text(encoding="utf-8"))
    keys = {(name, count): datasets.get(name).paper_key(count) for name in datasets.NAMES for count in (7, 8)}
    found = {key: value for key, value in keys.items() if value is not None}
    assert found.pop(("fer2013", 7)) == found.pop(("fer2013", 8)) == "fer2013"
    assert found.pop(("rafdb", 7)) == found.pop(("rafdb", 8)) == "rafdb"
    assert found == {("affectnet", 7): "affectnet_7"}, "nothing was published for 8 classes"
    assert {"fer2013", "rafdb", "affectnet_7"} <= published["ad_corre"].keys()


def test_only_drawn_data_needs_no_source():
    assert [name for name in datasets.NAMES if not datasets.get(name).has_source] == ["synthetic"]
