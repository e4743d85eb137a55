"""Do the tables print the records, say what is missing, and mark what was selected how?"""

from __future__ import annotations

import json

import pytest
from report_runs import CLASSES, make_row

from datasets.shared.expressions import CLASS_NAMES
from grids.experiments import AD_CORRE
from reporting import tables as report_tables
from reporting.tables import (
    accuracy_table,
    correlation_table,
    difference_table,
    p_value,
    recall_table,
    reference_table,
    signed,
)

PAPER = json.loads(report_tables.PAPER_RESULTS.read_text(encoding="utf-8"))


def cells(table, row):
    """A row's texts by column, found by its name without marks."""
    for texts in table.rows:
        if texts[0].rstrip("\u2020\u2021") == row:
            return dict(zip(table.columns, texts, strict=True))
    raise AssertionError(f"no row {row} in {table.rows}")


def test_accuracy_prints_mean_std_interval_and_the_papers_number(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0, 1.4], wanted=3), make_row(tmp_path, AD_CORRE, [1.6])]
    table, records = accuracy_table(rows)
    ce = cells(table, "CE")
    record = records[0]
    assert ce["Seeds"] == "2 of 3"
    assert ce["Accuracy,\u00a0%"] == f"{100 * record['accuracy_mean']:.2f} \u00b1 {100 * record['accuracy_std']:.2f}"
    assert ce["95% interval"] == f"{100 * record['accuracy_low']:.2f} to {100 * record['accuracy_high']:.2f}"
    recall = [result["mean_class_recall"] for result in rows[0].results]
    assert ce["Mean class recall,\u00a0%"].startswith(f"{50 * sum(recall):.2f} \u00b1 ")
    assert ce["Paper, accuracy\u00a0%"] == ""
    ours = cells(table, AD_CORRE)
    assert ours["Paper, accuracy\u00a0%"] == "72.03"
    assert ours["Accuracy,\u00a0%"] == f"{100 * rows[1].results[0]['accuracy']:.2f}"  # one seed has no deviation
    assert any(PAPER["ad_corre"]["ablation"] in note for note in table.notes)
    assert any(PAPER["ad_corre"]["fer2013"]["source"] in note for note in table.notes)
    assert "val: 210 images" in table.title


@pytest.mark.parametrize(
    ("dataset", "num_classes", "expected"),
    [("rafdb", 7, "86.96"), ("affectnet", 7, "63.36"), ("affectnet", 8, ""), ("synthetic", 7, ""), ("ferplus", 8, "")],
)
def test_the_papers_number_stands_only_where_it_was_measured(tmp_path, dataset, num_classes, expected):
    names = CLASS_NAMES[:num_classes]
    rows = [make_row(tmp_path, name, [1.0], dataset=dataset, class_names=names) for name in ("CE", AD_CORRE)]
    table, _ = accuracy_table(rows)
    assert [texts[-1] for texts in table.rows] == ["", expected]


def test_what_has_not_run_says_so_and_what_failed_says_why(tmp_path):
    rows = [
        make_row(tmp_path, "CE", [1.0, 1.2]),
        make_row(tmp_path, "FD", [], wanted=3),
        make_row(tmp_path, "MD", [], wanted=2, failures={1: "exit code 2: loss is not finite"}),
        make_row(tmp_path, AD_CORRE, [1.0], wanted=2, failures={1: "killed"}),
    ]
    table, records = accuracy_table(rows)
    assert table.rows[1][1:] == ("0 of 3", *["not run"] * 4, "")
    assert table.rows[2][1:] == ("0 of 2, 1 failed", *["failed"] * 4, "")
    assert table.rows[3][1] == "1 of 2, 1 failed"
    assert "Failed: MD, seed 1: exit code 2: loss is not finite" in table.notes
    assert f"Failed: {AD_CORRE}, seed 1: killed" in table.notes
    differences = difference_table(rows, records)
    assert differences.rows[0][1:] == ("not run",) * 6 and differences.rows[1][1:] == ("failed",) * 6
    assert recall_table(rows)[0].rows[1][1:] == ("not run",) * 7
    assert correlation_table(rows)[0].rows[2][1:] == ("failed",) * 4


@pytest.mark.parametrize(
    ("selected_on", "split", "mark"),
    [("val", "test", ""), ("test", "val", "\u2020"), ("val", "val", "\u2021"), ("test", "test", "\u2020\u2021")],
)
def test_selection_is_marked(tmp_path, selected_on, split, mark):
    rows = [make_row(tmp_path, name, [1.0], selected_on=selected_on, split=split) for name in ("CE", "FD")]
    table, records = accuracy_table(rows)
    assert [texts[0] for texts in table.rows] == [f"CE{mark}", f"FD{mark}"]
    for sign, words in (("\u2020", "selected on the test split"), ("\u2021", "the split that selected the epoch")):
        assert any(note.startswith(sign) and words in note for note in table.notes) == (sign in mark)
    assert difference_table(rows, records).rows[0][0] == f"FD{mark}"


def test_differences_print_points_interval_and_every_p(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0, 1.2, 1.1]), make_row(tmp_path, "FD", [0.9, 1.3])]
    _, records = accuracy_table(rows)
    table = difference_table(rows, records)
    found, record = cells(table, "FD"), records[1]
    assert found["Shared seeds"] == "2"
    assert found["Difference, points"] == signed(100 * record["difference"])
    assert (
        found["95% interval"]
        == f"{signed(100 * record['difference_low'])} to {signed(100 * record['difference_high'])}"
    )
    assert found["p, seeds (paired\u00a0t)"] == p_value(record["p_seeds"])
    assert found["p, images (bootstrap)"] == p_value(record["p_images"])
    assert found["p, McNemar, a seed each"] == "; ".join(p_value(record[f"p_mcnemar_seed{i}"]) for i in range(2))


def test_differences_without_a_partner(tmp_path):
    missing = make_row(tmp_path, "CE", [], wanted=2)
    rows = [missing, make_row(tmp_path, "FD", [1.0])]
    assert difference_table(rows, accuracy_table(rows)[1]).rows[0][1:] == ("CE: not run",) * 6
    first, second = make_row(tmp_path, "CE", [1.0]), make_row(tmp_path, "MD", [1.0, 1.0])
    del second.runs[0]
    rows = [first, second]
    assert difference_table(rows, accuracy_table(rows)[1]).rows[0][1:] == ("no shared seed",) * 6


def test_recall_prints_mean_and_change(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0]), make_row(tmp_path, "FD", [1.6])]
    table, records = recall_table(rows)
    assert [column.split(" ")[0] for column in table.columns[1:]] == list(CLASSES)
    happy = next(record for record in records if (record["row"], record["class"]) == ("FD", "Happy"))
    assert table.rows[1][2] == f"{100 * happy['recall_mean']:.1f} ({signed(100 * happy['change'], 1)})"
    assert "(" not in table.rows[0][2]
    assert table.columns[2] == f"Happy (n\u00a0=\u00a0{happy['n']})"


def test_correlations_print_before_and_after(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0, 2.0])]
    table, (record,) = correlation_table(rows)
    before, after = record["untrained_same_class_mean"], record["same_class_mean"]
    assert table.rows[0][1] == f"{signed(before)} \u2192 {signed(after)} \u00b1 {record['same_class_std']:.2f}"


def test_reference_methods_have_their_sources(tmp_path):
    table, records = reference_table([make_row(tmp_path, "CE", [], wanted=1, dataset="rafdb")])
    expected = [method for method in PAPER["reference_methods"] if method["dataset"] == "rafdb"]
    assert [(row[0], row[2]) for row in table.rows] == [(method["method"], method["source"]) for method in expected]
    assert [record["accuracy"] for record in records] == [method["accuracy"] for method in expected]
    assert reference_table([make_row(tmp_path, "CE", [], wanted=1, dataset="synthetic")]) is None


def test_paper_results_hold_their_sources():
    methods = [*PAPER["reference_methods"], *(PAPER["ad_corre"][name] for name in ("affectnet_7", "rafdb", "fer2013"))]
    assert all(0 < method["accuracy"] < 1 and method["source"] for method in methods)
    assert PAPER["class_order"] == list(CLASS_NAMES[:7])


@pytest.mark.parametrize(
    ("value", "expected"), [(1.234, "+1.23"), (-0.5, "\u22120.50"), (0.001, "0.00"), (-0.001, "0.00"), (None, "")]
)
def test_signed(value, expected):
    assert signed(value) == expected


@pytest.mark.parametrize(("p", "expected"), [(None, ""), (1.0, "1.000"), (0.0456, "0.046"), (0.0009, "< 0.001")])
def test_p_value(p, expected):
    assert p_value(p) == expected
