"""The command from end to end: a small grid, its list, its report and its refusals."""

from __future__ import annotations

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

import reproduce
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from files import UserError, only_writer
from reporting import figures

YAML = """
about: Does anything change in one epoch?
base: {epochs: 1, batch_size: 30, num_embeddings: 2, embedding_size: 8, input_size: 16}
rows:
  - {name: CE, w_fd: 0, w_md: 0, w_ed: 0}
  - {name: fails, weights: nothing.weights.h5}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a file of two rows, one of which always fails."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(folder / "data"), num_train=60, num_val=28, num_test=28))
    (folder / "mine.yaml").write_text(YAML)
    return folder


def words(command, *more):
    return [command, "mine.yaml", "--seeds", "1", "--data-dir", "data", "--run-dir", "runs", *more]


def in_process(place, monkeypatch, *args):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["reproduce.py", *args])
    reproduce.main()


@pytest.mark.slow
def test_a_grid_from_its_runs_to_its_report(place, monkeypatch, capsys):
    done = run_python(ROOT / "reproduce.py", *words("run", "--jobs", "2"), cwd=place)
    assert done.returncode == 2 and "1 finished, 1 failed" in done.stdout
    assert "fails, synthetic, seed 0" in done.stderr and "nothing.weights.h5" in done.stderr
    (path,) = place.glob("runs/*/result.json")
    (error,) = place.glob("runs/*/error.json")
    assert json.loads(error.read_text())["exit_code"] == 2

    in_process(place, monkeypatch, *words("list"))
    (line,) = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:2] == ["python", "train.py"] and "nothing.weights.h5" in line
    in_process(place, monkeypatch, *words("list", "--all"))
    assert len(capsys.readouterr().out.splitlines()) == 2

    in_process(place, monkeypatch, *words("report", "--keep-results"))
    folder = place / "reports" / "synthetic-mine"
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in printed if str(error.parent) not in line)
    (ce,) = [line for line in printed if line.startswith("CE ")]
    assert f"{100 * json.loads(path.read_text())['accuracy']:.2f}" in ce and "1 of 1" in ce
    assert any("reports/synthetic-mine/index.html" in line for line in printed)
    with open(folder / "results.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["status"] == "done"]
    assert row["row"] == "CE" and float(row["accuracy"]) == json.loads(path.read_text())["accuracy"]
    page = (folder / "index.html").read_text()
    assert "Does anything change" in page and "failed" in page and "nothing.weights.h5" in page
    assert (path.parent / "history.png").is_file()

    # The same report from the files that it kept.
    args = ["--seeds", "1", "--run-dir", folder / "runs", "--report-dir", place / "again", "--name", "synthetic-mine"]
    in_process(place, monkeypatch, "report", str(folder / "experiments.yaml"), *map(str, args))
    for name in ("results.csv", "summary.csv"):
        assert (place / "again" / "synthetic-mine" / name).read_bytes() == (folder / name).read_bytes()


def old_grid(tmp_path):
    """A grid of one row, of which one seed has a result of an old version and another a damaged one."""
    options = "dataset: fer2013, epochs: 12, batch_size: 64, input_size: 36, warmup_epochs: 1, w_md: 0, w_ed: 0"
    (tmp_path / "old.yaml").write_text(f"rows: [{{name: CE + FD, {options}}}]\n")
    write_split(tmp_path / "data", [0, 1], dataset="fer2013")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(ROOT / "tests/data/old_runs/fd-seed0")
    return ["old.yaml", "--seeds", "3"]


def test_damaged_results_are_named_and_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "_DRAWERS", ())  # tested elsewhere, and slow
    grid = old_grid(tmp_path)
    in_process(tmp_path, monkeypatch, "list", *grid)
    one, two = capsys.readouterr().out.splitlines()  # of seeds 1 and 2
    damaged = tmp_path / shlex.split(one)[-1]
    damaged.mkdir()
    (damaged / "result.json").write_text('{"accuracy": 0.')
    in_process(tmp_path, monkeypatch, "list", *grid)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [two] and damaged.name in printed.err

    cut = tmp_path / shlex.split(two)[-1]
    cut.mkdir()
    (cut / "result.json").write_text((tmp_path / "runs/mine/result.json").read_text().replace('"seed": 0', '"seed": 2'))
    in_process(tmp_path, monkeypatch, "report", *grid)
    with open(tmp_path / "reports/fer2013-old/results.csv", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done", "failed", "failed"]
    printed = capsys.readouterr().err
    assert damaged.name in printed and f"{cut.name}/predictions.npz" in printed
    page = (tmp_path / "reports/fer2013-old/index.html").read_text()
    assert damaged.name in page and cut.name in page

    with pytest.raises(UserError, match=damaged.name):
        in_process(tmp_path, monkeypatch, "run", *grid)
    assert "2 finished, 1 unreadable" in capsys.readouterr().out


def test_other_views_and_the_images_without_a_copy_are_reported(tmp_path, monkeypatch):
    """The images of train are those of rows 0 and 1, and every 256th of val is the same: 30 of 3,589."""
    monkeypatch.setattr(figures, "_DRAWERS", ())
    grid = old_grid(tmp_path)
    with pytest.raises(UserError, match=r"predictions of flip.*test\.py evaluate .* --views flip .*--run-dir RUN/flip"):
        in_process(tmp_path, monkeypatch, "report", *grid, "--views", "flip")
    run = tmp_path / "runs/mine"
    run.unlink()
    for folder in (run, run / "flip"):
        shutil.copytree(ROOT / "tests/data/old_runs/fd-seed0", folder)
    result = json.loads((run / "result.json").read_text())
    (run / "flip/result.json").write_text(json.dumps({**result, "views": "flip"}))

    write_split(tmp_path / "data", np.arange(9) % 7, dataset="fer2013", split="val")
    with pytest.raises(UserError, match="--without-copies: expected fer2013/val in data"):
        in_process(tmp_path, monkeypatch, "report", *grid, "--without-copies")
    write_split(tmp_path / "data", np.arange(3589) % 7, dataset="fer2013", split="val")
    in_process(tmp_path, monkeypatch, "report", *grid, "--without-copies", "--views", "flip", "--keep-results")
    folder = tmp_path / "reports/fer2013-old-flip"
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "n = 3,559, without the 30 images that have a copy in train" in page and "Views averaged: `flip`" in page
    assert "--without-copies" in page and "--views flip" in page
    assert (folder / "runs/mine/flip/predictions.npz").is_file()


def test_a_grid_that_another_process_is_doing_does_not_end_with_0(tmp_path, monkeypatch, capsys):
    grid = old_grid(tmp_path)
    in_process(tmp_path, monkeypatch, "list", *grid)
    one, two = (tmp_path / shlex.split(line)[-1] for line in capsys.readouterr().out.splitlines())
    with only_writer(one), only_writer(two), pytest.raises(UserError, match=r"2 of 3 runs .*another process"):
        in_process(tmp_path, monkeypatch, "run", *grid)
    assert "1 finished, 2 running" in capsys.readouterr().out


def test_the_recipe_of_the_experiments_is_used(tmp_path, monkeypatch, capsys):
    write_split(tmp_path / "data", [0, 1], dataset="rafdb")
    in_process(tmp_path, monkeypatch, "list", "paper", "--seeds", "1")
    ce, ad_corre = (line.partition(" --run-dir")[0] for line in capsys.readouterr().out.splitlines())
    assert "--epochs 300" in ce and "--w-fd 0" in ce and "--epochs 300" in ad_corre and "--w-fd" not in ad_corre
    in_process(tmp_path, monkeypatch, "list", "paper", "--seeds", "1", "--recipe", "default")
    assert "--epochs" not in capsys.readouterr().out


def test_mistakes_are_one_message(tmp_path, monkeypatch):
    cases = [
        (["run", "moon"], "components.*'moon'"),
        (["run", "--seeds", "2", "rivals"], "rivals.*after run"),
        (["run", "components", "--seeds", "0"], "--seeds.*1.*0"),
        (["run", "components", "--jobs", "0"], "--jobs.*1.*0"),
        (["report", "components"], "finished run of components"),
    ]
    for args, facts in cases:
        with pytest.raises(UserError, match=facts):
            in_process(tmp_path, monkeypatch, *args)
