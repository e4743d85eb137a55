"""Lists of suspects: lines, control, summary, second opinion; out-of-fold probabilities; the command."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import write_split

import test as test_module
from config import DatasetName
from data_helper import open_split
from datasets import CLASS_NAMES
from files import UserError
from labels import suspects
from labels.confident_learning import Suspects
from labels.probabilities import out_of_fold_probabilities, split_probabilities
from labels.second_labels import SecondLabels
from model_files import model_file
from training.left_out import folds_of, kept_rows

LABELS = np.arange(70) % 7
IMAGES = np.random.default_rng(4).integers(0, 256, (70, 24, 24, 1), np.uint8)


@pytest.fixture
def split(tmp_path):
    write_split(tmp_path, LABELS, images=IMAGES, shape=(24, 24, 1), dataset="fer2013")
    return open_split(tmp_path, "fer2013", "train")


@pytest.fixture
def probabilities():
    """Sure of every label, but of rows 3, 10 and 20."""
    table = np.full((70, 7), 0.05) + 0.65 * np.eye(7)[LABELS]
    for row, code in ((3, 0), (10, 1), (20, 2)):
        table[row] = 0.01 + 0.9 * np.eye(7)[code] + 0.03 * np.eye(7)[LABELS[row]]
    return table


def found_of(probabilities, rows):
    suggested = probabilities[rows].argmax(axis=1)
    scores = [probabilities[row, LABELS[row]] - probabilities[row].max() for row in rows]
    return Suspects(np.array(rows), suggested, np.array(scores))


def lines_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the report


def test_a_list_names_label_suggestion_and_probabilities_and_a_training_takes_it(split, probabilities, tmp_path):
    summary = suspects.write_report(tmp_path / "out", split, probabilities, found_of(probabilities, [20, 3, 10]))
    lines = lines_of(tmp_path / "out" / suspects.LIST)
    assert [(line["row"], line["label"], line["suggested"]) for line in lines] == [
        ("20", "Anger", "Sad"),
        ("3", "Surprise", "Neutral"),
        ("10", "Surprise", "Happy"),
    ]
    for line in lines:
        values = [float(line[f"p {name}"]) for name in CLASS_NAMES[:7]]
        assert values == pytest.approx(probabilities[int(line["row"])], abs=1e-4)
        assert float(line["score"]) == pytest.approx(0.04 - 0.91, abs=1e-4)
    kept = kept_rows(split, str(tmp_path / "out" / suspects.LIST), None)
    assert kept.tolist() == [row for row in range(70) if row not in (3, 10, 20)]
    assert summary == json.loads((tmp_path / "out" / suspects.SUMMARY).read_text())
    assert (summary["suspects"], summary["n"], summary["digest"]) == (3, 70, split.digest)
    assert summary["accuracy"] == 67 / 70 and "95.71%" in suspects.format_table(summary)
    pairs = np.zeros((7, 7), int)
    pairs[6, 2] = pairs[3, 0] = pairs[3, 1] = 1
    assert summary["pairs"] == pairs.tolist()
    assert (tmp_path / "out" / suspects.GRID).read_bytes().startswith(b"\x89PNG")


def test_the_control_has_as_many_images_of_each_class_and_no_suspect(split, probabilities, tmp_path):
    rows = [*range(21), 27, 34, 41, 48, 55]  # 3 of the 10 images of each class, 8 of the last: 2 are left of that
    suspects.write_report(tmp_path, split, probabilities, found_of(probabilities, rows), seed=3)
    control = [int(line["row"]) for line in lines_of(tmp_path / suspects.CONTROL)]
    assert not set(control) & set(rows) and len(set(control)) == len(control)
    wanted = np.minimum(np.bincount(LABELS[rows]), 10 - np.bincount(LABELS[rows]))
    assert np.bincount(LABELS[control], minlength=7).tolist() == wanted.tolist()
    assert suspects.control_rows(split, np.array(rows), 3).tolist() == control
    assert suspects.control_rows(split, np.array(rows), 4).tolist() != control
    assert len(kept_rows(split, str(tmp_path / suspects.CONTROL), None)) == 70 - len(control)


def test_a_list_of_too_many_doubts_the_networks(split, probabilities, tmp_path):
    for count, noted in ((21, False), (22, True)):
        found = found_of(1 - probabilities, list(range(count)))
        text = suspects.format_table(suspects.write_report(tmp_path, split, 1 - probabilities, found))
        assert (suspects._TOO_MANY in text) == noted


def test_no_suspects_give_empty_lists_and_a_table(split, probabilities, tmp_path):
    none = Suspects(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    second = SecondLabels("ferplus", LABELS, {})
    summary = suspects.write_report(tmp_path, split, probabilities, none, second)
    assert (summary["suspects"], summary["also"]["suspects_differ"]) == (0, None)
    assert lines_of(tmp_path / suspects.LIST) == lines_of(tmp_path / suspects.CONTROL) == []
    assert "0 of 70 labels" in suspects.format_table(summary)


def test_a_second_opinion_is_counted(split, probabilities, tmp_path):
    """Of four suspects the second label is the suggested one, the split's own, a third one, and missing."""
    found = found_of(probabilities, [20, 3, 10, 5])
    second = LABELS.copy()
    second[20], second[10], second[40], second[41], second[5] = 2, 5, (LABELS[40] + 1) % 7, -1, -1
    summary = suspects.write_report(tmp_path, split, probabilities, found, SecondLabels("ferplus", second, {}))
    also = summary["also"]
    shares = {"differ": 3 / 68, "suspects_differ": 2 / 3, "suggested": 1 / 3, "found": 2 / 3}
    assert (also["n"], also["suspects"]) == (68, 3)
    assert {name: also[name] for name in shares} == pytest.approx(shares)
    text = suspects.format_table(summary)
    assert max(map(len, text.splitlines())) <= 80
    for number in ("68 of the images", "4.41%", "66.67%", "33.33%"):
        assert number in text


# --- probabilities


def folded(tiny_weights, tmp_path, fold, scale, dataset="fer2013/train"):
    """A model file as train.py --fold leaves it, whose logits are ``scale`` times those of the tiny model."""
    network, info = model_file.load_model(tiny_weights)
    head = network.get_layer("logits")
    head.set_weights([scale * array for array in head.get_weights()])
    path = tmp_path / f"{fold.replace('/', '-')}-{scale}.weights.h5"
    metrics = {**info.metrics, "fold": fold}
    model_file.save_model(path, network, dataclasses.replace(info, dataset=dataset, metrics=metrics))
    return str(path)


@pytest.mark.slow
def test_each_image_is_predicted_by_the_network_that_has_not_seen_it(split, tiny_weights, tmp_path):
    files = [folded(tiny_weights, tmp_path, f"{number}/3", number) for number in (2, 3, 1)]
    found = out_of_fold_probabilities(files, split, batch_size=16)
    alone = {int(file.split("-")[-1][0]): split_probabilities(split, [file], None, False) for file in files}
    folds = folds_of(split, 3)
    expected = np.array([alone[fold][row] for row, fold in enumerate(folds)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(folds) == {1, 2, 3} and abs(alone[1] - alone[3]).max() > 1e-3


@pytest.mark.slow
def test_other_files_than_one_of_each_fold_are_refused(split, tiny_weights, tmp_path):
    first = folded(tiny_weights, tmp_path, "1/2", 1)
    others = {
        "fold 1/2 again": first,
        "fold 2/3": folded(tiny_weights, tmp_path, "2/3", 1),
        "synthetic/train, no fold": str(tiny_weights),
        "of other/train": folded(tiny_weights, tmp_path, "2/2", 1, "other/train"),
    }
    for facts, other in others.items():
        with pytest.raises(UserError, match=rf"--fold I/2 on fer2013/train.*{facts}"):
            out_of_fold_probabilities([first, other], split)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (((), None, False), "received none"),
        ((("a.h5",), "b.npz", False), "received both"),
        ((("a.h5",), None, True), "--folds.*received 1"),
        (((), "b.npz", True), "--folds.*received 0"),
    ],
)
def test_probabilities_come_from_one_source(split, given, facts):
    with pytest.raises(UserError, match=facts):
        split_probabilities(split, *given)


# --- the command


@pytest.mark.slow
def test_the_command_lists_the_suspects_of_a_file_of_teach(split, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cleanlab")
    rng = np.random.default_rng(0)
    table = np.full((70, 7), 0.02) + 0.86 * np.eye(7)[LABELS]
    wrong = rng.choice(70, 5, replace=False)
    for row in wrong:
        table[row] = np.roll(table[row], 2)
    npz = {"probabilities": table.astype(np.float32), "digest": split.digest, "class_names": list(CLASS_NAMES[:7])}
    np.savez(tmp_path / "teacher.npz", **npz)
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path, (LABELS + 2) % 7, images=IMAGES, shape=(24, 24, 1), dataset="ferplus")
    settings = test_module.SuspectsConfig(probabilities="teacher.npz", data_dir=str(tmp_path), also=DatasetName.ferplus)
    summary = test_module.suspects(settings)
    shown = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    listed = {int(line["row"]) for line in lines_of(folder / suspects.LIST)}
    assert listed == set(wrong.tolist()) and summary["also"]["suggested"] == 1
    assert "5 of 70 labels" in shown and "--fold" in shown and f"wrote runs/{folder.name}/" in shown
    # The list of other probabilities goes elsewhere; the same one to the same place.
    np.savez(tmp_path / "other.npz", **{**npz, "probabilities": np.roll(table, 1, axis=1).astype(np.float32)})
    for name in ("other.npz", "teacher.npz"):
        test_module.suspects(dataclasses.replace(settings, probabilities=name))
    assert len(list((tmp_path / "runs").iterdir())) == 2
