"""The options of `reproduce.py`: its own, and those of train.py."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro

from command_line import Range, from_sections, parse_command_over, sectioned
from config import (
    LAST_SEED,
    RECIPES,
    RecipeOption,
    TrainConfig,
    chosen_recipe,
    options_by_name,
    preferred_backend,
    training_options,
)
from files import UserError
from grids.experiments import preset_names
from measuring.views import Views

# The options of train.py that `--help` repeats here; the others are accepted as well.
_SHOWN = ("dataset", "data_dir", "seed", "epochs", "debug")
_HIDDEN = "train.py"
_EXPERIMENTS_HELP = f"A preset ({', '.join(preset_names())}) or a .yaml file."


@dataclasses.dataclass(frozen=True)
class GridConfig(TrainConfig, RecipeOption):
    """The options that the commands of reproduce.py share."""

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
    """Does every run that is not finished; an interrupted one continues.

    Every option of train.py is accepted too: python train.py --help lists them.

    They hold for each row that does not set them itself.
    """

    jobs: Annotated[int, Range(1, 1_024)] = 1
    """Runs at a time; each gets an equal share of the cores and GPUs."""


@dataclasses.dataclass(frozen=True)
class ListGridConfig(GridConfig):
    """Prints a command for each run that is not finished.

    For a job array of a cluster, Ray or GNU parallel.

    Every option of train.py is accepted too: python train.py --help lists them.
    """

    all: bool = False
    """Also print the finished runs."""


@dataclasses.dataclass(frozen=True)
class ReportGridConfig(GridConfig):
    """Writes tables, figures and a page from the results of the runs.

    Every option of train.py is accepted too: python train.py --help lists them.

    Give those of run, because they decide which runs are reported.
    """

    name: str | None = None
    """Name of the report; None joins the names of the data set and the experiments, such as fer2013-components."""
    report_dir: str = "reports"
    """Folder of the reports."""
    views: Views | None = None
    """Report the predictions of these views: of <run>/<views>/, where test.py evaluate --run-dir wrote them; a run
    without them counts as not run. None reports what each run measured itself."""
    without_copies: bool = False
    """Also report the images that have no copy in train (prepare_data.py inspect); needs the prepared data."""
    keep_results: bool = False
    """Copy results, predictions and histories beside the report, so that it can be made again from there."""


def parse_grid_command(commands: dict[str, type[GridConfig]], description: str, recipe: str) -> GridConfig:
    """Makes the config of the sub-command named first on the command line (`parse_command` over a recipe).

    Args:
        commands: sub-command name to config class.
        description: what the program does, for ``--help``.
        recipe: where unnamed options come from, unless the command line has a ``--recipe``.

    Raises:
        UserError: a number outside its range, or seeds beyond the last one.
    """
    base = dataclasses.replace(RECIPES[chosen_recipe() or recipe], backend=preferred_backend())
    shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name != "run_dir"}
    training = [name for name in options_by_name(base) if name != "run_dir"]
    # tyro does not parse what it hides.
    hidden = [_HIDDEN] if {"-h", "--help"} & set(sys.argv) else []
    made = {}
    for name, cls in commands.items():
        own = [field.name for field in dataclasses.fields(cls) if field.name not in (*shared, "run_dir")]
        sections = {"": [*own, "run_dir"], _HIDDEN: [each for each in training if each not in _SHOWN]}
        sections[""] += _SHOWN
        made[sectioned(cls, sections, cls(**shared), hidden)] = name
    options = parse_command_over({name: (cls, {"description": cls.__doc__}) for cls, name in made.items()}, description)
    settings = from_sections(commands[made[type(options)]], options)
    if settings.seed + settings.seeds - 1 > LAST_SEED:
        raise UserError(
            f"--seed: expected {LAST_SEED - settings.seeds + 1} or less with --seeds {settings.seeds}, received "
            f"{settings.seed}"
        )
    return settings
