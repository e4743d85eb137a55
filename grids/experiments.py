"""Which runs answer a question? Experiments as rows of plain data: the presets, and one's own from a YAML file.

A row is a name and the options of `train.py` in which it differs from the others; a grid is its rows times the seeds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

import config
from config import DatasetName, TrainConfig
from files import UserError, write_text

# The rows whose number in the paper is the accuracy of the data set: the full loss.
AD_CORRE = "Ad-Corre"

_CE = {"w_fd": 0, "w_md": 0, "w_ed": 0}
_Rows = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A question as rows.

    Attributes:
        about: the question, in words.
        rows: name to the options in which the row differs; the first row is what the others are tested against.
        recipe: where all other options come from (`config.RECIPES`).
        datasets: run on these when the command line names none.
    """

    about: str
    rows: _Rows
    recipe: str = "default"
    datasets: tuple[DatasetName, ...] = (DatasetName.synthetic,)


PRESETS = {
    "paper": Preset(
        "The paper's three data sets in the published set-up, with cross-entropy alone (all that the published code "
        "trained with) and with the whole loss.",
        {"CE": _CE, AD_CORRE: {}},
        recipe="published",
        datasets=(DatasetName.affectnet, DatasetName.rafdb, DatasetName.fer2013),
    ),
    "components": Preset(
        "What does each component of the loss add to cross-entropy?",
        {
            "CE": _CE,
            "CE + FD": {"w_md": 0, "w_ed": 0},
            "CE + FD + MD": {"w_ed": 0},
            AD_CORRE: {},
            "Ad-Corre, no adaptive map": {"adaptive": False},
        },
    ),
    "num-embeddings": Preset(
        "How many embedding vectors does a face need?",
        {f"k = {k}": {"num_embeddings": k} for k in (1, 2, 4, 7, 10)},
    ),
    "embedding-size": Preset(
        "How long must an embedding vector be?",
        {f"d = {d}": {"embedding_size": d} for d in (32, 64, 128, 256, 512)},
    ),
    "backbones": Preset(
        "Which backbone?",
        {arch: {"arch": arch} for arch in ("mini_xcp", "xcp", "resnet", "keras:MobileNetV2", "keras:EfficientNetB0")},
    ),
    "loss-weights": Preset(
        "How much should the three discriminators weigh beside cross-entropy?",
        {
            "CE": _CE,
            **{f"discriminators x {w}": {"w_fd": w, "w_md": w, "w_ed": w} for w in (0.1, 0.3, 1, 3, 10)},
        },
    ),
    "rivals": Preset(
        "How does Ad-Corre compare with other losses on embeddings?",
        {
            "CE": _CE,
            "CE + center": {**_CE, "w_center": 1},
            "CE + supervised contrastive": {**_CE, "w_supcon": 1},
            "CE + triplet, semi-hard": {**_CE, "w_triplet": 1},
            AD_CORRE: {},
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row on one data set.

    Attributes:
        name: the row's.
        settings: everything else; its seed is the first of the grid's.
    """

    name: str
    settings: TrainConfig

    def with_seed(self, seed: int) -> TrainConfig:
        return dataclasses.replace(self.settings, seed=seed)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every row of a preset or a file, on every data set, with every seed.

    Attributes:
        name: of the preset or the file.
        about: the question, in words.
        experiments: data set by data set, in the order of the rows.
        seeds: successive ones.
    """

    name: str
    about: str
    experiments: tuple[Experiment, ...]
    seeds: tuple[int, ...]

    def runs(self) -> list[tuple[Experiment, int]]:
        """Every (experiment, seed), seed by seed, so that a grid cut short has every row."""
        return [(experiment, seed) for seed in self.seeds for experiment in self.experiments]


def read_preset(name: str) -> Preset:
    """A preset by its name, or the rows of a YAML file.

    The file holds ``rows``, a list of ``name`` with any options of `train.py` by their names (``w_fd: 0``), and
    optionally ``about``, ``recipe``, ``datasets`` and ``base``, options of all rows::

        about: Does a longer ramp help?
        base: {dataset: fer2013, epochs: 15}
        rows:
          - {name: no ramp}
          - {name: five epochs, ramp_epochs: 5}

    Raises:
        UserError: no such preset or file, or a file of another form.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"experiments: expected one of {', '.join(PRESETS)} or a .yaml file, received {name!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, found something else ({' '.join(str(error).split())})") from None
    return _preset_of(content, path)


def _preset_of(content: Any, path: Path) -> Preset:
    allowed = {"about", "recipe", "datasets", "base", "rows"}
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or set(content) - allowed:
        raise UserError(f"{path}: expected the entries rows (a list) and optionally {', '.join(sorted(allowed))}")
    rows: _Rows = {}
    for i, row in enumerate(content["rows"], 1):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise UserError(f"{path}: row {i}: expected a name and options, found {row!r}")
        if row["name"] in rows:
            raise UserError(f"{path}: row {i}: the name {row['name']!r} stands twice")
        rows[row["name"]] = {**(content.get("base") or {}), **{key: row[key] for key in row if key != "name"}}
    if not rows:
        raise UserError(f"{path}: expected one row or more, found none")
    recipe = content.get("recipe", "default")
    if recipe not in config.RECIPES:
        raise UserError(f"{path}: recipe: expected one of {', '.join(config.RECIPES)}, found {recipe!r}")
    try:
        datasets = tuple(DatasetName(name) for name in content.get("datasets") or ())
    except ValueError as error:
        raise UserError(f"{path}: datasets: {error}; expected some of {', '.join(DatasetName)}") from None
    return Preset(content.get("about", ""), rows, recipe, datasets)


def make_grid(name: str, preset: Preset, base: TrainConfig, dataset_chosen: bool, num_seeds: int) -> Grid:
    """Lays a preset's rows over the options of the command line.

    Args:
        name: of the preset or its file.
        preset: the rows; their options win over ``base``.
        base: all other options; its seed is the first.
        dataset_chosen: ``base`` names the data set; otherwise the preset's are taken.
        num_seeds: 1 or more.

    Raises:
        UserError: an option that train.py does not have, or a value that it would refuse.
    """
    if num_seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, received {num_seeds}")
    datasets = (base.dataset,) if dataset_chosen or not preset.datasets else preset.datasets
    experiments = []
    for dataset in datasets:
        for row, options in preset.rows.items():
            settings = config.with_options(dataclasses.replace(base, dataset=dataset), options, f"{name}: row {row!r}")
            config.check(settings)
            experiments.append(Experiment(row, settings))
    return Grid(Path(name).stem, preset.about, tuple(experiments), tuple(range(base.seed, base.seed + num_seeds)))


def write_yaml(path: str | Path, grid: Grid) -> None:
    """Writes a grid as a file for `read_preset` that spells out every option, so that no later default changes it."""
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
