"""Describes the devices and processes that train one network together, and what the processes exchange."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

import config
from command_line import option
from config import TrainConfig
from files import UserError, only_writer

_ADDRESS = re.compile(r"[^\s/]+:\d{1,5}")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm's steps that are no srun: interactive shells, batch scripts
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one network together, and which of them this one is.

    The methods that exchange values do nothing special in a group of one process. In a larger group every process must
    call them in the same order, inside `exchange.connected`.

    Attributes:
        devices: devices of each process.
        processes: number of processes.
        process_id: rank of this process, 0..processes-1; only rank 0 writes files and prints.
        coordinator: ``HOST:PORT`` of rank 0; None for one process.
        first_device: index of this process's first device among those that it sees.
    """

    devices: int = 1
    processes: int = 1
    process_id: int = 0
    coordinator: str | None = None
    first_device: int = 0

    @property
    def all_devices(self) -> int:
        """Devices of all processes."""
        return self.devices * self.processes

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.process_id == 0

    def broadcast(self, value: Value) -> Value:
        """Rank 0's ``value`` (JSON-ready), in every process; waits until all have called it."""
        if self.processes == 1:
            return value
        from jax.experimental import multihost_utils

        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        text = multihost_utils.broadcast_one_to_all(np.resize(text, length))  # every process needs the same shape
        return json.loads(np.asarray(text).tobytes())

    def wait(self) -> None:
        """Returns when every process has called it."""
        self.broadcast(None)

    def rank0_first(self, function: Callable[..., Value], *args: Any) -> Value:
        """The result of ``function(*args)``, called in rank 0 before the other processes call it."""
        if self.is_rank0:
            result = function(*args)
        self.wait()
        return result if self.is_rank0 else function(*args)

    def on_rank0(self, function: Callable[..., Value]) -> Callable[..., Value | None]:
        """``function`` in rank 0; in the other processes a function that does nothing and returns None."""
        return function if self.is_rank0 else lambda *args, **options: None

    def only_writer(self, folder: Any) -> contextlib.AbstractContextManager[None]:
        """Rank 0's lock on ``folder`` (`files.only_writer`)."""
        return only_writer(folder) if self.is_rank0 else contextlib.nullcontext()

    def check_agreement(self, what: str, values: Mapping[str, Any], remedy: str) -> None:
        """Checks that every process has rank 0's values.

        Args:
            what: name of the values in the message.
            values: name to JSON-ready value, may be nested.
            remedy: end of the message.

        Raises:
            UserError: this process has other values.
        """
        if changed := config.differences(self.broadcast(values), values):
            raise UserError(f"{what}: expected those of process 0, found others ({'; '.join(changed)}); {remedy}")

    def padded(self, size: int) -> int:
        """``size``, the images of a batch, rounded up to a multiple of all devices."""
        return -(-size // self.all_devices) * self.all_devices

    def share(self, size: int) -> slice:
        """This process's rows of a batch of ``size`` images filled up to `padded`, in the order of the processes."""
        each = self.padded(size) // self.processes
        return slice(self.process_id * each, (self.process_id + 1) * each)

    def take(self, images: np.ndarray, rows: np.ndarray | range, size: int | None = None) -> np.ndarray:
        """Reads this process's share of the batch of ``images`` at ``rows``, filled up with black images.

        Args:
            images: (N, H, W, C), may be a memory map.
            rows: int (B,), or a range, which is read as one piece.
            size: of the batch, B or more; None is B. It is filled up to `padded` of it.
        """
        share = self.share(len(rows) if size is None else size)
        own = rows[share]
        own = np.asarray(images[own.start : own.stop] if isinstance(own, range) else images[own])
        missing = share.stop - share.start - len(own)
        return np.pad(own, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else own


GROUP_OF_ONE = ProcessGroup()


def process_group(settings: TrainConfig, environment: Mapping[str, str] = os.environ) -> ProcessGroup:
    """The process group that the options describe; what they leave open is read from Slurm, in a step of srun.

    Args:
        settings: of which backend, batch_size, devices, processes, process_id and coordinator are read.
        environment: `os.environ`; Slurm's variables are read with the JAX backend only.

    Raises:
        UserError: options that contradict each other, a backend other than JAX, or a batch size that is not a
            multiple of the devices.
    """
    slurm = _slurm_group(environment) if settings.backend == "jax" else {}
    processes = settings.processes or slurm.get("processes", 1)
    if slurm.get("processes") != processes:  # the options differ: then Slurm's numbers mean nothing
        slurm = {}
    if processes == 1:
        _check_one_process(settings)
        group = ProcessGroup(settings.devices)
    else:
        group = ProcessGroup(
            settings.devices,
            processes,
            slurm.get("process_id") if settings.process_id is None else settings.process_id,
            settings.coordinator or slurm.get("coordinator"),
            _first_device(environment, settings.devices) if slurm else 0,
        )
    if group.all_devices > 1 and settings.backend != "jax":
        name, number = ("devices", group.devices) if group.devices > 1 else ("processes", group.processes)
        raise UserError(
            f"--{name}: expected 1 with --backend {settings.backend}, received {number}; several devices and processes "
            "train with --backend jax, where the loss sees the pairs of the whole batch"
        )
    if group.processes > 1:
        _check_several_processes(group)
    if settings.batch_size % group.all_devices:
        lower = settings.batch_size // group.all_devices * group.all_devices
        nearest = " or ".join(str(size) for size in (lower, lower + group.all_devices) if size)
        raise UserError(
            f"--batch-size: expected a multiple of {group.all_devices}, the devices of all processes (it is the size "
            f"of the whole batch, which they share), received {settings.batch_size}; use {nearest}"
        )
    return group


def _check_one_process(settings: TrainConfig) -> None:
    """Refuses options of several processes where there is one; all three of process 0 of 1 are accepted."""
    for name, alone in (("process_id", (None, 0)), ("coordinator", (None, settings.coordinator))):
        if getattr(settings, name) not in (alone if settings.processes else (None,)):
            raise UserError(
                f"{option(name)}: expected --processes N (2 or more) beside it, received "
                f"{'--processes 1' if settings.processes else 'none'}"
            )


def _check_several_processes(group: ProcessGroup) -> None:
    needed = {
        f"--process-id I (0 to {group.processes - 1})": group.process_id,
        "--coordinator HOST:PORT (where process 0 is)": group.coordinator,
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise UserError(
            f"--processes {group.processes}: expected {' and '.join(missing)} beside it, received none; "
            "under srun none of the three is needed"
        )
    if group.process_id >= group.processes:
        raise UserError(
            f"--process-id: expected 0 to {group.processes - 1} with --processes {group.processes}, "
            f"received {group.process_id}"
        )
    if not _ADDRESS.fullmatch(group.coordinator) or not 0 < int(group.coordinator.rpartition(":")[2]) < 65536:
        raise UserError(f"--coordinator: expected HOST:PORT, as 10.0.0.1:29500, received {group.coordinator!r}")


def _slurm_group(environment: Mapping[str, str]) -> dict[str, Any]:
    """Processes, id and coordinator in a step that srun started; empty elsewhere.

    A batch script has no step: what it starts without srun is one process, whatever SLURM_NTASKS is. The shell of
    ``salloc`` and a batch script's own step have numbers above all others, and so is what they start.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    try:
        job, step, processes, process_id = (
            int(environment[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "NTASKS", "PROCID")
        )
        processes = int(environment.get("SLURM_STEP_NUM_TASKS", processes))  # SLURM_NTASKS may be the whole job's
    except (KeyError, ValueError):
        return {}
    if not nodes or step >= _FIRST_SPECIAL_STEP:
        return {}
    # Above the range of ephemeral ports; each step of a job has its own.
    port = 61440 + (job + 97 * step) % 4096
    return {"processes": processes, "process_id": process_id, "coordinator": f"{first_host(nodes)}:{port}"}


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation: of ``a[007-9,12]-ib,b`` it is ``a007-ib``."""
    before, number, after = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes).groups()
    return before + (number or "") + (after or "")


def _first_device(environment: Mapping[str, str], devices: int) -> int:
    """0; but where all tasks of a machine see all of its GPUs, each takes the next ``devices`` of them."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    first = int(environment.get("SLURM_LOCALID", 0)) * devices
    return first if first + devices <= len(visible) else 0
