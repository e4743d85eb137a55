"""How does a grid of runs get done? Each by a process of its own, by any number of processes and machines at once.

A run is a `train.py` command with a folder of its own. Its lock (`files.only_writer`) decides who takes it, its
`result.json` that it is done, and `state.h5` where it goes on after a kill; nothing else is kept anywhere.
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

from tqdm import tqdm

import command_line
import config
from config import DatasetName, TrainConfig
from data_helper import prepared_splits
from files import UserError, is_taken, read_json, write_json
from grids.experiments import Experiment, Grid

RESULT, ERROR, LOG = "result.json", "error.json", "log.txt"
TRAIN = Path(__file__).parents[1] / "train.py"
_POLL_SECONDS = 0.5
_MESSAGE_LINES = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        experiment: its row.
        settings: everything that `train.py` is told.
        folder: where it is, or will be.
    """

    experiment: Experiment
    settings: TrainConfig
    folder: Path

    @property
    def command(self) -> list[str]:
        """The words that do this run, from the project's folder."""
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
        """``finished``, ``running`` (in any process), ``failed``, ``stopped`` (goes on from there) or ``waiting``."""
        if (self.folder / RESULT).exists():
            return "finished"
        if is_taken(self.folder):
            return "running"
        if (self.folder / ERROR).exists():
            return "failed"
        return "stopped" if (self.folder / "state.h5").exists() else "waiting"

    def epochs_done(self) -> int:
        """Whole epochs so far."""
        if (self.folder / RESULT).exists():
            return self.settings.epochs
        with contextlib.suppress(OSError), open(self.folder / "history.csv", newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.DictReader(file))
        return 0

    def error(self) -> str | None:
        """What ended the run, if it failed and was not repeated since."""
        path = self.folder / ERROR
        return read_json(path)["message"] if path.exists() and not (self.folder / RESULT).exists() else None


def runs_of(grid: Grid, run_dir: str | Path) -> list[Run]:
    """Every run of a grid, seed by seed.

    A run is in the folder that `train.py` itself would choose below ``run_dir``, or in any other one there whose
    `result.json` says that it is this run.
    """
    finished = {}
    for path in sorted(Path(run_dir).glob(f"*/{RESULT}")):
        if settings := config.settings_of(read_json(path).get("config", {"?": None})):
            finished[config.run_id(settings)] = path.parent
    runs = []
    for experiment, seed in grid.runs():
        settings = dataclasses.replace(experiment.with_seed(seed), run_dir=None)
        name = config.run_id(settings)
        runs.append(Run(experiment, settings, finished.get(name, Path(run_dir) / name)))
    return runs


def with_data(runs: Sequence[Run]) -> list[Run]:
    """The runs whose data set is prepared; says which are left out.

    Raises:
        UserError: none is prepared.
    """
    there = {
        (data_dir, dataset)
        for data_dir in {run.settings.data_dir for run in runs}
        for dataset, split in prepared_splits(data_dir)
        if split == "train"
    }
    # train.py draws the synthetic faces itself.
    found = [
        run
        for run in runs
        if run.settings.dataset == DatasetName.synthetic or (run.settings.data_dir, run.settings.dataset.value) in there
    ]
    missing = sorted({run.settings.dataset.value for run in runs} - {run.settings.dataset.value for run in found})
    if not found:
        raise UserError(
            f"{runs[0].settings.data_dir}: none of {', '.join(missing)} is prepared there; "
            "run: python prepare_data.py DATASET --source PATH"
        )
    if missing:
        print(f"left out, for it is not prepared: {', '.join(missing)}")
    return found


def run_grid(runs: Sequence[Run], jobs: int = 1) -> dict[str, list[Run]]:
    """Does every run that is not finished, each in its own process, and shows one progress line for all of them.

    A run that another process has taken is passed over. One that fails leaves ``error.json`` in its folder and the
    others go on; the next call tries it again. What a run prints is in its ``log.txt``.

    Args:
        runs: of one grid or of several.
        jobs: processes at a time; each gets an equal share of the processor's cores.

    Returns:
        The runs by `Run.state` at the end.
    """
    with Progress(runs) as progress:
        waiting = list(runs)
        active: list[Job] = []
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    if run.state() not in ("finished", "running"):
                        share = {job.share for job in active}
                        active.append(Job(run, next(i for i in range(jobs) if i not in share), jobs))
                progress.show([job.run for job in active])
                active = [job for job in active if not job.ended()]
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
        run: which.
        share: which of the equal shares of the cores it gets.
        shares: how many there are.
    """

    def __init__(self, run: Run, share: int, shares: int):
        self.run, self.share = run, share
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
        """Whether the process has ended; records an error that it ended with."""
        code = self.process.poll()
        if code is None:
            return False
        self.log.close()
        error = self.run.folder / ERROR
        if code == 0:
            error.unlink(missing_ok=True)
        elif not is_taken(self.run.folder):  # otherwise another process was faster to take the run
            message = self._last_lines() or f"ended with code {code} without a word"
            write_json(error, {"command": shlex.join(self.run.command), "exit_code": code, "message": message})
        return True

    def stop(self) -> None:
        """Ends the process; the run can go on after its last whole epoch."""
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def _last_lines(self) -> str:
        with open(self.run.folder / LOG, "rb") as file:
            file.seek(self.start_of_log)
            text = file.read().decode("utf-8", "replace")
        # A progress bar writes over itself with \r: only what it left on the screen counts.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        # A message may stand behind what a bar left there.
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return errors[-1] if errors else "\n".join([line for line in lines if line.strip()][-_MESSAGE_LINES:])


def _give_cores(pid: int, share: int, shares: int) -> None:
    """Keeps a process on its share of the cores: two of one core each train more a second than two on both."""
    if not hasattr(os, "sched_setaffinity"):  # not on this system
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[share % len(cores) :: shares] if shares <= len(cores) else [cores[share % len(cores)]]
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(pid, mine)


class Progress:
    """One line for the whole grid: epochs done of all runs, those running, and the time left.

    Args:
        runs: all of them; what was done before is shown as done, and does not count for the time left.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs

    def __enter__(self) -> Progress:
        total = sum(run.settings.epochs for run in self.runs)
        done = sum(run.epochs_done() for run in self.runs)
        self.bar = tqdm(total=total, initial=done, unit="epoch", dynamic_ncols=True, smoothing=0.1)
        self.drawn = ""
        return self

    def __exit__(self, *exception) -> None:
        self.show([])
        self.bar.close()

    def show(self, active: Sequence[Run]) -> None:
        """Draws the line again."""
        states = [run.state() for run in self.runs]
        counts = f"{states.count('finished')}/{len(states)} runs"
        if "failed" in states:
            counts += f", {states.count('failed')} failed"
        self.bar.set_description(counts, refresh=False)
        self.bar.set_postfix_str("; ".join(run.title for run in active), refresh=False)
        self.bar.update(sum(run.epochs_done() for run in self.runs) - self.bar.n)
        # On a screen the clock goes on; in a file each line is kept, and only news is worth one.
        line = f"{self.bar.n} {self.bar.desc} {self.bar.postfix}"
        if line != self.drawn or sys.stderr.isatty():
            self.bar.refresh()
        self.drawn = line
