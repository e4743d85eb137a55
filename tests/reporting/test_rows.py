"""Do the records hold what the runs' files hold, counted again by loops?"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from report_runs import CLASSES, labels_of, make_row, write_run

from files import UserError
from reporting.rows import (
    RunFiles,
    check_same_images,
    correlation_record,
    recall_records,
    run_records,
    summary_record,
)


def right(run):
    """Which images a run has right, image by image."""
    with np.load(run.folder / "predictions.npz") as file:
        pairs = zip(file["labels"].tolist(), file["probabilities"].tolist(), strict=True)
        return [label == row.index(max(row)) for label, row in pairs]


def test_run_files_load(tmp_path):
    run = RunFiles(write_run(tmp_path / "run", seed=3, epochs=4))
    assert run.result["seed"] == 3
    assert run.correct.tolist() == right(run)
    assert np.mean(right(run)) == pytest.approx(run.result["accuracy"])
    assert run.history["epoch"].tolist() == [1, 2, 3, 4] and "val_fd" in run.history
    assert len(run.predictions["tsne_rows"]) == len(run.predictions["tsne_places"]) == 150


@pytest.mark.parametrize("content", [None, "{", "[]", '{"accuracy": 0.5}'])
def test_a_damaged_result_is_named(tmp_path, content):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").unlink() if content is None else (folder / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"run/result\.json: (no such file|expected)"):
        RunFiles(folder)


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("epoch,loss\n1,high\n" if path.suffix == ".csv" else "no array")


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
def test_damaged_predictions_are_named(tmp_path, how):
    run = RunFiles(write_run(tmp_path / "run"))
    damage(run.folder / "predictions.npz", how)
    with pytest.raises(UserError, match=r"run/predictions\.npz: (no such file|expected the predictions)"):
        _ = run.correct


@pytest.mark.parametrize("how", ["gone", "other"])
def test_a_damaged_history_is_named(tmp_path, how):
    run = RunFiles(write_run(tmp_path / "run"))
    damage(run.folder / "history.csv", how)
    with pytest.raises(UserError, match=r"run/history\.csv: (no such file|expected numbers)"):
        _ = run.history


def test_predictions_of_another_run_are_refused(tmp_path):
    one, other = (write_run(tmp_path / str(i), seed=i) for i in range(2))
    (one / "predictions.npz").write_bytes((other / "predictions.npz").read_bytes())
    with pytest.raises(UserError, match="the two are of different runs"):
        _ = RunFiles(one).correct


def test_rows_on_other_images_are_refused(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0, 2.0]), make_row(tmp_path, "FD", [1.5])]
    check_same_images(rows)
    for change in ({"n": 200}, {"split": "test"}, {"labels": labels_of(210)[::-1]}):
        with pytest.raises(UserError, match=r"other-0: expected the images of .*CE-0 \(fer2013/val, 210 images\)"):
            check_same_images([*rows, make_row(tmp_path, "other", [1.0], **change)])


def test_settings_are_those_of_the_run_or_else_the_wanted_ones(tmp_path):
    run = make_row(tmp_path, "k", [1.0], options={"num_embeddings": 2}, epochs=5).settings
    assert (run["num_embeddings"], run["epochs"], run["arch"]) == (2, 5, "mini_xcp")
    wanted = make_row(tmp_path, "d", [], wanted=1, options={"embedding_size": 32}).settings
    assert (wanted["embedding_size"], wanted["num_embeddings"]) == (32, 7)


def test_every_seed_has_a_run_record(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0], wanted=4, failures={2: "broke"})
    records = run_records(row)
    assert [(record["seed"], record["status"]) for record in records] == [
        (0, "done"),
        (1, "done"),
        (2, "failed"),
        (3, "not run"),
    ]
    result = json.loads((row.runs[1].folder / "result.json").read_text())
    for name in (
        "split",
        "n",
        "accuracy",
        "mean_class_recall",
        "macro_f1",
        "ece",
        "parameters",
        "commit",
        "selected_on",
    ):
        assert records[1][name] == result[name]
    assert records[1]["same_class"] == result["correlations"]["same_class"]
    assert records[1]["untrained_between_embeddings"] == result["correlations_untrained"]["between_embeddings"]
    assert set(records[3]) == {"dataset", "row", "seed", "status"}


def test_summary_is_over_the_seeds(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 1.5, 2.0], wanted=4)
    record = summary_record(row, row)
    accuracies = [np.mean(right(run)) for run in row.runs.values()]
    mean = sum(accuracies) / 3
    assert record["accuracy_mean"] == pytest.approx(mean)
    assert record["accuracy_std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in accuracies) / 2))
    assert record["accuracy_low"] < mean < record["accuracy_high"]
    assert (record["seeds_done"], record["seeds_wanted"], record["seeds_failed"], record["n"]) == (3, 4, 0, 210)
    assert "difference" not in record


def test_difference_is_over_the_shared_seeds(tmp_path):
    reference = make_row(tmp_path, "CE", [1.0, 1.2])
    row = make_row(tmp_path, "Ad-Corre", [1.5, 1.1, 9.0])  # seed 2 has no partner
    record = summary_record(row, reference)
    pairs = [(right(row.runs[seed]), right(reference.runs[seed])) for seed in (0, 1)]
    differences = [np.mean(a) - np.mean(b) for a, b in pairs]
    assert record["seeds_shared"] == 2
    assert record["difference"] == pytest.approx(np.mean(differences))
    assert record["difference_low"] < record["difference"] < record["difference_high"]
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(2))
    assert record["p_seeds"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    for seed, (a, b) in enumerate(pairs):
        assert record[f"only_row_seed{seed}"] == sum(x and not y for x, y in zip(a, b, strict=True))
        assert record[f"only_reference_seed{seed}"] == sum(y and not x for x, y in zip(a, b, strict=True))
    assert "p_mcnemar_seed2" not in record


def test_rows_without_a_shared_seed_have_no_difference(tmp_path):
    reference, row = make_row(tmp_path, "CE", [], wanted=2), make_row(tmp_path, "FD", [1.0], wanted=2)
    assert summary_record(row, reference)["seeds_shared"] == 0
    assert "difference" not in summary_record(row, reference)
    assert "accuracy_mean" not in summary_record(reference, reference)


def test_recall_counts_each_class(tmp_path):
    reference = make_row(tmp_path, "CE", [1.0, 1.2])
    row = make_row(tmp_path, "FD", [1.5, 1.4])
    labels = labels_of(210)

    def recall(run, code):
        found = [ok for ok, label in zip(right(run), labels, strict=True) if label == code]
        return sum(found) / len(found)

    records = recall_records(row, reference)
    assert [record["class"] for record in records] == list(CLASSES)
    for code, record in enumerate(records):
        mean = np.mean([recall(run, code) for run in row.runs.values()])
        before = np.mean([recall(run, code) for run in reference.runs.values()])
        assert record["recall_mean"] == pytest.approx(mean) and record["change"] == pytest.approx(mean - before)
        assert record["n"] == np.sum(labels == code)
    assert all(record["change"] is None for record in recall_records(reference, reference))


def test_a_class_without_images_has_no_recall(tmp_path):
    labels = np.arange(60) % 6  # nobody is angry
    rows = [make_row(tmp_path, name, [1.0], labels=labels) for name in ("CE", "FD")]
    record = recall_records(rows[1], rows[0])[-1]
    assert (record["class"], record["recall_mean"], record["change"], record["n"]) == ("Anger", None, None, 0)


def test_correlations_are_means_over_seeds(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0])
    record = correlation_record(row)
    for name in ("same_class", "different_classes", "between_class_means", "between_embeddings"):
        values = [run.result["correlations"][name] for run in row.runs.values()]
        before = [run.result["correlations_untrained"][name] for run in row.runs.values()]
        assert record[f"{name}_mean"] == pytest.approx(sum(values) / 2)
        assert record[f"{name}_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert record[f"untrained_{name}_mean"] == pytest.approx(sum(before) / 2)


def test_mean_leaves_absent_values_out(tmp_path):
    row = make_row(tmp_path, "CE", [1.0, 2.0])
    values = iter([[1.0, None, None], [3.0, 5.0, None]])
    np.testing.assert_array_equal(row.mean(lambda _: next(values)), [2.0, 5.0, np.nan])
