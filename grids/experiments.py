"""Experiments as rows of options, read from YAML files; a grid is their rows times data sets and seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

import config
from config import DatasetName, TrainConfig
from files import UserError, write_text
from grids.strict_yaml import read_yaml
from reading.text import printable

PRESETS = Path(__file__).with_name("presets")
_MOST_ROWS, _LONGEST_NAME = 1_000, 100
_ENTRIES = {"about": str, "recipe": str, "datasets": list, "base": dict, "rows": list}


def preset_names() -> list[str]:
    """The names of the files in `PRESETS`, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


@dataclasses.dataclass(frozen=True)
class Experiments:
    """The content of an experiments file.

    Attributes:
        name: the file's, without its ending.
        about: the question that the rows answer.
        rows: name to the options in which the row differs; the first row is what the others are tested against.
        recipe: where all other options come from (`config.RECIPES`).
        datasets: run on these when the command line names none; empty for the recipe's.
    """

    name: str
    about: str
    rows: dict[str, dict[str, Any]]
    recipe: str = "default"
    datasets: tuple[DatasetName, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row on one data set.

    Attributes:
        name: the row's name.
        settings: all options of its runs; the seed is the grid's first.
    """

    name: str
    settings: TrainConfig

    def with_seed(self, seed: int) -> TrainConfig:
        return dataclasses.replace(self.settings, seed=seed)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every row of an experiments file, on every data set, with every seed.

    Attributes:
        name: of the experiments.
        about: the question that the rows answer.
        experiments: data set by data set, in the order of the rows.
        seeds: successive ones.
    """

    name: str
    about: str
    experiments: tuple[Experiment, ...]
    seeds: tuple[int, ...]

    def runs(self) -> list[tuple[Experiment, int]]:
        """Every (experiment, seed), seed by seed, so that an interrupted grid has results of every row."""
        return [(experiment, seed) for seed in self.seeds for experiment in self.experiments]


def read_experiments(name: str) -> Experiments:
    """Reads a preset (``grids/presets/<name>.yaml``) or any other YAML file.

    The file holds ``rows``, a list of ``name`` with any options of `train.py` by their names (``w_fd: 0``), and
    optionally ``about``, ``recipe``, ``datasets`` and ``base``, options of all rows::

        about: Does a longer ramp help?
        base: {dataset: fer2013, epochs: 15}
        rows:
          - {name: no ramp}
          - {name: five epochs, ramp_epochs: 5}

    Args:
        name: a name in `preset_names`, or a path that ends with .yaml or .yml.

    Raises:
        UserError: no such preset or file, or a file of another form: every option is one text, number, bool or null.
    """
    path = PRESETS / f"{name}.yaml" if name in preset_names() else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"experiments: expected one of {', '.join(preset_names())} or a .yaml file, received {name!r}")
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return _experiments_of(content, path)


def _experiments_of(content: Any, path: Path) -> Experiments:
    if not isinstance(content, dict) or "rows" not in content or set(content) - set(_ENTRIES):
        raise UserError(f"{path}: expected rows and optionally some of {', '.join(_ENTRIES)}, and nothing else")
    for entry, value in content.items():
        if not isinstance(value, _ENTRIES[entry]):
            raise UserError(f"{path}: {entry}: expected a {_ENTRIES[entry].__name__}, found {_short(value)}")
    recipe = content.get("recipe", "default")
    if recipe not in config.RECIPES:
        raise UserError(f"{path}: recipe: expected one of {', '.join(config.RECIPES)}, found {_short(recipe)}")
    try:
        datasets = tuple(DatasetName(name) for name in content.get("datasets", ()))
    except ValueError as error:
        raise UserError(
            f"{path}: datasets: {printable(error, 80)}; expected some of {', '.join(DatasetName)}"
        ) from None
    rows = _rows_of(content["rows"], content.get("base", {}), path)
    return Experiments(path.stem, content.get("about", ""), rows, recipe, datasets)


def _rows_of(listed: list[Any], base: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    if len(listed) > _MOST_ROWS:
        raise UserError(f"{path}: expected at most {_MOST_ROWS:,} rows, found {len(listed):,}")
    _check_scalar(base, f"{path}: base")
    for i, row in enumerate(listed, 1):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise UserError(f"{path}: row {i}: expected a name and options, found {_short(row)}")
        if not 1 <= len(row["name"]) <= _LONGEST_NAME or not row["name"].isprintable():
            raise UserError(
                f"{path}: row {i}: expected a name of 1 to {_LONGEST_NAME} printable characters, found "
                f"{_short(row['name'])}"
            )
        _check_scalar(row, f"{path}: row {i}")
        if row["name"] in rows:
            raise UserError(f"{path}: row {i}: an earlier row has the name {row['name']!r} too")
        rows[row["name"]] = {**base, **{option: value for option, value in row.items() if option != "name"}}
    if not rows:
        raise UserError(f"{path}: expected one row or more, found none")
    return rows


def _check_scalar(options: dict[str, Any], where: str) -> None:
    for name, value in options.items():
        if isinstance(value, (list, dict)):
            raise UserError(
                f"{where}: {printable(name, 40)}: expected one text, number, bool or null, found {_short(value)}"
            )


def _short(value: Any) -> str:
    return printable(repr(value), 80)


def make_grid(experiments: Experiments, base: TrainConfig, dataset_chosen: bool, num_seeds: int) -> Grid:
    """Combines rows with the options of the command line.

    Args:
        experiments: the rows; their options win over ``base``.
        base: all other options; its seed is the first.
        dataset_chosen: ``base`` names the data set; otherwise the experiments' are taken.
        num_seeds: 1 or more.

    Raises:
        UserError: an option that train.py does not have, a value that it would refuse, or another seed or folder than
            that of the command line.
    """
    datasets = (base.dataset,) if dataset_chosen or not experiments.datasets else experiments.datasets
    made = []
    for dataset in datasets:
        for row, options in experiments.rows.items():
            place = f"{experiments.name}: row {row!r}"
            settings = config.with_options(dataclasses.replace(base, dataset=dataset), options, place)
            config.check(settings)
            if (settings.seed, settings.run_dir) != (base.seed, base.run_dir):  # they would be ignored
                raise UserError(
                    f"{place}: expected no seed and no run_dir, which all rows share; use --seed, --seeds, --run-dir"
                )
            made.append(Experiment(row, settings))
    seeds = tuple(range(base.seed, base.seed + num_seeds))
    return Grid(experiments.name, experiments.about, tuple(made), seeds)


def write_yaml(path: str | Path, grid: Grid) -> None:
    """Writes a grid as a file for `read_experiments` with every option in it, so that no later default changes it."""
    rows = {}
    for experiment in grid.experiments:
        options = config.options_by_name(experiment.settings)
        rows[experiment.name] = {name: options[name] for name in options if name not in (*config.PLACES, "dataset")}
    first = next(iter(rows.values()))
    base = {name: value for name, value in first.items() if all(row[name] == value for row in rows.values())}
    content = {
        "about": grid.about,
        "datasets": list(dict.fromkeys(experiment.settings.dataset.value for experiment in grid.experiments)),
        "base": base,
        "rows": [{"name": name, **{key: row[key] for key in row if key not in base}} for name, row in rows.items()],
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
