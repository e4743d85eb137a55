"""Executes the runs of a grid, each in a process of its own.

A run is a `train.py` command with its own folder. The folder's lock (`files.only_writer`) makes sure that one process
at a time does the run, on this machine or another. `result.json` marks it as finished, and it continues from
`state.h5` after an interruption. No other state is kept.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import command_line
import config
import run_identity
from config import DatasetName, TrainConfig
from data_helper import prepared_splits
from files import UserError, is_taken, read_json, write_json
from grids.experiments import Experiment, Grid

RESULT, ERROR, LOG = "result.json", "error.json", "log.txt"
TRAIN = Path(__file__).parents[1] / "train.py"
_POLL_SECONDS = 0.5
_MESSAGE_LINES = 20
_LATELY = 5  # epochs of a run whose mean duration counts for the time left


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
        """The duration of each finished epoch; 0 where the history does not say."""
        with contextlib.suppress(OSError), open(self.folder / "history.csv", newline="", encoding="utf-8") as file:
            return [float(row.get("seconds") or 0) for row in csv.DictReader(file)]
        return []

    def error(self) -> str | None:
        """The message of a failed or unreadable run; None in any other state."""
        if self.problem or self.state() != "failed":
            return self.problem
        try:
            return str(read_json(self.folder / ERROR)["message"])
        except (UserError, KeyError, TypeError) as error:
            return f"{self.folder / ERROR}: cannot be read ({error})"


def runs_of(grid: Grid, run_dir: str | Path) -> list[Run]:
    """Every run of a grid, seed by seed.

    A run is in the folder below ``run_dir`` that holds it, under any name (`run_identity.find_run`), or gets a new
    one, whose name does not depend on the data: for processes that start before and after the synthetic faces are
    drawn it would be two names for one run. It does only where that folder holds a run on other data. This function
    alone decides which folder belongs to which run. A `result.json` that cannot be read is reported on standard error
    and never counts as a result.
    """
    problems: dict[Path, str] = {}
    for path in sorted(Path(run_dir).glob(f"*/{RESULT}")):
        try:
            if not isinstance(result := read_json(path), dict):
                raise UserError(f"{path}: expected a result (a JSON object), found {type(result).__name__}")
        except (UserError, OSError) as error:
            problems[path.parent] = str(error)
            print(f"passed over: {error}", file=sys.stderr)
    stored = run_identity.stored_runs(run_dir)
    planned = {each: run_identity.planned_identity(each.settings) for each in grid.experiments}
    runs = []
    for experiment, seed in grid.runs():
        settings = dataclasses.replace(experiment.with_seed(seed), run_dir=None)
        identity = dataclasses.replace(planned[experiment], options=run_identity.options_of(settings))
        new = Path(run_dir) / dataclasses.replace(identity, digests={}).name
        folder = run_identity.find_run(identity, stored)
        folder = folder or (Path(run_dir) / identity.name if new in stored else new)
        runs.append(Run(experiment, settings, folder, problems.get(folder)))
    return runs


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
        jobs: processes at a time; each gets an equal share of the processor's cores.

    Returns:
        The runs by `Run.state` at the end.
    """
    with Progress(runs, jobs) as progress:
        waiting = list(runs)
        active: list[Job] = []
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    if run.state() not in ("finished", "unreadable", "running"):
                        share = {job.share for job in active}
                        active.append(Job(run, next(i for i in range(jobs) if i not in share), jobs))
                progress.show([job.run for job in active])
                for job in [job for job in active if job.ended()]:
                    active.remove(job)
                    progress.ended(job.run, time.monotonic() - job.started)
                time.sleep(_POLL_SECONDS if active else 0)
        finally:
            for job in active:
                job.stop()
    by_state: dict[str, list[Run]] = {}
    for run in runs:
        by_state.setdefault(run.state(), []).append(run)
    return by_state


class Job:
    """A process that does a run.

    Args:
        run: the run.
        share: index of its share of the cores, 0..shares-1.
        shares: number of equal shares.
    """

    def __init__(self, run: Run, share: int, shares: int):
        self.run, self.share, self.started = run, share, time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(run.folder / LOG, "ab")  # noqa: SIM115 - as long as the process
        self.start_of_log = self.log.tell()
        self.process = subprocess.Popen(
            [sys.executable, str(TRAIN), *run.command[2:]],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        if shares > 1:
            _give_cores(self.process.pid, share, shares)

    def ended(self) -> bool:
        """Whether the process has ended; writes ``error.json`` where it failed."""
        code = self.process.poll()
        if code is None:
            return False
        self.log.close()
        error = self.run.folder / ERROR
        if code == 0:
            error.unlink(missing_ok=True)
        elif not is_taken(self.run.folder):  # otherwise another process is doing the run now
            message = self._last_lines() or f"ended with code {code} and without a message"
            write_json(error, {"command": shlex.join(self.run.command), "exit_code": code, "message": message})
        return True

    def stop(self) -> None:
        """Ends the process; the run can continue after its last finished epoch."""
        self.process.terminate()
        self.process.wait()
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


def _give_cores(pid: int, share: int, shares: int) -> None:
    """Binds a process to its share of the cores: two processes on one core each are faster than two on both."""
    if not hasattr(os, "sched_setaffinity"):  # not on this system
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[share % len(cores) :: shares] if shares <= len(cores) else [cores[share % len(cores)]]
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(pid, mine)


class TimeLeft:
    """Estimates how long the unfinished runs will take, from the epochs that have been done lately.

    A run's next epochs take as long as its own last ones in this session. Without any the mean of the nearest runs is
    taken: of its row, of its network on its data set, of the grid. Epochs of earlier sessions, which may have had
    another machine, count only where this session has none. What a process takes beside its epochs is added.

    Args:
        runs: of the grid.
        jobs: runs at a time.
    """

    def __init__(self, runs: Sequence[Run], jobs: int):
        self.runs, self.jobs = runs, jobs
        self.before = {run.folder: run.epochs_done() for run in runs}
        self.over: set[Path] = set()  # ended in this session
        self.extra: list[float] = []  # seconds beside the epochs

    def ended(self, run: Run, seconds: float) -> None:
        """Takes note that the process of a run has ended after so many seconds."""
        self.over.add(run.folder)
        if (run.folder / RESULT).exists():
            self.extra.append(max(0.0, seconds - sum(run.epoch_seconds()[self.before[run.folder] :])))

    def seconds(self, active: Sequence[Run]) -> float | None:
        """Seconds until this session has done all runs that it can do; None while nothing has been measured.

        Args:
            active: the runs that it is doing; a run that another process does is not waited for.
        """
        durations = {run.folder: run.epoch_seconds() for run in self.runs}
        needs = []
        for run in self.runs:
            is_next = run.folder not in self.over and run.state() in ("waiting", "stopped", "failed")
            if run in active or is_next:
                epoch = self._epoch(run, durations)
                if epoch is None:
                    return None
                extra = sum(self.extra) / len(self.extra) if self.extra else 0.0
                needs.append((run.settings.epochs - len(durations[run.folder])) * epoch + extra)
        return max(sum(needs) / self.jobs, *needs) if needs else 0.0

    def _epoch(self, run: Run, durations: dict[Path, list[float]]) -> float | None:
        """The mean seconds of the last epochs of the nearest runs that have any."""
        new = {folder: values[self.before[folder] :] for folder, values in durations.items()}
        own, all_runs = [run], self.runs
        row = [each for each in all_runs if each.experiment == run.experiment]
        alike = [each for each in all_runs if _network(each) == _network(run)]
        for seconds, near in (
            *((new, own), (new, row), (durations, own), (durations, row)),
            *((new, alike), (new, all_runs), (durations, alike), (durations, all_runs)),
        ):
            lately = [value for each in near for value in seconds[each.folder][-_LATELY:] if value > 0]
            if lately:
                return sum(lately) / len(lately)
        return None


def _network(run: Run) -> tuple[Any, ...]:
    """What the duration of an epoch depends on most."""
    return run.settings.dataset, run.settings.model, run.settings.backend


class Progress:
    """One progress line for the whole grid: finished epochs of all runs, the time left and the active runs.

    A log file gets a line when a run begins or ends.

    Args:
        runs: all of them.
        jobs: runs at a time.
    """

    def __init__(self, runs: Sequence[Run], jobs: int):
        self.runs = runs
        self.time_left = TimeLeft(runs, jobs)

    def __enter__(self) -> Progress:
        self.on_terminal = sys.stderr.isatty()
        total = sum(run.settings.epochs for run in self.runs)
        self.bar = tqdm(total=total, unit="epoch", dynamic_ncols=True, disable=not self.on_terminal)
        self.drawn = ""
        return self

    def __exit__(self, *exception) -> None:
        self.show([])
        self.bar.close()

    def ended(self, run: Run, seconds: float) -> None:
        """Takes note that the process of a run has ended after so many seconds."""
        self.time_left.ended(run, seconds)

    def show(self, active: Sequence[Run]) -> None:
        """Updates the line."""
        states = [run.state() for run in self.runs]
        counts = f"{states.count('finished')}/{len(states)} runs"
        if "failed" in states:
            counts += f", {states.count('failed')} failed"
        epochs = sum(run.epochs_done() for run in self.runs)
        seconds = self.time_left.seconds(active)
        left = "? left" if seconds is None else f"{tqdm.format_interval(seconds)} left"
        names = "; ".join(run.title for run in active)
        if self.on_terminal:
            self.bar.bar_format = f"{counts} |{{bar}}| {epochs}/{self.bar.total} epochs, {left}{{postfix}}"
            self.bar.n = epochs
            self.bar.set_postfix_str(names, refresh=True)
        elif (line := f"{counts}{': ' * bool(names)}{names}") != self.drawn:
            print(f"{epochs}/{self.bar.total} epochs, {left}, {line}", file=sys.stderr, flush=True)
            self.drawn = line
