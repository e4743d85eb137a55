"""The labels that another prepared data set has for the same images: FER+ of FER-2013, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_split

from data_helper import open_split
from datasets import CLASS_NAMES
from datasets.fer2013 import PrepareFer2013Config, prepare_fer2013
from datasets.ferplus import PrepareFerplusConfig, prepare_ferplus
from files import UserError
from labels.second_labels import find_second_labels

IMAGES = np.random.default_rng(2).integers(0, 256, (12, 8, 8, 1), np.uint8)


def split_of(tmp_path, rows, labels, dataset="fer2013", split="val", num_classes=7):
    shown = {"images": IMAGES[list(rows)], "shape": (8, 8, 1), "num_classes": num_classes}
    write_split(tmp_path, labels, dataset=dataset, split=split, **shown)
    return open_split(tmp_path, dataset, split)


def test_images_are_matched_by_their_pixels_and_classes_by_their_names(tmp_path):
    split = split_of(tmp_path, range(8), [0, 1, 2, 3, 4, 5, 6, 0])
    # In two splits, in another order; 2 twice with two labels, 3 twice with one, 4 as Contempt; 6 and 7 are missing.
    split_of(tmp_path, [5, 4, 3, 3, 11], [1, 7, 2, 2, 0], "ferplus", "train", 8)
    split_of(tmp_path, [2, 1, 0, 2], [0, 1, 6, 1], "ferplus", "test", 8)
    second = find_second_labels(str(tmp_path), "ferplus", split)
    assert second.labels.tolist() == [6, 1, -1, 2, -1, 1, -1, -1]
    assert second.usable.tolist() == [label >= 0 for label in second.labels]
    assert sorted(second.left_out.values()) == [1, 1, 2]
    reasons = {count: reason for reason, count in second.left_out.items()}
    assert "not in ferplus" in reasons[2]
    assert {reason for reason, count in second.left_out.items() if count == 1} == {
        "with two labels in ferplus",
        "Contempt in ferplus, which is no class of fer2013",
    }


def test_copies_in_the_split_have_the_same_second_label(tmp_path):
    split = split_of(tmp_path, [0, 1, 0], [0, 1, 2])
    split_of(tmp_path, [0], [3], "ferplus")
    assert find_second_labels(str(tmp_path), "ferplus", split).labels.tolist() == [3, -1, 3]


def test_what_is_refused(tmp_path):
    split = split_of(tmp_path, range(3), [0, 1, 2])
    with pytest.raises(UserError, match=r"--also fer2013: .*another data set"):
        find_second_labels(str(tmp_path), "fer2013", split)
    with pytest.raises(UserError, match=r"ferplus/train is not prepared .*prepare_data\.py ferplus"):
        find_second_labels(str(tmp_path), "ferplus", split)
    split_of(tmp_path, range(6, 9), [0, 1, 2], "ferplus")
    with pytest.raises(UserError, match=r"--also ferplus: .*fer2013/val.*found none.*JPEG"):
        find_second_labels(str(tmp_path), "ferplus", split)


def test_ferplus_is_matched_with_fer2013(tmp_path):
    """From the two CSV files, through both readers: the majority of the votes of each row, where it has one."""
    rng = np.random.default_rng(5)
    codes = {"0": 6, "1": 5, "2": 4, "3": 1, "4": 2, "5": 3, "6": 0}  # FER-2013's to ours
    columns = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
    names = {name: name.capitalize() for name in columns} | {"happiness": "Happy", "sadness": "Sad"}
    pixels, ballots, expected = ["emotion,pixels,Usage"], [f"Usage,Image name,{','.join(columns)}"], []
    for usage in ("Training", "PublicTest", "PrivateTest"):
        for row in range(14):
            image = " ".join(map(str, rng.integers(0, 256, 48 * 48)))
            winner = columns[row % 10]
            votes = {column: 0 for column in columns} | {winner: 10 if row < 10 else 5}
            votes["fear" if winner != "fear" else "neutral"] += 0 if row < 10 else 5  # a tie: no majority
            pixels.append(f"{row % 7},{image},{usage}")
            ballots.append(f"{usage},fer{row:07}.png,{','.join(str(votes[column]) for column in columns)}")
            if usage == "PublicTest":
                usable = row < 10 and winner not in ("contempt", "unknown", "NF")
                expected.append((codes[str(row % 7)], CLASS_NAMES.index(names[winner]) if usable else -1))
    (tmp_path / "fer2013.csv").write_text("\n".join(pixels))
    (tmp_path / "fer2013new.csv").write_text("\n".join(ballots))
    places = {"source": str(tmp_path), "data_dir": str(tmp_path)}
    prepare_fer2013(PrepareFer2013Config(**places))
    prepare_ferplus(PrepareFerplusConfig(**places))
    split = open_split(tmp_path, "fer2013", "val")
    second = find_second_labels(str(tmp_path), "ferplus", split)
    assert list(zip(split.labels.tolist(), second.labels.tolist(), strict=True)) == expected
    assert sum(second.left_out.values()) == 7
