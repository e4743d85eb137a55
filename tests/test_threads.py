"""The number of threads of a run: kept with it, and used again when it goes on."""

from __future__ import annotations

import json
import os

import pytest
from conftest import run_python

import experiment
import runtime

# Prints the threads of two moments, whether another number is accepted at each, and a digest of a gradient's bits.
STEP = """
import os, sys
wanted, cores = int(sys.argv[1]), int(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
import runtime
runtime.import_keras()
first, accepted = runtime.threads(), runtime.use_threads(wanted)
import hashlib
import keras, numpy as np
network = keras.Sequential([keras.Input((48, 48, 8)), keras.layers.Conv2D(32, 3), keras.layers.Conv2D(32, 3)])
network.compile("sgd", "mse", jit_compile=False if keras.backend.backend() == "tensorflow" else "auto")
for variable in network.variables:
    variable.assign(np.random.default_rng(1).normal(size=variable.shape))
x = np.random.default_rng(0).normal(size=(21, 48, 48, 8)).astype("float32")
network.train_on_batch(x, x[:, :44, :44, :1].repeat(32, -1))
bits = hashlib.sha256(b"".join(np.asarray(variable).tobytes() for variable in network.variables)).hexdigest()
print(first, accepted, runtime.threads(), runtime.use_threads(wanted + 1), bits)
"""


@pytest.mark.slow
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda pid: ())(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_the_bits_follow_the_number_of_threads_and_not_that_of_the_cores(backend):
    found = {}
    for threads, cores in ((2, 2), (1, 1), (2, 1)):
        done = run_python("-c", STEP, threads, cores, env_changes={"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stderr
        first, accepted, used, changed, found[threads, cores] = done.stdout.split()
        assert (first, accepted, used, changed) == (str(cores), "True", str(threads), "False")
    assert found[2, 1] == found[2, 2]


@pytest.mark.parametrize(
    ("kept", "accepted", "printed"),
    [
        ({"threads": 3}, True, "3 threads, as at the start of the run"),
        ({"threads": 3}, False, "began with 3 threads and goes on with 2: the last bits may differ"),
        ({"threads": 2}, False, ""),
        ({}, False, ""),
        ({"threads": "3"}, False, ""),
        ({"threads": 10**9}, False, ""),
        ([], False, ""),
        (None, False, ""),
    ],
)
def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path, monkeypatch, capsys, kept, accepted, printed):
    asked = []
    monkeypatch.setattr(runtime, "threads", lambda: 2)
    monkeypatch.setattr(runtime, "use_threads", lambda number: asked.append(number) or accepted)
    if kept is not None:
        (tmp_path / "env.json").write_text(json.dumps(kept))
    experiment._use_threads_of(tmp_path)
    assert not asked and not capsys.readouterr().out  # a run that has no state begins anew
    (tmp_path / "state.h5").touch()
    experiment._use_threads_of(tmp_path)
    assert asked == ([3] if printed else [])
    out = capsys.readouterr().out
    assert printed in out and bool(printed) == bool(out)
