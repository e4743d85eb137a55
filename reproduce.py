"""Runs grids of experiments and reports them: ``python reproduce.py {run,list,report} components``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import command_line
import config
from config import DatasetName, TrainConfig
from data_helper import open_split
from files import UserError, copy_file, run_command
from grids.experiments import Grid, make_grid, read_experiments, write_yaml
from grids.options import GridConfig, ListGridConfig, ReportGridConfig, RunGridConfig, parse_grid_command
from grids.runner import ERROR, RESULT, Run, run_grid, runs_of, with_data
from measuring.views import Views, views_of
from reading.run_files import read_result
from reading.text import printable
from reporting.formats import plain_table
from reporting.report import write_report
from reporting.rows import Row, RunFiles
from reporting.tables import accuracy_table

_NOT_PRINTED = 5  # column of the accuracy table that a terminal has no room for: macro F1
_KEPT = (RESULT, "predictions.npz", "history.csv")


def run(settings: RunGridConfig) -> None:
    """Does the runs of the experiments that are not finished, and prints how many are in which state.

    Raises:
        UserError: no such experiments or data; or, at the end, runs that failed, whose result is damaged or that
            another process is doing.
    """
    runs = with_data(runs_of(_grid(settings), settings.run_dir))
    by_state = run_grid(runs, settings.jobs)
    print(", ".join(f"{len(some)} {state}" for state, some in by_state.items()))
    for each in runs:
        if message := each.error():
            print(printable(f"{each.state()}: {each.title} ({each.folder})"), f"  {message}", sep="\n", file=sys.stderr)
    if failed := by_state.get("failed"):
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, see above; the same command tries them again")
    if unreadable := by_state.get("unreadable"):
        folders = ", ".join(str(each.folder) for each in unreadable)
        raise UserError(
            f"the files of {len(unreadable)} runs cannot be read, see above; remove {folders} and run again"
        )
    if left := len(runs) - len(by_state.get("finished", ())):
        raise UserError(
            f"{left} of {len(runs)} runs are not finished, because another process does them or did; give the same "
            "command again when it has ended"
        )


def list_runs(settings: ListGridConfig) -> None:
    """Prints a command for each run that is not finished."""
    for each in with_data(runs_of(_grid(settings), settings.run_dir)):
        if each.state() != "unreadable" and (settings.all or each.state() != "finished"):
            print(shlex.join(each.command))


def make_report(settings: ReportGridConfig) -> None:
    """Writes the report of the experiments from the result files that are there.

    Raises:
        UserError: no run of them is finished.
    """
    grid = _grid(settings)
    runs = runs_of(grid, settings.run_dir)
    rows = _rows(runs, grid.seeds, settings.views)
    if not any(row.runs for row in rows):
        raise UserError(_nothing_to_report(settings, grid, runs))
    datasets = list(dict.fromkeys(each.settings.dataset.value for each in runs))
    views = [settings.views] if settings.views else []
    name = settings.name or "-".join([*(datasets if len(datasets) == 1 else ()), grid.name, *views])
    folder = Path(settings.report_dir) / name
    if settings.keep_results:
        _keep(grid, runs, folder, settings.views)
    measured = {row.dataset for row in rows if row.runs} if settings.without_copies else ()
    copied = {dataset: _copied(settings.data_dir, rows, dataset) for dataset in measured}
    write_report(name, grid.about, rows, folder, "\n".join(_commands(settings)), copied)
    for dataset in datasets:
        table, _ = accuracy_table([row for row in rows if row.dataset == dataset])
        printed = [place for place in range(len(table.columns)) if place != _NOT_PRINTED]
        print(plain_table(table, printed), end="\n\n")
    print(f"page     {folder}/index.html\nall      {folder}/ (report.md, tables as CSV and LaTeX, figures/)")


def _nothing_to_report(settings: ReportGridConfig, grid: Grid, runs: Sequence[Run]) -> str:
    expected = f"{settings.run_dir}: expected a finished run of {grid.name} with these options"
    if settings.views and (finished := [each for each in runs if each.state() == "finished"]):
        result = read_result(finished[0].folder / RESULT)
        data = {} if settings.data_dir == TrainConfig.data_dir else {"data_dir": settings.data_dir}
        measured = {"dataset": result["dataset"], "split": result["split"], "views": settings.views, **data}
        return (
            f"{expected} and predictions of {settings.views}, found none; for each finished run RUN: python test.py "
            f"evaluate {shlex.join(command_line.to_args(measured))} --run-dir RUN/{settings.views} "
            "--weights RUN/best.weights.h5"
        )
    options = {"seeds": settings.seeds, "run_dir": settings.run_dir, **config.changed_options(settings.training())}
    command = ["python", "reproduce.py", "run", settings.experiments, *command_line.to_args(options)]
    return f"{expected}, found none; run: {shlex.join(command)}"


def _grid(settings: GridConfig) -> Grid:
    chosen = any(arg.split("=")[0] == "--dataset" for arg in sys.argv)
    return make_grid(read_experiments(settings.experiments), settings.training(), chosen, settings.seeds)


def _rows(runs: Sequence[Run], seeds: Sequence[int], views: Views | None = None) -> list[Row]:
    """The runs by data set and row: each row with its finished runs, and the messages of the others."""
    by_row: dict[tuple[str, str], list[Run]] = {}
    for each in runs:
        by_row.setdefault((each.settings.dataset.value, each.experiment.name), []).append(each)
    datasets = list(DatasetName)
    rows = []
    for (dataset, name), same in sorted(by_row.items(), key=lambda item: datasets.index(item[0][0])):
        finished, failures = {}, {each.settings.seed: each.error() for each in same if each.error()}
        for each in same:
            if each.state() == "finished" and _is_measured(each.folder, views):
                try:
                    finished[each.settings.seed] = RunFiles.read(each.folder, views)
                except UserError as error:
                    failures[each.settings.seed] = str(error)
                    print(f"passed over: {error}", file=sys.stderr)
        options = _computed(same[0].experiment.settings)
        rows.append(Row(name, dataset, options, tuple(seeds), finished, failures))
    return rows


def _is_measured(folder: Path, views: Views | None) -> bool:
    """Whether a finished run has predictions of these views: its own, or those of ``test.py evaluate``."""
    return views is None or (folder / views / RESULT).exists() or views_of(read_result(folder / RESULT)) == views


def _copied(data_dir: str, rows: Sequence[Row], dataset: str) -> np.ndarray:
    """Bool (N,): which of a data set's measured images have a copy in train, exact or near.

    Raises:
        UserError: a split that is not prepared, or other images than those of the results.
    """
    from datasets.shared.duplicates import find_duplicates  # with imagehash, which a plain report does not need

    result = next(result for row in rows if row.dataset == dataset for result in row.results)
    train, measured = (open_split(data_dir, dataset, split) for split in ("train", result["split"]))
    expected = (result.get("digests") or {}).get(result["split"])
    if expected not in (None, measured.digest) or len(measured) != result["n"]:
        raise UserError(
            f"--without-copies: expected {measured.name} in {data_dir} as the runs measured it, found other images; "
            "prepare it again, or leave the option out"
        )
    return find_duplicates([train, measured]).near[result["split"], "train"].repeated


def _commands(settings: ReportGridConfig) -> list[str]:
    """The commands that make the runs and the report again, in the default folders."""
    options = {"seeds": settings.seeds, **_computed(settings.training())}
    own = {"views": settings.views, "without_copies": settings.without_copies}
    own = {name: value for name, value in own.items() if value}
    return [
        shlex.join(
            ["python", "reproduce.py", command, settings.experiments, *command_line.to_args({**options, **more})]
        )
        for command, more in (("run", {}), ("report", own))
    ]


def _computed(settings: TrainConfig) -> dict[str, Any]:
    """The options that differ from train.py's defaults and change what is computed."""
    return {name: value for name, value in config.changed_options(settings).items() if name not in config.PLACES}


def _keep(grid: Grid, runs: Sequence[Run], folder: Path, views: Views | None) -> None:
    """Copies the files that a report needs beside it, and the experiments with all their options."""
    for each in runs:
        target = folder / "runs" / each.folder.name
        names = {"finished": _KEPT, "failed": (ERROR,)}.get(each.state(), ())
        if each.state() == "finished" and views and (each.folder / views / RESULT).exists():
            names = (*names, *(f"{views}/{name}" for name in _KEPT[:2]))
        if each.folder.resolve() != target.resolve():
            for name in names:
                copy_file(each.folder / name, target / name)
    write_yaml(folder / "experiments.yaml", grid)


_COMMANDS = {
    "run": (RunGridConfig, run),
    "list": (ListGridConfig, list_runs),
    "report": (ReportGridConfig, make_report),
}


def main() -> None:
    # The recipe of the experiments gives the defaults, so it is read before the options.
    words = sys.argv[2:3]
    named = bool(words) and not words[0].startswith("-")
    recipe = read_experiments(words[0]).recipe if named else "default"
    settings = parse_grid_command({name: cls for name, (cls, _) in _COMMANDS.items()}, __doc__, recipe)
    if settings.experiments != (words[0] if named else GridConfig.experiments):
        raise UserError(f"{settings.experiments}: expected the experiments right after {sys.argv[1]}")
    command = next(command for cls, command in _COMMANDS.values() if type(settings) is cls)
    command(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
