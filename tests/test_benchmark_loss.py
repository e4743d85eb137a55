"""The loss's benchmark runs and reports time and memory; wrong options are refused."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, run_python


@pytest.mark.slow
def test_a_quick_run_prints_a_table_and_one_json_line():
    done = run_python(ROOT / "benchmarks" / "loss.py", "--backend", "jax", "--batches", "96", "--quick", timeout=300)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    (row,) = result["rows"]
    assert len(table) == 2 and {"commit", "jax", "cpu_count"} <= set(result)
    assert (row["batch_size"], row["k"], row["d"]) == (96, 7, 256)
    assert row["terms_s"] > 0 and row["terms_over_product"] > 0 and row["product_bytes"] >= 0
    gradient = 96 * 7 * 256 * 4
    assert gradient / 2 < row["terms_compiled_bytes"] < 20 * gradient


@pytest.mark.slow
def test_a_batch_of_one_is_refused():
    done = run_python(ROOT / "benchmarks" / "loss.py", "--batches", "1")
    assert done.returncode == 2 and "--batches: expected 2 faces or more, received 1" in done.stderr
