"""How does a release become our prepared format? Whole or not at all.

A reader (one module a data set) looks at a source and makes a `Release` of arrays, which `write_release` writes, or
`Pictures` still to be decoded, which `write_pictures` decodes on all cores and goes on with after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_helper import FORMAT_VERSION, SPLITS, open_split
from datasets.shared.archives import SourceFiles
from datasets.shared.decoding import Picture, Unreadable, decode_pictures
from datasets.shared.split_writer import SplitWriter, published_together
from files import UserError

CHECKPOINT_SECONDS = 5.0  # of work that an interruption costs at most


@dataclasses.dataclass(frozen=True)
class ReleaseOptions:
    """The options of every preparation from an official release."""

    source: str
    """The official release: a folder, or a zip or tar of it."""
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class PrepareOptions(ReleaseOptions):
    """The options of every preparation that decodes image files."""

    strict: bool = False
    """Stop at the first picture that cannot be read, instead of listing and skipping it."""
    workers: int | None = None
    """Threads that decode; None is one per core."""


@dataclasses.dataclass(frozen=True)
class Release:
    """What a reader found in a source.

    Attributes:
        counts: split -> number of images; splits that the source lacks are absent.
        examples: (split, image uint8 of `image_shape`, canonical label), as many as counted; iterated once.
        image_shape: (H, W, C) of every image.
        class_names: a name a class, in the order of the codes.
        sources: the files read, each as `file_identity` describes it.
        options: what else decided the content, JSON-ready.
        votes: split -> float32 (its images, classes) for `votes.npy`; empty where nobody voted.
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
        UserError: what the reader finds wrong on the way, or another process is writing this data set.
    """
    shared = (release.image_shape, release.class_names, release.sources, release.options)
    writers = {split: SplitWriter(data_dir, dataset, split, count, *shared) for split, count in release.counts.items()}
    with published_together(list(writers.values())):
        for split, image, label in release.examples:
            writers[split].add(image, label)
        for split, votes in release.votes.items():
            writers[split].add_array("votes", votes)
    return {split: writer.meta for split, writer in writers.items()}


# --- releases whose pictures are still to be decoded ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a reader found in a source, its pictures still to be decoded.

    Attributes:
        files: the source.
        pictures: what to prepare, in the order of each split's rows.
        size: side of the prepared images, pixels.
        channels: 1 (gray) or 3 (RGB).
        class_names: a name a class, in the order of the codes.
        sources: what tells that the source is the same as before, see `SourceFiles.stamp`.
        options: what else decided the content, JSON-ready.
        margin: share of the face box added on each side.
    """

    files: SourceFiles
    pictures: Sequence[Picture]
    size: int
    channels: int
    class_names: Sequence[str]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    margin: float = 0.0


def write_pictures(
    data_dir: str | Path, dataset: str, release: Pictures, *, strict: bool = False, workers: int | None = None
) -> dict[str, dict[str, Any]]:
    """Decodes a release's pictures on all cores and writes its splits, all or none of them, with a progress bar.

    Goes on where an interrupted preparation of the same source and options stopped, and returns at once when
    it is done already. Pictures that cannot be read are left out and listed, on standard error and in `meta.json`.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        release: what to prepare; one picture or more.
        strict: stop at the first picture that cannot be read.
        workers: how many pictures are decoded at a time; None is one a core.

    Returns:
        Split -> the content of its `meta.json`, where besides what every split has there are ``skipped`` (a list of
        ``{"name", "reason"}``) and ``preparation`` (``sha256`` over all that decided the content, how many
        ``pictures`` there were to read, and all ``splits`` that were made together). An earlier split that the
        release lacks stays as it was.

    Raises:
        UserError: with ``strict`` a picture that cannot be read, otherwise a split of which none can; or
            another process is writing this data set.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers: expected 1 or more, received {workers}")
    pictures: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for picture in release.pictures:
        pictures[picture.split].append(picture)
    pictures = {split: found for split, found in pictures.items() if found}
    metas = {split: _prepared_meta(data_dir, dataset, split) for split in pictures}
    shape = (release.size, release.size, release.channels)
    options = {**release.options, "size": release.size, "margin": release.margin}
    shared = (shape, release.class_names, release.sources, options)
    writers = {}
    for split, found in pictures.items():
        preparation = {"sha256": _digest(release, found), "pictures": len(found), "splits": list(pictures)}
        if metas[split].get("preparation") != preparation:
            writers[split] = SplitWriter(data_dir, dataset, split, len(found), *shared, preparation)
            metas[split] = writers[split].meta
        elif strict:
            _stop_at(release.files, metas[split]["skipped"])
    if writers:
        with published_together(list(writers.values())):
            for split, writer in writers.items():
                _fill(writer, release, pictures[split], strict, workers)
    _print_skipped(metas)
    return metas


def _digest(release: Pictures, pictures: Sequence[Picture]) -> str:
    """SHA-256 of all that decides the content of a split."""
    digest = hashlib.sha256()
    shape = (release.size, release.channels, release.margin)
    digest.update(json.dumps([FORMAT_VERSION, shape, list(release.class_names)]).encode())
    digest.update(json.dumps([release.sources, release.options], sort_keys=True).encode())
    for picture in pictures:
        digest.update(repr(picture).encode())
    return digest.hexdigest()


def _prepared_meta(data_dir: str | Path, dataset: str, split: str) -> dict[str, Any]:
    """The `meta.json` of a split that is as `write_pictures` left it; otherwise nothing."""
    try:
        meta = open_split(data_dir, dataset, split).meta
    except UserError:
        return {}
    # Fewer when pictures were dropped from it since.
    whole = "preparation" in meta and meta["num_images"] + len(meta["skipped"]) == meta["preparation"]["pictures"]
    return meta if whole else {}


def _fill(
    writer: SplitWriter, release: Pictures, pictures: Sequence[Picture], strict: bool, workers: int | None
) -> None:
    """Adds the pictures that no interrupted preparation has added already."""
    if strict:
        _stop_at(release.files, writer.skipped)
    rest = pictures[writer.done :]
    decoded = decode_pictures(
        release.files, rest, release.size, release.channels, margin=release.margin, workers=workers
    )
    name = f"preparing {writer.meta['dataset']}/{writer.meta['split']}"
    bar = tqdm(rest, name, len(pictures), initial=writer.done, unit="image", disable=None)
    saved = time.monotonic()
    with contextlib.closing(decoded):
        for picture, image in zip(bar, decoded, strict=True):
            if isinstance(image, Unreadable):
                writer.skip(picture.name, image.reason)
                if strict:
                    _stop_at(release.files, writer.skipped)
            else:
                writer.add(image, picture.label)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                writer.checkpoint()
                saved = time.monotonic()


def _stop_at(files: SourceFiles, skipped: Sequence[dict[str, str]]) -> None:
    for picture in skipped:
        raise UserError(
            f"{files.path}/{picture['name']}: {picture['reason']}; put the file right, or leave out what cannot be "
            "read by preparing without --strict"
        )


def _print_skipped(metas: dict[str, dict[str, Any]]) -> None:
    for split, meta in metas.items():
        if skipped := meta["skipped"]:
            first = "; ".join(f"{picture['name']}: {picture['reason']}" for picture in skipped[:3])
            more = "; ..." if len(skipped) > 3 else ""
            print(f"{split}: left out {len(skipped):,} pictures that cannot be read ({first}{more})", file=sys.stderr)


def find_prepared(
    data_dir: str | Path, dataset: str, sources: list[dict[str, Any]], options: dict[str, Any], *, strict: bool = False
) -> dict[str, dict[str, Any]] | None:
    """Looks, before a reader reads 287,651 labels, whether `write_pictures` has prepared the same already.

    Args:
        data_dir: folder of the prepared data sets.
        dataset: its name.
        sources: as for `Pictures`.
        options: those of the recorded options (``size`` and ``margin`` are among them) that are known beforehand.
        strict: a preparation that left pictures out does not count.

    Returns:
        What `write_pictures` returned then, or None.
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
    """Chooses what is held out for validation: of n images of a class, ``round(share * n)``.

    Depends on the order of the labels, the share and the seed alone.

    Args:
        labels: (N,) codes.
        share: 0 <= share < 1.
        seed: of the choice.

    Returns:
        bool (N,), True for what is held out.
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
