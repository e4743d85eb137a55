"""Divides the processor's cores and the GPUs of this machine among the workers of a grid."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Sequence

_SMI_SECONDS = 20
_MEMORY = 0.9  # of a GPU, for all its workers; each of them also takes some hundred MB beside its share
_USERS_OWN = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


def find_gpus() -> list[str]:
    """The NVIDIA GPUs (or the parts of one, MIG) that a run may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    No backend is imported, because it would take memory on every GPU: they are those of ``CUDA_VISIBLE_DEVICES``, or
    all that ``nvidia-smi`` lists. Empty without a GPU or its driver.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA stops at the first name that is none
        names = (name.strip() for name in visible.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    try:
        command = ["nvidia-smi", "-L"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: list[list[str]] = []  # each GPU, followed by its parts
    for kind, name in re.findall(r"^\s*(GPU|MIG) .*\(UUID: ([\w/-]+)\)", done.stdout, flags=re.MULTILINE):
        if kind == "GPU":
            found.append([name])
        else:
            found[-1].append(name)
    return [name for gpu in found for name in gpu[1:] or gpu]


def gpu_environment(share: int, shares: int, gpus: Sequence[str], devices: int = 1) -> dict[str, str]:
    """The environment variables that give a worker its share of the GPUs; empty where there is nothing to share.

    Several GPUs are dealt out in turn (``CUDA_VISIBLE_DEVICES``). The workers of one GPU get equal parts of its memory
    (``XLA_PYTHON_CLIENT_MEM_FRACTION``; JAX alone would take 75% for the first of them), unless the user has set how
    JAX takes memory. TensorFlow takes it as it needs it (`runtime.set_up`).

    Args:
        share: index of the worker, 0..shares-1.
        shares: workers at a time.
        gpus: the names of the GPUs (`find_gpus`).
        devices: those on which the run wants to train; a run on several sees all of them.
    """
    if shares == 1 or not gpus:
        return {}
    changes = {}
    workers = shares
    if devices == 1:
        mine = share % len(gpus)
        workers = len(range(mine, shares, len(gpus)))
        if len(gpus) > 1:
            changes["CUDA_VISIBLE_DEVICES"] = gpus[mine]
    if workers > 1 and not any(name in os.environ for name in _USERS_OWN):
        changes["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_MEMORY / workers:.3f}"
    return changes


def give_cores(pid: int, share: int, shares: int) -> None:
    """Binds a process to its share of the cores: two processes on one core each are faster than two on both."""
    if not hasattr(os, "sched_setaffinity"):  # not on this system
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[share % len(cores) :: shares] if shares <= len(cores) else [cores[share % len(cores)]]
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(pid, mine)
