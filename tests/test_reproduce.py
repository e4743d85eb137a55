"""The command from end to end: a real small grid, its list, its report, its refusals."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
from conftest import ROOT, run_python

import reproduce
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from files import UserError

YAML = """
about: Does FD change anything in two epochs?
base: {epochs: 2, batch_size: 30, num_embeddings: 2, embedding_size: 8, input_size: 16}
rows:
  - {name: CE, w_fd: 0, w_md: 0, w_ed: 0}
  - {name: CE + FD, w_md: 0, w_ed: 0}
  - {name: "diverges", learning_rate: 1.0e+30, optimizer: adam}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a file of three rows, one of which cannot but fail."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(folder / "data"), num_train=60, num_val=28, num_test=28))
    (folder / "mine.yaml").write_text(YAML)
    return folder


def words(place, command, *more):
    return [command, "mine.yaml", "--seeds", "1", "--data-dir", "data", "--run-dir", "runs", *more]


def in_process(place, monkeypatch, *args):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["reproduce.py", *args])
    reproduce.main()


@pytest.fixture(scope="module")
def done(place):
    return run_python(ROOT / "reproduce.py", *words(place, "run", "--jobs", "2"), cwd=place)


def test_the_grid_gets_done_and_the_failure_is_told(place, done):
    assert done.returncode == 2
    assert "2 finished, 1 failed" in done.stdout
    assert "failed: diverges, synthetic, seed 0" in done.stderr and "the loss is nan" in done.stderr
    assert done.stderr.rstrip().endswith("error: 1 of 3 runs failed, see above; the same command tries them again")
    assert len(list(place.glob("runs/*/result.json"))) == 2
    (error,) = place.glob("runs/*/error.json")
    assert json.loads(error.read_text())["exit_code"] == 2


def test_list_prints_what_is_left(place, done, monkeypatch, capsys):
    in_process(place, monkeypatch, *words(place, "list"))
    (line,) = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:2] == ["python", "train.py"] and "1e+30" in line
    in_process(place, monkeypatch, *words(place, "list", "--all"))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_report_and_the_same_report_from_what_it_kept(place, done, monkeypatch):
    in_process(place, monkeypatch, *words(place, "report", "--keep-results"))
    folder = place / "reports" / "synthetic-mine"
    with open(folder / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    assert [(row["row"], row["seed"]) for row in rows] == [("CE", "0"), ("CE + FD", "0")]
    results = [json.loads(path.read_text()) for path in place.glob("runs/*/result.json")]
    assert {float(row["accuracy"]) for row in rows} == {result["accuracy"] for result in results}
    page = (folder / "index.html").read_text()
    assert "Does FD change anything" in page and "failed" in page and "the loss is nan" in page

    kept = folder / "experiments.yaml"
    args = ["--seeds", "1", "--run-dir", folder / "runs", "--report-dir", place / "again", "--name", "synthetic-mine"]
    in_process(place, monkeypatch, "report", str(kept), *map(str, args))
    for name in ("results.csv", "summary.csv"):
        assert (place / "again" / "synthetic-mine" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "moon"], "expected one of paper, components"),
        (["run", "--seeds", "2", "rivals"], "expected the experiments right after run"),
        (["run", "components", "--seeds", "0"], "--seeds: expected 1 or more"),
        (["run", "components", "--jobs", "0"], "--jobs: expected 1 or more"),
        (["run", "components", "--epochs", "0"], "--epochs: expected 1 to"),
        (["run", "paper"], "none of affectnet, fer2013, rafdb is prepared"),
        (["report", "components"], "expected a finished run of components with these options, found none"),
    ],
)
def test_mistakes_are_told_in_one_message(tmp_path, monkeypatch, args, message):
    with pytest.raises(UserError, match=message):
        in_process(tmp_path, monkeypatch, *args)
