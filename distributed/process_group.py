"""Who trains one network together? Devices and processes, told by the options or by Slurm; the share of each."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from command_line import option
from config import TrainConfig
from files import UserError

_ADDRESS = re.compile(r"[^\s/]+:\d{1,5}")


@dataclasses.dataclass(frozen=True)
class Team:
    """Who trains one network together, and which of them this process is.

    Attributes:
        devices: devices of each process.
        processes: how many processes.
        process_id: which of them this one is, 0..processes-1; 0 alone writes and speaks.
        coordinator: ``HOST:PORT`` of process 0; None for one process.
        first_device: place of this process's first device among those that it sees.
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
    def leads(self) -> bool:
        """Whether this is the process that writes the files and speaks."""
        return self.process_id == 0

    def padded(self, size: int) -> int:
        """The size of a batch of ``size`` images that is filled up until every device has as many as the others."""
        return -(-size // self.all_devices) * self.all_devices

    def share(self, size: int) -> slice:
        """This process's rows of a batch of ``size`` images filled up to `padded`, in the order of the processes."""
        each = self.padded(size) // self.processes
        return slice(self.process_id * each, (self.process_id + 1) * each)

    def take(self, images: np.ndarray, rows: np.ndarray | range, size: int | None = None) -> np.ndarray:
        """Reads this process's share of the batch of ``images`` at ``rows``, which black ones fill up.

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


ALONE = Team()


def team_of(settings: TrainConfig, environment: Mapping[str, str] = os.environ) -> Team:
    """Who trains: what the options say, and what they leave open from Slurm, in a step that srun started.

    Args:
        settings: of which backend, batch_size, devices, processes, process_id and coordinator are read.
        environment: `os.environ`; Slurm's variables are read with the JAX backend only.

    Raises:
        UserError: options that do not fit together, an engine that cannot do it, a batch that cannot be shared out.
    """
    slurm = _slurm_team(environment) if settings.backend == "jax" else {}
    processes = settings.processes or slurm.get("processes", 1)
    if slurm.get("processes") != processes:  # told otherwise: then Slurm's numbers mean nothing
        slurm = {}
    if processes == 1:
        _refuse_lonely(settings)
        team = Team(settings.devices)
    else:
        team = Team(
            settings.devices,
            processes,
            slurm.get("process_id") if settings.process_id is None else settings.process_id,
            settings.coordinator or slurm.get("coordinator"),
            _first_device(environment, settings.devices) if slurm else 0,
        )
    if team.all_devices > 1 and settings.backend != "jax":
        name, number = ("devices", team.devices) if team.devices > 1 else ("processes", team.processes)
        raise UserError(
            f"--{name}: expected 1 with --backend {settings.backend}, received {number}; several devices and processes "
            "train with --backend jax, where the loss sees the pairs of the whole batch"
        )
    if team.processes > 1:
        _check_members(team)
    if settings.batch_size % team.all_devices:
        lower = settings.batch_size // team.all_devices * team.all_devices
        nearest = " or ".join(str(size) for size in (lower, lower + team.all_devices) if size)
        raise UserError(
            f"--batch-size: expected a multiple of {team.all_devices}, the devices of all processes (it is the size of "
            f"the whole batch, which they share), received {settings.batch_size}; use {nearest}"
        )
    return team


def _refuse_lonely(settings: TrainConfig) -> None:
    """Refuses the options of several processes where there is one (process 0 of 1, told in full, is fine)."""
    for name, alone in (("process_id", (None, 0)), ("coordinator", (None, settings.coordinator))):
        if getattr(settings, name) not in (alone if settings.processes else (None,)):
            raise UserError(
                f"{option(name)}: expected --processes N (2 or more) beside it, received "
                f"{'--processes 1' if settings.processes else 'none'}"
            )


def _check_members(team: Team) -> None:
    needed = {
        f"--process-id I (0 to {team.processes - 1})": team.process_id,
        "--coordinator HOST:PORT (where process 0 is)": team.coordinator,
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise UserError(
            f"--processes {team.processes}: expected {' and '.join(missing)} beside it, received none; "
            "under srun none of the three is needed"
        )
    if team.process_id >= team.processes:
        raise UserError(
            f"--process-id: expected 0 to {team.processes - 1} with --processes {team.processes}, "
            f"received {team.process_id}"
        )
    if not _ADDRESS.fullmatch(team.coordinator) or not 0 < int(team.coordinator.rpartition(":")[2]) < 65536:
        raise UserError(f"--coordinator: expected HOST:PORT, as 10.0.0.1:29500, received {team.coordinator!r}")


def _slurm_team(environment: Mapping[str, str]) -> dict[str, Any]:
    """Processes, id and coordinator in a step that srun started; empty elsewhere.

    A batch script has no step, and what it starts without srun is one process, whatever SLURM_NTASKS says.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    try:
        job, step, processes, process_id = (
            int(environment[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "NTASKS", "PROCID")
        )
    except (KeyError, ValueError):
        return {}
    if not nodes:
        return {}
    # Above the range from which systems take ports by themselves; each step of a job its own.
    port = 61440 + (job + 97 * step) % 4096
    return {"processes": processes, "process_id": process_id, "coordinator": f"{first_host(nodes)}:{port}"}


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: of ``a[007-9,12]-ib,b`` it is ``a007-ib``."""
    before, number, after = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes).groups()
    return before + (number or "") + (after or "")


def _first_device(environment: Mapping[str, str], devices: int) -> int:
    """0; but where all tasks of a machine see all of its GPUs, each takes the next ``devices`` of them."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    first = int(environment.get("SLURM_LOCALID", 0)) * devices
    return first if first + devices <= len(visible) else 0
