"""Tables print the records, name what is missing, and mark how the epoch was selected."""

from __future__ import annotations

import json

import pytest
from report_runs import CLASSES, make_row, make_two_rows, with_seeds

from datasets import CLASS_NAMES
from reporting.rows import AD_CORRE
from reporting.tables import (
    PAPER_RESULTS,
    accuracy_table,
    correlation_table,
    difference_table,
    p_value,
    recall_table,
    reference_table,
    signed,
)

PAPER = json.loads(PAPER_RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    return make_two_rows(tmp_path_factory.mktemp("two_rows"))


def cells(table, row):
    """The texts of a row by column; the row is found by its name without marks."""
    for texts in table.rows:
        if texts[0].rstrip("\u2020\u2021") == row:
            return dict(zip(table.columns, texts, strict=True))
    raise AssertionError(f"no row {row} in {table.rows}")


def test_accuracy_prints_mean_deviation_interval_and_the_papers_number(tmp_path, two_rows):
    rows = [make_row(tmp_path, "CE", [1.0, 1.4], wanted=3), with_seeds(two_rows[1], 0)]
    table, (record, _) = accuracy_table(rows)
    name, seeds, accuracy, interval, recall, f1, paper = table.rows[0]
    assert (name.rstrip("\u2021"), seeds, paper) == ("CE", "2 of 3", "")
    assert accuracy == f"{100 * record['accuracy_mean']:.2f} \u00b1 {100 * record['accuracy_std']:.2f}"
    assert interval == f"{100 * record['accuracy_low']:.2f} to {100 * record['accuracy_high']:.2f}"
    for text, measure in ((recall, "mean_class_recall"), (f1, "macro_f1")):
        values = [result[measure] for result in rows[0].results]
        assert text.startswith(f"{50 * sum(values):.2f} \u00b1 ")
    assert table.rows[1][2] == f"{100 * rows[1].results[0]['accuracy']:.2f}"  # one seed has no deviation
    assert table.rows[1][-1] == "72.03"
    assert any(PAPER["ad_corre"]["ablation"] in note for note in table.notes)
    assert any(PAPER["ad_corre"]["fer2013"]["source"] in note for note in table.notes)
    assert "FER-2013, val, n = 210" in table.title


def test_the_papers_number_is_beside_the_data_set_that_it_was_measured_on(tmp_path):
    cases = [("rafdb", 7, "86.96"), ("affectnet", 7, "63.36"), ("affectnet", 8, None), ("synthetic", 7, None)]
    for i, (dataset, num_classes, expected) in enumerate(cases):
        names = CLASS_NAMES[:num_classes]
        rows = [
            make_row(tmp_path / str(i), name, [1.0], dataset=dataset, class_names=names) for name in ("CE", AD_CORRE)
        ]
        table, _ = accuracy_table(rows)
        if expected:
            assert [texts[-1] for texts in table.rows] == ["", expected]
        else:
            assert not any("Paper" in column for column in table.columns)


def test_rows_without_a_result_say_why(tmp_path, two_rows):
    rows = [
        two_rows[0],
        make_row(tmp_path, "FD", [], wanted=3),
        make_row(tmp_path, "MD", [], wanted=2, failures={1: "exit code 2: loss is not finite"}),
        make_row(tmp_path, AD_CORRE, [1.0], wanted=2, failures={1: "killed"}),
    ]
    table, records = accuracy_table(rows)
    assert table.rows[1][1:] == ("0 of 3", *["not run"] * 4, "")
    assert table.rows[2][1:] == ("0 of 2, 1 failed", *["failed"] * 4, "")
    assert table.rows[3][1] == "1 of 2, 1 failed"
    assert "Failed: MD, seed 1: exit code 2: loss is not finite" in table.notes
    missing = "not run (3 of 3 seeds): FD; not run (1 of 2 seeds): MD; failed (1 of 2 seeds): MD, Ad-Corre"
    assert f"Missing runs: {missing}." in table.notes
    differences = difference_table(rows, records)
    assert differences.rows[0][1:] == ("not run",) * 8 and differences.rows[1][1:] == ("failed",) * 8
    assert recall_table(rows)[0].rows[1][1:] == ("not run",) * 7
    assert correlation_table(rows)[0].rows[2][1:] == ("failed",) * 4


def test_selection_is_marked(tmp_path):
    cases = [("val", "test", ""), ("test", "val", "\u2020"), ("val", "val", "\u2021"), ("test", "test", "\u2020\u2021")]
    for i, (selected_on, split, mark) in enumerate(cases):
        rows = [make_row(tmp_path / str(i), name, [1.0], selected_on=selected_on, split=split) for name in ("CE", "FD")]
        table, records = accuracy_table(rows)
        assert [texts[0] for texts in table.rows] == [f"CE{mark}", f"FD{mark}"]
        assert [sign for sign in "\u2020\u2021" if any(note.startswith(sign) for note in table.notes)] == list(mark)
        assert difference_table(rows, records).rows[0][0] == f"FD{mark}"


def test_differences_print_points_interval_and_every_p(two_rows):
    _, records = accuracy_table(two_rows)
    record, found = records[1], difference_table(two_rows, records).rows[0]
    low, high = (signed(100 * record[f"difference_{side}"]) for side in ("low", "high"))
    mcnemar = "; ".join(p_value(record[f"p_mcnemar_seed{i}"]) for i in range(2))
    points = signed(100 * record["difference"])
    assert found[1:] == (
        "2",
        points,
        f"{low} to {high}",
        *(p_value(record[name]) for name in ("p_seeds", "p_seeds_holm", "p_images", "p_images_holm")),
        mcnemar,
    )


def test_differences_without_a_partner(tmp_path, two_rows):
    rows = [make_row(tmp_path, "CE", [], wanted=2), two_rows[1]]
    assert difference_table(rows, accuracy_table(rows)[1]).rows[0][1:] == ("CE: not run",) * 8
    rows = [with_seeds(two_rows[0], 0), with_seeds(two_rows[1], 1)]
    assert difference_table(rows, accuracy_table(rows)[1]).rows[0][1:] == ("no shared seed",) * 8


def test_recall_prints_mean_and_change(two_rows):
    table, records = recall_table(two_rows)
    assert [column.split(" ")[0] for column in table.columns[1:]] == list(CLASSES)
    happy = next(record for record in records if (record["row"], record["class"]) == (AD_CORRE, "Happy"))
    assert table.rows[1][2] == f"{100 * happy['recall_mean']:.1f} ({signed(100 * happy['change'], 1)})"
    assert "(" not in table.rows[0][2]
    assert table.columns[2] == f"Happy (n\u00a0=\u00a0{happy['n']})"


def test_correlations_print_before_and_after(two_rows):
    table, (record, _) = correlation_table(two_rows)
    before, after = record["untrained_same_class_mean"], record["same_class_mean"]
    assert table.rows[0][1] == f"{signed(before)} \u2192 {signed(after)} \u00b1 {record['same_class_std']:.2f}"


def test_a_measure_that_a_result_lacks_is_a_blank_cell(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0]), make_row(tmp_path, "FD", [1.6])]
    for name in ("macro_f1", "per_class", "correlations", "selected_on", "config"):
        del rows[1].runs[0].result[name]
    assert cells(accuracy_table(rows)[0], "FD")["Macro F1,\u00a0%"] == ""
    assert recall_table(rows)[0].rows[1] == ("FD", *[""] * 7)
    assert correlation_table(rows)[0].rows[1] == ("FD", *[""] * 4)
    assert all(texts[1] for texts in recall_table(rows)[0].rows[:1])


def test_reference_methods_have_their_sources(tmp_path):
    table, records = reference_table([make_row(tmp_path, "CE", [], wanted=1, dataset="rafdb")])
    expected = [method for method in PAPER["reference_methods"] if method["dataset"] == "rafdb"]
    assert [(row[0], row[2]) for row in table.rows] == [(method["method"], method["source"]) for method in expected]
    assert [record["accuracy"] for record in records] == [method["accuracy"] for method in expected]
    assert reference_table([make_row(tmp_path, "CE", [], wanted=1, dataset="synthetic")]) is None


def test_signs_and_p():
    assert [signed(value) for value in (1.234, -0.5, 0.001, -0.001, None)] == [
        "+1.23",
        "\u22120.50",
        "0.00",
        "0.00",
        "",
    ]
    assert [p_value(p) for p in (None, 1.0, 0.0456, 0.0009)] == ["", "1.000", "0.046", "< 0.001"]
