"""Prepares a data set for training by its name; ``inspect`` shows what is prepared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import datasets
from command_line import Range, parse_command_over
from config import DatasetName
from data_helper import SPLITS, PreparedSplit, open_split, prepared_splits
from datasets.shared import summary
from datasets.shared.duplicates import MAX_DISTANCE, drop_from_train, find_duplicates
from files import UserError, run_command
from reading.text import printable_lines


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Shows every prepared split: its counts, the official counts, a grid of its images, its duplicates."""

    data_dir: str = "data"
    """Folder of the prepared data sets."""
    dataset: DatasetName | None = None
    """One data set; None is every prepared one."""
    duplicates: Literal["near", "exact", "none"] = "near"
    """What to look for: equal pixels only (exact), or similar images too (near; takes minutes for AffectNet)."""
    distance: Annotated[int, Range(0, MAX_DISTANCE)] = 4
    """Near duplicates are images whose perceptual hashes differ in at most this many of 64 bits."""
    drop_duplicates: bool = False
    """Rewrite train without the images that have duplicates (see --duplicates) in val or test; needs --dataset."""
    debug: bool = False
    """Show tracebacks."""


def main() -> None:
    """Prepares the data set that the command line names, or shows what is prepared."""
    data_sets = [datasets.get(name) for name in datasets.NAMES]
    commands = {each.name: (each.options, {"description": each.about}) for each in data_sets}
    config = parse_command_over(
        commands | {"inspect": (InspectConfig, {})}, "Prepares data sets and shows what is prepared."
    )
    if isinstance(config, InspectConfig):
        return inspect(config)
    data_set = next(each for each in data_sets if each.options is type(config))
    metas = data_set.prepare(config)
    print(*map(printable_lines, summary.prepared_lines(data_set, config.data_dir, metas)), sep="\n")


def inspect(config: InspectConfig) -> None:
    """Prints what is prepared, draws a grid of each split's images, looks for duplicates and drops them on request."""
    names = [config.dataset.value] if config.dataset else list(datasets.NAMES)
    prepared = prepared_splits(config.data_dir)
    found = {name: [split for split in SPLITS if (name, split) in prepared] for name in names}
    if not any(found.values()):
        raise UserError(_how_to_prepare(config.data_dir, names))
    if config.drop_duplicates:
        check_can_drop(config, found)
    for name in filter(found.get, names):
        splits = [open_split(config.data_dir, name, split) for split in found[name]]
        show_splits(config.data_dir, name, splits)
        if config.duplicates != "none":
            show_duplicates(config, splits)


def show_splits(data_dir: str, name: str, splits: Sequence[PreparedSplit]) -> None:
    """Prints the counts of a data set's splits beside the official ones, and draws a grid of each split's images."""
    from plots import save_image_grid  # imports matplotlib, which the other commands need not wait for

    metas = {split.meta["split"]: split.meta for split in splits}
    print(name, summary.counts_table(metas), *summary.official_lines(datasets.get(name), metas), sep="\n")
    for split in splits:
        grid = _grid_path(data_dir, split.name)
        save_image_grid(grid, split.images, split.labels, split.class_names)
        height, width, channels = split.images.shape[1:]
        print(f"{split.name}: {width} x {height} {'gray' if channels == 1 else 'RGB'}, images in {grid}")


def _grid_path(data_dir: str, name: str) -> Path:
    """Beside the split; in the current folder where the data cannot be written."""
    beside = Path(data_dir, f"{name}.png")
    return beside if os.access(beside.parent, os.W_OK) else Path(f"{name.replace('/', '-')}.png")


def show_duplicates(config: InspectConfig, splits: Sequence[PreparedSplit]) -> None:
    """Prints which images appear more than once, and drops them from train on request."""
    found = find_duplicates(splits, config.distance if config.duplicates == "near" else None)
    print(*summary.duplicates_lines(found), sep="\n")
    if config.drop_duplicates:
        train = next(split for split in splits if split.meta["split"] == "train")
        print(summary.dropped_line(train, drop_from_train(config.data_dir, train, found)))


def check_can_drop(config: InspectConfig, found: dict[str, list[str]]) -> None:
    """Refuses ``--drop-duplicates`` where it is not clear what to drop from what."""
    if config.dataset is None:
        raise UserError("--drop-duplicates changes one data set: name it with --dataset")
    if config.duplicates == "none":
        raise UserError("--drop-duplicates: expected --duplicates near or exact, received none")
    splits = found[config.dataset.value]
    if "train" not in splits or len(splits) < 2:
        raise UserError(
            f"--drop-duplicates: expected {config.dataset.value}'s train and its val or test in {config.data_dir}, "
            f"found {' and '.join(splits)}; prepare the others first"
        )


def _how_to_prepare(data_dir: str, names: Sequence[str]) -> str:
    sourced = [name for name in names if datasets.get(name).has_source]
    commands = [f"python prepare_data.py {' or '.join(sourced)} --source PATH"] if sourced else []
    commands += [f"python prepare_data.py {name}" for name in names if name not in sourced]
    return (
        f"{data_dir}: expected prepared {' or '.join(names)} data, found none; "
        f"run: {', or '.join(f'{command} --data-dir {data_dir}' for command in commands)}"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
