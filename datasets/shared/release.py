"""Writes a release in the prepared format, whole or not at all.

A reader (one module per data set) makes a `Release` of arrays from a source, which `write_release` writes, or an
`ImageRelease` of image files, which `write_images` decodes on all cores and resumes after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from command_line import Range
from data_helper import FORMAT_VERSION, SPLITS, open_split, split_dir
from datasets.shared.archives import SourceFiles
from datasets.shared.decoding import ImageFile, Unreadable, decode_images
from datasets.shared.split_writer import SplitWriter, published_together
from files import UserError
from reading.text import printable

CHECKPOINT_SECONDS = 5.0  # an interruption costs at most this much work


@dataclasses.dataclass(frozen=True)
class ReleaseOptions:
    """The options of every preparation from an official release."""

    source: str
    """The data set as it was published, or a folder of your own; or a zip or tar of either."""
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class PrepareOptions(ReleaseOptions):
    """The options of every preparation that decodes image files."""

    strict: bool = False
    """Stop at the first image that cannot be read, instead of listing and skipping it."""
    workers: Annotated[int | None, Range(1, 1_024)] = None
    """Threads that decode; None is one per core."""


@dataclasses.dataclass(frozen=True)
class Release:
    """The images that a reader found in a source.

    Attributes:
        counts: split -> number of images; splits that the source lacks are absent.
        examples: (split, image uint8 of `image_shape`, canonical label), as many as counted; iterated once.
        image_shape: (H, W, C) of every image.
        class_names: one name per class, in the order of the codes.
        sources: the files read, each as `file_identity` describes it.
        options: the other options that decide the content, JSON-ready.
        votes: split -> float32 (its images, classes) for `votes.npy`; empty for a data set without votes.
    """

    counts: dict[str, int]
    examples: Iterable[tuple[str, np.ndarray, int]]
    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    votes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def write_release(data_dir: str | Path, dataset: str, release: Release) -> dict[str, dict[str, Any]]:
    """Writes the splits of a release, all or none of them.

    Returns:
        Split -> the content of its `meta.json`. An earlier split that the release lacks stays as it was.

    Raises:
        UserError: the reader finds a fault in the source, another process is writing this data set, or an earlier
            ``val`` was held out of another ``train``.
    """
    _check_hold_out(data_dir, dataset, release.counts)
    shared = (release.image_shape, release.class_names, release.sources, release.options)
    writers = {split: SplitWriter(data_dir, dataset, split, count, *shared) for split, count in release.counts.items()}
    with published_together(list(writers.values())):
        for split, image, label in release.examples:
            writers[split].add(image, label)
        for split, votes in release.votes.items():
            writers[split].add_array("votes", votes)
    return {split: writer.meta for split, writer in writers.items()}


def _check_hold_out(data_dir: str | Path, dataset: str, splits: Collection[str]) -> None:
    """Refuses train alone beside a val that was held out of an earlier train: its images would be in both."""
    if "train" not in splits or "val" in splits:
        return
    try:
        share = open_split(data_dir, dataset, "val").meta["options"].get("val_share")
    except UserError:  # there is none
        return
    if share:
        folder = split_dir(data_dir, dataset, "val")
        raise UserError(
            f"{folder}: was prepared with --val-share {share}, so its images may be in this train too, which has no "
            "validation part; remove that folder and run again, or give --val-share"
        )


# --- releases whose images are still to be decoded ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageRelease:
    """The image files that a reader found in a source.

    Attributes:
        files: the source.
        images: what to prepare, in the order of each split's rows.
        size: side of the prepared images, pixels.
        channels: 1 (gray) or 3 (RGB).
        class_names: one name per class, in the order of the codes.
        sources: identify the source, see `SourceFiles.stamp`.
        options: the other options that decide the content, JSON-ready.
        margin: share of the face box added on each side.
    """

    files: SourceFiles
    images: Sequence[ImageFile]
    size: int
    channels: int
    class_names: Sequence[str]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    margin: float = 0.0


def write_images(
    data_dir: str | Path, dataset: str, release: ImageRelease, *, strict: bool = False, workers: int | None = None
) -> dict[str, dict[str, Any]]:
    """Decodes a release's images on all cores and writes its splits, all or none of them, with a progress bar.

    Resumes an interrupted preparation of the same source and options, and returns at once when it is done already.
    Images that cannot be read are left out and listed, on standard error and in `meta.json`.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        release: what to prepare; at least one image.
        strict: stop at the first image that cannot be read.
        workers: number of decoding threads; None is one per core.

    Returns:
        Split -> the content of its `meta.json`, where besides what every split has there are ``skipped`` (a list of
        ``{"name", "reason"}``) and ``preparation`` (``sha256`` over all that decided the content, how many
        ``pictures`` there were to read, and all ``splits`` that were made together). An earlier split that the
        release lacks stays as it was.

    Raises:
        UserError: with ``strict`` an image that cannot be read, otherwise a split of which none can; or see
            `write_release`.
    """
    images: dict[str, list[ImageFile]] = {split: [] for split in SPLITS}
    for image in release.images:
        images[image.split].append(image)
    images = {split: found for split, found in images.items() if found}
    _check_hold_out(data_dir, dataset, images)
    metas = {split: _prepared_meta(data_dir, dataset, split) for split in images}
    shape = (release.size, release.size, release.channels)
    options = {**release.options, "size": release.size, "margin": release.margin}
    shared = (shape, release.class_names, release.sources, options)
    writers = {}
    for split, found in images.items():
        preparation = {"sha256": _digest(release, found), "pictures": len(found), "splits": list(images)}
        if metas[split].get("preparation") != preparation:
            writers[split] = SplitWriter(data_dir, dataset, split, len(found), *shared, preparation)
            metas[split] = writers[split].meta
        elif strict:
            _stop_at(release.files, metas[split]["skipped"])
    if writers:
        with published_together(list(writers.values())):
            for split, writer in writers.items():
                _fill(writer, release, images[split], strict, workers)
    _print_skipped(metas)
    return metas


def _digest(release: ImageRelease, images: Sequence[ImageFile]) -> str:
    """SHA-256 of everything that decides the content of a split."""
    digest = hashlib.sha256()
    shape = (release.size, release.channels, release.margin)
    digest.update(json.dumps([FORMAT_VERSION, shape, list(release.class_names)]).encode())
    digest.update(json.dumps([release.sources, release.options], sort_keys=True).encode())
    for image in images:
        # The name that the class had when the first sets were prepared: they are to be recognised.
        digest.update(repr(image).replace("ImageFile(", "Picture(", 1).encode())
    return digest.hexdigest()


def _prepared_meta(data_dir: str | Path, dataset: str, split: str) -> dict[str, Any]:
    """The `meta.json` of a split that is unchanged since `write_images`; otherwise nothing."""
    try:
        meta = open_split(data_dir, dataset, split).meta
    except UserError:
        return {}
    # There are fewer images after duplicates were dropped.
    whole = {"preparation", "skipped"} <= meta.keys() and meta["num_images"] + len(meta["skipped"]) == meta[
        "preparation"
    ]["pictures"]
    return meta if whole else {}


def _fill(
    writer: SplitWriter, release: ImageRelease, images: Sequence[ImageFile], strict: bool, workers: int | None
) -> None:
    """Adds the images that an interrupted preparation has not added already."""
    if strict:
        _stop_at(release.files, writer.skipped)
    rest = images[writer.done :]
    decoded = decode_images(release.files, rest, release.size, release.channels, margin=release.margin, workers=workers)
    name = f"preparing {writer.meta['dataset']}/{writer.meta['split']}"
    bar = tqdm(rest, name, len(images), initial=writer.done, unit="image", disable=None)
    saved = time.monotonic()
    with contextlib.closing(decoded):
        for image, pixels in zip(bar, decoded, strict=True):
            if isinstance(pixels, Unreadable):
                writer.skip(image.name, pixels.reason)
                if strict:
                    _stop_at(release.files, writer.skipped)
            else:
                writer.add(pixels, image.label)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                writer.checkpoint()
                saved = time.monotonic()


def _stop_at(files: SourceFiles, skipped: Sequence[dict[str, str]]) -> None:
    for image in skipped:
        raise UserError(
            f"{files.path}/{image['name']}: {image['reason']}; repair the file, or prepare without --strict "
            "to leave out what cannot be read"
        )


def _print_skipped(metas: dict[str, dict[str, Any]]) -> None:
    for split, meta in metas.items():
        if skipped := meta["skipped"]:
            first = "; ".join(f"{image['name']}: {image['reason']}" for image in skipped[:3])
            more = "; ..." if len(skipped) > 3 else ""
            line = f"{split}: left out {len(skipped):,} images that cannot be read ({first}{more})"
            print(printable(line), file=sys.stderr)


def find_prepared(
    data_dir: str | Path, dataset: str, sources: list[dict[str, Any]], options: dict[str, Any], *, strict: bool = False
) -> dict[str, dict[str, Any]] | None:
    """Finds out, before a reader reads up to 287,651 labels, whether `write_images` has prepared the same already.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        sources: as for `ImageRelease`.
        options: the recorded options (``size`` and ``margin`` are among them) that are known before reading.
        strict: a preparation that left images out does not count.

    Returns:
        The return value of `write_images` then, or None.
    """
    metas = {split: _prepared_meta(data_dir, dataset, split) for split in SPLITS}
    found = {
        split: meta
        for split, meta in metas.items()
        if meta.get("sources") == sources and {**meta["options"], **options} == meta["options"]
    }
    whole = bool(found) and all(set(meta["preparation"]["splits"]) <= set(found) for meta in found.values())
    if not whole or (strict and any(meta["skipped"] for meta in found.values())):
        return None
    _print_skipped(found)
    return found


def stratified_hold_out(labels: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Chooses the images held out for validation: of n images of a class, ``round(share * n)``.

    Depends only on the order of the labels, the share and the seed.

    Args:
        labels: (N,) codes.
        share: 0 <= share < 1.
        seed: seed of the choice.

    Returns:
        bool (N,), True for the images held out.
    """
    if not 0 <= share < 1:
        raise UserError(f"hold-out: expected a share of 0 or more and below 1, received {share}")
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held_out[rng.permutation(rows)[: round(share * len(rows))]] = True
    return held_out
