"""Text tables of prepared data sets: counts per class, the official counts, duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_helper import SPLITS, PreparedSplit, split_dir
from datasets.shared.dataset import DataSet
from datasets.shared.duplicates import DROPPED, Duplicates
from reading.text import aligned


def prepared_lines(dataset: DataSet, data_dir: str, metas: Mapping[str, dict[str, Any]]) -> list[str]:
    """What a preparation did: counts, how they differ from the official ones, what was left out, the folders.

    Args:
        dataset: that was prepared.
        data_dir: folder of the prepared data sets.
        metas: split -> `meta.json`, as `DataSet.prepare` returns it.
    """
    lines = [counts_table(metas), *official_lines(dataset, metas, absent="not in the source")]
    for split in SPLITS:
        folder = split_dir(data_dir, dataset.name, split)
        if split not in metas and folder.exists():
            lines.append(f"{split}: {folder} was prepared earlier and stays as it was")
    options = next(iter(metas.values()))["options"]
    for part, reasons in options.get("left_out", {}).items():
        if reasons:
            lines.append(f"{part}: left out {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}")
    if bare := options.get("pictures_without_annotation"):
        lines.append(f"ignored {bare:,} images without an annotation")
    for split, meta in metas.items():
        lines.append(f"{meta['num_images']:,} images in {split_dir(data_dir, dataset.name, split)}")
    return lines


def counts_table(metas: Mapping[str, dict[str, Any]]) -> str:
    """Images per class, one column per split, each with its share of the split."""
    header, columns = ["class"], []
    for split, meta in metas.items():
        counts, total = meta["class_counts"], meta["num_images"]
        header += [split, "share"]
        columns += [[f"{n:,}" for n in (*counts, total)], [f"{n / total:.1%}" for n in (*counts, total)]]
    names = next(iter(metas.values()))["class_names"]
    return "\n".join(aligned([header, *zip([*names, "all"], *columns, strict=True)]))


def official_lines(dataset: DataSet, metas: Mapping[str, dict[str, Any]], absent: str = "not prepared") -> list[str]:
    """One line per part of the official release: whether the counts are the official ones, and what could not be read.

    A split that the release does not have was held out of its training part, and is counted there; so are images
    that were dropped as duplicates.

    Args:
        dataset: the data set.
        metas: split -> `meta.json`.
        absent: what is printed of a part without a split.
    """
    first = next(iter(metas.values()))
    official = dataset.official_counts(first)
    lines = []
    for part, all_classes in official.items():
        expected = all_classes[: len(first["class_names"])]
        splits = [split for split in metas if split == part or (part == "train" and split not in official)]
        if not splits:
            lines.append(f"{part}: {absent} ({sum(expected):,} images in the official release)")
            continue
        dropped = [drop["class_counts"] for split in splits for drop in metas[split]["options"].get(DROPPED, [])]
        counted = [metas[split]["class_counts"] for split in splits] + dropped
        counts = [sum(column) for column in zip(*counted, strict=True)]
        line = f"{' + '.join(splits)}: {_difference(first['class_names'], counts, expected)}"
        line += f" (counting {sum(map(sum, dropped)):,} dropped as duplicates)" if dropped else ""
        skipped = sum(len(metas[split].get("skipped", [])) for split in splits)
        lines.append(line + (f"; could not be read: {skipped:,}" if skipped else ""))
    return lines


def _difference(names: Sequence[str], counts: Sequence[int], official: Sequence[int]) -> str:
    pairs = zip(names, counts, official, strict=True)
    differing = [f"{name} {found:,} instead of {expected:,}" for name, found, expected in pairs if found != expected]
    if not differing:
        return f"as in the official release, {sum(official):,} images"
    differing.append(f"all {sum(counts):,} instead of {sum(official):,}")
    return f"differs from the official release: {', '.join(differing)}"


def duplicates_lines(found: Duplicates) -> list[str]:
    """One row per ordered pair of splits: how many images of the first also appear in the second; blank images."""
    kinds = {"exact": found.exact}
    if found.near is not None:
        kinds["near"] = found.near
    header, rows = ["in", "also in"], [list(splits) for splits in found.exact]
    for kind, overlaps in kinds.items():
        header += [kind, "share", "pairs", "differ"]
        for row, overlap in zip(rows, overlaps.values(), strict=True):
            row += [f"{overlap.repeated.sum():,}", f"{overlap.repeated.mean():.1%}", f"{overlap.pairs:,}"]
            row += [f"{overlap.disagreeing:,} ({overlap.disagreeing / max(1, overlap.pairs):.1%})"]
    near = f"near: exact or near ({found.distance} bits); " if found.near is not None else ""
    lines = [*aligned([header, *rows]), f"{near}differ: the pairs whose labels differ"]
    if any(found.blank.values()):
        blank = ", ".join(f"{split} {count:,}" for split, count in found.blank.items())
        lines.append(f"blank images (one colour): {blank}; they can be exact duplicates, never near ones")
    return lines


def dropped_line(train: PreparedSplit, dropped: dict[str, Any] | None) -> str:
    """What `duplicates.drop_from_train` dropped from a split, from its return value."""
    if dropped is None:
        return f"{train.name}: no image is also in another split, nothing to drop"
    return (
        f"{train.name}: dropped {dropped['count']:,} images that are also in {' or '.join(dropped['compared_with'])}, "
        f"{len(train) - dropped['count']:,} are left; meta.json lists their rows"
    )
