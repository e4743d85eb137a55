"""The commands of test.py: what they print and write, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT, run_python, write_split
from test_test_model import image, save

import plots
import test as test_module
import test_model
from config import DatasetName
from datasets import CLASS_NAMES
from files import UserError
from model_files import model_file
from test import EvaluateConfig, TestModels


@pytest.fixture(scope="module")
def model(tiny_weights):
    return TestModels(tiny_weights)


def test_this_is_our_module_and_offers_the_published_names():
    """Python has a package `test` of its own."""
    assert test_module.__file__ == str(ROOT / "test.py")
    assert (test_module.TestModels, test_module.Recognition) == (test_model.TestModels, test_model.Recognition)


def run_main(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["test.py", *map(str, args)])
    test_module.main()


def test_recognize_prints_a_table(tiny_weights, tmp_path, monkeypatch, capsys):
    paths = [save(tmp_path / name, image(30, 30, seed=i)) for i, name in enumerate(("a.png", "a longer name.png"))]
    run_main(monkeypatch, "recognize", *paths, "--weights", tiny_weights)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "label", *CLASS_NAMES[:7]]
    assert len(rows) == 2 and len({len(row) for row in (head, *rows)}) == 1
    for path, row in zip(paths, rows, strict=True):
        label, *shares = row.removeprefix(path).split()
        values = [float(share.removesuffix("%")) for share in shares]
        assert label == CLASS_NAMES[int(np.argmax(values))] and sum(values) == pytest.approx(100, abs=0.4)


def test_evaluate_measures_a_split_and_names_the_report(tiny_weights, tmp_path, monkeypatch, capsys):
    write_split(tmp_path / "data", np.arange(23) % 7, split="test", shape=(24, 24, 1))
    args = ("--dataset", "synthetic", "--split", "test", "--data-dir", tmp_path / "data", "--batch-size", 5)
    run_main(monkeypatch, "evaluate", "--weights", tiny_weights, *args, "--run-dir", tmp_path / "report")
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    assert (result["dataset"], result["split"], result["n"]) == ("synthetic", "test", 23)
    assert (result["weights"], result["trained_on"]) == (str(tiny_weights), "synthetic/train")
    assert "synthetic/test: 23 images" in shown and shown.endswith(f"wrote {tmp_path / 'report'}/\n")


def test_evaluations_of_other_weights_or_with_flip_get_other_folders(
    tiny_weights, model, tmp_path, monkeypatch, capsys
):
    write_split(tmp_path / "data", np.arange(14) % 7, split="val", shape=(24, 24, 1))
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        changed, info = model_file.load_model(tiny_weights)
        changed.trainable_variables[-1].assign_add(np.full(7, len(run) + ord(run), np.float32))
        model_file.save_model(tmp_path / run / "best.weights.h5", changed, info)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").mkdir()
    changed.trainable_variables[-1].assign_add(np.ones(7, np.float32))
    model_file.save_model(tmp_path / "elsewhere/a/best.weights.h5", changed, info)
    monkeypatch.setattr(plots, "save_figures", lambda *args: None)  # tested elsewhere, and slow
    names = []
    for weights, flips in (("a", (False, True)), ("b", (False,)), ("elsewhere/a", (False,)), ("a", (False,))):
        for flip in flips:
            capsys.readouterr()
            test_module.evaluate(EvaluateConfig(f"{weights}/best.weights.h5", DatasetName.synthetic, flip=flip))
            printed = capsys.readouterr().out
            assert "selected on this same split" in printed  # the file says so: its metrics are of val
            names.append(printed.splitlines()[-1].removeprefix("wrote runs/").removesuffix("/"))
    assert len(set(names)) == 4 and names[0] == names[4]  # the same evaluation again has the same folder
    assert names[0].startswith("evaluate-a-best-synthetic-val-")
    assert names[1].startswith("evaluate-a-best-synthetic-val-flip-")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(set(names))


def test_evaluate_never_replaces_the_result_of_a_run(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path / "data", np.arange(14) % 7, split="val", shape=(24, 24, 1))
    (tmp_path / "config.json").write_text("{}")
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path / "data")
    with pytest.raises(UserError, match=r"--run-dir .*holds a training run"):
        run_main(monkeypatch, "evaluate", *args, "--run-dir", tmp_path)


def test_evaluate_refuses_data_of_other_classes(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path, np.arange(16) % 8, split="val", shape=(24, 24, 1), num_classes=8)
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path, "--run-dir", tmp_path / "r")
    with pytest.raises(UserError, match=r"synthetic/val: expected a network of its 8 classes .* received one of 7"):
        run_main(monkeypatch, "evaluate", *args)


@pytest.mark.slow
def test_the_command_prints_json_lines(tiny_weights, tmp_path):
    save(tmp_path / "face.png", image(40, 40, 3))
    done = run_python(ROOT / "test.py", "recognize", "face.png", "--weights", tiny_weights, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert list(found) == ["image", "label", "probabilities"] and found["image"] == "face.png"
    assert list(found["probabilities"]) == list(CLASS_NAMES[:7])
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert not done.stderr


@pytest.mark.slow
def test_the_command_fails_in_one_line_with_code_2():
    done = run_python(ROOT / "test.py", "recognize")
    message = "error: recognize: expected one or more image files, received none"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [message])


def test_convert_writes_our_form_of_what_keras_saved(model, tmp_path, monkeypatch, capsys):
    model.network.save(tmp_path / "run.keras")
    run_main(monkeypatch, "convert", tmp_path / "run.keras", tmp_path / "ours.weights.h5")
    assert f"wrote {tmp_path / 'ours.weights.h5'}: mini_xcp, 7 classes" in capsys.readouterr().out
    ours = TestModels(tmp_path / "ours.weights.h5")
    faces = image(3, 24, 24, 3)
    for found, expected in zip(ours.predict(faces), model.predict(faces), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert ours.info.origin.endswith("converted from run.keras")


def test_convert_writes_nothing_for_a_bad_target_or_source(tiny_weights, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ours\.h5: expected a name that ends with \.weights\.h5"):
        run_main(monkeypatch, "convert", tiny_weights, tmp_path / "ours.h5")
    (tmp_path / "cut.h5").write_bytes(tiny_weights.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cut\.h5: "):
        run_main(monkeypatch, "convert", tmp_path / "cut.h5", tmp_path / "ours.weights.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.h5"]


def test_describe_prints_one_fact_per_line_or_json(tiny_weights, monkeypatch, capsys):
    run_main(monkeypatch, "describe", tiny_weights)
    lines = capsys.readouterr().out.splitlines()
    run_main(monkeypatch, "describe", tiny_weights, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert [line.split("  ")[0].strip() for line in lines] == list(facts)
    assert [line[14:] for line in lines] == list(facts.values())
    assert facts["architecture"] == "mini_xcp" and facts["trained on"] == "synthetic/train"
