"""How the cores and GPUs of a machine are divided among the workers of a grid; `nvidia-smi` is a script of ours."""

from __future__ import annotations

import os

import pytest

from grids.shares import find_gpus, gpu_environment

FRACTION, VISIBLE = "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"
TWO = """GPU 0: NVIDIA H200 (UUID: GPU-1111-aa)
GPU 1: NVIDIA H200 (UUID: GPU-2222-bb)
"""
PARTS = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1111-aa)
  MIG 3g.20gb     Device  0: (UUID: MIG-3333-cc)
  MIG 3g.20gb     Device  1: (UUID: MIG-4444-dd)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2222-bb)
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (FRACTION, VISIBLE, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def answers(text, code=0):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return answers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TWO, ["GPU-1111-aa", "GPU-2222-bb"]),
        (PARTS, ["MIG-3333-cc", "MIG-4444-dd", "GPU-2222-bb"]),
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.\n", []),
    ],
)
def test_gpus_are_those_that_nvidia_smi_lists(nvidia_smi, text, found):
    nvidia_smi(text, code=0 if found else 9)
    assert find_gpus() == found


def test_a_users_choice_of_gpus_holds(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi(TWO)
    for visible, found in (("3, GPU-1111-aa", ["3", "GPU-1111-aa"]), ("", []), ("-1", []), ("0,-1,1", ["0"])):
        monkeypatch.setenv(VISIBLE, visible)
        assert find_gpus() == found
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # a machine without the driver
    assert find_gpus() == []


def test_workers_share_the_memory_of_their_gpu():
    assert gpu_environment(0, 4, []) == {} == gpu_environment(0, 1, ["a", "b"])
    assert [gpu_environment(i, 4, ["a"]) for i in range(4)] == [{FRACTION: "0.225"}] * 4
    dealt = [gpu_environment(i, 3, ["a", "b"]) for i in range(3)]
    assert dealt == [{VISIBLE: "a", FRACTION: "0.450"}, {VISIBLE: "b"}, {VISIBLE: "a", FRACTION: "0.450"}]
    # A run on both GPUs sees both, and shares each of them with all other workers.
    assert gpu_environment(1, 3, ["a", "b"], devices=2) == {FRACTION: "0.300"}


@pytest.mark.parametrize("name", [FRACTION, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"])
def test_a_users_own_setting_of_the_memory_holds(monkeypatch, name):
    monkeypatch.setenv(name, "0.1")
    assert gpu_environment(2, 3, ["a", "b"]) == {VISIBLE: "a"}
