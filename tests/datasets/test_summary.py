"""Tests of datasets.shared.summary: counts per class beside the official ones."""

from __future__ import annotations

from conftest import write_split

import datasets
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.summary import official_lines, prepared_lines

RAFDB = datasets.get("rafdb")


def meta_of(split, counts, dataset="rafdb", **more):
    return {
        "dataset": dataset,
        "split": split,
        "class_names": list(CLASS_NAMES[: len(counts)]),
        "class_counts": list(counts),
        "num_images": sum(counts),
        "options": {},
        **more,
    }


def test_what_was_held_out_dropped_or_skipped_is_counted_where_it_belongs():
    """RAF-DB's training part is 2524 4772 1982 1290 281 717 705, its test part 680 1185 478 329 74 160 162."""
    val = [252, 477, 198, 129, 28, 72, 70]  # one Anger is missing
    train_dropped = [2270, 4295, 1784, 1161, 253, 645, 633]  # two Neutral and one Anger were dropped
    drop = {"dropped_duplicates": [{"class_counts": [2, 0, 0, 0, 0, 0, 0]}, {"class_counts": [0, 0, 0, 0, 0, 0, 1]}]}
    skipped = [{"name": "train_1.jpg", "reason": "cut off"}]
    metas = {
        "train": meta_of("train", train_dropped, options=drop, skipped=skipped),
        "val": meta_of("val", val),
        "test": meta_of("test", [680, 1185, 478, 329, 74, 160, 162]),
    }
    train, test = official_lines(RAFDB, metas)
    assert train.startswith("train + val: differs") and "Neutral" not in train
    assert "Anger 704 instead of 705" in train and "all 12,270 instead of 12,271" in train
    assert "3 dropped" in train and train.endswith(": 1"), "one could not be read"
    assert test == "test: as in the official release, 3,068 images"
    del metas["test"]
    assert official_lines(RAFDB, metas)[1] == "test: not prepared (3,068 images in the official release)"


def test_affectnet_is_compared_with_the_release_it_came_from():
    for form, num_classes, total in (
        ("2021", 8, "3,999"),
        ("first", 8, "4,000"),
        ("first", 7, "3,500"),
    ):
        counts = [500] * 7 + [499 if form == "2021" else 500]
        metas = {"test": meta_of("test", counts[:num_classes], "affectnet", options={"form": form})}
        assert (
            official_lines(datasets.get("affectnet"), metas)[1] == f"test: as in the official release, {total} images"
        )


def test_a_preparation_reports_what_was_left_out_and_what_stays(tmp_path):
    write_split(tmp_path, [0], split="test", dataset="rafdb")
    options = {"left_out": {"train": {"contempt": 2}, "test": {}}, "pictures_without_annotation": 3}
    text = "\n".join(prepared_lines(RAFDB, str(tmp_path), {"train": meta_of("train", [3, 1], options=options)}))
    assert f"test: {tmp_path}/rafdb/test was prepared earlier" in text and "val was prepared" not in text
    assert "train: left out 2 contempt" in text and "test: left out" not in text
    assert "3 images without an annotation" in text
    assert f"4 images in {tmp_path}/rafdb/train" in text
