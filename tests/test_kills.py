"""A training that is killed at any replacement of a file ends as if it had not been; see kills.py."""

from __future__ import annotations

import os
import sys

import pytest
from conftest import ROOT, run_python

PLACES = os.environ.get("AD_CORRE_KILLS", "3")  # "all" takes some ten minutes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_run_that_is_killed_at_a_replacement_ends_the_same_to_the_bit(tmp_path):
    chosen = [] if PLACES == "all" else ["--places", PLACES]
    done = run_python(ROOT / "tests" / "kills.py", "--folder", tmp_path, *chosen)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.count("the same\n") >= 3 and "killed" in done.stdout
