"""Do the modules keep to their layers, and does what is instant stay free of Keras?"""

from __future__ import annotations

import ast
import re
import sys

import pytest
from conftest import ROOT, run_python

LAYERS = (
    {"errors", "lost_peers"},
    {"config", "files", "images", "safe_hdf5"},
    {"sources", "split_writer", "annotations"},
    {"decoding", "experiments", "team"},
    {
        "onnx_network",
        "runtime",
        "data_helper",
        "metrics",
        "comparison",
        "synthetic",
        "published_file",
        "report_formats",
        "rivals",
    },
    {
        "dataset_class",
        "cnn_model",
        "custom_loss",
        "plots",
        "synthetic_data",
        "fer2013",
        "rafdb",
        "affectnet",
        "published",
        "duplicates",
        "report_rows",
    },
    {"model_file", "trainer", "ferplus", "report_tables"},
    {"evaluation", "report_figures", "grid"},
    {"experiment", "report_page", "export"},
    {"report"},
    {"train", "test", "prepare_data", "reproduce"},
)
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}
ON_DISK = sorted(path.stem for path in ROOT.glob("*.py"))
WITHOUT_KERAS = ("errors", "config", "files", "images", "safe_hdf5", "data_helper", "metrics", "synthetic", "plots")
WITHOUT_KERAS += ("published_file", "sources", "split_writer", "decoding", "experiments", "comparison", "report_rows")
WITHOUT_KERAS += ("onnx_network", "report_formats", "report_tables", "report_figures", "report_page", "report")
WITHOUT_KERAS += ("team", "lost_peers")


def imported(source: str) -> set[str]:
    """The top-level names of every import in a module, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a flat layout has no relative imports"
            names.add(node.module.split(".")[0])
    return names


def imports_of(module: str) -> set[str]:
    return imported((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def reachable(module: str) -> set[str]:
    """Every name that importing ``module`` may import, through our own modules."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports_of(name) if name in ON_DISK else ()
    return seen


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g as h\n    if 1:\n        from i import j\n"
    assert imported(source) == {"a", "c", "g", "i"}


def test_every_module_has_its_layer():
    assert sorted(LAYER_OF) == ON_DISK


@pytest.mark.parametrize("module", ON_DISK)
def test_imports_go_down(module):
    ours = imports_of(module) & set(ON_DISK)
    assert {name: LAYER_OF[name] for name in ours if LAYER_OF[name] >= LAYER_OF[module]} == {}


def test_only_runtime_knows_the_backend():
    backends = {"tensorflow", "jax", "torch"}
    knowing = {module for module in ON_DISK if imports_of(module) & backends}
    assert knowing == {"runtime", "export"}  # the converters are TensorFlow's


@pytest.mark.parametrize("module", WITHOUT_KERAS)
def test_keras_is_out_of_reach(module):
    assert not reachable(module) & {"keras", "tensorflow", "jax", "torch"}


def test_help_and_config_load_no_keras():
    """Python's own account of what it imported while each command printed its help."""
    commands = sorted(LAYERS[-1])
    lines = [f"import {name}" for name in (*commands, *WITHOUT_KERAS)]
    done = run_python(
        "-c", "; ".join(["import sys", *lines, "print('keras' in sys.modules, 'tensorflow' in sys.modules)"])
    )
    assert (done.stdout.strip(), done.stderr) == ("False False", "")
    done = run_python("-X", "importtime", ROOT / "train.py", "--help")
    assert done.returncode == 0 and "--arch" in done.stdout
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "config" in loaded and not loaded & {"keras", "tensorflow", "jax", "torch"}


def test_ruff_takes_test_for_ours():
    """It finds the other modules by itself; what the list names must be there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"known-first-party = \[(.*?)\]", text, flags=re.DOTALL)
    assert {"test"} <= set(re.findall(r'"(\w+)"', listed)) <= set(ON_DISK)


def test_no_module_hides_one_of_the_standard_library():
    """Python's own tests, which `test.py` does hide, are not counted there."""
    assert not set(ON_DISK) & sys.stdlib_module_names
