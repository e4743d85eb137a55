"""Shows how far the runs of a grid are, and estimates the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from run_identity import RESULT

if TYPE_CHECKING:
    from grids.runner import Run

_LINE_SECONDS = 600  # between the lines of a log file while no run begins or ends
_LATELY = 5  # epochs of a run whose mean duration counts for the time left


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

    A log file gets a line when a run begins or ends, and one per 10 minutes.

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
        self.drawn, self.drawn_at = "", 0.0
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
            return
        line, now = f"{counts}{': ' * bool(names)}{names}", time.monotonic()
        if line != self.drawn or now >= self.drawn_at + _LINE_SECONDS:
            print(f"{epochs}/{self.bar.total} epochs, {left}, {line}", file=sys.stderr, flush=True)
            self.drawn, self.drawn_at = line, now
