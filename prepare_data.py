"""How does a data set become ready to train on? Prepare it by its name, look with ``inspect``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from command_line import parse_command
from config import DatasetName
from data_helper import PreparedSplit, Split, open_split, prepared_splits, split_dir
from datasets import affectnet, ferplus, published, rafdb
from datasets.affectnet import PrepareAffectnetConfig
from datasets.fer2013 import OFFICIAL_COUNTS, PrepareFer2013Config, prepare_fer2013
from datasets.ferplus import PrepareFerplusConfig
from datasets.published import PreparePublishedConfig
from datasets.rafdb import PrepareRafdbConfig
from datasets.shared.duplicates import DROPPED, Duplicates
from datasets.shared.expressions import CLASS_NAMES
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from files import UserError, run_command


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Shows every prepared split: its counts, the official ones, a grid of its pictures, what stands in it twice."""

    data_dir: str = "data"
    """Folder of the prepared data sets."""
    dataset: DatasetName | None = None
    """One data set; None is every prepared one."""
    duplicates: Literal["near", "exact", "none"] = "near"
    """What to look for: the same pixels, or pictures alike too; near takes minutes for AffectNet."""
    distance: int = 4
    """Bits of 64 in which the perceptual hashes of near duplicates differ at most."""
    drop_duplicates: bool = False
    """Rewrite train without the pictures whose duplicates (as looked for) stand in val or test; wants --dataset."""
    debug: bool = False


def main() -> None:
    """Prepares the data set that the command line names, or shows what is prepared."""
    commands = {
        "fer2013": (PrepareFer2013Config, fer2013),
        "ferplus": (PrepareFerplusConfig, lambda config: report(config, ferplus.prepare_ferplus(config))),
        "rafdb": (PrepareRafdbConfig, lambda config: report(config, rafdb.prepare_rafdb(config))),
        "affectnet": (PrepareAffectnetConfig, lambda config: report(config, affectnet.prepare_affectnet(config))),
        "published": (PreparePublishedConfig, lambda config: report(config, published.prepare_published(config))),
        "synthetic": (PrepareSyntheticConfig, lambda config: report(config, write_synthetic_splits(config))),
        "inspect": (InspectConfig, inspect),
    }
    classes = {name: config_class for name, (config_class, _) in commands.items()}
    config = parse_command(classes, "Prepares data sets and shows what is prepared.")
    run = next(run for config_class, run in commands.values() if type(config) is config_class)
    run(config)


def report(config: Any, metas: dict[str, dict[str, Any]]) -> None:
    """Prints what was prepared: counts, how they differ from the official ones, what was left out, and where it is."""
    print(counts_table(metas))
    for line in official_lines(metas):
        print(line)
    options = next(iter(metas.values()))["options"]
    for part, reasons in options.get("left_out", {}).items():
        if reasons:
            print(f"{part}: left out {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}")
    if bare := options.get("pictures_without_annotation"):
        print(f"passed over {bare:,} pictures without an annotation")
    print_folders(config.data_dir, metas)


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


def inspect(config: InspectConfig) -> None:
    """Prints what is prepared, draws a grid of each split's pictures and looks for duplicates, to drop on request."""
    names = [config.dataset.value] if config.dataset else [name.value for name in DatasetName]
    prepared = prepared_splits(config.data_dir)
    found = {name: [split for split in get_args(Split) if (name, split) in prepared] for name in names}
    if not any(found.values()):
        sourced = " or ".join(name for name in names if name != "synthetic")
        commands = [f"python prepare_data.py {sourced} --source PATH"] if sourced else []
        commands += ["python prepare_data.py synthetic"] if "synthetic" in names else []
        raise UserError(
            f"{config.data_dir}: expected prepared {' or '.join(names)} data, found none; "
            f"run: {', or '.join(f'{command} --data-dir {config.data_dir}' for command in commands)}"
        )
    if config.drop_duplicates:
        check_can_drop(config, found)
    for name in filter(found.get, names):
        splits = [open_split(config.data_dir, name, split) for split in found[name]]
        show_splits(config.data_dir, {split.meta["split"]: split for split in splits})
        if config.duplicates != "none":
            show_duplicates(config, splits)


def show_splits(data_dir: str, splits: dict[str, PreparedSplit]) -> None:
    """Prints the counts of a data set's splits beside the official ones, and draws a grid of each one's pictures."""
    from plots import save_image_grid  # here and not above: matplotlib, for which the other commands would wait

    metas = {name: split.meta for name, split in splits.items()}
    print(f"{next(iter(metas.values()))['dataset']}\n{counts_table(metas)}")
    for line in official_lines(metas):
        print(line)
    for split in splits.values():
        grid = Path(data_dir, f"{split.name}.png")
        save_image_grid(grid, split.images, split.labels, split.class_names)
        height, width, channels = split.images.shape[1:]
        print(f"{split.name}: {width} x {height} {'gray' if channels == 1 else 'RGB'}, pictures in {grid}")


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


def show_duplicates(config: InspectConfig, splits: Sequence[PreparedSplit]) -> None:
    """Prints which pictures stand more than once, and drops them from train on request."""
    from datasets.shared.duplicates import (  # here and not above: SciPy, as with matplotlib
        drop_from_train,
        find_duplicates,
    )

    found = find_duplicates(splits, config.distance if config.duplicates == "near" else None)
    print(duplicates_table(found))
    if any(found.blank.values()):
        blank = ", ".join(f"{split} {count:,}" for split, count in found.blank.items())
        print(f"blank pictures (one colour): {blank}; exact duplicates of their like, near ones of none")
    if config.drop_duplicates:
        train = next(split for split in splits if split.meta["split"] == "train")
        dropped = drop_from_train(config.data_dir, train, found)
        if dropped is None:
            print(f"{train.name}: no picture stands in another split, nothing to drop")
        else:
            others = " or ".join(dropped["compared_with"])
            print(
                f"{train.name}: dropped {dropped['count']:,} pictures that stand in {others} too, "
                f"{len(train) - dropped['count']:,} are left; meta.json lists their rows"
            )


def duplicates_table(found: Duplicates) -> str:
    """A row an ordered pair of splits: how many pictures of the first stand again in the second."""
    kinds = {"exact": found.exact}
    if found.near is not None:
        kinds[f"exact or near ({found.distance} bits)"] = found.near
    header, rows = ["pictures of", "again in"], [list(splits) for splits in found.exact]
    for kind, overlaps in kinds.items():
        header += [kind, "share", "pairs", "labels differ"]
        for row, overlap in zip(rows, overlaps.values(), strict=True):
            row += [f"{overlap.repeated.sum():,}", f"{overlap.repeated.mean():.1%}", f"{overlap.pairs:,}"]
            row += [f"{overlap.disagreeing:,} ({overlap.disagreeing / max(1, overlap.pairs):.1%})"]
    return _aligned([header, *rows])


def official_lines(metas: dict[str, dict[str, Any]]) -> list[str]:
    """In words, a line a part of the official release: whether it is there with the official counts, and what was left.

    A split that the release does not have was held out of its training part, and is counted there; so are pictures
    dropped as duplicates.
    """
    official = official_counts(next(iter(metas.values())))
    lines = []
    for part, expected in official.items():
        splits = [split for split in metas if split == part or (part == "train" and split not in official)]
        if not splits:
            lines.append(f"{part}: not prepared")
            continue
        dropped = [drop["class_counts"] for split in splits for drop in metas[split]["options"].get(DROPPED, [])]
        counted = [metas[split]["class_counts"] for split in splits] + dropped
        counts = [sum(column) for column in zip(*counted, strict=True)]
        line = f"{' + '.join(splits)}: {differences_from(metas[splits[0]]['class_names'], counts, expected)}"
        line += f" (counting {sum(map(sum, dropped)):,} dropped as duplicates)" if dropped else ""
        skipped = sum(len(metas[split].get("skipped", [])) for split in splits)
        lines.append(line + (f"; could not be read: {skipped:,}" if skipped else ""))
    return lines


def official_counts(meta: dict[str, Any]) -> dict[str, Sequence[int]]:
    """Part of the official release -> images a class prepared; nothing for a data set that has no official counts."""
    official = {
        "fer2013": OFFICIAL_COUNTS,
        "ferplus": ferplus.OFFICIAL_COUNTS,
        "rafdb": rafdb.OFFICIAL_COUNTS,
        "affectnet": affectnet.OFFICIAL_COUNTS.get(meta["options"].get("form"), {}),
    }.get(meta["dataset"], {})
    return {part: counts[: len(meta["class_names"])] for part, counts in official.items()}


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
    return differences_from(meta["class_names"], meta["class_counts"], OFFICIAL_COUNTS[split])


def differences_from(names: Sequence[str], counts: Sequence[int], official: Sequence[int]) -> str:
    """In words, how the images a class differ from the official ones."""
    pairs = zip(names, counts, official, strict=True)
    differing = [f"{name} {found:,} instead of {expected:,}" for name, found, expected in pairs if found != expected]
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
