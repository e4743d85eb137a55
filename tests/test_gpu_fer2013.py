"""The GPU benchmark on a CPU: its schedule, its steps, a kill, its files and its table."""

from __future__ import annotations

import json
import math
import signal
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_fer2013 as gpu

from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from files import UserError, run_command
from model_files import model_file

pytestmark = pytest.mark.slow

STEPS = 5
# 64 pictures in batches of 16: 4 steps an epoch.
TOY = ["--dataset", "synthetic", "--arch", "mini_xcp", "--size", "24", "--batch-size", "16", "--precision", "float32"]
TOY += ["--share", "0.1", "--steps", str(STEPS), "--save-seconds", "0", "--pretrained", "none"]
# Runs commands one after the other where TensorFlow cannot be imported.
DRIVER = """
import json, os, signal, sys
sys.path.insert(0, {benchmarks!r})
sys.modules["tensorflow"] = None  # every import of it fails
import gpu_fer2013
import plots
from files import run_command

plots.save_figures = lambda *args: None  # tested elsewhere, and slow
report, save = gpu_fer2013.Run._report, gpu_fer2013.Run.save

def save_and_die(run):
    save(run)
    if {kill} and run.notes["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)

def report_whole(run):
    if run.options.run_dir.name == "whole":
        report(run)

gpu_fer2013.Run.save, gpu_fer2013.Run._report = save_and_die, report_whole
for sys.argv[1:] in json.loads(sys.argv[1]):
    code = run_command(gpu_fer2013.main)
    assert code == 0, code
assert not [name for name in sys.modules if name.startswith("tensorflow.")]
"""


# --- a run, a killed run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """On JAX ``killed/ad_corre``, killed and resumed, and ``whole/ad_corre`` and ``whole/ce``; the second output."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes = {"num_train": 640, "num_val": 210, "num_test": 1, "size": 24}
    write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(folder / "data"), **sizes))

    def run(*commands, kill):
        commands = [
            [*TOY, "--data-dir", f"{folder}/data", "--run-dir", f"{folder}/{a}", "--losses", *b] for a, b in commands
        ]
        driver = DRIVER.format(benchmarks=str(ROOT / "benchmarks"), kill=kill)
        return run_python("-c", driver, json.dumps(commands))

    with pytest.MonkeyPatch.context() as patch:
        # XLA's compiler takes most of the time: less of it, and not again for what another run has compiled.
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        killed = run(("killed", ["ad_corre"]), kill=True)
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        assert not (folder / "killed" / "ad_corre" / "result.json").exists()
        done = run(("killed", ["ad_corre"]), ("whole", ["ad_corre", "ce"]), kill=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, whole=folder / "whole", output=done.stdout)


@pytest.mark.parametrize(("loss", "terms"), [("ce", {"ce"}), ("ad_corre", {"ce", "fd", "md", "ed"})])
def test_a_run_reports_all_that_it_measured(runs, loss, terms):
    whole = runs.whole
    result, flipped = (json.loads((whole / loss / name).read_text()) for name in ("result.json", "flip/result.json"))
    assert (result["dataset"], result["split"], result["n"], result["share"]) == ("synthetic", "val", 21, 0.1)
    assert (result["selected_on"], result["steps"], result["start"]) == ("val", STEPS, "scratch")
    assert (result["platform"], result["flip"], flipped["flip"]) == ("cpu", False, True)
    assert result["minutes"] > 0 and result["images_per_second"] > 0 and result["config"]["loss"]["name"] == loss
    history = result["history"]
    assert [row["step"] for row in history] == [4, STEPS]  # the epoch's end, the schedule's end
    for row in history:
        assert terms == set(row) & {"ce", "fd", "md", "ed"} and math.isfinite(row["loss"])
        weights = {"ce": result["config"]["loss"]["w_ce"] or 50 / 7}
        assert row["loss"] == pytest.approx(sum(weights.get(term, 1.0) * row[term] for term in terms), rel=1e-4)
    best = max(row["val_accuracy"] for row in history)
    assert history[result["best_epoch"] - 1]["val_accuracy"] == best
    assert result["last_accuracy"] == history[-1]["val_accuracy"]


def test_a_killed_run_goes_on_to_the_same_weights(runs):
    assert "ad_corre: going on at step 2 of 5" in runs.output
    states = []
    for folder in ("whole", "killed"):
        with np.load(runs.folder / folder / "ad_corre" / "state.npz") as file:
            states.append(dict(file))
    notes = [json.loads(str(state.pop("notes"))) for state in states]
    assert len(states[0]) > 100 and set(states[0]) == set(states[1])
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)
    for row in (row for note in notes for row in note["history"]):
        del row["seconds"]
    assert notes[0]["history"] == notes[1]["history"] and len(notes[0]["history"]) == 2


def test_the_parts_join_to_the_weights_that_were_measured(runs, tmp_path):
    """Read here by TensorFlow: the probabilities are those that JAX wrote."""
    import evaluation
    from data_helper import open_split

    target, folder = tmp_path / "joined.weights.h5", runs.whole / "ad_corre"
    gpu.join(folder, target)
    network, info = model_file.load_model(target)
    assert (info.network.arch, info.network.input_size, info.dataset) == ("mini_xcp", 24, "synthetic/train")
    options = SimpleNamespace(data_dir=runs.folder / "data", dataset="synthetic", share=0.1, seed=0)
    val = gpu.open_share(options, "val")
    assert len(open_split(options.data_dir, "synthetic", "val")) == 210
    with np.load(folder / "predictions.npz") as file:
        np.testing.assert_array_equal(file["labels"], val.labels)
        np.testing.assert_allclose(evaluation.predict(network, val.images)[0], file["probabilities"], atol=1e-4)


def test_another_run_in_the_folder_is_refused(tmp_path):
    assert not gpu.same_run(tmp_path, {"size": 96, "loss": {"w_fd": 1.0}})
    assert gpu.same_run(tmp_path, {"size": 96, "loss": {"w_fd": 1.0}})
    with pytest.raises(UserError, match=r"other options \(loss.w_fd: 1.0 -> 0.0\)"):
        gpu.same_run(tmp_path, {"size": 96, "loss": {"w_fd": 0.0}})


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    assert gpu.Run._read_state(run) is None
    np.savez(tmp_path / "state.npz", notes=np.array('{"step": 3}'), a=np.ones(1000))
    (array,) = gpu.Run._read_state(run)
    assert run.notes == {"step": 3} and array.sum() == 1000
    content = (tmp_path / "state.npz").read_bytes()
    for damaged in (content[:2000], content.replace(np.ones(2).tobytes(), np.zeros(2).tobytes(), 1), b""):
        (tmp_path / "state.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"state.npz: the checkpoint is damaged"):
            gpu.Run._read_state(run)


# --- the schedule -----------------------------------------------------------------------------------------------


def test_the_schedule_ends_within_the_time(monkeypatch):
    """A step with a hundredth of a 1 s validation: 0.05 s; 10 s of saving after 40 s: times 1.25; slack: times 1.6.

    That is 0.1 s; of 300.05 s 60 are gone and 40 kept for the report: 200.05 s, 2,000 steps.
    """
    monkeypatch.setattr(gpu, "REPORT_S", 40.0)
    monkeypatch.setattr(gpu, "SLACK", 0.6)
    assert gpu.decide_steps(300.05, 60, 0.04, 1.0, 10.0, 100, 40.0) == 2000
    # Saved after every call: half of the time is saving.
    assert gpu.decide_steps(300.05, 60, 0.04, 1.0, 10.0, 100, 0.0) == 1250
    with pytest.raises(
        UserError, match=r"--minutes: expected 1.8 or more for each loss \(an epoch: 10 s\), received 1.5"
    ):
        gpu.decide_steps(90, 60, 0.04, 1.0, 10.0, 100, 40.0)


def test_the_rate_warms_up_and_falls_to_zero():
    """Warm-up of 10 of 110 steps: a tenth of 0.5 at once, 0.5 at step 10, half of it halfway down, 0 at the end."""
    found = [float(gpu.rate(step, 110, 0.5, 10)) for step in (0, 9, 10, 60, 110)]
    np.testing.assert_allclose(found, [0.05, 0.5, 0.5, 0.25, 0], atol=1e-6)
    assert float(gpu.rate(500, gpu.UNDECIDED, 0.5, 10)) == pytest.approx(0.5)
    short = [float(gpu.rate(step, 4, 0.5, 10)) for step in range(4)]
    np.testing.assert_allclose(short, [0.25, 0.5, 0.5, 0.25], atol=1e-6)


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tiny_weights, tmp_path):
    """A folder with a halved model file in parts of 100,000 bytes."""
    path = tmp_path / "best.weights.h5"
    path.write_bytes(tiny_weights.read_bytes())
    gpu.halve(path)
    found = gpu.split_file(path, tmp_path, 100_000)
    assert len(found) > 2 and all(part.stat().st_size <= 100_000 for part in found)
    return tmp_path


def test_half_precision_is_of_kernels_only(parts, tiny_weights):
    exact, _ = model_file.load_model(tiny_weights)
    half, _ = model_file.load_model(parts / "best.weights.h5")
    assert (parts / "best.weights.h5").stat().st_size < 0.7 * tiny_weights.stat().st_size
    differ = 0
    for a, b in zip(exact.weights, half.weights, strict=True):
        if len(a.shape) == 1:
            np.testing.assert_array_equal(a, b, err_msg=a.path)
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25, err_msg=a.path)
        differ += not np.array_equal(a, b)
    assert differ > 5


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    path = tmp_path / "best.weights.h5"
    with h5py.File(path, "w") as file:
        file["kernel"] = np.full((2, 2), 7e4, np.float32)
        file.attrs[model_file.ATTRIBUTE] = "{}"
    with pytest.raises(UserError, match="kernel holds numbers beyond half precision"), np.errstate(over="ignore"):
        gpu.halve(path)


def test_joined_parts_are_the_file(parts, tmp_path):
    gpu.join(parts, tmp_path / "joined.weights.h5")
    assert (tmp_path / "joined.weights.h5").read_bytes() == (parts / "best.weights.h5").read_bytes()


def test_fewer_parts_leave_none_of_the_old_behind(parts):
    gpu.split_file(parts / "best.weights.h5", parts, 10_000_000)
    assert [path.name for path in parts.glob("weights.f16.part*")] == ["weights.f16.part00"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "weights.f16.part01").unlink(), "part01: this part is missing"),
        (lambda folder: (folder / "weights.f16.part01").write_bytes(b"x"), "part01: expected sha256"),
        (lambda folder: (folder / gpu.MANIFEST).unlink(), "weights.f16.json: no such file"),
        (lambda folder: (folder / gpu.MANIFEST).write_text('{"parts": [3]}'), "expected a manifest"),
    ],
)
def test_spoilt_parts_are_refused(parts, spoil, message):
    spoil(parts)
    with pytest.raises(UserError, match=message):
        gpu.join(parts, parts / "joined.weights.h5")
    assert not (parts / "joined.weights.h5").exists() and not list(parts.glob(".tmp-*"))


def test_a_manifest_reaches_into_no_other_folder(parts, tmp_path):
    manifest = json.loads((parts / gpu.MANIFEST).read_text())
    manifest["parts"][0]["name"] = "/etc/passwd"
    (parts / gpu.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{parts}/passwd: this part is missing"):
        gpu.join(parts, tmp_path / "joined.weights.h5")


def test_a_joined_file_needs_its_ending(parts):
    with pytest.raises(UserError, match=r"expected a name that ends with .weights.h5"):
        gpu.join(parts, parts / "joined.h5")


# --- the table ------------------------------------------------------------------------------------------------------


def write_result(folder, accuracy, **changes):
    result = {
        "start": "scratch",
        "device": "NVIDIA Z",
        "platform": "gpu",
        "minutes": 11.52,
        "images_per_second": 4321.0,
    }
    result |= {"n": 3589, "accuracy": accuracy, "mean_class_recall": 0.25, "last_accuracy": 0.125, "share": 1.0}
    result |= {"intervals": {"accuracy": [0.5, 0.75]}, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_the_table_is_made_from_result_files(tmp_path, capsys):
    write_result(tmp_path / "ce", 0.6)
    assert "| ce | not run |" in gpu.make_table(tmp_path), "half a report"
    write_result(tmp_path / "ce" / "flip", 0.7)
    lines = gpu.make_table(tmp_path).splitlines()
    expected = (
        "| ce | scratch | NVIDIA Z | 11.5 | 4,321 | 3,589 | 60.00% | 50.00% to 75.00% | 70.00% | 25.00% | 12.50% |"
    )
    assert lines[2] == expected
    assert lines[3] == "| ad_corre " + "| not run " * 10 + "|"
    assert {line.count("|") for line in lines} == {12}
    assert not capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"share": 0.01}, {"platform": "cpu"}])
def test_a_trial_is_no_result(tmp_path, capsys, changes):
    for folder in (tmp_path / "ce", tmp_path / "ce" / "flip"):
        write_result(folder, 0.6, **changes)
    assert "60.00%" not in gpu.make_table(tmp_path)
    assert "left out" in capsys.readouterr().err


def test_results_go_between_the_marks_of_a_page(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text("above\n<!-- table: begin -->\n<!-- table: end -->\nbelow\n")
    gpu.show_table(tmp_path, str(copy))
    empty = copy.read_text()
    assert empty.startswith("above\n") and empty.endswith("below\n") and "| ce | not run |" in empty
    write_result(tmp_path / "ce", 0.6)
    write_result(tmp_path / "ce" / "flip", 0.7)
    gpu.show_table(tmp_path, str(copy))
    changed = set(copy.read_text().splitlines()) ^ set(empty.splitlines())
    assert len(changed) == 2 and all(line.startswith("| ce |") for line in changed)
    copy.write_text("no marks")
    with pytest.raises(UserError, match="expected the marks"):
        gpu.show_table(tmp_path, str(copy))


# --- slips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--minutes: expected how long to train, received nothing"),
        (["--minutes", "0"], "--minutes: expected more than 0 to 100000, received 0.0"),
        (["--minutes", "nan"], "--minutes: expected more than 0 to 100000, received nan"),
        (["--minutes", "5", "--share", "1.5"], "--share: expected more than 0 to 1, received 1.5"),
        (["--minutes", "5", "--batch-size", "0"], "--batch-size: expected 1 or more, received 0"),
        (["--minutes", "5", "--mixup", "-1"], "--mixup: expected 0 or more, received -1.0"),
        (["--join", "nowhere", "x.weights.h5"], "nowhere/weights.f16.json: no such file"),
    ],
)
def test_slips_are_one_message_and_code_2(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["gpu_fer2013.py", *args])
    assert run_command(gpu.main) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_data_that_is_not_prepared_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_fer2013.py", "--minutes", "1", "--data-dir", str(tmp_path)])
    assert run_command(gpu.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: fer2013/train is not prepared") and "python prepare_data.py fer2013" in error
