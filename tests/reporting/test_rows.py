"""Records of runs, compared with loops over the files of the runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from report_runs import CE, CLASSES, labels_of, make_row, make_two_rows, with_seeds, write_run

from files import UserError
from reporting.rows import (
    CORRELATIONS,
    RunFiles,
    check_same_images,
    correlation_record,
    recall_records,
    run_records,
    summary_record,
)


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    return make_two_rows(tmp_path_factory.mktemp("two_rows"))


def right(run):
    """Which images a run predicts correctly, image by image."""
    with np.load(run.folder / "predictions.npz") as file:
        pairs = zip(file["labels"].tolist(), file["probabilities"].tolist(), strict=True)
        return [label == row.index(max(row)) for label, row in pairs]


def test_the_files_of_a_run(tmp_path):
    run = RunFiles.read(write_run(tmp_path / "run", seed=3, epochs=4))
    assert run.result["seed"] == 3
    assert run.correct.tolist() == right(run)
    assert run.history["epoch"].tolist() == [1, 2, 3, 4] and "val_fd" in run.history
    assert len(run.predictions["tsne_rows"]) == len(run.predictions["tsne_places"]) == 150


def test_a_damaged_result_is_named(tmp_path):
    cases = ["gone", "{", "[]", "no accuracy", "text for a number"]
    for damage in cases:
        path = write_run(tmp_path / "run") / "result.json"
        result = json.loads(path.read_text())
        if damage == "gone":
            path.unlink()
        elif damage == "no accuracy":
            del result["accuracy"]
            path.write_text(json.dumps(result))
        else:
            path.write_text(damage if len(damage) < 3 else json.dumps(result | {"macro_f1": "0.5"}))
        with pytest.raises(UserError, match=r"run.result\.json"):
            RunFiles.read(path.parent)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("per_class.Sad", "x"),
        ("per_class.Sad.n", "12"),
        ("train_seconds", True),
        ("mean_class_recall", 10**400),
        ("confusion_matrix", [[1, 2], [3]]),
        ("correlations.class_means", [[0.5]]),
        ("config.loss", {"w_fd": []}),
        ("class_names", "Sad"),
        ("selected_on", "\x1b[31m"),
        ("flip", 1),
        ("views", True),
    ],
)
def test_an_entry_of_another_kind_is_named(tmp_path, entry, value):
    path = write_run(tmp_path / "run") / "result.json"
    result = json.loads(path.read_text())
    *parents, name = entry.split(".")
    place = result
    for parent in parents:
        place = place[parent]
    place[name] = value
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=rf"result\.json: {entry.split('.')[0]}"):
        RunFiles.read(path.parent)
    place[name] = None  # of another version
    path.write_text(json.dumps(result))
    if entry != "class_names":
        RunFiles.read(path.parent)


def test_damaged_predictions_are_named(tmp_path):
    cases = ["gone", "cut", "of another run"]
    for damage in cases:
        path = write_run(tmp_path / "run") / "predictions.npz"
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_bytes((write_run(tmp_path / "other", seed=1) / "predictions.npz").read_bytes())
        with pytest.raises(UserError, match=r"run.predictions\.npz"):
            RunFiles.read(path.parent)


@pytest.mark.parametrize(
    ("array", "change", "facts"),
    [
        ("probabilities", lambda values, wrong: np.pad(values, ((0, 0), (0, 1))), "of the . classes"),
        (
            "labels",
            lambda values, wrong: np.r_[values[:wrong], 99, values[wrong + 1 :]],
            "of the . classes",
        ),
        ("tsne_rows", lambda values, wrong: values + 1000, "tsne_rows"),
        ("tsne_rows", lambda values, wrong: values - 1000, "tsne_rows"),
        ("tsne_places", lambda values, wrong: values[:-1], "tsne_rows"),
        ("tsne_places", lambda values, wrong: np.pad(values, ((0, 0), (0, 1))), "tsne_rows"),
    ],
)
def test_predictions_that_do_not_fit_together_are_named(tmp_path, array, change, facts):
    path = write_run(tmp_path / "run") / "predictions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    wrong = np.flatnonzero(arrays["probabilities"].argmax(axis=1) != arrays["labels"])[0]  # the accuracy stays
    np.savez(path, **{**arrays, array: change(arrays[array], wrong)})
    with pytest.raises(UserError, match=rf"run.predictions\.npz: .*{facts}"):
        RunFiles.read(path.parent)


def test_blanks_of_a_history_are_gaps_and_words_are_damage(tmp_path):
    path = write_run(tmp_path / "run") / "history.csv"
    path.write_text("epoch,loss,fd\n1,2.5,\n2,2.0000000000000004,0.5\n")
    history = RunFiles.read(path.parent).history
    np.testing.assert_array_equal(history["fd"], [np.nan, 0.5])
    assert history["loss"].tolist() == [2.5, 2.0000000000000004]
    path.write_text("epoch,loss\n1,high\n")
    with pytest.raises(UserError, match=r"run.history\.csv"):
        RunFiles.read(path.parent)
    path.unlink()
    assert RunFiles.read(path.parent).history == {}


def test_rows_on_other_images_are_refused(tmp_path, two_rows):
    check_same_images(two_rows)
    for change in ({"n": 200}, {"split": "test"}, {"labels": labels_of(210)[::-1]}):
        other = make_row(tmp_path, "other", [1.0], **change)
        with pytest.raises(UserError, match=r"other-0.*CE-0 \(fer2013/val, 210 images\)"):
            check_same_images([*two_rows, other])


def test_settings_are_those_of_the_run_or_else_the_wanted_ones(tmp_path):
    run = make_row(tmp_path, "k", [1.0], options={"num_embeddings": 2}, epochs=5).settings
    assert (run["num_embeddings"], run["epochs"], run["arch"]) == (2, 5, "mini_xcp")
    wanted = make_row(tmp_path, "d", [], wanted=1, options={"embedding_size": 32}).settings
    assert (wanted["embedding_size"], wanted["num_embeddings"]) == (32, 7)


def test_every_seed_has_a_run_record(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0], wanted=4, failures={2: "broke"})
    records = run_records(row)
    assert [(r["seed"], r["status"]) for r in records] == [(0, "done"), (1, "done"), (2, "failed"), (3, "not run")]
    result = row.runs[1].result
    for name in ("split", "n", "accuracy", "mean_class_recall", "macro_f1", "ece", "parameters", "commit"):
        assert records[1][name] == result[name]
    assert records[1]["same_class"] == result["correlations"]["same_class"]
    assert records[1]["untrained_between_embeddings"] == result["correlations_untrained"]["between_embeddings"]


def test_summary_is_over_the_seeds(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 1.5, 2.0], wanted=4, failures={2: "finished later", 3: "broke"})
    record = summary_record(row, row)
    accuracies = [np.mean(right(run)) for run in row.runs.values()]
    mean = sum(accuracies) / 3
    assert record["accuracy_mean"] == pytest.approx(mean)
    assert record["accuracy_std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in accuracies) / 2))
    assert record["accuracy_low"] < mean < record["accuracy_high"]
    assert (record["seeds_done"], record["seeds_wanted"], record["seeds_failed"], record["n"]) == (3, 4, 1, 210)
    assert record["train_seconds_mean"] == 12.5 and "difference" not in record


def test_difference_is_over_the_shared_seeds(tmp_path, two_rows):
    reference = two_rows[0]
    row = make_row(tmp_path, "Ad-Corre", [1.5, 1.1, 9.0])  # the reference has no seed 2
    record = summary_record(row, reference)
    pairs = [(right(row.runs[seed]), right(reference.runs[seed])) for seed in (0, 1)]
    differences = [np.mean(a) - np.mean(b) for a, b in pairs]
    assert record["seeds_shared"] == 2
    assert record["difference"] == pytest.approx(np.mean(differences))
    assert record["difference_std"] == pytest.approx(np.std(differences, ddof=1))
    assert record["difference_low"] < record["difference"] < record["difference_high"]
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(2))
    assert record["p_seeds"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    for seed, (a, b) in enumerate(pairs):
        assert record[f"only_row_seed{seed}"] == sum(x and not y for x, y in zip(a, b, strict=True))
        assert record[f"only_reference_seed{seed}"] == sum(y and not x for x, y in zip(a, b, strict=True))
    assert "p_mcnemar_seed2" not in record
    alone = summary_record(with_seeds(row, 2), reference)
    assert alone["seeds_shared"] == 0 and "difference" not in alone


def test_recall_counts_each_class(two_rows):
    reference, row = two_rows
    labels = labels_of(210)

    def recall(run, code):
        found = [ok for ok, label in zip(right(run), labels, strict=True) if label == code]
        return sum(found) / len(found)

    records = recall_records(with_seeds(row, 0), reference)
    assert [record["class"] for record in records] == list(CLASSES)
    for code, record in enumerate(records):
        after, before = recall(row.runs[0], code), recall(reference.runs[0], code)
        assert record["recall_mean"] == pytest.approx(after) and record["change"] == pytest.approx(after - before)
        assert record["n"] == np.sum(labels == code)
    assert all(record["change"] is None for record in recall_records(reference, reference))


def test_a_class_without_images_has_no_recall(tmp_path):
    labels = np.arange(60) % 6  # no Anger
    rows = [make_row(tmp_path, name, [1.0], labels=labels) for name in ("CE", "FD")]
    record = recall_records(rows[1], rows[0])[-1]
    assert (record["class"], record["recall_mean"], record["change"], record["n"]) == ("Anger", None, None, 0)


def test_correlations_are_means_over_seeds(two_rows):
    row = two_rows[0]
    record = correlation_record(row)
    for name in CORRELATIONS:
        values = [run.result["correlations"][name] for run in row.runs.values()]
        before = [run.result["correlations_untrained"][name] for run in row.runs.values()]
        assert record[f"{name}_mean"] == pytest.approx(sum(values) / 2)
        assert record[f"{name}_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert record[f"untrained_{name}_mean"] == pytest.approx(sum(before) / 2)


def test_a_mean_leaves_absent_values_out(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0], options=CE)
    for run, values in zip(row.runs.values(), ([1.0, None, None], [3.0, 5.0, None]), strict=True):
        run.result["new"] = {"values": values}
    np.testing.assert_array_equal(row.mean("new", "values"), [2.0, 5.0, np.nan])
    del row.runs[1].result["new"]
    assert row.mean("new", "values") is None


def test_a_measure_that_one_seed_lacks_has_no_mean(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0])
    result = row.runs[1].result
    result["ece"] = None
    for name in ("mean_class_recall", "per_class", "correlations", "config", "commit"):
        del result[name]
    summary = summary_record(row, row)
    assert summary["ece_mean"] is None and summary["mean_class_recall_mean"] is None
    assert summary["macro_f1_mean"] is not None
    assert {record["recall_mean"] for record in recall_records(row, row)} == {None}
    assert correlation_record(row)["same_class_mean"] is None
    assert run_records(row)[1]["ece"] is None and run_records(row)[0]["ece"] is not None
