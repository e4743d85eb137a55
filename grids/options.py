"""The options of `reproduce.py`: which experiments, and those of train.py that all of their runs have."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from command_line import parse_command_over
from config import RECIPES, RecipeOption, TrainConfig, chosen_recipe, training_options


@dataclasses.dataclass(frozen=True)
class GridConfig(TrainConfig, RecipeOption):
    """What the commands of reproduce.py share: which experiments, and the options that all of their runs have.

    Options of train.py that are named here hold for every row that does not set them itself.
    """

    experiments: Annotated[str, tyro.conf.Positional] = "components"
    """A preset (paper, components, num-embeddings, embedding-size, backbones, loss-weights, rivals) or a .yaml file."""
    seeds: int = 3
    """Seeds a row, from --seed on."""
    run_dir: str = "runs"
    """Folder of all runs."""

    def training(self) -> TrainConfig:
        """The options of the runs."""
        return dataclasses.replace(training_options(self), run_dir=None)


@dataclasses.dataclass(frozen=True)
class RunGridConfig(GridConfig):
    """Does every run that is not finished, one progress line for all; a killed one goes on where it stopped."""

    jobs: int = 1
    """Runs at a time, each on its share of the cores."""


@dataclasses.dataclass(frozen=True)
class ListGridConfig(GridConfig):
    """Prints one command a run that is not finished, for a cluster's job array, Ray or GNU parallel."""

    all: bool = False
    """The finished runs too."""


@dataclasses.dataclass(frozen=True)
class ReportGridConfig(GridConfig):
    """Makes tables, figures and a page of the runs' result files."""

    name: str | None = None
    """Name of the report; None is the data set's and the experiments', as fer2013-components."""
    report_dir: str = "reports"
    """Folder of the reports."""
    keep_results: bool = False
    """Copy the result files, predictions and histories beside the report, so that it can be made again from there."""


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
