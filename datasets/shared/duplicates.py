"""Finds images that appear in a data set more than once, and drops them from train.

Exact duplicates have the same pixels. Near duplicates are the same photograph with another brightness, watermark,
compression or a slightly other crop: their perceptual hashes (pHash of the library imagehash: 64 bits, which of the
lowest 8 x 8 frequencies lie above their median) differ in a few bits at most.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_helper import PreparedSplit, read_meta
from datasets.shared.split_writer import SplitWriter
from files import UserError

DROPPED = "dropped_duplicates"  # what was dropped, in the options of a `meta.json`
MAX_DISTANCE = 8  # at 8 half of FER-2013's near pairs are coincidences, and nearly every pair has to be compared

_BLOCK = 256  # images hashed at a time
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, np.uint8)


# --- fingerprints ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """The hashes of a split's images.

    Attributes:
        pixels: uint64 (N,), equal for equal pixels; two of 300,000 different images collide with probability 2e-9.
        perceptual: uint64 (N,), pHash: close (in bits) for alike images.
        blank: bool (N,), images of one colour: their pHash means nothing, so they are in no near pair.
    """

    pixels: np.ndarray
    perceptual: np.ndarray
    blank: np.ndarray


def fingerprints(split: PreparedSplit, workers: int | None = None) -> Fingerprints:
    """Hashes every image of a split, block by block, with a progress bar.

    Args:
        split: a prepared split.
        workers: threads (the slow parts release Python's lock); None is one per core.
    """
    hash_block = functools.partial(_hash_block, split)
    parts = []
    with (
        concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        tqdm(total=len(split), desc=f"hashing {split.name}", unit="image", disable=None) as bar,
    ):
        for part in pool.map(hash_block, range(0, len(split), _BLOCK)):
            parts.append(part)
            bar.update(len(part[0]))
    return Fingerprints(*map(np.concatenate, zip(*parts, strict=True)))


def _hash_block(split: PreparedSplit, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel hash, perceptual hash and blankness of the images from row ``start`` on."""
    # Not through the memory map: what an earlier block read would add up in memory.
    images = split.rows[start : start + _BLOCK]
    pixels = [hashlib.blake2b(image, digest_size=8).digest() for image in images]
    without_axis = images[..., 0] if images.shape[3] == 1 else images  # PIL's gray has no channel axis
    perceptual = [imagehash.phash(Image.fromarray(image)).hash for image in without_axis]
    return (
        np.frombuffer(b"".join(pixels), np.uint64),
        np.packbits(np.reshape(perceptual, (-1, 64)), axis=1).view(np.uint64)[:, 0],
        np.array([_is_blank(image) for image in images]),
    )


def _is_blank(image: np.ndarray) -> bool:
    """Whether all pixels have one colour; the first row decides it for nearly all images."""
    return bool((image[0] == image[0, 0]).all() and (image == image[0, 0]).all())


# --- pairs ----------------------------------------------------------------------------------------------------------


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Finds all pairs of hashes that differ in at most ``distance`` bits, without comparing all with all.

    The 64 bits are distributed over ``distance + 1`` bands. Two hashes that differ in at most ``distance`` bits agree
    on a whole band, because one bit spoils one band. So only hashes that agree on a band are compared: they are
    neighbours once sorted by it.

    Args:
        hashes: uint64 (N,).
        distance: 0 or more.

    Yields:
        Rows (i, j) of pairs, two int64 (K,), in parts that fit in memory; each pair once, in one order or the other.
    """
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    # In turn: pHash sorts its bits by frequency, and the lowest are much alike in all faces.
    bands = [np.bitwise_or.reduce(bits[band :: distance + 1]) for band in range(distance + 1)]
    for number, band in enumerate(bands):
        keys = hashes & band
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.arange(len(keys))
        for step in range(1, len(keys)):
            # A row that differs from the one `step` places on differs from all further ones: it is done.
            first = first[: np.searchsorted(first, len(keys) - step)]
            first = first[keys[first] == keys[first + step]]
            if not len(first):
                break
            i, j = order[first], order[first + step]
            differing = hashes[i] ^ hashes[j]
            close = _bit_count(differing) <= distance
            for earlier in bands[:number]:  # which has found the pair already if they agree on it
                close &= differing & earlier != 0
            if close.any():
                yield i[close], j[close]


def _bit_count(values: np.ndarray) -> np.ndarray:
    """Number of ones in each uint64, uint8; NumPy has it from 2.0 on."""
    ones = _ONES[values.view(np.uint16)]
    return ones[0::4] + ones[1::4] + ones[2::4] + ones[3::4]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Duplicates between two splits, or inside one of them (both the same then).

    Attributes:
        repeated: bool (N,), the images of the first split that also appear in the second.
        pairs: pairs of an image of the first and one of the second split that are duplicates of each other.
        disagreeing: those pairs whose two labels differ.
    """

    repeated: np.ndarray
    pairs: int
    disagreeing: int


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found.

    Attributes:
        distance: largest difference of two near duplicates, bits; None when the search was for exact ones only.
        blank: split -> number of images of one colour. They can be exact duplicates, never near ones.
        exact: (split, split) -> images with the same pixels, for every ordered pair and each split with itself.
        near: the same for exact and near duplicates together; None when the search was for exact ones only.
    """

    distance: int | None
    blank: dict[str, int]
    exact: dict[tuple[str, str], Overlap]
    near: dict[tuple[str, str], Overlap] | None


def find_duplicates(
    splits: Sequence[PreparedSplit], distance: int | None = 4, workers: int | None = None
) -> Duplicates:
    """Compares every image of a data set's splits with every other.

    Args:
        splits: one or more splits of one data set.
        distance: bits in which the perceptual hashes of near duplicates differ at most, 0..`MAX_DISTANCE`; None looks
            for exact duplicates only. pHash sets half of its bits, so that every distance is even.
        workers: processes; None is one per core.

    Raises:
        UserError: the distance is out of its range.
    """
    if distance is not None and not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"--distance: expected 0 to {MAX_DISTANCE} bits, received {distance}")
    prints = [fingerprints(split, workers) for split in splits]
    # All that follows is about the U different images: many copies of one cost no more than one.
    _, rows, image_of = np.unique(
        np.concatenate([found.pixels for found in prints]), return_index=True, return_inverse=True
    )
    names = [split.meta["split"] for split in splits]
    lengths = np.cumsum([len(split) for split in splits])[:-1]
    images = dict(zip(names, np.split(image_of.ravel(), lengths), strict=True))  # ravel: NumPy 2.0 kept another shape
    counts = np.zeros((len(rows), len(splits), max(split.num_classes for split in splits)), np.int64)  # (U, S, C)
    for place, split in enumerate(splits):
        np.add.at(counts, (images[names[place]], place, split.labels), 1)

    tally = _Tally(names, images, counts)
    exact = tally.overlaps()
    near = None
    if distance is not None:
        perceptual = np.concatenate([found.perceptual for found in prints])[rows]
        visible = np.flatnonzero(~np.concatenate([found.blank for found in prints])[rows])
        for i, j in near_pairs(perceptual[visible], distance):
            tally.add(visible[i], visible[j])
        near = tally.overlaps()
    blank = {name: int(found.blank.sum()) for name, found in zip(names, prints, strict=True)}
    return Duplicates(distance, blank, exact, near)


class _Tally:
    """Counts repeated images, and pairs, from pairs of different images.

    Args:
        names: S splits.
        images: split -> int64 (N,), which of the U different images each of its rows shows.
        counts: int64 (U, S, C), how often each appears in a split with a label.
    """

    def __init__(self, names: Sequence[str], images: dict[str, np.ndarray], counts: np.ndarray):
        self._names, self._images, self._counts = names, images, counts
        totals = counts.sum(axis=2)
        # [u, t]: split t has a duplicate of image u, other than u itself.
        self._alike = np.zeros(totals.shape, bool)
        itself = np.diag(totals.sum(axis=0))  # is no pair
        self._pairs = np.einsum("us,ut->st", totals, totals) - itself  # ordered ones
        self._agreeing = np.einsum("usc,utc->st", counts, counts) - itself

    def add(self, i: np.ndarray, j: np.ndarray) -> None:
        """Takes in pairs of different images, int64 (K,) each."""
        left, right = self._counts[i], self._counts[j]
        in_left, in_right = left.sum(axis=2), right.sum(axis=2)
        np.logical_or.at(self._alike, i, in_right > 0)
        np.logical_or.at(self._alike, j, in_left > 0)
        for pairs, one in (
            (self._pairs, np.einsum("ks,kt->st", in_left, in_right)),
            (self._agreeing, np.einsum("ksc,ktc->st", left, right)),
        ):
            pairs += one + one.T

    def overlaps(self) -> dict[tuple[str, str], Overlap]:
        """What has been found so far."""
        totals = self._counts.sum(axis=2)
        found = {}
        for s, first in enumerate(self._names):
            for t, second in enumerate(self._names):
                repeated = self._alike[:, t] | (totals[:, t] > (s == t))
                ordered = 1 + (s == t)  # inside a split each pair was counted in both orders
                pairs = int(self._pairs[s, t]) // ordered
                agreeing = int(self._agreeing[s, t]) // ordered
                found[first, second] = Overlap(repeated[self._images[first]], pairs, pairs - agreeing)
        return found


# --- dropping -------------------------------------------------------------------------------------------------------


def drop_from_train(data_dir: str | Path, train: PreparedSplit, duplicates: Duplicates) -> dict[str, Any] | None:
    """Rewrites a data set's train without the images that also appear in its other splits, which stay as they are.

    The list ``dropped_duplicates`` in the options of `meta.json` gets one more entry: what was compared and how, the
    ``count`` and ``class_counts`` of the images dropped, and their ``rows`` in train as it was before. Preparing the
    data set again brings them back.

    Args:
        data_dir: folder of the prepared data sets.
        train: the split to rewrite.
        duplicates: what `find_duplicates` found in it and the others; near ones are dropped too if looked for.

    Returns:
        The new entry; None, and nothing is written, when no image appears again.

    Raises:
        UserError: no image would be left, train has changed since, or another process is writing the data set.
    """
    overlaps = duplicates.exact if duplicates.near is None else duplicates.near
    others = [second for first, second in overlaps if first == "train" and second != "train"]
    repeated = np.logical_or.reduce([overlaps["train", other].repeated for other in others])
    if not repeated.any():
        return None
    if repeated.all():
        raise UserError(
            f"{train.name}: all {len(train):,} images also appear in {' or '.join(others)}; nothing was dropped, "
            "prepare the data set again from its official release"
        )
    entry: dict[str, Any] = {
        "compared_with": others,
        "method": "pixels"
        if duplicates.distance is None
        else f"pixels, and pHash of imagehash {imagehash.__version__}",
        "distance": duplicates.distance,
        "count": int(repeated.sum()),
        "class_counts": np.bincount(train.labels[repeated], minlength=train.num_classes).tolist(),
        "rows": np.flatnonzero(repeated).tolist(),
    }
    meta, kept = train.meta, np.flatnonzero(~repeated)
    options = {**meta["options"], DROPPED: [*meta["options"].get(DROPPED, []), entry]}
    described = (meta["image_shape"], meta["class_names"], meta["sources"], options)
    writer = SplitWriter(data_dir, meta["dataset"], "train", len(kept), *described)
    # But not "preparation": preparing again is to bring back what was dropped, not to find it done already.
    writer.meta |= {name: meta[name] for name in meta.keys() - writer.meta.keys() - {"preparation"}}
    with writer:
        found = read_meta(writer.folder)
        if {**found, "digest": None} != {**meta, "digest": None}:  # the digest may have been added since
            raise UserError(f"{train.name}: was prepared again while it was compared; run the same command again")
        for row in tqdm(kept.tolist(), f"writing {train.name}", unit="image", disable=None):
            writer.add(train.rows[row], int(train.labels[row]))
        if train.votes is not None:
            writer.add_array("votes", train.votes[kept])
    return entry
