"""Damaged files of every format are read or refused with one message; see fuzz.py for many more cases."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import time
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz_formats import FORMATS, Believed, Format

from files import UserError

CASES, SEED = 160, 26  # the first 109 of seed 26 have every format
HERE = list(FORMATS)
if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
    HERE = [each for each in HERE if each.name != "onnx"]
if importlib.util.find_spec("ai_edge_litert") is None:
    HERE = [each for each in HERE if each.name != "tflite"]


def test_no_damage_is_a_traceback_a_crash_a_hang_or_believed():
    outcomes = fuzz.run_cases(range(CASES), seed=SEED, names=[each.name for each in HERE])
    bad = [outcome for outcome in outcomes if outcome.kind not in fuzz.GOOD]
    assert not bad, f"{len(bad)} of {CASES}; repeat one with `python tests/fuzz.py --seed {SEED} --case N`: {bad}"
    assert {outcome.format for outcome in outcomes} == {each.name for each in HERE}
    counts = [sum(outcome.kind == kind for outcome in outcomes) for kind in fuzz.GOOD]
    assert min(counts) > CASES / 10, f"{counts}: the damage is too mild or too strong to find anything"


@pytest.mark.parametrize("form", HERE, ids=lambda form: form.name)
def test_what_is_not_damaged_is_read(form, tmp_path):
    form.write(tmp_path)
    form.read(tmp_path)


# --- the suite itself can see what it looks for


def bad_reader(kind):
    def read(folder):
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "hang":
            time.sleep(60)
        elif kind == "memory":
            np.ones(fuzz.MEMORY * 5 // 4, np.uint8)
        elif kind == "believed":
            raise Believed("x")
        elif kind == "message":
            raise UserError("a message without the name of the file")
        elif kind == "traceback":
            raise IndexError("x")

    return read


KINDS = ("signal", "hang", "memory", "believed", "message", "traceback", "ok")


FAILING = [Format(kind, lambda folder: (folder / "x").write_bytes(b"x"), ("x",), bad_reader(kind)) for kind in KINDS]


@pytest.mark.slow
def test_every_kind_of_failure_is_seen_and_the_worker_goes_on():
    source = "test_fuzz:FAILING"
    chosen = fuzz.Cases(0, KINDS, source, Path()).chosen
    of_kind = [next(case for case in range(1000) if chosen(case)[0].name == kind) for kind in KINDS]
    outcomes = fuzz.run_cases(of_kind, seed=0, names=KINDS, source=source)
    assert sorted(outcome.kind for outcome in outcomes) == sorted(KINDS)
    for outcome in outcomes:
        assert outcome.kind == outcome.format, outcome


def test_damage_changes_the_file_and_depends_on_the_seed_only():
    data = bytes(range(256))
    found = [fuzz.damage(data, random.Random(seed)) for seed in range(50)]
    assert found == [fuzz.damage(data, random.Random(seed)) for seed in range(50)]
    assert len(set(found)) > 40 and data not in found[:1]
