"""Executes the runs of a grid, each in a process of its own.

A run is a `train.py` command with its own folder. The folder's lock (`files.only_writer`) makes sure that one process
at a time does the run, on this machine or another. `result.json` marks it as finished, and it continues from
`state.h5` after an interruption. No other state is kept.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import command_line
import config
import run_identity
from config import DatasetName, TrainConfig
from data_helper import prepared_splits
from files import UserError, is_taken, write_json
from grids import worker
from grids.experiments import Experiment, Grid
from grids.progress import Progress
from grids.shares import find_gpus, give_cores, gpu_environment
from reading import run_files
from reading.run_files import ERROR, HISTORY, RESULT
from reading.text import printable

LOG = "log.txt"
TRAIN = Path(__file__).parents[1] / "train.py"
_POLL_SECONDS = 0.5
_MESSAGE_LINES = 20
_STOP_SECONDS = 20.0
_SIGNAL_CODES = (130, 143)  # of `files.run_command`
_LEFT_ALONE = ("finished", "unreadable", "running")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        experiment: its row.
        settings: the options of its `train.py` command.
        folder: where it is, or will be.
        problem: why its `result.json` cannot be read; None where it can, or where there is none.
    """

    experiment: Experiment
    settings: TrainConfig
    folder: Path
    problem: str | None = None

    @property
    def command(self) -> list[str]:
        """The command line that does this run, from the project's folder."""
        return [
            "python",
            TRAIN.name,
            *command_line.to_args(config.changed_options(self.settings)),
            "--run-dir",
            str(self.folder),
        ]

    @property
    def title(self) -> str:
        return f"{self.experiment.name}, {self.settings.dataset.value}, seed {self.settings.seed}"

    def state(self) -> str:
        """The run's state, as one word.

        ``finished``, ``unreadable`` (its `result.json` is damaged), ``running`` (in any process), ``failed``,
        ``stopped`` (will continue from its `state.h5`) or ``waiting``.
        """
        if self.problem:
            return "unreadable"
        if (self.folder / RESULT).exists():
            return "finished"
        if is_taken(self.folder):
            return "running"
        if (self.folder / ERROR).exists():
            return "failed"
        return "stopped" if (self.folder / "state.h5").exists() else "waiting"

    def epochs_done(self) -> int:
        """Finished epochs."""
        if (self.folder / RESULT).exists():
            return self.settings.epochs
        return len(self.epoch_seconds())

    def epoch_seconds(self) -> list[float]:
        """The duration of each finished epoch; 0 where the history does not say. Empty where it cannot be read."""
        try:
            return _read_seconds(self.folder / HISTORY)
        except (OSError, UserError):
            return []

    def error(self) -> str | None:
        """The message of a failed or unreadable run; None in any other state."""
        if self.problem or self.state() != "failed":
            return self.problem
        try:
            return run_files.read_error(self.folder / ERROR)
        except (OSError, UserError) as error:
            return printable(f"{self.folder / ERROR}: cannot be read ({error})")


def runs_of(grid: Grid, run_dir: str | Path) -> list[Run]:
    """Every run of a grid, seed by seed.

    A run is in the folder below ``run_dir`` that holds it, under any name (`run_identity.find_run`), or gets a new
    one, whose name does not depend on the data: for processes that start before and after the synthetic faces are
    drawn it would be two names for one run. It does only where that folder holds a run on other data. This function
    alone decides which folder belongs to which run. What is damaged in a folder is reported on standard error; a run
    whose options or result cannot be read counts as ``unreadable``.
    """
    problems: dict[Path, str] = {}
    stored = run_identity.stored_runs(run_dir, damaged=problems)
    for path in sorted(Path(run_dir).glob(f"*/{RESULT}")):
        try:
            run_files.read_result(path)
        except (UserError, OSError) as error:
            problems[path.parent] = str(error)
    for problem in problems.values():
        print(printable(f"passed over: {problem}"), file=sys.stderr)
    planned = {each: run_identity.planned_identity(each.settings) for each in grid.experiments}
    runs = []
    for experiment, seed in grid.runs():
        settings = dataclasses.replace(experiment.with_seed(seed), run_dir=None)
        identity = dataclasses.replace(planned[experiment], options=run_identity.options_of(settings))
        new = Path(run_dir) / dataclasses.replace(identity, digests={}).name
        folder = run_identity.find_run(identity, stored)
        folder = folder or (Path(run_dir) / identity.name if new in stored else new)
        runs.append(Run(experiment, settings, folder, problems.get(folder)))
        _report_history(folder / HISTORY)
    return runs


def _report_history(path: Path) -> None:
    """Reports a damaged history on standard error: nothing depends on it but the time left and the figures."""
    try:
        _read_seconds(path)
    except UserError as error:
        print(printable(f"passed over: {error}"), file=sys.stderr)
    except OSError:  # none yet
        pass


def _read_seconds(path: Path) -> list[float]:
    """The column ``seconds`` of a history.

    Raises:
        UserError: the file is damaged.
    """
    history = run_files.read_history(path)
    epochs = len(next(iter(history.values()), ()))
    return [seconds if math.isfinite(seconds) else 0.0 for seconds in history.get("seconds", [0.0] * epochs)]


def with_data(runs: Sequence[Run]) -> list[Run]:
    """The runs whose data set is prepared; the data sets left out are reported on standard error.

    Raises:
        UserError: none is prepared.
    """
    prepared = {
        (data_dir, dataset)
        for data_dir in {run.settings.data_dir for run in runs}
        for dataset, split in prepared_splits(data_dir)
        if split == "train"
    }

    def ready(run: Run) -> bool:
        dataset = run.settings.dataset
        # train.py draws the synthetic faces itself.
        return dataset == DatasetName.synthetic or (run.settings.data_dir, dataset.value) in prepared

    missing = ", ".join(sorted({run.settings.dataset.value for run in runs if not ready(run)}))
    found = [run for run in runs if ready(run)]
    if not found:
        raise UserError(
            f"{runs[0].settings.data_dir}: none of {missing} is prepared there; "
            "run: python prepare_data.py DATASET --source PATH"
        )
    if missing:
        print(f"left out because it is not prepared: {missing}", file=sys.stderr)
    return found


def run_grid(runs: Sequence[Run], jobs: int = 1) -> dict[str, list[Run]]:
    """Does every run that is not finished, each in its own process, and shows one progress line for all of them.

    A run that another process is doing is skipped. A run that fails leaves ``error.json`` in its folder and the others
    continue; the next call tries it again. The output of a run is in its ``log.txt``.

    Args:
        runs: of one grid or more.
        jobs: processes at a time; each gets an equal share of the processor's cores and of the GPUs (`grids.shares`).

    Returns:
        The runs by `Run.state` at the end.
    """
    waiting = [run for run in runs if run.state() not in _LEFT_ALONE]
    jobs = max(1, min(jobs, len(waiting)))
    gpus = find_gpus() if jobs > 1 else []
    with Progress(runs, jobs) as progress:
        active: list[Job] = []
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    if run.state() not in _LEFT_ALONE:
                        taken = {job.share for job in active}
                        active.append(Job(run, next(i for i in range(jobs) if i not in taken), jobs, gpus))
                progress.show([job.run for job in active])
                for job in [job for job in active if job.ended()]:
                    active.remove(job)
                    progress.ended(job.run, time.monotonic() - job.started)
                time.sleep(_POLL_SECONDS if active else 0)
        finally:
            for job in active:
                job.ask_to_stop()
            for job in active:
                job.stop()
    by_state: dict[str, list[Run]] = {}
    for run in runs:
        by_state.setdefault(run.state(), []).append(run)
    return by_state


class Job:
    """A process that does a run; it ends when this process ends, however that happens (`grids.worker`).

    Args:
        run: the run.
        share: index of its share of the cores and GPUs, 0..shares-1.
        shares: number of equal shares.
        gpus: the names of the GPUs to share (`grids.shares.find_gpus`).
    """

    def __init__(self, run: Run, share: int, shares: int, gpus: Sequence[str] = ()):
        self.run, self.share, self.started = run, share, time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(run.folder / LOG, "ab")  # noqa: SIM115 - as long as the process
        self.start_of_log = self.log.tell()
        self.process = subprocess.Popen(
            [sys.executable, worker.__file__, str(TRAIN), *run.command[2:]],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "KERAS_BACKEND": run.settings.backend,  # the command leaves out what is train.py's default
                **gpu_environment(share, shares, gpus, run.settings.devices),
            },
        )
        if shares > 1:
            give_cores(self.process.pid, share, shares)

    def ended(self) -> bool:
        """Whether the process has ended; writes ``error.json`` where it failed."""
        code = self.process.poll()
        if code is None:
            return False
        self._close()
        error = self.run.folder / ERROR
        if code == 0:
            error.unlink(missing_ok=True)
        elif not is_taken(self.run.folder):  # otherwise another process is doing the run now
            message = _how_it_ended(code, self._last_lines())
            write_json(error, {"command": shlex.join(self.run.command), "exit_code": code, "message": message})
        return True

    def ask_to_stop(self) -> None:
        """Sends SIGTERM, once: a second one would end the process without its cleaning up."""
        self.process.terminate()

    def stop(self) -> None:
        """Waits until the process has stopped, or ends it; the run can continue after its last finished epoch."""
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # it compiles, or its disk hangs
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        self.process.stdin.close()
        self.log.close()

    def _last_lines(self) -> str:
        with open(self.run.folder / LOG, "rb") as file:
            file.seek(self.start_of_log)
            text = file.read().decode("utf-8", "replace")
        # A progress bar overwrites itself with \r: only its last text counts.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        # A message may follow a progress bar on the same line.
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return errors[-1] if errors else "\n".join([line for line in lines if line.strip()][-_MESSAGE_LINES:])


def _how_it_ended(code: int, last_lines: str) -> str:
    """The message of a process that failed; a signal that ended it is named first."""
    number = -code if code < 0 else code - 128 if code in _SIGNAL_CODES else 0
    if not number:
        return last_lines or f"ended with code {code} and without a message"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    cause = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
    return f"killed by {name}{cause}" + (f"; the last lines of its output:\n{last_lines}" if last_lines else "")
