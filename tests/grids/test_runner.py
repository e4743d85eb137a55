"""Does a grid get done: once each, by several processes, after kills, and past failures?"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_split

import command_line
import config
from config import DatasetName, TrainConfig
from files import UserError, only_writer
from grids import runner as grids
from grids.experiments import PRESETS, make_grid

# Stands in for train.py: takes the folder, does its epochs, and notes every start. Seed 1 fails the first time.
STAND_IN = """
import csv, json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from files import only_writer
options = dict(zip(sys.argv, sys.argv[1:]))
folder = Path(options["--run-dir"])
try:
    with only_writer(folder):
        if (folder / "result.json").exists():  # as train.py, which looks when it has the folder
            sys.exit()
        with open(folder / "starts", "a") as file:
            print(os.getpid(), sorted(os.sched_getaffinity(0)), file=file)
        if options.get("--seed") == "1" and not (folder / "error.json").exists():
            print("\\repoch 1: 2%| [md=1.623]error: the loss is nan\\r\\nsome notice")
            sys.exit(2)
        if options.get("--seed") == "2":
            os.abort()
        path = folder / "history.csv"
        rows = list(csv.reader(open(path)))[1:] if path.exists() else []
        for epoch in range(len(rows), int(options["--epochs"])):
            time.sleep({pause})
            rows.append([epoch + 1])
            with open(path, "w") as file:
                csv.writer(file).writerows([["epoch"], *rows])
            (folder / "state.h5").touch()
        (folder / "result.json").write_text(json.dumps({{"accuracy": 0.5}}))
except Exception as error:
    print("error:", error)
    sys.exit(2)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def use(pause=0.0):
        path = tmp_path / "stand_in.py"
        path.write_text(STAND_IN.format(root=str(ROOT), pause=pause))
        monkeypatch.setattr(grids, "TRAIN", path)
        monkeypatch.setattr(grids, "_POLL_SECONDS", 0.05)

    return use


def runs_in(folder, seeds=1, epochs=2, preset="components", **options):
    base = config.with_options(TrainConfig(), {"epochs": epochs, **options}, "test")
    return grids.runs_of(make_grid(preset, PRESETS[preset], base, False, seeds), folder)


def starts(run):
    return (run.folder / "starts").read_text().splitlines()


def test_every_run_has_the_folder_that_train_py_would_choose(tmp_path):
    runs = runs_in(tmp_path, seeds=2)
    assert len({run.folder for run in runs}) == 10
    assert [run.folder.name for run in runs] == [config.run_id(run.settings) for run in runs]
    assert [run.settings.seed for run in runs] == [0] * 5 + [1] * 5


def test_a_command_gives_back_its_settings(tmp_path):
    for run in runs_in(tmp_path, w_ce=2.5, augment=False):
        assert run.command[:2] == ["python", "train.py"]
        parsed = command_line.parse_options(TrainConfig, args=run.command[2:])
        assert config.identity(parsed) == config.identity(run.settings)
        assert parsed.run_dir == str(run.folder)


def test_a_finished_run_is_found_under_any_name(tmp_path):
    wanted = runs_in(tmp_path)[1]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "result.json").write_text(json.dumps({"config": config.identity(wanted.settings)}))
    assert [run.folder.name for run in runs_in(tmp_path)].index("mine") == 1
    assert [run.state() for run in runs_in(tmp_path)] == ["waiting", "finished", "waiting", "waiting", "waiting"]


def test_an_option_younger_than_a_result_has_its_default(tmp_path):
    old = config.identity(TrainConfig(epochs=3))
    del old["loss"]["ramp_epochs"]
    assert config.settings_of(old) == TrainConfig(epochs=3)
    assert config.settings_of({**old, "loss": {"w_xx": 1}}) is None


def test_all_runs_get_done_once(tmp_path, stand_in, capsys):
    stand_in()
    runs = runs_in(tmp_path)
    assert grids.run_grid(runs, jobs=2) == {"finished": runs}
    assert all(len(starts(run)) == 1 for run in runs)
    line = capsys.readouterr().err.split("\r")[-1]
    assert "5/5 runs" in line and "10/10" in line
    grids.run_grid(runs)
    assert all(len(starts(run)) == 1 for run in runs)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_jobs_do_not_share_a_core(tmp_path, stand_in):
    stand_in(pause=0.3)
    runs = runs_in(tmp_path)[:2]
    grids.run_grid(runs, jobs=2)
    cores = [set(json.loads(starts(run)[0].partition(" ")[2])) for run in runs]
    assert cores[0] and cores[1] and not cores[0] & cores[1]


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, stand_in):
    stand_in()
    runs = [run for run in runs_in(tmp_path, seeds=4) if run.experiment.name == "CE"]
    states = grids.run_grid(runs)
    assert [run.settings.seed for run in states["finished"]] == [0, 3]
    assert [run.settings.seed for run in states["failed"]] == [1, 2]
    error = json.loads((runs[1].folder / "error.json").read_text())
    assert (error["exit_code"], error["message"]) == (2, "the loss is nan")
    assert error["command"].startswith("python stand_in.py --")
    assert runs[2].error() == f"ended with code {-signal.SIGABRT} without a word"

    states = grids.run_grid(runs)  # seed 1 works the second time
    assert [run.settings.seed for run in states["failed"]] == [2]
    assert runs[1].error() is None and not (runs[1].folder / "error.json").exists()


def test_a_run_that_another_process_has_taken_is_passed_over(tmp_path, stand_in):
    stand_in()
    runs = runs_in(tmp_path)
    with only_writer(runs[0].folder):
        states = grids.run_grid(runs)
        assert states == {"running": runs[:1], "finished": runs[1:]}
    assert not (runs[0].folder / "starts").exists()


def test_two_processes_share_a_grid_and_never_take_the_same_run(tmp_path, stand_in):
    stand_in(pause=0.05)
    code = (
        "import sys; sys.path[:0] = {paths!r}\n"
        "import test_runner; from grids import runner; from pathlib import Path\n"
        "runner.TRAIN = Path({train!r}); runner._POLL_SECONDS = 0.01\n"
        "runner.run_grid(test_runner.runs_in({folder!r}, preset='loss-weights'))"
    ).format(
        paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/grids")],
        train=str(grids.TRAIN),
        folder=str(tmp_path / "runs"),
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    runs = runs_in(tmp_path / "runs", preset="loss-weights")
    assert [run.state() for run in runs] == ["finished"] * 6
    assert [len(starts(run)) for run in runs] == [1] * 6


def test_a_stopped_run_goes_on(tmp_path, stand_in):
    stand_in(pause=0.2)
    run = runs_in(tmp_path, epochs=4)[0]
    job = grids.Job(run, 0, 1)
    deadline = time.monotonic() + 20
    while run.epochs_done() < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    job.stop()
    assert run.state() == "stopped" and 1 <= run.epochs_done() < 4
    assert grids.run_grid([run]) == {"finished": [run]}
    assert len(starts(run)) == 2
    with open(run.folder / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_data_sets_that_are_not_prepared_are_left_out(tmp_path, capsys):
    write_split(tmp_path / "data", [0, 1], dataset="rafdb")
    runs = runs_in(tmp_path, preset="paper", data_dir=str(tmp_path / "data"))
    assert {run.settings.dataset for run in grids.with_data(runs)} == {DatasetName.rafdb}
    assert capsys.readouterr().out == "left out, for it is not prepared: affectnet, fer2013\n"
    with pytest.raises(UserError, match="none of affectnet, fer2013, rafdb is prepared"):
        grids.with_data(runs_in(tmp_path, preset="paper", data_dir=str(tmp_path / "nothing")))
    synthetic = runs_in(tmp_path, data_dir=str(tmp_path / "nothing"))
    assert grids.with_data(synthetic) == synthetic
