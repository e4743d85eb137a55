"""Tests of datasets.shared.duplicates: exactly the repeated images are found, and only they are dropped from train."""

from __future__ import annotations

import itertools
import json

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from data_helper import open_split
from datasets.shared import duplicates
from datasets.shared.duplicates import drop_from_train, find_duplicates, fingerprints, near_pairs
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.split_writer import SplitWriter
from files import UserError

SIDE = 48
PREPARATION = {"sha256": "0", "pictures": 9, "splits": ["train"]}


def landscape(seed, channels=1):
    """An image unlike any of another seed: a smooth random landscape."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), dtype=np.uint8)
    return cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).reshape(SIDE, SIDE, channels)


def brighter(image):
    return (image * 0.7 + 60).astype(np.uint8)


def as_jpeg(image):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], -1).reshape(image.shape)


def cropped(image):
    """One pixel less on the left, stretched to the old size."""
    return cv2.resize(image[:, 1:], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).reshape(image.shape)


def blank(value):
    return np.full((SIDE, SIDE, 1), value, np.uint8)


def prepare(data_dir, **splits):
    """Writes and opens splits given as lists of (image, label)."""
    for split, examples in splits.items():
        shape = examples[0][0].shape
        with SplitWriter(data_dir, "set", split, len(examples), shape, CLASS_NAMES[:7], [], {"form": "test"}) as writer:
            writer.meta |= {"skipped": [{"name": "a.jpg", "reason": "cut off"}], "preparation": PREPARATION}
            for image, label in examples:
                writer.add(image, label)
    return [open_split(data_dir, "set", split) for split in splits]


def rows(overlap):
    return np.flatnonzero(overlap.repeated).tolist()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- fingerprints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_fingerprints_are_the_librarys_in_the_order_of_the_rows(tmp_path, monkeypatch, channels):
    """In blocks of 4, the last one short, on several threads."""
    monkeypatch.setattr(duplicates, "_BLOCK", 4)
    images = [landscape(seed, channels) for seed in range(10)]
    (split,) = prepare(tmp_path, train=[(image, 0) for image in images])
    found = fingerprints(split, workers=3)
    for row, image in enumerate(images):
        pil = Image.fromarray(image[..., 0] if channels == 1 else image)
        bits = [bool(int(found.perceptual[row]) >> bit & 1) for bit in range(64)]
        assert sum(bits) == imagehash.phash(pil).hash.sum()
        for other, expected in enumerate(images[:row]):
            pil_other = Image.fromarray(expected[..., 0] if channels == 1 else expected)
            differing = bin(int(found.perceptual[row] ^ found.perceptual[other])).count("1")
            assert differing == imagehash.phash(pil) - imagehash.phash(pil_other)
    assert len(set(found.pixels.tolist())) == 10
    assert not found.blank.any()


def test_blank_is_one_colour_everywhere(tmp_path):
    """A red image is blank although its channels differ; one odd pixel, wherever it is, makes an image not blank."""
    red = np.zeros((SIDE, SIDE, 3), np.uint8)
    red[..., 0] = 200
    images = [red, np.full_like(red, 7)]
    for place in ((0, 1), (1, 0), (SIDE - 1, SIDE - 1)):
        images.append(red.copy())
        images[-1][place][2] = 1
    (split,) = prepare(tmp_path, train=[(image, 0) for image in images])
    assert fingerprints(split).blank.tolist() == [True, True, False, False, False]


# --- pairs ----------------------------------------------------------------------------------------------------------


def clustered_hashes(seed):
    """120 hashes around 12 centres, 0 to 9 bits away from them, some of them equal."""
    rng = np.random.default_rng(seed)
    hashes = []
    for centre in rng.integers(0, 2**63, 12):
        for _ in range(10):
            flips = rng.choice(64, rng.integers(0, 10), replace=False)
            hashes.append(int(centre) ^ sum(1 << int(bit) for bit in flips))
    return np.array(hashes, np.uint64)


def test_near_pairs_are_those_of_comparing_all_with_all():
    for distance in (
        0,
        3,
        8,
    ):
        hashes = clustered_hashes(distance)
        expected = {
            (a, b)
            for a, b in itertools.combinations(range(len(hashes)), 2)
            if bin(int(hashes[a]) ^ int(hashes[b])).count("1") <= distance
        }
        found = [(int(a), int(b)) for i, j in near_pairs(hashes, distance) for a, b in zip(i, j, strict=True)]
        assert len(found) == len(expected) > 0, "each pair once"
        assert {(min(pair), max(pair)) for pair in found} == expected


def test_without_two_hashes_there_is_no_pair():
    assert [list(near_pairs(np.zeros(count, np.uint64), 4)) for count in (0, 1)] == [[], []]


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_exact_duplicates_inside_and_across_splits(tmp_path):
    """Three times in train is 3 images and 3 pairs; the label of train's row 5 differs from val's."""
    a, b, c, d, e = map(landscape, range(5))
    train = [(a, 0), (b, 1), (a, 0), (c, 2), (a, 3), (d, 4)]
    val = [(e, 0), (d, 5), (a, 0)]
    found = find_duplicates(prepare(tmp_path, train=train, val=val), None)
    assert found.near is None and found.blank == {"train": 0, "val": 0}
    assert list(found.exact) == [("train", "train"), ("train", "val"), ("val", "train"), ("val", "val")]
    inside, across = found.exact["train", "train"], found.exact["train", "val"]
    assert (rows(inside), inside.pairs, inside.disagreeing) == ([0, 2, 4], 3, 2)
    assert (rows(across), across.pairs, across.disagreeing) == ([0, 2, 4, 5], 4, 2)
    back = found.exact["val", "train"]
    assert (rows(back), back.pairs, back.disagreeing) == ([1, 2], 4, 2)
    assert rows(found.exact["val", "val"]) == []


@pytest.mark.parametrize("change", [brighter, as_jpeg, cropped])
def test_a_changed_image_is_a_near_duplicate(tmp_path, change):
    images = [landscape(seed) for seed in range(20)]
    val = [(change(image), 0) for image in images[:5]]
    splits = prepare(tmp_path, train=[(image, 1) for image in images], val=val)
    found = find_duplicates(splits, 8)
    assert found.exact["train", "val"].pairs == 0
    across = found.near["train", "val"]
    assert (rows(across), across.pairs, across.disagreeing) == ([0, 1, 2, 3, 4], 5, 5)
    assert rows(found.near["train", "train"]) == [], "images of different seeds are none"


def test_the_counts_are_those_of_comparing_all_with_all(tmp_path):
    """Three splits with copies, changed copies, blank images and random labels."""
    rng = np.random.default_rng(0)
    changes = (np.copy, np.copy, brighter, as_jpeg, cropped)
    pool = (
        [changes[rng.integers(5)](landscape(int(rng.integers(8)))) for _ in range(40)] + [blank(0)] * 3 + [blank(9)] * 2
    )
    examples = [(pool[place], int(rng.integers(3))) for place in rng.permutation(len(pool))]
    parts = {"train": examples[:25], "val": examples[25:35], "test": examples[35:]}
    found = find_duplicates(prepare(tmp_path, **parts), 4)

    def alike(one, other, near):
        if np.array_equal(one, other):
            return True
        if not near or one.min() == one.max() or other.min() == other.max():
            return False
        first, second = (imagehash.phash(Image.fromarray(image[..., 0])) for image in (one, other))
        return first - second <= 4

    for kind, overlaps in (("exact", found.exact), ("near", found.near)):
        for first, second in itertools.product(parts, repeat=2):
            repeated, pairs, disagreeing = set(), 0, 0
            for i, (image, label) in enumerate(parts[first]):
                for j, (other, other_label) in enumerate(parts[second]):
                    if (first != second or i != j) and alike(image, other, kind == "near"):
                        repeated.add(i)
                        if first != second or i < j:
                            pairs += 1
                            disagreeing += label != other_label
            overlap = overlaps[first, second]
            assert (set(rows(overlap)), overlap.pairs, overlap.disagreeing) == (repeated, pairs, disagreeing)
    assert found.near["train", "val"].pairs > found.exact["train", "val"].pairs > 0


def test_blank_images_are_exact_duplicates_of_their_like_only(tmp_path):
    """The hashes of all blank images but black ones are the same."""
    splits = prepare(
        tmp_path, train=[(blank(0), 0), (blank(80), 0), (landscape(0), 0)], val=[(blank(0), 0), (blank(90), 1)]
    )
    found = find_duplicates(splits, 8)
    assert found.blank == {"train": 2, "val": 2}
    for overlaps in (found.exact, found.near):
        assert rows(overlaps["train", "val"]) == [0]
        assert rows(overlaps["val", "train"]) == [0]
        assert rows(overlaps["train", "train"]) == []


def test_splits_of_seven_and_eight_classes_compare(tmp_path):
    (train,) = prepare(tmp_path, train=[(landscape(0), 6)])
    with SplitWriter(tmp_path, "set", "val", 1, (SIDE, SIDE, 1), CLASS_NAMES, [], {}) as writer:
        writer.add(landscape(0), 7)
    found = find_duplicates([train, open_split(tmp_path, "set", "val")], None)
    assert (found.exact["train", "val"].pairs, found.exact["train", "val"].disagreeing) == (1, 1)


@pytest.mark.parametrize("distance", [-1, 9])
def test_a_distance_out_of_range_is_refused(tmp_path, distance):
    with pytest.raises(UserError, match=f"--distance: expected 0 to 8 bits, received {distance}"):
        find_duplicates(prepare(tmp_path, train=[(landscape(0), 0)]), distance)


# --- dropping -------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(tmp_path):
    """Train whose rows 1 (exactly), 2 (twice, of row 1) and 4 (nearly) stand in val and test; 0, 3, 5, 6 do not."""
    images = [landscape(seed) for seed in range(7)]
    train = [
        (images[0], 5),
        (images[1], 1),
        (images[1], 1),
        (images[3], 4),
        (images[4], 3),
        (images[5], 2),
        (images[6], 0),
    ]
    val = [(images[1], 1), (landscape(20), 0)]
    test = [(landscape(21), 0), (brighter(images[4]), 3)]
    return tmp_path, prepare(tmp_path, train=train, val=val, test=test)


def test_dropping_keeps_the_order_and_records_what_it_did(leaking):
    data_dir, splits = leaking
    others = {name: content(data_dir / "set" / name) for name in ("val", "test")}
    before = splits[0].images[:], splits[0].labels
    drop_from_train(data_dir, splits[0], find_duplicates(splits, 4))
    train = open_split(data_dir, "set", "train")
    kept = [0, 3, 5, 6]
    assert np.array_equal(train.images, before[0][kept])
    assert train.labels.tolist() == [5, 4, 2, 0]
    assert train.meta["class_counts"] == [1, 0, 1, 0, 1, 1, 0]
    assert train.meta["options"] == {
        "form": "test",
        "dropped_duplicates": [
            {
                "compared_with": ["val", "test"],
                "method": f"pixels, and pHash of imagehash {imagehash.__version__}",
                "distance": 4,
                "count": 3,
                "class_counts": [0, 2, 0, 1, 0, 0, 0],
                "rows": [1, 2, 4],
            }
        ],
    }
    written = train.meta.pop("digest")
    assert written == train.digest != splits[0].digest
    assert train.meta["skipped"] == splits[0].meta["skipped"]
    assert "preparation" not in train.meta, "it no longer is what that preparation made"
    assert {name: content(data_dir / "set" / name) for name in ("val", "test")} == others


def test_what_stands_beside_the_labels_loses_the_same_rows(leaking):
    data_dir, splits = leaking
    train = splits[0]
    share = 0.6 + 0.05 * np.arange(len(train), dtype=np.float32)[:, None]  # of the label; row by row another
    of_label = np.eye(train.num_classes, dtype=np.float32)[train.labels]
    votes = of_label * share + np.roll(of_label, 1, axis=1) * (1 - share)
    np.save(data_dir / "set/train/votes.npy", votes)
    meta = {name: value for name, value in train.meta.items() if name != "digest"}
    (data_dir / "set/train/meta.json").write_text(json.dumps(meta))
    splits[0] = open_split(data_dir, "set", "train")
    drop_from_train(data_dir, splits[0], find_duplicates(splits, 4))
    assert np.load(data_dir / "set/train/votes.npy").tolist() == votes[[0, 3, 5, 6]].tolist()


def test_dropping_again_finds_nothing_and_writes_nothing(leaking):
    data_dir, splits = leaking
    drop_from_train(data_dir, splits[0], find_duplicates(splits, 4))
    after = content(data_dir / "set/train")
    splits[0] = open_split(data_dir, "set", "train")
    assert drop_from_train(data_dir, splits[0], find_duplicates(splits, 4)) is None
    assert content(data_dir / "set/train") == after


def test_what_a_later_search_finds_is_recorded_after_the_earlier(leaking):
    """Exact first: rows 1 and 2; then the near one, row 4 of the first train and 2 of what was left."""
    data_dir, splits = leaking
    exact = drop_from_train(data_dir, splits[0], find_duplicates(splits, None))
    assert (exact["rows"], exact["method"], exact["distance"]) == ([1, 2], "pixels", None)
    splits[0] = open_split(data_dir, "set", "train")
    near = drop_from_train(data_dir, splits[0], find_duplicates(splits, 4))
    assert (near["rows"], near["count"], near["class_counts"]) == ([2], 1, [0, 0, 0, 1, 0, 0, 0])
    meta = json.loads((data_dir / "set/train/meta.json").read_text())
    assert meta["options"]["dropped_duplicates"] == [exact, near]
    assert meta["num_images"] == 4


def test_an_interrupted_drop_leaves_train_as_it_was(leaking, monkeypatch):
    data_dir, splits = leaking
    found, before = find_duplicates(splits, 4), content(data_dir / "set/train")
    add, added = SplitWriter.add, []

    def failing(self, image, label):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(label)
        add(self, image, label)

    monkeypatch.setattr(SplitWriter, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        drop_from_train(data_dir, splits[0], found)
    assert added == [5, 4], "it was under way"
    assert content(data_dir / "set/train") == before
    assert sorted(path.name for path in (data_dir / "set").iterdir() if path.is_dir()) == ["test", "train", "val"]


def test_a_train_prepared_again_meanwhile_is_not_overwritten(leaking):
    data_dir, splits = leaking
    found = find_duplicates(splits, 4)
    prepare(data_dir, train=[(landscape(30), 0)])
    before = content(data_dir / "set/train")
    with pytest.raises(UserError, match="set/train: was prepared again while it was compared"):
        drop_from_train(data_dir, splits[0], found)
    assert content(data_dir / "set/train") == before


def test_a_train_of_duplicates_alone_is_not_emptied(tmp_path):
    splits = prepare(tmp_path, train=[(landscape(0), 0), (landscape(0), 1)], val=[(landscape(0), 0)])
    with pytest.raises(UserError, match=r"set/train: all 2 images .*in val; nothing was dropped"):
        drop_from_train(tmp_path, splits[0], find_duplicates(splits, 4))
    assert len(open_split(tmp_path, "set", "train")) == 2
