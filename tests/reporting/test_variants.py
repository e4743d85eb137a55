"""The mean of the seeds and the images without a copy are scored from the predictions of the runs."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from report_runs import make_row, make_two_rows, with_seeds, write_run

from files import UserError
from reporting.report import write_report
from reporting.rows import AD_CORRE, RunFiles, check_same_images
from reporting.tables import percent, signed
from reporting.variants import clean_tables, ensemble_table, mean_of_seeds, on_images


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    return make_two_rows(tmp_path_factory.mktemp("two_rows"))


def hits_of_mean(row, seeds) -> np.ndarray:
    """Bool (N,), image by image: is the label the class with the largest sum of the seeds' probabilities?"""
    found = []
    for image, label in enumerate(row.runs[seeds[0]].predictions["labels"]):
        sums = sum(row.runs[seed].predictions["probabilities"][image].astype(np.float64) for seed in seeds)
        found.append(int(np.argmax(sums)) == label)
    return np.array(found)


def test_the_mean_of_the_seeds_is_one_answer_of_all_networks(two_rows):
    reference, row = two_rows
    table, records = ensemble_table(two_rows)
    a, b = hits_of_mean(row, [0, 1]), hits_of_mean(reference, [0, 1])
    assert records[1]["accuracy_mean"] == a.mean() > row.correct([0, 1]).mean() + 0.01
    assert records[1]["difference"] == pytest.approx(a.mean() - b.mean())
    assert table.rows[1][:3] == (f"{AD_CORRE}\u2021", "2", percent(a.mean()))
    assert signed(100 * (a.mean() - b.mean())) in table.rows[1]
    assert not any("seeds" in column for column in table.columns), "one answer has no spread over seeds"
    alone = mean_of_seeds(row, [0, 1]).runs[0]
    assert alone.result["n"] == len(a) and alone.result["class_names"] == row.results[0]["class_names"]


def test_means_are_compared_over_the_seeds_that_both_have(tmp_path, two_rows):
    three = make_row(tmp_path, "three", [1.6, 1.5, 1.2])
    rows = [two_rows[0], three, make_row(tmp_path, "nothing", [], wanted=2)]
    table, records = ensemble_table(rows)
    assert [record["networks"] for record in records] == [2, 3, 0]
    assert records[1]["accuracy_mean"] == hits_of_mean(three, [0, 1, 2]).mean()
    difference = hits_of_mean(three, [0, 1]).mean() - hits_of_mean(two_rows[0], [0, 1]).mean()
    assert records[1]["difference"] == pytest.approx(difference) and records[1]["seeds_shared"] == 2
    assert records[1]["p_images_holm"] == pytest.approx(min(1, 2 * records[1]["p_images"]))
    assert "not run" in table.rows[2] and "comparisons in this table: 2" in table.notes[-1]
    assert ensemble_table([with_seeds(row, 0) for row in two_rows]) is None


def test_images_without_a_copy_are_scored_alone(two_rows):
    rng = np.random.default_rng(3)
    copied = rng.random(210) < 0.2
    (table, records), (ensembles, of_means) = clean_tables(two_rows, copied)
    for row, record in zip(two_rows, records, strict=True):
        assert record["n"] == (~copied).sum()
        assert record["accuracy_mean"] == pytest.approx(row.correct([0, 1])[:, ~copied].mean())
    assert of_means[1]["accuracy_mean"] == hits_of_mean(two_rows[1], [0, 1])[~copied].mean()
    for each in (table, ensembles):
        assert f"n = {(~copied).sum()}" in each.title and f"{copied.sum()} images that have a copy" in each.title
    assert {table.name, ensembles.name} == {"clean", "clean-ensembles"}
    kept = on_images(two_rows[0], np.ones(210, bool))
    assert kept.results[0]["macro_f1"] == two_rows[0].results[0]["macro_f1"]
    assert len(clean_tables([with_seeds(row, 0) for row in two_rows], copied)) == 1


@pytest.mark.parametrize("copied", [np.zeros(9, bool), np.ones(210, bool)])
def test_copies_of_other_images_are_refused(two_rows, copied):
    with pytest.raises(UserError, match="fer2013: expected 210 images"):
        clean_tables(two_rows, copied)


def test_a_report_has_the_tables_of_the_copies_where_they_are_known(tmp_path, two_rows):
    copied = {"fer2013": np.arange(210) < 21}
    written = write_report("r", "Why?", two_rows, tmp_path, "command", copied)
    names = {path.name for path in written}
    assert {"clean.csv", "clean.tex", "clean-ensembles.csv", "clean-ensembles.tex", "ensembles.csv"} <= names
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "n = 189, without the 21 images that have a copy in train" in page


# Other views of the images


def with_views(folder, views="flip", **changes):
    """A run's folder with an evaluation of its weights in a folder of its own, better by its quality."""
    run = write_run(folder, seed=1, quality=1.0)
    other = write_run(folder.parent / "other", seed=1, quality=2.0, **changes)
    text = (other / "result.json").read_text().replace('"views": "none"', f'"views": "{views}"')
    (other / "result.json").write_text(text.replace('"seed": 1', '"seed": 0'))
    (other / "history.csv").unlink()
    shutil.move(other, run / "flip")
    return run


def test_a_run_is_read_with_the_predictions_of_other_views(tmp_path):
    folder = with_views(tmp_path / "run")
    own, flip = RunFiles.read(folder), RunFiles.read(folder, "flip")
    assert RunFiles.read(folder, "none").result == own.result
    assert flip.result["views"] == "flip" and flip.result["accuracy"] == flip.correct.mean() > own.result["accuracy"]
    assert (flip.result["seed"], flip.history.keys()) == (1, own.history.keys())
    assert flip.result["per_class"] != own.result["per_class"]
    row = dataclasses.replace(make_row(tmp_path, "flip", [1.0]), runs={1: flip})
    check_same_images([row])


@pytest.mark.parametrize(
    ("changes", "fact"),
    [({"split": "test"}, "split val"), ({"n": 200}, "n 210"), ({"views": "ten-crop"}, "views flip")],
)
def test_an_evaluation_of_something_else_is_refused(tmp_path, changes, fact):
    with pytest.raises(UserError, match=f"flip: expected (the )?{fact}"):
        RunFiles.read(with_views(tmp_path / "run", **changes), "flip")
