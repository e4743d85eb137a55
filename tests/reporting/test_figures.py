"""The figures of a report show the numbers of the runs, in panels whose labels do not overlap."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from report_runs import CE, CLASSES, make_row, make_two_rows, with_seeds

import config
import plots
from datasets import CLASS_NAMES
from reporting import figures
from reporting.rows import AD_CORRE
from reporting.tables import PAPER_RESULTS

PAPER = json.loads(PAPER_RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    return make_two_rows(tmp_path_factory.mktemp("two_rows"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn during a test, by file name."""
    found = {}

    class Recorder(plots.FigureCanvasAgg):
        def print_png(self, path, *args, **kwargs):
            if isinstance(path, Path):  # and not matplotlib's own search for a renderer
                found[path.name.split("-", 2)[2]] = self.figure  # .tmp-<process>-<name>
            super().print_png(path, *args, **kwargs)

    monkeypatch.setattr(plots, "FigureCanvasAgg", Recorder)
    return found


def cell_texts(axes, num_classes=7):
    """The texts drawn into a matrix, (C, C)."""
    found = np.full((num_classes, num_classes), "", object)
    for text in axes.texts:
        column, row = (round(place) for place in text.get_position())
        found[row, column] = text.get_text()
    return found


def panels(figure):
    return [axes for axes in figure.axes if axes.images]


NAMES = [f"fer2013-{name}.png" for name in ("accuracy", "confusion", "correlations", "tsne", "curves")]


def test_every_figure_is_written_and_has_a_title(tmp_path, drawn, two_rows):
    made = figures.save_figures(tmp_path, two_rows)
    assert [figure.path.name for figure in made] == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for figure in made:
        image = cv2.imread(str(figure.path))
        assert min(image.shape[:2]) > 200 and (image == 255).mean() > 0.2 and image.std() > 10
        assert figure.title and figure.caption.endswith(".")
        assert drawn[figure.path.name].get_suptitle().startswith("FER-2013, val, n = 210")
    assert figures.save_figures(tmp_path, [make_row(tmp_path, "CE", [], wanted=1)]) == []


def test_confusion_is_in_row_percent_over_seeds_beside_the_papers(tmp_path, drawn, two_rows):
    figures._save_confusion(tmp_path, two_rows)
    first, second, paper = panels(drawn["fer2013-confusion.png"])
    for axes, row in ((first, two_rows[0]), (second, two_rows[1])):
        expected = np.zeros((7, 7))
        for result in row.results:
            for code, counts in enumerate(result["confusion_matrix"]):
                expected[code] += [50 * count / sum(counts) for count in counts]  # the mean of two seeds
        np.testing.assert_allclose(axes.images[0].get_array(), expected)
        assert cell_texts(axes)[3, 3] == f"{expected[3, 3]:.1f}"
        accuracy = 50 * sum(result["accuracy"] for result in row.results)
        assert axes.get_title() == f"{row.name}\n{accuracy:.2f}%, mean of 2 seeds"
    np.testing.assert_allclose(paper.images[0].get_array(), PAPER["ad_corre"]["fer2013"]["confusion_percent"])
    assert cell_texts(paper)[0, 5] == "0.16" and cell_texts(paper)[0, 0] == "73"  # with the published digits
    assert paper.get_title() == "The paper's Ad-Corre\n72.03%, as published"
    assert [label.get_text() for label in first.get_yticklabels()] == list(CLASSES)
    assert len({axes.images[0].get_clim() for axes in (first, second, paper)}) == 1


def test_confusion_of_other_classes_has_no_panel_of_the_paper(tmp_path, drawn):
    rows = [make_row(tmp_path, name, [1.0], dataset="affectnet", class_names=CLASS_NAMES) for name in ("CE", AD_CORRE)]
    figures._save_confusion(tmp_path, rows)
    assert [axes.get_title().split("\n")[0] for axes in panels(drawn["affectnet-confusion.png"])] == ["CE", AD_CORRE]


def test_confusion_of_the_last_row_and_of_a_class_without_images(tmp_path, drawn):
    """Without Ad-Corre, the last row with a result takes its place."""
    rows = [make_row(tmp_path, name, [1.0], labels=np.arange(60) % 6) for name in ("k = 1", "k = 4")]
    figures._save_confusion(tmp_path, [*rows, make_row(tmp_path, "k = 7", [], wanted=1)])
    found = panels(drawn["fer2013-confusion.png"])
    assert [axes.get_title().split("\n")[0] for axes in found] == ["k = 1", "k = 4", "The paper's Ad-Corre"]
    texts = cell_texts(found[0])
    assert set(texts[6]) == {""} and all(texts[5])


def test_correlations_show_before_and_after_on_one_scale(tmp_path, drawn, two_rows):
    figures._save_correlations(tmp_path, two_rows)
    untrained, first, second = panels(drawn["fer2013-correlations.png"])
    for axes, row, key in (
        (untrained, two_rows[0], "correlations_untrained"),
        (first, two_rows[0], "correlations"),
        (second, two_rows[1], "correlations"),
    ):
        matrices = [np.array(result[key]["class_means"]) for result in row.results]
        np.testing.assert_allclose(axes.images[0].get_array(), (matrices[0] + matrices[1]) / 2)
        assert axes.images[0].get_clim() == (-1, 1)
        between = [value for i, line in enumerate(sum(matrices) / 2) for j, value in enumerate(line) if i != j]
        assert axes.get_title().endswith(f"{np.mean(between):.2f}".replace("-", "\u2212"))
    assert untrained.get_title().startswith("CE, untrained")


def test_tsne_shows_one_seed_of_both(tmp_path, drawn, two_rows):
    rows = [two_rows[0], with_seeds(two_rows[1], 1)]
    figures._save_tsne(tmp_path, rows)
    for axes, row in zip(drawn["fer2013-tsne.png"].axes, rows, strict=True):
        (points,) = axes.findobj(PathCollection)
        np.testing.assert_allclose(points.get_offsets(), row.runs[1].predictions["tsne_places"])
        assert axes.get_title() == f"{row.name}, {100 * row.runs[1].result['accuracy']:.2f}%"
    legend = [text.get_text() for text in drawn["fer2013-tsne.png"].legends[0].get_texts()]
    assert legend == list(CLASSES)
    apart = figures._save_tsne(tmp_path, [with_seeds(two_rows[0], 0), rows[1]])
    assert len(drawn["fer2013-tsne.png"].axes) == 1
    assert f"Without a panel: {AD_CORRE} (no t-SNE of seed 0)" in apart.caption


def test_accuracy_shows_every_seed_the_mean_and_what_is_missing(tmp_path, drawn, two_rows):
    missing = [make_row(tmp_path, "FD", [], wanted=2), make_row(tmp_path, "MD", [], failures={0: "x"})]
    figures._save_accuracy(tmp_path, [*two_rows, *missing])
    (axes,) = drawn["fer2013-accuracy.png"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["CE", AD_CORRE, "FD", "MD"]
    dots = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "None"]
    assert dots == [[[r["accuracy"], i] for r in row.results] for i, row in enumerate(two_rows)]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_color() == plots.ORANGE]
    assert means == [pytest.approx(np.mean([r["accuracy"] for r in row.results])) for row in two_rows]
    intervals = [line.get_xdata() for line in axes.lines if line.get_color() == plots.PALE]
    assert all(low < mean < high for (low, high), mean in zip(intervals, means, strict=True))
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [("not run", 2), ("failed", 3)]


def test_accuracy_against_k(tmp_path, drawn):
    # 7 is the default: the row's options do not name it
    rows = [
        make_row(tmp_path, f"k = {k}", [1 + k / 9, 1.2], options={"num_embeddings": k} if k != 7 else {})
        for k in (7, 1, 2)
    ]
    missing = make_row(tmp_path, "k = 4", [], wanted=1, options={"num_embeddings": 4, "epochs": 3})
    figures._save_against(tmp_path, [*rows, missing])
    axes = drawn["fer2013-against-k.png"].axes[0]
    line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    expected = sorted((row.settings["num_embeddings"], np.mean([r["accuracy"] for r in row.results])) for row in rows)
    np.testing.assert_allclose(line.get_xydata(), expected)
    assert axes.get_xlabel() == "k, embedding vectors per face"
    dots = [line for line in axes.lines if line.get_color() == plots.ORANGE and len(line.get_xdata()) == 2]
    assert sorted(dot.get_xdata()[0] for dot in dots) == [1, 2, 7]
    assert axes.get_xticks().tolist() == [1, 2, 4, 7]


def test_options_that_move_together_are_one_axis(tmp_path, drawn):
    rows = [make_row(tmp_path, f"x {w}", [1.0], options={"w_fd": w, "w_md": w, "w_ed": w}) for w in (0, 0.1, 1, 10)]
    made = figures._save_against(tmp_path, rows)
    axes = drawn["fer2013-against-w-fd-w-md-w-ed.png"].axes[0]
    assert axes.get_xscale() == "symlog" and axes.get_xlabel() == "--w-fd = --w-md = --w-ed"
    assert made.title == "Accuracy against --w-fd = --w-md = --w-ed"


def test_rows_that_differ_otherwise_have_no_such_curve(tmp_path):
    cases = [
        [CE, {"w_md": 0, "w_ed": 0}, {"w_ed": 0}],  # several options, with different values
        [{"arch": "xcp"}, {"arch": "resnet"}, {"arch": "mini_xcp"}],  # no number
        [{"num_embeddings": 1}, {"num_embeddings": 2}],  # two points are no curve
        [{"num_embeddings": 1}, {"num_embeddings": 2}, {"num_embeddings": 2}],
    ]
    for options in cases:
        rows = [make_row(tmp_path, f"row {i}", [], wanted=1, options=row) for i, row in enumerate(options)]
        assert figures._varied(rows) is None


def test_curves_have_a_panel_per_term_and_a_line_per_row(tmp_path, drawn, two_rows):
    figures._save_curves(tmp_path, two_rows)
    figure = drawn["fer2013-curves.png"]
    grid = np.array(figure.axes).reshape(2, 5)
    terms = [config.LOSS_TERMS[term] for term in ("ce", "fd", "md", "ed")]
    assert [axes.get_title() for axes in grid[0]] == ["Accuracy", *terms]
    for axes, key in ((grid[0, 0], "accuracy"), (grid[1, 0], "val_accuracy"), (grid[1, 1], "val_ce")):
        for line, row in zip(axes.lines, two_rows, strict=True):
            one, two = (run.history[key] for run in row.runs.values())
            np.testing.assert_allclose(line.get_ydata(), (one + two) / 2)
            band = axes.collections[two_rows.index(row)].get_paths()[0].vertices[:, 1]
            spread = (one + two) / 2 + np.abs(one - two) / np.sqrt(2)
            assert band.max() == pytest.approx(spread.max())
    assert [line.get_color() for line in grid[0, 2].lines] == [grid[0, 1].lines[1].get_color()]  # CE has no FD
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CE", AD_CORRE]


def test_new_terms_have_curves_without_an_edit(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(config, "LOSS_TERMS", {**config.LOSS_TERMS, "margin": "Margin loss"})
    row = make_row(tmp_path, "CE", [1.0])
    history = row.runs[0].history
    history["unknown"] = history["margin"] = history["ce"]
    figures._save_curves(tmp_path, [row])
    titles = [axes.get_title() for axes in drawn["fer2013-curves.png"].axes if axes.get_title()]
    assert titles[-2:] == ["Margin loss", "unknown"]


def test_what_a_result_lacks_is_not_drawn(tmp_path, drawn, monkeypatch):
    drawers = (figures._save_confusion, figures._save_correlations, figures._save_curves)
    monkeypatch.setattr(figures, "_DRAWERS", drawers)
    rows = [make_row(tmp_path, name, [1.0]) for name in ("CE", AD_CORRE)]
    for row, left in ((rows[1], 3), (rows[0], 0)):
        for name in ("confusion_matrix", "correlations", "correlations_untrained", "config"):
            del row.runs[0].result[name]
        row.runs[0].history.clear()
        assert len(figures.save_figures(tmp_path / "figures", rows)) == left
    titles = [axes.get_title().split("\n")[0] for axes in panels(drawn["fer2013-confusion.png"])]
    assert titles == ["CE", "The paper's Ad-Corre"]


def visible_texts(figure):
    """The texts of a figure that are drawn, the cells of matrices left out."""
    figure.draw_without_rendering()
    ignored = {text for axes in figure.axes for text in axes.texts}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ignored |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [text for text in texts if text not in ignored]


def overlapping(figure):
    """Pairs of texts that cover one another."""
    # Rotated labels stand slanted side by side: their boxes overlap, they do not.
    texts = [text for text in visible_texts(figure) if not 0 < text.get_rotation() < 90]
    boxes = [(text.get_text(), text.get_window_extent().shrunk(0.98, 0.9)) for text in texts]
    return [(one, two) for (one, a), (two, b) in itertools.combinations(boxes, 2) if a.overlaps(b) and one != two]


@pytest.mark.slow
def test_long_names_do_not_overlap(tmp_path, drawn):
    long = "Ad-Corre with a name as long as people give them, and longer"
    rows = [make_row(tmp_path, f"CE {long}", [1.0], options={"num_embeddings": 2})]
    rows += [make_row(tmp_path, f"{i} {long}", [1.2], options={"num_embeddings": i}) for i in (3, 4)]
    figures.save_figures(tmp_path / "figures", rows)
    assert len(drawn) == 6
    assert {name: overlapping(figure) for name, figure in drawn.items()} == {name: [] for name in drawn}
    for figure in drawn.values():
        width, height = figure.canvas.get_width_height()
        for text in visible_texts(figure):
            box = text.get_window_extent()
            assert box.x0 > -2 and box.x1 < width + 2 and box.y0 > -2 and box.y1 < height + 2, text.get_text()


def test_the_overlap_test_finds_an_overlap():
    figure = plots.Figure(figsize=(4, 1))
    figure.text(0.1, 0.5, "one text that is long")
    figure.text(0.2, 0.5, "and another one")
    figure.text(0.2, 0.1, "apart")
    assert overlapping(figure) == [("one text that is long", "and another one")]


def test_cells_have_a_true_minus_and_no_minus_zero():
    assert [figures._number(value, ".2f") for value in (-0.004, -0.25, 1)] == ["0.00", "\u22120.25", "1.00"]


def test_every_row_has_a_panel_or_a_word_on_why_not(tmp_path, drawn, two_rows, monkeypatch):
    one, two = two_rows
    third, fourth = dataclasses.replace(two, name="another"), dataclasses.replace(one, name="later", runs={})
    made = {figure.path.stem: figure for figure in figures.save_figures(tmp_path, [two, one, third, fourth])}
    for name, more in (("confusion", 1), ("correlations", 1), ("tsne", 0)):  # more: the paper's; the untrained one
        titles = [axes.get_title().split("\n")[0].split(",")[0] for axes in drawn[f"fer2013-{name}.png"].axes]
        assert {AD_CORRE, "CE", "another"} <= set(titles) and "later" not in titles
        assert len([title for title in titles if title]) == 3 + more
        assert made[f"fer2013-{name}"].caption.endswith(" Without a panel: later (not run).")
    monkeypatch.setattr(figures, "_MOST_ROWS", 2)
    many = [one, third, two]  # `third` is as good as Ad-Corre
    caption = figures._save_confusion(tmp_path, many).caption
    assert (
        "Without a panel: another (only the first, Ad-Corre and the most accurate rows are shown, 2 in all)" in caption
    )
