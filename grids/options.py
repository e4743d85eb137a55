"""The options of `reproduce.py`: its own, and those of train.py."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from command_line import Range, parse_command_over
from config import RECIPES, RecipeOption, TrainConfig, chosen_recipe, training_options
from grids.experiments import preset_names

_EXPERIMENTS_HELP = f"A preset ({', '.join(preset_names())}) or a .yaml file."


@dataclasses.dataclass(frozen=True)
class GridConfig(TrainConfig, RecipeOption):
    """The options that the commands of reproduce.py share.

    The options of train.py hold for every row that does not set them itself.
    """

    experiments: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_EXPERIMENTS_HELP)] = "components"
    seeds: Annotated[int, Range(1, 10_000)] = 3
    """Seeds per row: --seed, --seed + 1 and so on."""
    run_dir: str = "runs"
    """Folder of all runs."""

    def training(self) -> TrainConfig:
        """The options of the runs."""
        return dataclasses.replace(training_options(self), run_dir=None)


@dataclasses.dataclass(frozen=True)
class RunGridConfig(GridConfig):
    """Does every run that is not finished, with one progress line for all of them.

    An interrupted run continues where it stopped.
    """

    jobs: Annotated[int, Range(1, 1_024)] = 1
    """Runs at a time; each gets an equal share of the cores."""


@dataclasses.dataclass(frozen=True)
class ListGridConfig(GridConfig):
    """Prints one command per run that is not finished, for a job array of a cluster, Ray or GNU parallel."""

    all: bool = False
    """Also print the finished runs."""


@dataclasses.dataclass(frozen=True)
class ReportGridConfig(GridConfig):
    """Writes tables, figures and a page from the result files of the runs."""

    name: str | None = None
    """Name of the report; None joins the names of the data set and the experiments, such as fer2013-components."""
    report_dir: str = "reports"
    """Folder of the reports."""
    keep_results: bool = False
    """Copy results, predictions and histories beside the report, so that it can be made again from there."""


def parse_grid_command(commands: dict[str, type[GridConfig]], description: str, recipe: str) -> GridConfig:
    """Makes the config of the sub-command named first on the command line (`parse_command` over a recipe).

    Args:
        commands: sub-command name to config class.
        description: what the program does, for ``--help``.
        recipe: where unnamed options come from, unless the command line has a ``--recipe``.
    """
    base = RECIPES[chosen_recipe() or recipe]
    own = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name != "run_dir"}
    return parse_command_over({name: (cls, {"default": cls(**own)}) for name, cls in commands.items()}, description)
