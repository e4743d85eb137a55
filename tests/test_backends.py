"""The whole training step on TensorFlow, JAX and PyTorch: it trains the network, and the three agree."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import backend_steps
import numpy as np
import pytest
from conftest import ROOT

BACKENDS = ("tensorflow", "jax", "torch")
# Float32 rounds by 6e-8. The three add in different orders, a few hundred numbers at a time: the terms then agree to
# about 2e-7 of their size, and gradients to about 1e-6 of the largest of their array.
TERM_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 5e-6
# AdamW's step is RATE times a gradient over the root of its mean square. The smallest such root is here 0.002 of the
# largest in its array, so that the gradients' error moves two steps by less than a hundredth of RATE.
WEIGHT_TOLERANCE = 1e-2 * backend_steps.RATE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs_of(tmp_path_factory):
    """What `backend_steps` wrote, by backend; each backend runs once."""
    folder, found = tmp_path_factory.mktemp("backends"), {}

    def outputs_of(backend: str) -> dict[str, np.ndarray]:
        if importlib.util.find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed")
        if backend not in found:
            path = folder / f"{backend}.npz"
            # On the CPU: a GPU's TF32 has 11 bits.
            on_cpu = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_TORCH_DEVICE": "cpu"}
            environment = {**os.environ, **on_cpu, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, backend_steps.__file__, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
            assert done.returncode == 0, f"{backend} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            with np.load(path, allow_pickle=False) as file:
                found[backend] = dict(file)
            assert found[backend].pop("backend") == backend
        return found[backend]

    return outputs_of


def group(outputs: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in outputs.items() if name.startswith(prefix)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_discriminators_move_every_variable_before_the_embeddings(backend, outputs_of):
    """AdamW's first step is RATE wherever there is a gradient; weight decay moves a kernel without one too."""
    outputs = outputs_of(backend)
    before, after = group(outputs, "random/before/"), group(outputs, "random/after/")
    assert len(before) == 11
    for name, weight in before.items():
        is_kernel = name.endswith("kernel")
        decayed = weight * (1 - backend_steps.RATE * backend_steps.DECAY * is_kernel)
        assert np.abs(after[name] - decayed).max() > 0.5 * backend_steps.RATE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_state_is_finite_after_a_step(backend, outputs_of):
    state = group(outputs_of(backend), "random/state/")
    assert any(name.endswith("velocity") for name in state) and any(name.endswith("history") for name in state)
    for name, array in state.items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("loss", backend_steps.LOSSES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_two_steps_agree_with_tensorflow(backend, loss, outputs_of):
    """Terms, weights, statistics of the batch normalisation, moments of the gradients, predictions remembered."""
    found, expected = (group(outputs_of(each), f"{loss}/plain/") for each in (backend, "tensorflow"))
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found.pop("history"), expected["history"])
    assert np.all(expected.pop("history") >= 0)
    assert {"terms/ce of step 2", "terms/fd of step 2", "terms/md of step 2", "terms/ed of step 2"} < expected.keys()
    assert ("terms/eac of step 2" in expected) == (loss == "two_views")
    for name, array in expected.items():
        largest = np.abs(array).max()
        tolerances = {"terms": TERM_TOLERANCE * largest, "weights": WEIGHT_TOLERANCE}
        tolerance = tolerances.get(name.split("/")[0], GRADIENT_TOLERANCE * largest)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("loss", backend_steps.LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_resident_images_and_many_steps_per_call_change_nothing(backend, loss, outputs_of):
    """Two epochs of 4 steps, as with batches from outside, to the bit; on JAX to rounding.

    XLA compiles the loop's body otherwise than a step alone. How many steps a call takes changes no bit there either.
    """
    streamed, single, many = (group(outputs_of(backend), f"{loss}/{steps_per_call}/") for steps_per_call in (0, 1, 32))
    assert many.keys() == streamed.keys() and "logs/val_loss" in streamed
    assert single.keys() == (many.keys() if loss == "ad_corre" else set())  # one step per call is tried with one loss
    for name, array in single.items():
        np.testing.assert_array_equal(many[name], array, err_msg=name)
    for name, array in streamed.items():
        if backend == "jax":
            np.testing.assert_allclose(many[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(many[name], array, err_msg=name)
