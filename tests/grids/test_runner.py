"""The runs of a grid: done once each, by several processes, after interruptions and past failures."""

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
from grids import progress, runner
from grids.experiments import make_grid, read_experiments
from run_identity import RunIdentity, options_of

# Replaces train.py: locks the folder, does its epochs, and records every start. Seed 1 fails the first time.
STAND_IN = """
import csv, json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from files import only_writer
options = dict(zip(sys.argv, sys.argv[1:]))
folder = Path(options["--run-dir"])
try:
    with only_writer(folder):
        if (folder / "result.json").exists():  # as train.py, which looks when it has the lock
            sys.exit()
        with open(folder / "starts", "a") as file:
            print(os.getpid(), sorted(os.sched_getaffinity(0)), file=file)
        with open(folder / "gpu", "w") as file:
            names = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"
            json.dump({{name: os.environ[name] for name in names if name in os.environ}}, file)
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
        monkeypatch.setattr(runner, "TRAIN", path)
        monkeypatch.setattr(runner, "_POLL_SECONDS", 0.05)

    return use


def runs_in(folder, seeds=1, epochs=2, experiments="components", **options):
    base = config.with_options(TrainConfig(), {"epochs": epochs, **options}, "test")
    return runner.runs_of(make_grid(read_experiments(experiments), base, False, seeds), folder)


def starts(run):
    return (run.folder / "starts").read_text().splitlines()


def test_a_command_does_its_run_in_the_folder_that_train_py_would_choose(tmp_path):
    runs = runs_in(tmp_path, seeds=2, w_ce=2.5, augment=False)
    assert [run.folder for run in runs] == [tmp_path / RunIdentity(options_of(run.settings), {}).name for run in runs]
    assert len({run.folder for run in runs}) == 10 and [run.settings.seed for run in runs] == [0] * 5 + [1] * 5
    for run in runs[:5]:
        assert run.command[:2] == ["python", "train.py"]
        parsed = command_line.parse_options(TrainConfig, args=run.command[2:])
        assert options_of(parsed) == options_of(run.settings)
        assert parsed.run_dir == str(run.folder)


def test_finished_runs_are_found_under_any_name_beside_damaged_results(tmp_path, capsys):
    wanted = runs_in(tmp_path)
    results = {
        "mine": json.dumps({"config": options_of(wanted[1].settings), "a later measure": 1}),
        "measured": json.dumps({"accuracy": 0.5}),  # by test.py, of no run
        "later": json.dumps({"config": {"an option of a later version": 1}}),
        "of another type": json.dumps({"config": {"dataset": "moon"}}),
        "half": '{"accuracy": 0.',
        "list": "[]",
        wanted[3].folder.name: "",
    }
    for name, text in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    runs = runs_in(tmp_path)
    assert [run.state() for run in runs] == ["waiting", "finished", "waiting", "unreadable", "waiting"]
    assert runs[1].folder.name == "mine" and "result.json" in runs[3].error()
    named = capsys.readouterr().err.splitlines()
    assert len(named) == 3
    assert all(any(name in line for line in named) for name in ("half", "list", wanted[3].folder.name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", '{"model": 5}'),
        ("config.json", '{"digests": {"train": 5}}'),
        ("config.json", "[" * 100_000),
        ("result.json", "3"),
        ("result.json", "9" * 10_000),
    ],
)
def test_a_run_whose_options_or_result_are_damaged_is_named_and_passed_over(tmp_path, capsys, name, text):
    folder = runs_in(tmp_path)[1].folder
    folder.mkdir()
    (folder / name).write_text(text)
    runs = runs_in(tmp_path)
    assert [run.state() for run in runs] == ["waiting", "unreadable", "waiting", "waiting", "waiting"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / name) in line and str(folder / name) in runs[1].error()


@pytest.mark.parametrize("text", ["epoch,seconds\n1,soon\n", "epoch,seconds\n1,nan\n", "epoch,seconds\n\xff"])
def test_a_damaged_history_stops_nothing(tmp_path, capsys, text):
    run = runs_in(tmp_path)[0]
    run.folder.mkdir()
    (run.folder / "history.csv").write_text(text, encoding="latin-1")
    (run.folder / "error.json").mkdir()
    run = runs_in(tmp_path)[0]
    assert ("history.csv" in capsys.readouterr().err) == ("nan" not in text)
    assert sum(run.epoch_seconds()) == 0 and run.state() == "failed" and "error.json" in run.error()
    progress.TimeLeft([run], 1).seconds([run])


def test_a_run_of_an_old_version_is_found():
    """Its `config` lacks the options that came later: they have their defaults."""
    options = {"dataset": "fer2013", "epochs": 12, "batch_size": 64, "input_size": 36, "warmup_epochs": 1}
    runs = runs_in(ROOT / "tests/data/old_runs", **options)
    assert [run.folder.name for run in runs if run.state() == "finished"] == ["fd-seed0"]
    assert [run.experiment.name for run in runs if run.state() == "finished"] == ["CE + FD"]


def test_all_runs_are_done_once_on_cores_of_their_own(tmp_path, stand_in, capsys):
    stand_in(pause=0.1)
    runs = runs_in(tmp_path)
    assert runner.run_grid(runs, jobs=2) == {"finished": runs}
    lines = capsys.readouterr().err.splitlines()
    assert "5/5 runs" in lines[-1] and "10/10 epochs" in lines[-1]
    assert 5 < len(lines) < 12 and not any("\r" in line for line in lines)  # one where a run begins or ends
    runner.run_grid(runs)
    assert all(len(starts(run)) == 1 for run in runs)
    if len(os.sched_getaffinity(0)) > 1:  # the first two ran at the same time
        one, two = (set(json.loads(starts(run)[0].partition(" ")[2])) for run in runs[:2])
        assert one and two and not one & two


def write_history(run, *seconds):
    run.folder.mkdir(exist_ok=True)
    rows = [f"{i + 1},{value}" for i, value in enumerate(seconds)]
    (run.folder / "history.csv").write_text("\n".join(["epoch,seconds", *rows]) + "\n")


def finish(run):
    (run.folder / "result.json").write_text("{}")


def test_the_time_left_counts_the_epochs_of_each_row_as_they_are_now(tmp_path):
    """Two rows, two seeds, 10 epochs each: a row of 2 s per epoch, and one of 30 s."""
    rows = "rows: [{name: small}, {name: large, arch: xcp}]\n"
    (tmp_path / "two.yaml").write_text(rows)
    runs = runs_in(tmp_path / "runs", seeds=2, epochs=10, experiments=str(tmp_path / "two.yaml"))
    (tmp_path / "runs").mkdir()
    small, large, small_1, large_1 = runs
    write_history(small, *[9.0] * 4)  # of a session before, when the machine was slower
    left = progress.TimeLeft(runs, jobs=1)
    assert left.seconds([small]) == 6 * 9 + 30 * 9  # nothing else is known yet
    write_history(small, *[9.0] * 4, *[2.0] * 6)
    finish(small)
    left.ended(small, seconds=15)  # 3 s beside the epochs
    assert left.seconds([large]) == 3 * (3 + 10 * 2)
    write_history(large, 100.0, 30.0, 30.0, 30.0, 30.0, 30.0)  # the first, with the compilation, counts no longer
    assert left.seconds([large]) == (3 + 4 * 30) + (3 + 10 * 2) + (3 + 10 * 30)
    left.jobs = 2
    assert left.seconds([large, small_1]) == 3 + 10 * 30  # large_1 alone takes longer than half of all
    with only_writer(large_1.folder):  # in another process
        left.jobs = 1
        assert left.seconds([large]) == (3 + 4 * 30) + (3 + 10 * 2)
    for run in (large, small_1, large_1):
        left.ended(run, 1.0)
    assert left.seconds([]) == 0
    assert progress.TimeLeft(runs_in(tmp_path / "none"), 1).seconds([]) is None


def test_a_failed_run_is_recorded_and_the_others_continue(tmp_path, stand_in):
    stand_in()
    runs = [run for run in runs_in(tmp_path, seeds=4) if run.experiment.name == "CE"]
    states = runner.run_grid(runs)
    assert [run.settings.seed for run in states["finished"]] == [0, 3]
    assert [run.settings.seed for run in states["failed"]] == [1, 2]
    error = json.loads((runs[1].folder / "error.json").read_text())
    assert (error["exit_code"], error["message"]) == (2, "the loss is nan")
    assert error["command"].startswith("python stand_in.py --")
    assert runs[2].error() == "killed by SIGABRT"

    states = runner.run_grid(runs)  # seed 1 works the second time
    assert [run.settings.seed for run in states["failed"]] == [2]
    assert runs[1].error() is None and not (runs[1].folder / "error.json").exists()
    (runs[2].folder / "error.json").write_text("[")
    assert "error.json" in runs[2].error()


def test_runs_that_are_taken_or_unreadable_are_passed_over(tmp_path, stand_in):
    stand_in()
    folder = runs_in(tmp_path)[1].folder
    folder.mkdir()
    (folder / "result.json").write_text("[]")
    runs = runs_in(tmp_path)
    with only_writer(runs[0].folder):
        states = runner.run_grid(runs)
        assert states == {"running": runs[:1], "unreadable": runs[1:2], "finished": runs[2:]}
    assert [(run.folder / "starts").exists() for run in runs] == [False] * 2 + [True] * 3


def test_two_processes_share_a_grid_and_never_do_the_same_run(tmp_path, stand_in):
    stand_in(pause=0.05)
    code = (
        "import sys; sys.path[:0] = {paths!r}\n"
        "import test_runner; from grids import runner; from pathlib import Path\n"
        "runner.TRAIN = Path({train!r}); runner._POLL_SECONDS = 0.01\n"
        "runner.run_grid(test_runner.runs_in({folder!r}))"
    ).format(
        paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/grids")],
        train=str(runner.TRAIN),
        folder=str(tmp_path / "runs"),
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    runs = runs_in(tmp_path / "runs")
    assert [run.state() for run in runs] == ["finished"] * 5
    assert [len(starts(run)) for run in runs] == [1] * 5


def test_a_stopped_run_continues(tmp_path, stand_in):
    stand_in(pause=0.1)
    run = runs_in(tmp_path, epochs=4)[0]
    job = runner.Job(run, 0, 1)
    deadline = time.monotonic() + 20
    while run.epochs_done() < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    job.ask_to_stop()
    job.stop()
    assert run.state() == "stopped" and 1 <= run.epochs_done() < 4
    assert runner.run_grid([run]) == {"finished": [run]}
    assert len(starts(run)) == 2
    with open(run.folder / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_workers_get_their_share_of_the_gpus(tmp_path, stand_in, monkeypatch):
    stand_in(pause=0.1)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    runs = runs_in(tmp_path)[:4]
    assert runner.run_grid(runs, jobs=3) == {"finished": runs}
    found = [json.loads((run.folder / "gpu").read_text()) for run in runs]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert found[:3] == [
        {"CUDA_VISIBLE_DEVICES": "4", **memory},
        {"CUDA_VISIBLE_DEVICES": "7"},
        {"CUDA_VISIBLE_DEVICES": "4", **memory},
    ]
    assert found[3] in found[:3]


STARTER = """
import sys
sys.path[:0] = {paths!r}
import test_runner
from files import run_command
from grids import runner
from pathlib import Path
runner.TRAIN = Path({train!r})
runner._POLL_SECONDS = 0.05
raise SystemExit(run_command(lambda: runner.run_grid(test_runner.runs_in({folder!r}, epochs=600))))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_worker_ends_with_the_process_that_started_it(tmp_path, stand_in, number, code):
    stand_in(pause=0.1)
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/grids")]
    program = STARTER.format(paths=paths, train=str(runner.TRAIN), folder=str(tmp_path / "runs"))
    starter = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    run = runs_in(tmp_path / "runs", epochs=600)[0]
    wait_for(lambda: run.epochs_done())
    assert run.state() == "running"
    starter.send_signal(number)
    message = starter.communicate(timeout=30)[1].splitlines()[-1]
    assert starter.returncode == code and ("SIGTERM" in message) == (code == 143)
    wait_for(lambda: run.state() == "stopped")  # the system has released its lock
    assert not (run.folder / "error.json").exists()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_is_reported_by_its_signal(tmp_path, stand_in):
    stand_in(pause=0.1)
    run = runs_in(tmp_path, epochs=600)[0]
    job = runner.Job(run, 0, 1)
    wait_for(lambda: run.epochs_done())
    job.process.kill()
    wait_for(job.ended)
    error = json.loads((run.folder / "error.json").read_text())
    assert (
        error["exit_code"] == -9 and error["message"].startswith("killed by SIGKILL") and "memory" in error["message"]
    )
    assert runner._how_it_ended(143, "epoch 1").startswith("killed by SIGTERM")
    assert runner._how_it_ended(1, "") == "ended with code 1 and without a message"


def test_data_sets_that_are_not_prepared_are_left_out(tmp_path, capsys):
    write_split(tmp_path / "data", [0, 1], dataset="rafdb")
    runs = runs_in(tmp_path, experiments="paper", data_dir=str(tmp_path / "data"))
    assert {run.settings.dataset for run in runner.with_data(runs)} == {DatasetName.rafdb}
    printed = capsys.readouterr()
    assert "affectnet, fer2013" in printed.err and not printed.out  # the output of `list` is commands only
    with pytest.raises(UserError, match="affectnet, fer2013, rafdb"):
        runner.with_data(runs_in(tmp_path, experiments="paper", data_dir=str(tmp_path / "nothing")))
    synthetic = runs_in(tmp_path, data_dir=str(tmp_path / "nothing"))
    assert runner.with_data(synthetic) == synthetic


def test_a_log_file_gets_a_line_when_something_changes_or_after_ten_minutes(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    runs = runs_in(tmp_path)
    with progress.Progress(runs, jobs=1) as shown:
        for seconds, active in ((0, []), (5, []), (10, runs[:1]), (300, runs[:1]), (611, runs[:1])):
            now[0] = 1000.0 + seconds
            shown.show(active)
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1] == lines[2] and runs[0].title in lines[1] and runs[0].title not in lines[0]
