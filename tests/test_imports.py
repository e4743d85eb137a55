"""What is instant stays free of Keras, and no module hides one of the standard library's."""

from __future__ import annotations

import re
import sys

from conftest import ROOT, run_python

COMMANDS = ("train", "test", "prepare_data", "reproduce")


def test_help_loads_no_keras():
    """Python's own account of what it imported for the commands, the data sets and the reports."""
    lines = ["import sys", *(f"import {name}" for name in COMMANDS), "from reporting import report"]
    done = run_python("-c", "; ".join([*lines, "print(*{'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules))"]))
    assert (done.stdout.strip(), done.stderr) == ("", "")
    done = run_python("-X", "importtime", ROOT / "train.py", "--help")
    assert done.returncode == 0 and "--arch" in done.stdout
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "config" in loaded and not loaded & {"keras", "tensorflow", "jax", "torch"}


def test_no_module_hides_one_of_the_standard_library():
    """Python's own tests, which `test.py` does hide, are not counted there."""
    assert not {path.stem for path in ROOT.glob("*.py")} & sys.stdlib_module_names
