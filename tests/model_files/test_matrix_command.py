"""`test.py evaluate` with several model files or data sets: real files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import write_split

import evaluation
import plots
import test as test_module
from files import UserError
from model_files import model_file


@pytest.fixture
def project(tiny_weights, tmp_path, monkeypatch):
    """A folder, our current one, with two model files and two data sets, one of them with 8 classes."""
    monkeypatch.chdir(tmp_path)
    network, info = model_file.load_model(tiny_weights)
    network.trainable_variables[-1].assign_add(np.arange(7, dtype=np.float32) / 50)
    model_file.save_model("other.weights.h5", network, info)
    rng = np.random.default_rng(0)
    for dataset, num_classes in (("synthetic", 7), ("affectnet", 8)):
        labels = np.arange(30) % num_classes
        images = rng.integers(0, 256, (30, 24, 24, 1), np.uint8)
        write_split(
            *("data", labels), split="val", dataset=dataset, shape=(24, 24, 1), num_classes=num_classes, images=images
        )
    monkeypatch.setattr(plots, "save_figures", lambda *args: None)  # tested elsewhere, and slow
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["test.py", "evaluate", *map(str, args)])
    test_module.main()


@pytest.mark.slow
def test_every_file_is_measured_on_every_data_set(project, tiny_weights, monkeypatch, capsys):
    run(monkeypatch, "--weights", tiny_weights, "other.weights.h5", "--dataset", "synthetic", "affectnet")
    folder = project / capsys.readouterr().out.splitlines()[-1].removeprefix("wrote ").removesuffix("/")
    assert folder.name.startswith("matrix-2x2-val-")
    found = json.loads((folder / "matrix.json").read_text())
    assert {"matrix.json", "matrix.csv", "matrix.png"} == {path.name for path in folder.iterdir()}
    assert [(cell["model"], cell["dataset"]) for cell in found["cells"]] == [
        *(("tiny", "synthetic"), ("tiny", "affectnet"), ("other", "synthetic"), ("other", "affectnet"))
    ]
    assert [each["left_out"] for each in found["datasets"]] == [0, 3] and len(found["class_names"]) == 7
    # The same classes: the cell is what the evaluation of this pair says.
    run(monkeypatch, "--weights", "other.weights.h5", "--dataset", "synthetic", "--run-dir", "one")
    one = json.loads((project / "one" / "result.json").read_text())
    for name in ("accuracy", "mean_class_recall", "macro_f1", "intervals", "confusion_matrix"):
        assert found["cells"][2][name] == one[name]
    assert [cell["selected_here"] for cell in found["cells"]] == [True, False, True, False]
    assert one["selected_on"] == "val" and found["commit"] == evaluation.commit()


def test_one_file_on_several_data_sets_with_views(project, tiny_weights, monkeypatch, capsys):
    args = ("--weights", tiny_weights, "--dataset", "synthetic", "affectnet", "--flip", "--run-dir", "m")
    run(monkeypatch, *args)
    assert json.loads((project / "m" / "matrix.json").read_text())["views"] == "flip"
    assert "--views flip" in capsys.readouterr().out


def test_one_pair_is_an_evaluation_in_its_folder(project, tiny_weights, monkeypatch, capsys):
    run(monkeypatch, "--weights", "other.weights.h5", "--dataset", "synthetic")
    folder = capsys.readouterr().out.splitlines()[-1]
    expected = evaluation.default_folder("other.weights.h5", evaluation_split("synthetic"), "none", 0)
    assert folder == f"wrote {expected}/" and (project / expected / "result.json").exists()


def evaluation_split(dataset):
    from data_helper import open_split

    return open_split("data", dataset, "val")


BOTH = ("--dataset", "synthetic", "affectnet")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--weights", "other.weights.h5", "other.weights.h5", *BOTH), r"--weights: .*other\.weights\.h5 twice"),
        (("--weights", "other.weights.h5", "copy.weights.h5", *BOTH), r"the same bytes in other\S* and copy"),
        (
            ("--weights", "other.weights.h5", "--dataset", "synthetic", "synthetic"),
            r"--dataset: .*synthetic, synthetic",
        ),
        (("--weights", "other.weights.h5", "--dataset", "synthetic", "rafdb"), r"rafdb/val is not prepared"),
        (("--weights", "--dataset", "synthetic"), r"--weights: expected one or more, received none"),
        (("--weights", "other.weights.h5", "--dataset"), r"--dataset: expected one or more, received none"),
        (("--weights", "other.weights.h5", *BOTH, "--explain"), r"--explain: expected one of --weights"),
        (("--weights", "other.weights.h5", *BOTH, "--corruptions"), r"--corruptions: expected one of --weights"),
        (("--weights", "other.weights.h5", *BOTH, "--groups", "g.csv"), r"--groups: expected one of --weights"),
        (("--weights", "other.weights.h5", *BOTH, "--run-dir", "run"), r"--run-dir run: holds a training run"),
        (("--weights", "other.weights.h5", *BOTH, "--flip", "--views", "ten-crop"), r"--flip: "),
    ],
)
def test_what_makes_no_matrix_is_one_message(project, monkeypatch, args, message):
    (project / "copy.weights.h5").write_bytes((project / "other.weights.h5").read_bytes())
    (project / "run").mkdir()
    (project / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message) as caught:
        run(monkeypatch, *args)
    assert "\n" not in str(caught.value) and not (project / "runs").exists()


@pytest.mark.slow
def test_corruptions_and_groups_name_their_folder(project, tiny_weights, monkeypatch, capsys):
    args = ("--weights", "other.weights.h5", "--dataset", "synthetic")
    (project / "g.csv").write_text("image,group\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(30)))
    (project / "h.csv").write_text("image,group\n" + "".join(f"{i},{'ab'[i % 3 > 0]}\n" for i in range(30)))
    names = []
    for more in ((), ("--groups", "g.csv"), ("--groups", "h.csv"), ("--corruptions",)):
        run(monkeypatch, *args, *more)
        names.append(capsys.readouterr().out.splitlines()[-1].removesuffix("/"))
    plain, g, h, corruptions = names
    assert g.startswith(f"{plain}-groups-") and h.startswith(f"{plain}-groups-") and g != h
    assert corruptions == f"{plain}-corruptions"
    result = json.loads((project / g.removeprefix("wrote ") / "result.json").read_text())
    assert result["groups"]["by_group"]["a"]["n"] == 15 and result["groups"]["largest_gaps"] is None
    (project / "bad.csv").write_text("image,group\n99,a\n")
    with pytest.raises(UserError, match=r"bad\.csv, line 2: .*synthetic/val, 0 to 29"):
        run(monkeypatch, *args, "--groups", "bad.csv")
