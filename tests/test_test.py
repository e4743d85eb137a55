"""The commands of test.py: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python, write_split
from test_test_model import OneDetector, image, save

import evaluation
import faces
import plots
import test as test_module
import test_model
from config import DatasetName
from datasets import CLASS_NAMES
from files import UserError, only_writer
from model_files import model_file
from recognition import recognize_command
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


# recognize


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder, our current one, with two faces, a wall and a damaged file; the detector knows where the faces are."""
    monkeypatch.chdir(tmp_path)
    for name, shape in (("a.png", (60, 80, 3)), ("wall.png", (50, 90, 3))):
        save(tmp_path / name, image(*shape))
    (tmp_path / "bad.png").write_bytes(b"")
    by_width = {80: OneDetector((5, 10, 30, 30), (40, 20, 12, 12)), 90: OneDetector()}

    class Detector:
        def detect(self, pixels):
            return by_width[pixels.shape[1]].detect(pixels)

    monkeypatch.setattr(faces, "open_detector", lambda name, file: Detector())
    return tmp_path


def test_recognize_prints_a_row_per_face(tiny_weights, photographs, monkeypatch, capsys):
    run_main(monkeypatch, "recognize", "a.png", "wall.png", "--weights", tiny_weights)
    shown = capsys.readouterr()
    head, first, second, wall = shown.out.splitlines()
    assert head.split() == ["image", "label", "score", "box", *CLASS_NAMES[:7]]
    for row, score, box in ((first, "0.90", "5,10 30x30"), (second, "0.80", "40,20 12x12")):
        name, label, *rest = row.split()
        assert (name, rest[0], " ".join(rest[1:3]), len(row)) == ("a.png", score, box, len(head))
        values = [float(share.removesuffix("%")) for share in rest[3:]]
        assert label == CLASS_NAMES[int(np.argmax(values))] and sum(values) == pytest.approx(100, abs=0.4)
    assert wall.split() == ["wall.png", "no", "face"] and "wall.png: no face found" in shown.err.splitlines()


def test_table_fits_a_narrow_terminal(tiny_weights, photographs, monkeypatch, capsys):
    monkeypatch.setattr(recognize_command, "terminal_columns", lambda: 80)
    run_main(monkeypatch, "recognize", "a.png", "--weights", tiny_weights)
    head, first, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "label", "score", "box"] and max(len(head), len(first)) <= 80
    assert re.fullmatch(r"a\.png  \w+ \d+% +0\.90  5,10 30x30", first)


def test_recognize_prints_one_json_object_per_face(tiny_weights, photographs, monkeypatch, capsys):
    run_main(monkeypatch, "recognize", "--json", "*l*.png", "a.png", "--weights", tiny_weights)
    wall, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(wall) == list(first) == ["image", "face", "label", "score", "box", "probabilities"]
    assert wall["image"] == "wall.png" and set(list(wall.values())[1:]) == {None}
    assert [(found["image"], found["face"], found["box"]) for found in (first, second)] == [
        ("a.png", 1, [5, 10, 30, 30]),
        ("a.png", 2, [40, 20, 12, 12]),
    ]
    assert first["score"] == pytest.approx(0.9) and tuple(first["probabilities"]) == CLASS_NAMES[:7]
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)


def test_unreadable_image_costs_its_own_row(tiny_weights, photographs, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"2 .*bad\.png.* of 4"):
        run_main(monkeypatch, "recognize", "--json", ".", "none.png", "--weights", tiny_weights)
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["image"] for row in rows] == ["a.png", "a.png", "bad.png", "wall.png", "none.png"]
    assert "bad.png" in rows[2]["error"] and "none.png" in rows[4]["error"] and "error" not in rows[3]
    assert {"bad.png: the file is empty; expected an image"} < set(shown.err.splitlines())


def test_required_face_is_missed_after_the_other_rows(tiny_weights, photographs, monkeypatch, capsys):
    args = ("recognize", "--require-face", "wall.png", "a.png", "--weights", tiny_weights)
    with pytest.raises(UserError, match=r"--require-face: .* 1 \(wall\.png\) of 2"):
        run_main(monkeypatch, *args)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_recognize_uses_whole_images_on_request(tiny_weights, photographs, monkeypatch, capsys):
    run_main(monkeypatch, "recognize", "--no-detect-face", "--json", "wall.png", "--weights", tiny_weights)
    found = json.loads(capsys.readouterr().out)
    assert (found["box"], found["score"]) == ([0, 0, 90, 50], None)


def test_recognize_saves_annotated_copies(tiny_weights, photographs, monkeypatch):
    run_main(monkeypatch, "recognize", "a.png", "wall.png", "--save", "out", "--weights", tiny_weights)
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.jpg", "wall.jpg"]


def test_recognize_explains_one_image_in_a_file_and_several_in_a_folder(tiny_weights, photographs, monkeypatch):
    run_main(monkeypatch, "recognize", "a.png", "--explain", "why.png", "--weights", tiny_weights)
    assert sorted(path.name for path in Path().glob("why*")) == ["why-face2.png", "why.png"]
    run_main(monkeypatch, "recognize", "a.png", "wall.png", "--explain", "why", "--weights", tiny_weights)
    assert sorted(path.name for path in Path("why").iterdir()) == ["a-face2.png", "a.png"]
    before = Path("a.png").read_bytes()
    for option, target, facts in (
        ("--explain", "a.png", "this is the image itself"),
        ("--explain", ".", r"another folder than that of a\.png"),
        ("--save", "copies", r"another folder than that of copies/b\.jpg"),
    ):
        Path("copies").mkdir(exist_ok=True)
        Path("copies/b.jpg").write_bytes(before)
        images = ("a.png", "copies/b.jpg") if option == "--save" else ("a.png",)
        with pytest.raises(UserError, match=f"{option} {target}: .*{facts}"):
            run_main(monkeypatch, "recognize", *images, option, target, "--weights", tiny_weights)
    assert Path("a.png").read_bytes() == before
    for target in ("all.png", "why.jpg"):
        with pytest.raises(UserError, match=f"--explain {target}: .*folder"):
            run_main(monkeypatch, "recognize", "a.png", "wall.png", "--explain", target, "--weights", tiny_weights)


def test_evaluate_measures_a_split_and_names_the_report(tiny_weights, tmp_path, monkeypatch, capsys):
    write_split(tmp_path / "data", np.arange(23) % 7, split="test", shape=(24, 24, 1))
    args = ("--dataset", "synthetic", "--split", "test", "--data-dir", tmp_path / "data", "--batch-size", 5)
    run_main(monkeypatch, "evaluate", "--weights", tiny_weights, *args, "--run-dir", tmp_path / "report", "--explain")
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    assert (result["dataset"], result["split"], result["n"]) == ("synthetic", "test", 23)
    assert (result["weights"], result["trained_on"]) == (str(tiny_weights), "synthetic/train")
    assert result["explain"]["num_embeddings"] == 2 and (tmp_path / "report" / "explain.png").exists()
    assert "synthetic/test: 23 images" in shown and shown.endswith(f"wrote {tmp_path / 'report'}/\n")


def test_evaluations_of_other_weights_or_views_get_other_folders(tiny_weights, model, tmp_path, monkeypatch, capsys):
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
    plain, flip, views = {}, {"flip": True}, {"views": "flip"}
    for weights, given in (("a", (plain, flip, views)), ("b", (plain,)), ("elsewhere/a", (plain,)), ("a", (plain,))):
        for options in given:
            capsys.readouterr()
            test_module.evaluate(EvaluateConfig(f"{weights}/best.weights.h5", DatasetName.synthetic, **options))
            printed = capsys.readouterr().out
            assert "selected on this same split" in printed  # the file says so: its metrics are of val
            names.append(printed.splitlines()[-1].removeprefix("wrote runs/").removesuffix("/"))
    # The same evaluation again has the same folder, and --flip is short for --views flip.
    assert len(set(names)) == 4 and names[0] == names[5] and names[1] == names[2]
    assert names[0].startswith("evaluate-a-best-synthetic-val-")
    assert names[1].startswith("evaluate-a-best-synthetic-val-flip-")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(set(names))


def test_reports_of_more_never_replace_the_plain_one(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path / "data", np.arange(14) % 7, split="val", shape=(24, 24, 1))
    (tmp_path / "groups.csv").write_text("image,group\n0,a\n1,b\n")
    monkeypatch.chdir(tmp_path)
    folders = []
    monkeypatch.setattr(evaluation, "evaluate", lambda network, split, folder, **_: folders.append(str(folder)))
    monkeypatch.setattr(evaluation, "format_table", str)
    also = {"also": DatasetName.ferplus}
    for label in (0, 1):  # other labels of the same images are another report
        write_split(tmp_path / "data", np.full(14, label), dataset="ferplus", split="val", shape=(24, 24, 1))
        for options in ({}, {"explain": True}, {"corruptions": True}, {"groups": "groups.csv"}, also, also):
            test_module.evaluate(EvaluateConfig(str(tiny_weights), DatasetName.synthetic, **options))
    assert folders[:4] == folders[6:10] and folders[4] == folders[5] and folders[10] == folders[11]
    assert len(set(folders)) == 6


def test_flip_and_ten_crop_contradict_each_other(tiny_weights):
    with pytest.raises(UserError, match=r"--flip: .* without --views ten-crop"):
        test_module.evaluate(EvaluateConfig(str(tiny_weights), flip=True, views="ten-crop"))


@pytest.mark.parametrize("name", ["a.onnx", "a.tflite"])
def test_evaluate_names_the_remedy_for_an_exported_file(name):
    with pytest.raises(
        UserError, match=rf"{name}: evaluate measures weights files.*name the file that it was made from"
    ):
        test_module.evaluate(EvaluateConfig(name))


def test_evaluate_never_replaces_the_result_of_a_run(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path / "data", np.arange(14) % 7, split="val", shape=(24, 24, 1))
    (tmp_path / "config.json").write_text("{}")
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path / "data")
    with pytest.raises(UserError, match=r"--run-dir .*holds a training run"):
        run_main(monkeypatch, "evaluate", *args, "--run-dir", tmp_path)


def test_one_evaluation_at_a_time_writes_into_a_folder(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path / "data", np.arange(14) % 7, split="val", shape=(24, 24, 1))
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path / "data")
    with only_writer(tmp_path / "r"), pytest.raises(UserError, match=r"r: another process is writing there"):
        run_main(monkeypatch, "evaluate", *args, "--run-dir", tmp_path / "r")


@pytest.mark.parametrize("source", ["p", "p/weights.parts.json"])
def test_parts_are_not_cut_anew_in_their_own_folder(source, tmp_path, monkeypatch):
    """A kill between the removal of the old parts and the new manifest would lose the file."""
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match=r"p: expected another folder than that of the source"):
        run_main(monkeypatch, "convert", tmp_path / source, tmp_path / "p", "--parts", "1")


def test_evaluate_refuses_data_of_other_classes(tiny_weights, tmp_path, monkeypatch):
    write_split(tmp_path, np.arange(16) % 8, split="val", shape=(24, 24, 1), num_classes=8)
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path, "--run-dir", tmp_path / "r")
    with pytest.raises(UserError, match=r"synthetic/val: expected a network of its 8 classes .* received one of 7"):
        run_main(monkeypatch, "evaluate", *args)


@pytest.mark.parametrize("command", [("evaluate", "--weights"), ("calibrate",)])
def test_the_same_classes_in_another_order_are_refused(command, tiny_weights, tmp_path, monkeypatch):
    meta = write_split(tmp_path, np.arange(14) % 7, split="val", shape=(24, 24, 1)) / "meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "class_names": content["class_names"][::-1]}))
    with pytest.raises(UserError, match=r"synthetic/val: .*classes Anger, .*, in this order, received one of Neutral"):
        run_main(monkeypatch, *command, tiny_weights, "--dataset", "synthetic", "--data-dir", tmp_path)


@pytest.mark.slow
def test_the_command_prints_nothing_but_its_rows():
    """With the model, the detector and the image that come with the project."""
    done = run_python(ROOT / "test.py", "recognize", "examples/astronaut.png", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["label"] == "Happy" and done.stderr == ""


@pytest.mark.slow
def test_the_command_fails_in_one_line_with_code_2():
    done = run_python(ROOT / "test.py", "recognize")
    message = "error: recognize: expected one or more images, received none"
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


def test_convert_writes_half_precision_in_parts_and_joins_them(tiny_weights, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, "convert", tiny_weights, tmp_path / "half.weights.h5", "--half")
    run_main(monkeypatch, "convert", tiny_weights, tmp_path / "parts", "--half", "--parts", "1")
    assert "parts/weights.parts.json and 1 parts: mini_xcp, 7 classes" in capsys.readouterr().out
    run_main(monkeypatch, "convert", tmp_path / "parts", tmp_path / "joined.weights.h5")
    assert (tmp_path / "joined.weights.h5").read_bytes() == (tmp_path / "half.weights.h5").read_bytes()
    run_main(monkeypatch, "describe", tmp_path / "joined.weights.h5")
    assert re.search("precision +half: kernels float16", capsys.readouterr().out)
    # Its kernels lose nothing when written in full again.
    run_main(monkeypatch, "convert", tmp_path / "joined.weights.h5", tmp_path / "full", "--parts", "1")
    assert len(list((tmp_path / "full").glob("weights.part0*"))) == 2
    run_main(monkeypatch, "convert", tmp_path / "full" / "weights.parts.json", tmp_path / "full.weights.h5")
    run_main(monkeypatch, "convert", tmp_path / "full", tmp_path / "again.weights.h5", "--half")
    faces = image(3, 24, 24, 3)
    expected = TestModels(tmp_path / "half.weights.h5").predict(faces)
    for name in ("full", "again"):
        for found, values in zip(TestModels(tmp_path / f"{name}.weights.h5").predict(faces), expected, strict=True):
            np.testing.assert_array_equal(found, values)
    with pytest.raises(UserError, match=r"a\.weights\.h5: expected a folder for the parts"):
        run_main(monkeypatch, "convert", tiny_weights, tmp_path / "a.weights.h5", "--parts", "1")


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
