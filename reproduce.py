"""Reproduce the paper, or answer a question of one's own: ``python reproduce.py {run,list,report} components``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import config
from config import DatasetName, TrainConfig
from files import UserError, copy_file, run_command
from grids import experiments
from grids.experiments import Grid
from grids.options import GridConfig, ListGridConfig, ReportGridConfig, RunGridConfig, parse_grid_command
from grids.runner import ERROR, RESULT, Run, run_grid, runs_of, with_data
from reporting import report

_KEPT = (RESULT, "predictions.npz", "history.csv")


def run(settings: RunGridConfig) -> None:
    """Does the runs of the experiments that are not finished, and says what came of them.

    Raises:
        UserError: no such experiments or data; or, at the end, runs that failed.
    """
    if settings.jobs < 1:
        raise UserError(f"--jobs: expected 1 or more, received {settings.jobs}")
    runs = with_data(runs_of(_grid(settings), settings.run_dir))
    by_state = run_grid(runs, settings.jobs)
    print(", ".join(f"{len(some)} {state}" for state, some in by_state.items()))
    failed = by_state.get("failed", [])
    for failure in failed:
        print(f"failed: {failure.title} ({failure.folder})\n  {failure.error()}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, see above; the same command tries them again")


def list_runs(settings: ListGridConfig) -> None:
    """Prints a command for each run that is not finished."""
    for each in with_data(runs_of(_grid(settings), settings.run_dir)):
        if settings.all or each.state() != "finished":
            print(shlex.join(each.command))


def make_report(settings: ReportGridConfig) -> None:
    """Writes the report of the experiments from the result files that are there.

    Raises:
        UserError: no run of them is finished.
    """
    grid = _grid(settings)
    runs = runs_of(grid, settings.run_dir)
    if not any(each.state() == "finished" for each in runs):
        raise UserError(
            f"{settings.run_dir}: expected a finished run of {grid.name} with these options, found none; "
            f"run: {shlex.join(['python', 'reproduce.py', 'run', *sys.argv[2:]])}"
        )
    datasets = list(dict.fromkeys(each.settings.dataset.value for each in runs))
    name = settings.name or "-".join([*(datasets if len(datasets) == 1 else ()), grid.name])
    folder = Path(settings.report_dir) / name
    if settings.keep_results:
        _keep(grid, runs, folder)
    report.write_report(name, grid.about, _rows(runs, grid.seeds), folder, "\n".join(_commands(settings)))
    print(f"wrote {folder}/index.html, report.md, tables and figures")


def _grid(settings: GridConfig) -> Grid:
    preset = experiments.read_preset(settings.experiments)
    chosen = any(arg.split("=")[0] == "--dataset" for arg in sys.argv)
    return experiments.make_grid(settings.experiments, preset, settings.training(), chosen, settings.seeds)


def _rows(runs: Sequence[Run], seeds: Sequence[int]) -> list[report.Row]:
    """The runs by data set and row, each row with the runs that are finished and the errors of those that failed."""
    by_row: dict[tuple[str, str], list[Run]] = {}
    for each in runs:
        by_row.setdefault((each.settings.dataset.value, each.experiment.name), []).append(each)
    datasets = list(DatasetName)
    rows = []
    for (dataset, name), same in sorted(by_row.items(), key=lambda item: datasets.index(item[0][0])):
        rows.append(
            report.Row(
                name=name,
                dataset=dataset,
                options=_computed(same[0].experiment.settings),
                seeds=tuple(seeds),
                runs={e.settings.seed: report.RunFiles(e.folder) for e in same if e.state() == "finished"},
                failures={e.settings.seed: e.error() for e in same if e.error()},
            )
        )
    return rows


def _commands(settings: ReportGridConfig) -> list[str]:
    """What to type to get the runs and the report again, with the default folders."""
    options = {"seeds": settings.seeds, **_computed(settings.training())}
    return [
        shlex.join(["python", "reproduce.py", word, settings.experiments, *command_line.to_args(options)])
        for word in ("run", "report")
    ]


def _computed(settings: TrainConfig) -> dict[str, Any]:
    """The options that differ from train.py's defaults and change what is computed."""
    return {name: value for name, value in config.changed_options(settings).items() if name not in config.PLACES}


def _keep(grid: Grid, runs: Sequence[Run], folder: Path) -> None:
    """Copies what a report reads of each run beside it, with every option of the experiments spelt out."""
    for each in runs:
        target = folder / "runs" / each.folder.name
        names = {"finished": _KEPT, "failed": (ERROR,)}.get(each.state(), ())
        if each.folder.resolve() != target.resolve():
            for name in names:
                copy_file(each.folder / name, target / name)
    experiments.write_yaml(folder / "experiments.yaml", grid)


_COMMANDS = {
    "run": (RunGridConfig, run),
    "list": (ListGridConfig, list_runs),
    "report": (ReportGridConfig, make_report),
}


def main() -> None:
    # The experiments decide where unnamed options come from, so they are read before the options.
    words = sys.argv[2:3]
    named = bool(words) and not words[0].startswith("-")
    recipe = experiments.read_preset(words[0]).recipe if named else "default"
    settings = parse_grid_command({name: cls for name, (cls, _) in _COMMANDS.items()}, __doc__, recipe)
    if settings.experiments != (words[0] if named else GridConfig.experiments):
        raise UserError(f"{settings.experiments}: expected the experiments right after {sys.argv[1]}")
    command = next(command for cls, command in _COMMANDS.values() if type(settings) is cls)
    command(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
