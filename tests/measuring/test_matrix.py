"""The matrix: shared classes, restricted probabilities and its cells, compared with nested loops."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import metrics
from data_helper import PreparedSplit
from files import UserError
from measuring import matrix

EIGHT = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")


def split_of(dataset, class_names, labels, split="val"):
    """Every image is filled with its row number."""
    labels = np.array(labels, np.int64)
    images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 2, 2, 1))
    meta = {"dataset": dataset, "split": split, "class_names": list(class_names), "digest": f"{len(labels):064d}"}
    return PreparedSplit(images, labels, meta)


def model_of(weights, class_names, trained_on, selected_on="val", seed=0):
    """Probabilities that depend on the row number in the image and on the seed."""
    table = np.random.default_rng(seed).dirichlet(np.ones(len(class_names)), 256).astype(np.float32)
    return matrix.Model(
        weights, f"{seed:064x}", class_names, trained_on, selected_on, lambda: lambda images: table[images[:, 0, 0, 0]]
    )


@pytest.fixture
def models():
    return [
        model_of("runs/a/best.weights.h5", EIGHT, "affectnet/train", seed=1),
        model_of("runs/b/best.weights.h5", ("Sad", "Happy", "Neutral", "Anger"), None, seed=2),
    ]


@pytest.fixture
def splits():
    rng = np.random.default_rng(0)
    return [
        split_of("affectnet", EIGHT, rng.integers(0, 8, 60)),
        split_of("rafdb", ("Anger", "Neutral", "Sad", "Happy", "Surprise"), rng.integers(0, 5, 50)),
    ]


def test_every_cell_is_measured_on_the_shared_classes(models, splits):
    found = matrix.measure(models, splits, "none", seed=3)
    shared = ("Neutral", "Happy", "Sad", "Anger")  # in the order of the first data set
    assert found["class_names"] == list(shared)
    cells = iter(found["cells"])
    for model in models:
        for split in splits:
            labels, rows = [], []
            everything = model.load()(split.images)
            for row, label in enumerate(split.labels):
                name = split.class_names[label]
                if name in shared:
                    kept = [float(everything[row, model.class_names.index(each)]) for each in shared]
                    labels.append(shared.index(name))
                    rows.append([value / sum(kept) for value in kept])
            expected = metrics.score(np.array(labels), np.array(rows), shared, seed=3)
            cell = next(cells)
            assert cell["dataset"] == split.meta["dataset"] and cell["n"] == len(labels) < len(split)
            for name in ("accuracy", "mean_class_recall", "macro_f1", "ece", "intervals", "confusion_matrix"):
                assert cell[name] == pytest.approx(expected[name]) if name == "ece" else cell[name] == expected[name]
    first, second = found["datasets"]
    assert (first["n"] + first["left_out"], second["n"] + second["left_out"]) == (60, 50)
    assert [cell["same_dataset"] for cell in found["cells"]] == [True, False, False, False]
    assert [cell["selected_here"] for cell in found["cells"]] == [True, False, False, False]
    assert json.loads(json.dumps(found)) == found


def test_other_splits_did_not_select_the_epoch(models):
    found = matrix.measure(models[:1], [split_of("affectnet", EIGHT, range(8), "test")], "flip")
    assert found["cells"][0]["same_dataset"] and not found["cells"][0]["selected_here"]
    assert found["class_names"] == list(EIGHT) and "--views flip" in matrix.format_table(found)


def test_probabilities_are_given_that_it_is_a_shared_class():
    probabilities = np.array([[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0], [0.5, 0, 0.5, 0]], np.float32)
    found = matrix.restricted(probabilities, ("a", "b", "c", "d"), ("d", "a"))
    np.testing.assert_allclose(found, [[0.8, 0.2], [0.5, 0.5], [0, 1]])


def test_one_network_is_in_memory_at_a_time(models, splits):
    events = []

    def watched(model):
        def load():
            events.append(("load", model.weights))
            predict = model.load()
            return lambda images: events.append(("predict", len(images))) or predict(images)

        return matrix.Model(*(getattr(model, name) for name in FIELDS), load)

    matrix.measure([watched(model) for model in models], splits, "none")
    assert events == [
        *(("load", "runs/a/best.weights.h5"), ("predict", 60), ("predict", 50)),
        *(("load", "runs/b/best.weights.h5"), ("predict", 60), ("predict", 50)),
    ]


FIELDS = ("weights", "sha256", "class_names", "trained_on", "selected_on")


def test_fewer_than_two_shared_classes_and_no_image_are_refused(models):
    other = split_of("folders", ("Happy", "Fear"), [0, 1])
    with pytest.raises(UserError, match=r"two classes or more .*found Happy \(.*folders/val: Happy, Fear\)"):
        matrix.measure(models, [other], "none")
    with pytest.raises(UserError, match=r"rafdb/val: expected images of Happy, Sad, found none"):
        matrix.measure(
            models, [split_of("folders", ("Happy", "Sad"), [0, 1]), split_of("rafdb", EIGHT, [4, 4])], "none"
        )


def test_the_table_says_what_is_left_out_and_who_chose(models, splits):
    found = matrix.measure(models, splits, "none")
    table = matrix.format_table(found)
    lines = table.splitlines()
    left_out = sum(EIGHT[label] not in found["class_names"] for label in splits[0].labels)
    assert lines[0] == "4 classes: Neutral, Happy, Sad, Anger"
    assert f"affectnet/val: the {left_out} images of Surprise, Fear, Disgust, Contempt are left out" in lines[1]
    assert lines[3].startswith("a/best: its probability of Surprise, Fear, Disgust, Contempt is left out")
    cell = found["cells"][0]
    low, high = cell["intervals"]["accuracy"]
    row = next(line for line in lines if line.startswith("a/best (affectnet/train)"))
    assert f"{100 * cell['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})*" in row and row.count("*") == 1
    assert "b/best (unknown)" in table and "* This split selected" in lines[-1]


def test_files_hold_every_cell(models, splits, tmp_path):
    found = matrix.measure(models, splits, "none")
    matrix.write(found, tmp_path)
    assert json.loads((tmp_path / "matrix.json").read_text()) == found
    with open(tmp_path / "matrix.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["weights"], row["dataset"]) for row in rows] == [
        (model.weights, split.meta["dataset"]) for model in models for split in splits
    ]
    for row, cell in zip(rows, found["cells"], strict=True):
        assert float(row["accuracy"]) == cell["accuracy"] and int(row["n"]) == cell["n"]
        assert [float(row[f"macro_f1_{end}"]) for end in ("low", "high")] == cell["intervals"]["macro_f1"]
    assert rows[2]["trained_on"] == "" and (tmp_path / "matrix.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a/best.weights.h5"], ["a/best"]),
        (["a/good.weights.h5", "a/last.weights.h5"], ["good", "last"]),
        (["0/ce/best.weights.h5", "1/ce/best.weights.h5", "hf://o/r/m.weights.h5"], ["0/ce/best", "1/ce/best", "m"]),
        (["best.weights.h5", "a/best.weights.h5"], ["best", "a/best"]),
        (["a/m.h5", "a/m.weights.h5"], ["a/m.h5", "a/m.weights.h5"]),
    ],
)
def test_names_tell_the_files_apart(paths, names):
    assert matrix.short_names(paths) == names


def test_the_folder_depends_on_models_data_views_and_seed(models, splits):
    plain = matrix.default_folder(models, splits, "val", "none", 0)
    assert plain.parent.name == "runs" and plain.name.startswith("matrix-2x2-val-")
    others = [
        matrix.default_folder(models[:1], splits, "val", "none", 0),
        matrix.default_folder(models, splits[1:], "val", "none", 0),
        matrix.default_folder(models, splits, "val", "flip", 0),
        matrix.default_folder(models, splits, "val", "none", 1),
    ]
    assert len({plain, *others}) == 5 and matrix.default_folder(models, splits, "val", "none", 0) == plain
