"""How does a data set become ready to train on? Prepare it with ``fer2013`` or ``synthetic``, look with ``inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from config import (
    CLASS_NAMES,
    DatasetName,
    InspectConfig,
    PrepareFer2013Config,
    PrepareSyntheticConfig,
    Split,
    parse_command,
)
from data_helper import open_split, prepared_splits, split_dir
from errors import UserError, run_command
from fer2013 import OFFICIAL_COUNTS, prepare_fer2013
from synthetic_data import write_synthetic_splits


def main() -> None:
    """Prepares the data set that the command line names, or shows what is prepared."""
    commands = {"fer2013": PrepareFer2013Config, "synthetic": PrepareSyntheticConfig, "inspect": InspectConfig}
    config = parse_command(commands, "Prepares data sets and shows what is prepared.")
    if isinstance(config, PrepareFer2013Config):
        fer2013(config)
    elif isinstance(config, PrepareSyntheticConfig):
        synthetic(config)
    else:
        inspect(config)


def fer2013(config: PrepareFer2013Config) -> None:
    """Prepares FER-2013 and compares its counts with the official ones."""
    metas = prepare_fer2013(config.source, config.data_dir)
    print(official_table(metas))
    for split in OFFICIAL_COUNTS:
        print(f"{split}: {compared_with_official(split, metas.get(split))}")
        folder = split_dir(config.data_dir, "fer2013", split)
        if split not in metas and folder.exists():
            print(f"{split}: {folder} was prepared earlier and stays as it was")
    print_folders(config.data_dir, metas)


def synthetic(config: PrepareSyntheticConfig) -> None:
    """Draws the synthetic faces."""
    metas = write_synthetic_splits(config)
    print(counts_table(metas))
    print_folders(config.data_dir, metas)


def inspect(config: InspectConfig) -> None:
    """Prints what is prepared and draws a grid of each split's pictures."""
    from plots import save_image_grid  # here and not above: matplotlib, for which the other commands would wait

    names = [config.dataset.value] if config.dataset else [name.value for name in DatasetName]
    prepared = prepared_splits(config.data_dir)
    found = {name: [split for split in get_args(Split) if (name, split) in prepared] for name in names}
    if not any(found.values()):
        commands = [f"python prepare_data.py {name}{' --source PATH' * (name == 'fer2013')}" for name in names]
        raise UserError(
            f"{config.data_dir}: expected prepared {' or '.join(names)} data, found none; "
            f"run: {' or '.join(f'{command} --data-dir {config.data_dir}' for command in commands)}"
        )
    for name in filter(found.get, names):
        splits = [open_split(config.data_dir, name, split) for split in found[name]]
        print(f"{name}\n{counts_table({split.meta['split']: split.meta for split in splits})}")
        for split in splits:
            grid = Path(config.data_dir, f"{split.name}.png")
            save_image_grid(grid, split.images, split.labels, split.class_names)
            height, width, channels = split.images.shape[1:]
            print(f"{split.name}: {width} x {height} {'gray' if channels == 1 else 'RGB'}, pictures in {grid}")


def counts_table(metas: dict[str, dict[str, Any]]) -> str:
    """Images a class, a column a split, each with its share of the split."""
    header, columns = ["class"], []
    for split, meta in metas.items():
        counts, total = meta["class_counts"], meta["num_images"]
        header += [split, "share"]
        columns += [[f"{n:,}" for n in (*counts, total)], [f"{n / total:.1%}" for n in (*counts, total)]]
    names = next(iter(metas.values()))["class_names"]
    return _aligned([header, *zip([*names, "all"], *columns, strict=True)])


def official_table(metas: dict[str, dict[str, Any]]) -> str:
    """Images a class of FER-2013, a column a split, each beside the official release's."""
    header, columns = ["class"], []
    for split, official in OFFICIAL_COUNTS.items():
        header += [split, "official"]
        found = metas[split]["class_counts"] if split in metas else []
        columns += [[f"{n:,}" for n in (*found, sum(found))] if found else ["-"] * (len(official) + 1)]
        columns += [[f"{n:,}" for n in (*official, sum(official))]]
    return _aligned([header, *zip([*CLASS_NAMES[: len(official)], "all"], *columns, strict=True)])


def compared_with_official(split: str, meta: dict[str, Any] | None) -> str:
    """In words, whether a split of FER-2013 has the official counts."""
    if meta is None:
        return "not in the source"
    pairs = zip(meta["class_names"], meta["class_counts"], OFFICIAL_COUNTS[split], strict=True)
    differing = [f"{name} {found:,} instead of {official:,}" for name, found, official in pairs if found != official]
    return f"differs from the official release: {', '.join(differing)}" if differing else "as in the official release"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def print_folders(data_dir: str, metas: dict[str, dict[str, Any]]) -> None:
    """Says where the splits were written."""
    for split, meta in metas.items():
        print(f"wrote {meta['num_images']:,} images to {split_dir(data_dir, meta['dataset'], split)}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
