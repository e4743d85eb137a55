"""Several devices and processes: the same result as one device, one exchange of each tensor, a killed process."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_state, run_python

from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_run.py")
EPOCHS, BATCH = 4, 16


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """A program that one start has compiled is there for the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """5 batches to train on; 37 to select on, so that the last batch is of 5; 35 to test on."""
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(folder), num_train=84, num_val=37, num_test=35, size=16))
    return folder


def options(data_dir: Path, run_dir: Path) -> list[str]:
    named = {
        **{"--backend": "jax", "--data-dir": data_dir, "--run-dir": run_dir, "--epochs": EPOCHS},
        **{"--batch-size": BATCH, "--arch": "tiny", "--input-size": 8, "--num-embeddings": 2, "--embedding-size": 8},
        **{"--history": 50, "--average": 0.9, "--warmup-epochs": 1, "--mixup": 0.2, "--w-eac": 5},
    }
    return [str(part) for pair in named.items() for part in pair]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_group(
    arguments: list[str], devices: int, dies: tuple[int, int] | None = None
) -> list[tuple[int, str, str, float]]:
    """Two real processes on loopback; exit code, standard output and error of each, and when it ended.

    Args:
        arguments: of train.py.
        devices: of each process.
        dies: which process kills itself, and in which epoch.
    """
    port = free_port()
    group = []
    for i in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if dies and dies[0] == i:
            environment["DIE_AT_EPOCH"] = str(dies[1])
        place = ["--devices", devices, "--processes", 2, "--process-id", i, "--coordinator", f"localhost:{port}"]
        command = [sys.executable, SCRIPT, *arguments, *place]
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        group.append(process)
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 300
    try:
        while len(ended) < 2 and time.monotonic() < deadline:
            ended |= {i: time.monotonic() for i, p in enumerate(group) if i not in ended and p.poll() is not None}
            time.sleep(0.1)
    finally:
        for process in group:
            process.kill()
    outputs = [process.communicate() for process in group]
    return [(group[i].returncode, *outputs[i], ended.get(i, deadline)) for i in range(2)]


@pytest.fixture(scope="module")
def one(data_dir, tmp_path_factory) -> Path:
    """The folder of the run by one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = run_python(SCRIPT, *options(data_dir, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory) -> tuple[Path, list, list]:
    """The run by two processes, of which rank 0 is killed in epoch 3, finished on half the devices.

    They finish it with all images on every device. The folder, and what each of the two starts gave.
    """
    run_dir = tmp_path_factory.mktemp("two") / "run"
    arguments = options(data_dir, run_dir)
    return run_dir, run_group(arguments, 2, (0, 3)), run_group([*arguments, "--resident", "yes"], 1)


def history(run_dir: Path) -> list[dict[str, float]]:
    with open(run_dir / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_killed_process_ends_the_other_with_a_message(two):
    killed, other = two[1]
    assert killed[0] == -9, killed
    code, _, err, when = other
    assert code not in (0, -9), err
    assert when - killed[3] < 60
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 1 of 2" in errors[0] and "another process" in errors[0], err
    assert "Traceback" not in err and "absl" not in err


def test_a_process_that_waits_for_the_others_ends_at_sigterm(data_dir, tmp_path):
    place = ["--processes", 2, "--process-id", 1, "--coordinator", f"localhost:{free_port()}"]
    command = [str(part) for part in (sys.executable, SCRIPT, *options(data_dir, tmp_path / "run"), *place)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("process 1 of 2 waits" in line for line in process.stderr)
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()


def test_the_run_continues_and_only_rank_0_prints(two):
    run_dir, _, (first, second) = two
    assert (first[0], second[0]) == (0, 0), two[2]
    # The process may have died before the state of epoch 2 was on the disk.
    assert re.search("after epoch [12] of 4", first[1]) and "accuracy" in first[1]
    assert second[1:3] == ("", "")
    assert json.loads((run_dir / "result.json").read_text())["n"] == 35


def test_two_processes_train_as_one(one, two):
    """20 steps with augmentation, mixup, two views, dropout, adaptive map, averaged weights; the last batch is of 5."""
    run_dir = two[0]
    for expected, found in zip(history(one), history(run_dir), strict=True):
        assert expected.keys() == found.keys()
        for name in expected.keys() - {"seconds"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    expected, found = read_state(one), read_state(run_dir)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if array.dtype.kind in "iu":  # the confusion history, the random generators, the counters
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        elif "adamw" not in name:
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert any("ad_corre_loss/history" in name for name in expected)


def test_two_processes_evaluate_as_one(one, two):
    expected, found = (np.load(folder / "predictions.npz") for folder in (one, two[0]))
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-5)
    untrained = [json.loads((folder / "untrained.json").read_text()) for folder in (one, two[0])]
    assert untrained[1]["same_class"] == pytest.approx(untrained[0]["same_class"], abs=1e-5)


def test_the_compiled_step_exchanges_each_thing_once():
    """On 8 devices: the embeddings and the logits gathered, all gradients in one sum, and 4 of each batch-norm layer.

    A batch-norm layer needs the mean, then the variance about it (Keras computes the mean again beside it), and the
    same two back; its own two gradients are among the latter.
    """
    done = run_python(SCRIPT, "collectives", 8)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    norms = [(kind, shapes) for kind, shapes, origin in found if "/batch_norm" in origin]
    others = [(kind, shapes) for kind, shapes, origin in found if "/batch_norm" not in origin]
    assert [kind for kind, _ in norms] == ["all-reduce"] * 4 * 2
    assert sorted(shape for _, shapes in norms for shape in shapes) == ["f32[12]"] * 6 + ["f32[8]"] * 6
    gathers = [(kind, shapes) for kind, shapes in others if kind != "all-reduce"]
    assert gathers == [("all-gather", ["f32[16,2,8]"]), ("all-gather", ["f32[16,7]"])]
    gradients = ["f32[3,3,1,8]", "f32[3,3,1,8]", "f32[1,1,8,12]", "f32[16,12]", "f32[16]", "f32[7,16]"]
    assert [shapes for kind, shapes in others if kind == "all-reduce"] == [gradients]
