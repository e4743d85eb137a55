"""A report has all numbers of the runs' files, in one page that needs no other file."""

from __future__ import annotations

import base64
import csv
import html.parser
import re

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from report_runs import make_row

from files import UserError, write_text
from reporting import figures, report
from reporting.report import write_report
from reporting.rows import AD_CORRE, Row, RunFiles

COMMAND = "python reproduce.py run components --dataset fer2013\npython reproduce.py report components"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """The texts of an HTML page and its tags with their attributes; the tags must be well nested."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(autouse=True)
def few_figures(monkeypatch):
    """One figure per data set: drawing all takes seconds."""
    monkeypatch.setattr(figures, "_DRAWERS", (figures._save_accuracy,))


def components(folder, **options):
    return [
        make_row(folder, "CE", [1.0, 1.4], options={"w_fd": 0, "w_md": 0, "w_ed": 0, "epochs": 3}, **options),
        make_row(folder, "CE + FD", [], wanted=2, failures={1: "killed <by> me"}, options={"epochs": 3}, **options),
        make_row(folder, AD_CORRE, [1.6, 1.5], wanted=3, options={"epochs": 3}, **options),
    ]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_report_is_one_page_with_tables_figures_and_raw_numbers(tmp_path):
    rows = components(tmp_path)
    rows.append(make_row(tmp_path, "other code", [1.0], commit="d" * 40 + "-dirty", options={"epochs": 3}))
    folder = tmp_path / "report"
    written = write_report("components", "What does each add?", rows, folder, COMMAND)
    expected = {f"{name}.csv" for name in ("results", "summary", "ensembles", "recall", "correlations", "references")}
    expected |= {
        f"{name}.tex" for name in ("accuracy", "differences", "ensembles", "recall", "correlations", "references")
    }
    expected |= {"index.html", "report.md", "figures/fer2013-accuracy.png"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected
    assert {str(path.relative_to(folder)) for path in written} == expected

    source = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    (image,) = page.attributes("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == written[-1].read_bytes()
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*?\]\((.*?)\)", markdown) == ["figures/fer2013-accuracy.png"]
    # Nothing is fetched, and it is readable on a telephone and in the dark.
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?://", source)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    assert image["alt"] and "prefers-color-scheme: dark" in source
    assert all((folder / link["href"]).is_file() for link in page.attributes("a")) and page.attributes("a")

    text = "".join(page.texts)
    took = f"CE 0.2, {AD_CORRE} 0.2, other code 0.2 minutes per run"
    commits = f"{'c' * 40}, {'d' * 40}-dirty"
    for fact in (took, "val, 210 images", "0, 1, 2", commits, "mini_xcp", "--epochs 3"):
        assert fact in text and fact in markdown
    assert COMMAND in text and all(line in markdown for line in COMMAND.splitlines())
    assert "--w-fd 0 --w-md 0 --w-ed 0" in text
    assert "Failed: CE + FD, seed 1: killed <by> me" in text
    difference = sum(r["accuracy"] for r in rows[2].results) / 2 - sum(r["accuracy"] for r in rows[0].results) / 2
    assert f"{AD_CORRE} against CE: {100 * difference:+.2f} points" in text
    muted = [attributes for attributes in page.attributes("td") if attributes.get("class") == "muted"]
    assert len(muted) == source.count(">not run</td>") + source.count(">failed</td>") > 0


def test_results_are_raw_and_whole(tmp_path):
    rows = components(tmp_path)
    write_report("components", "Why?", rows, tmp_path / "report", COMMAND)
    records = read_csv(tmp_path / "report/results.csv")
    assert [(record["row"], record["seed"], record["status"]) for record in records] == [
        ("CE", "0", "done"),
        ("CE", "1", "done"),
        ("CE + FD", "0", "not run"),
        ("CE + FD", "1", "failed"),
        (AD_CORRE, "0", "done"),
        (AD_CORRE, "1", "done"),
        (AD_CORRE, "2", "not run"),
    ]
    for record in records:
        if record["status"] == "done":
            row = next(row for row in rows if row.name == record["row"])
            result = row.runs[int(record["seed"])].result
            for name in ("accuracy", "mean_class_recall", "macro_f1", "ece", "train_seconds"):
                assert float(record[name]) == result[name]
            assert float(record["different_classes"]) == result["correlations"]["different_classes"]
    summary = {record["row"]: record for record in read_csv(tmp_path / "report/summary.csv")}
    mean = sum(result["accuracy"] for result in rows[2].results) / 2
    assert float(summary[AD_CORRE]["accuracy_mean"]) == pytest.approx(mean, abs=1e-15)
    assert float(summary[AD_CORRE]["paper_accuracy"]) == 0.7203 and summary["CE + FD"]["accuracy_mean"] == ""


def test_each_data_set_has_its_section_and_its_own_reference(tmp_path):
    rows = [row for dataset in ("rafdb", "fer2013") for row in components(tmp_path, dataset=dataset)]
    rows += [make_row(tmp_path, name, [], wanted=1, dataset="affectnet") for name in ("CE", AD_CORRE)]
    write_report("paper", "Why?", rows, tmp_path / "report", COMMAND)
    page = Page((tmp_path / "report/index.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("section") == 3
    assert "No two rows with a seed in common have finished yet" in "".join(page.texts)
    text = (tmp_path / "report/accuracy.tex").read_text(encoding="utf-8")
    assert re.findall(r"\\label{(.*?)}", text) == [
        f"tab:paper-{name}-accuracy" for name in ("rafdb", "fer2013", "affectnet")
    ]
    summary = read_csv(tmp_path / "report/summary.csv")
    assert [record["difference"] != "" for record in summary] == [False, False, True] * 2 + [False] * 2
    assert [path.name for path in sorted((tmp_path / "report/figures").iterdir())] == [
        "fer2013-accuracy.png",
        "rafdb-accuracy.png",
    ]


@pytest.mark.filterwarnings("ignore:Glyph")  # the figures' font has no Chinese letters
def test_any_name_comes_through(tmp_path):
    odd = "a_b*c* | <script>alert(1)</script> & 100% [x](y) `z` {{ 7 * 7 }} \u03b1 \u8868"
    rows = [make_row(tmp_path, "CE", [1.0]), make_row(tmp_path, "odd", [1.2])]
    rows[1] = Row(odd, "fer2013", {}, (0,), rows[1].runs, {})
    write_report(odd, odd, rows, tmp_path / "report", odd)
    page = Page((tmp_path / "report/index.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts.count(odd) >= 4  # title, head, question, command
    markdown = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    rendered = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    assert "script" not in {tag for tag, _ in rendered.tags}
    assert odd in rendered.texts and f"{odd}\u2021" in rendered.texts and f"{odd}\n" in rendered.texts


def test_a_second_report_replaces_the_first_and_a_failed_one_does_not(tmp_path, monkeypatch):
    rows = [make_row(tmp_path, "CE", [1.0], wanted=2)]
    folder = tmp_path / "report"
    write_report("r", "Why?", rows, folder, COMMAND)
    first = (folder / "index.html").read_text(encoding="utf-8")
    rows = [make_row(tmp_path, "CE", [1.0, 1.1])]

    def full_disk(path, text):
        if path.name == "index.html":
            raise OSError(28, "No space left on device")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_text", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_report("r", "Why?", rows, folder, COMMAND)
    assert (folder / "index.html").read_text(encoding="utf-8") == first
    write_report("r", "Why?", rows, folder, COMMAND)
    second = (folder / "index.html").read_text(encoding="utf-8")
    assert "1 of 2" in first and "2 of 2" in second
    assert not list(folder.rglob(".tmp-*"))


def test_the_same_runs_give_the_same_report(tmp_path):
    rows = [make_row(tmp_path, "CE", [1.0]), make_row(tmp_path, "FD", [1.2])]
    for name in ("one", "two"):
        write_report("r", "Why?", rows, tmp_path / name, COMMAND)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(UserError, match="report r"):
        write_report("r", "Why?", [], tmp_path / "report", COMMAND)
    twice = [make_row(tmp_path, "CE", [], wanted=1)] * 2
    with pytest.raises(UserError, match="CE, CE"):
        write_report("r", "Why?", twice, tmp_path / "report", COMMAND)
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_a_run_of_an_old_version_is_reported_with_blanks(tmp_path, monkeypatch):
    """Its `result.json` with the first version's measures alone gives a whole report too."""
    monkeypatch.undo()  # all figures
    run = RunFiles.read(ROOT / "tests/data/old_runs/fd-seed0")
    rows = [Row("CE + FD", "fer2013", {"w_md": 0, "w_ed": 0}, (0,), {0: run})]
    write_report("old", "Why?", rows, tmp_path / "full", COMMAND)
    (full,) = read_csv(tmp_path / "full/results.csv")
    assert float(full["accuracy"]) == run.result["accuracy"] == 0.5742546670381722
    assert all(full.values())

    first = {name: run.result[name] for name in ("dataset", "split", "n", "accuracy", "class_names")}
    early = RunFiles(run.folder, {**first, "of a later version": {}}, run.predictions, {})
    rows.append(Row("early", "fer2013", {}, (0,), {0: early}))
    write_report("old", "Why?", rows, tmp_path / "part", COMMAND)
    _, record = read_csv(tmp_path / "part/results.csv")
    blank = {name for name, text in record.items() if not text}
    assert float(record["accuracy"]) == run.result["accuracy"] and {"macro_f1", "same_class", "commit"} <= blank
