"""Whole runs: what a run writes, how it continues after kill -9, what it refuses, what the options train."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import read_state

import augmentation
import config
import experiment
import run_identity
import trainer as training
from config import DatasetName, DatasetType, TrainConfig
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from distributed.process_group import GROUP_OF_ONE
from files import UserError, sha256
from model_files import model_file
from train import TrainModel
from training import optimization
from training.run_state import RunState, read_history

ROOT = Path(__file__).parents[1]
EPOCHS = 4


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_splits(
        PrepareSyntheticConfig(data_dir=str(folder), num_train=120, num_val=42, num_test=35, size=24)
    )
    return folder


def command(data_dir: Path, run_dir: Path) -> list[str]:
    options = {"--data-dir": data_dir, "--run-dir": run_dir, "--epochs": EPOCHS, "--batch-size": 30}
    flat = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "train.py", *flat, "--input-size", "24", "--num-embeddings", "3", "--embedding-size", "16"]


def settings(data_dir: Path, run_dir: Path, **changes) -> TrainConfig:
    small = TrainConfig(
        data_dir=str(data_dir),
        run_dir=str(run_dir),
        epochs=2,
        batch_size=30,
        model=config.ModelConfig(num_embeddings=3, embedding_size=16, input_size=24),
    )
    return dataclasses.replace(small, **changes)


@pytest.fixture(scope="module")
def whole_run(data_dir, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(command(data_dir, run_dir), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    return run_dir


def test_a_run_writes_its_whole_folder(whole_run):
    written = {path.name for path in whole_run.iterdir()}
    assert written >= {
        *("config.json", "env.json", "history.csv", "history.png", "state.h5", "best.weights.h5", "result.json"),
        *("predictions.npz", "confusion_matrix.png", "per_class.png", "reliability.png", "tsne.png", "tensorboard"),
    }
    assert not [name for name in written if name.startswith(".tmp")]
    result = json.loads((whole_run / "result.json").read_text())
    assert (result["dataset"], result["split"], result["n"], result["seed"]) == ("synthetic", "test", 35, 0)
    assert result["selected_on"] == "val"
    assert result["parameters"] == model_file.load_model(whole_run / "best.weights.h5")[0].count_params()
    assert result["train_seconds"] == pytest.approx(sum(row["seconds"] for row in read_history(whole_run)))
    untrained = json.loads((whole_run / "untrained.json").read_text())
    assert result["correlations_untrained"] == untrained != result["correlations"]
    assert untrained["same_class"] > 0.9, "an untrained network sees the same in every face"
    with open(whole_run / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert {"loss", "ce", "fd", "md", "ed", "accuracy", "val_accuracy", "learning_rate"} <= set(rows[0])
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert result["best_epoch"] == int(best["epoch"])
    info = model_file.read_info(whole_run / "best.weights.h5")
    assert info.metrics["accuracy"] == pytest.approx(float(best["val_accuracy"]))
    # The split that selects the epoch calibrates the probabilities too.
    assert (info.calibrated_on, result["calibrated_on"]) == ("synthetic/val", "synthetic/val")
    assert result["temperature"] == info.network.temperature != 1


def test_the_loss_column_is_the_weighted_sum_of_the_terms(whole_run):
    for row in read_history(whole_run):
        assert row["loss"] == pytest.approx(50 / 7 * row["ce"] + row["fd"] + row["md"] + row["ed"], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(data_dir, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(data_dir, run_dir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "state.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # some steps into the next epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(read_history(run_dir)) < EPOCHS

    done = subprocess.run(command(data_dir, run_dir), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    expected, found = read_state(whole_run), read_state(run_dir)
    assert expected.keys() == found.keys()
    assert any("history" in name for name in expected), "the confusion history is part of the state"
    assert any("seed_generator" in name for name in expected), "the random generators are part of the state"
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for weights in (whole_run, run_dir):
        assert model_file.read_info(weights / "best.weights.h5").network.arch == "mini_xcp"
    with (
        h5py.File(whole_run / "best.weights.h5") as left,
        h5py.File(run_dir / "best.weights.h5") as right,
    ):
        names = []
        left.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            np.testing.assert_array_equal(left[name][()], right[name][()], err_msg=name)


def test_a_finished_run_is_not_repeated(data_dir, whole_run, capsys):
    before = (whole_run / "state.h5").stat().st_mtime_ns
    again = settings(data_dir, whole_run, epochs=EPOCHS)
    assert experiment.train_and_evaluate(again)["n"] == 35
    assert "finished" in capsys.readouterr().out
    assert (whole_run / "state.h5").stat().st_mtime_ns == before


def test_a_finished_run_of_an_old_version_is_taken_over(data_dir, whole_run, tmp_path, monkeypatch):
    """Without digests and a younger option, in the folder that the old version chose."""
    folder = shutil.copytree(whole_run, tmp_path / "runs" / "synthetic-mini_xcp-seed0-01234567")
    for name in ("config.json", "result.json"):
        content = json.loads((folder / name).read_text())
        del content["digests"], content.get("config", content)["loss"]["ramp_epochs"]
        (folder / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    result = experiment.train_and_evaluate(dataclasses.replace(settings(data_dir, "", epochs=EPOCHS), run_dir=None))
    assert result == json.loads((whole_run / "result.json").read_text())
    for name in ("config.json", "result.json"):
        assert json.loads((folder / name).read_text()) == json.loads((whole_run / name).read_text())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]


def test_a_folder_keeps_to_one_run(data_dir, whole_run):
    with pytest.raises(UserError, match=r"epochs: 4 -> 2"):
        experiment.train_and_evaluate(settings(data_dir, whole_run))


@pytest.mark.slow
def test_train_model_starts_from_a_file_and_writes_into_a_folder(data_dir, whole_run, tmp_path):
    model = TrainModel(DatasetName.synthetic, DatasetType.train, settings(data_dir, tmp_path / "other"))
    weights, folder = whole_run / "best.weights.h5", tmp_path / "fine"
    result = model.train(arch="mini_xcp", weight_path=str(weights), epochs=1, learning_rate=0, run_dir=folder)
    started, _ = model_file.load_model(weights)
    ended, _ = model_file.load_model(folder / "best.weights.h5")
    for a, b in zip(started.trainable_variables, ended.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)  # at learning rate 0 the start is the end
    assert result["digests"]["weights"] == sha256(weights)
    assert model.train(weight_path=str(folder), weights=weights, epochs=1, learning_rate=0) == result
    with pytest.raises(UserError, match=r"--epoch;.*--epochs"):
        model.train(epoch=1)


def test_an_evaluation_part_cannot_be_trained_on():
    with pytest.raises(UserError, match="expected train or train_7, received eval"):
        TrainModel(DatasetName.synthetic, DatasetType.eval)
    with pytest.raises(UserError, match=r"dataset_name: expected one of .*rafdb.*, received 'raf'"):
        TrainModel("raf")


def test_train_7_is_not_trained_on_eight_classes(tmp_path):
    from conftest import write_split

    write_split(tmp_path, [0, 7], dataset="ferplus", num_classes=8)
    model = TrainModel(DatasetName.ferplus, DatasetType.train_7, settings(tmp_path, tmp_path / "run"))
    with pytest.raises(
        UserError, match="ferplus/train: expected 7 classes for train_7, found 8; prepare it with --classes 7"
    ):
        model.train()


def test_weights_of_another_architecture_are_refused(data_dir, whole_run, tmp_path):
    other = settings(
        data_dir,
        tmp_path / "run",
        weights=str(whole_run / "best.weights.h5"),
        model=config.ModelConfig(arch="xcp", input_size=71),
    )
    with pytest.raises(UserError, match=r"best\.weights\.h5: .*xcp.*mini_xcp"):
        experiment.train_and_evaluate(other)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    wild = settings(
        data_dir,
        run_dir,
        optimizer=config.OptimizerConfig(optimizer="adam", learning_rate=1e30, schedule="constant"),
    )
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+ of epoch 1"):
        experiment.train_and_evaluate(wild)
    assert not (run_dir / "state.h5").exists(), "a broken epoch is never saved"


def test_the_first_run_draws_the_synthetic_set_and_opens_its_test_split(tmp_path, monkeypatch):
    drawn = []

    def draw(wanted):
        drawn.append(wanted)
        write_synthetic_splits(dataclasses.replace(wanted, num_train=7, num_val=7, num_test=7))

    monkeypatch.setattr("datasets.synthetic.write_synthetic_splits", draw)
    for _ in range(2):
        splits = experiment._open_splits(settings(tmp_path, tmp_path / "run"))
        assert sorted(splits) == ["test", "train", "val"]
    assert drawn == [PrepareSyntheticConfig(data_dir=str(tmp_path))]


def test_a_folder_that_is_removed_under_a_run_is_named(tmp_path):
    """Whoever writes first notices it: TensorBoard's file, the state, the weights."""
    folder = tmp_path / "run"
    with (
        pytest.raises(UserError, match="run: the folder of the run is gone"),
        experiment._claimed(folder, GROUP_OF_ONE),
    ):
        shutil.rmtree(folder)
        (folder / "tensorboard" / "events").write_bytes(b"")
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="missing"), experiment._claimed(folder, GROUP_OF_ONE):
        (tmp_path / "missing").read_bytes()


def test_an_unprepared_data_set_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"run: python prepare_data\.py fer2013 --source PATH --data-dir"):
        experiment.train_and_evaluate(settings(tmp_path, tmp_path / "run", dataset=DatasetName.fer2013))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_options_train(data_dir, tmp_path):
    """Half precision, balanced classes, smoothed labels, no MD, accumulated gradients."""
    changes = {
        "precision": "mixed_bfloat16",
        "balanced": True,
        "loss": config.LossConfig(label_smoothing=0.1, w_md=0.0),
        "optimizer": config.OptimizerConfig(accumulate=3),
    }
    result = experiment.train_and_evaluate(settings(data_dir, tmp_path / "run", epochs=1, **changes))
    rows = read_history(tmp_path / "run")
    assert result["n"] == 35
    assert np.isfinite(rows[0]["loss"]) and "fd" in rows[0] and "md" not in rows[0]


def test_options_reach_the_loss_the_batches_the_network_and_the_saved_weights(data_dir, tmp_path, monkeypatch):
    """In place of `fit`, a best epoch is saved while every moving average is 0.5."""
    given = {}

    def fit(model, batches, callbacks, **options):
        given.update(model=model, batches=batches)
        assert any(isinstance(callback, optimization.AveragedWeights) for callback in callbacks)
        (run_state,) = (callback for callback in callbacks if isinstance(callback, RunState))
        monkeypatch.setattr(model.average, "_blend", lambda steps, averages, weights: averages)
        for average in model.average.averages:
            average.assign(np.full(average.shape, 0.5, "float32"))
        write = run_state.save_best({"epoch": 1, "val_accuracy": 0.5})
        for weight in model.network.weights:
            weight.assign(weight + 1)  # training goes on before the file is written
        write()

    monkeypatch.setattr(training.AdCorreTrainer, "fit", fit)
    wanted = settings(
        data_dir,
        tmp_path,
        balanced=True,
        loss=config.LossConfig(ramp_epochs=2.5),
        optimizer=config.OptimizerConfig(average=0.9),
        model=config.ModelConfig(num_embeddings=2, embedding_size=8, input_size=24, dropout=0.125),
    )
    splits = experiment._open_splits(wanted)
    run = experiment.Run(run_identity.identity_of(wanted, splits), GROUP_OF_ONE, 0.0)
    experiment._train(wanted, tmp_path, splits, run)
    model = given["model"]
    assert model.loss_layer.ramp_steps == 10, "2.5 epochs of 120 images in batches of 30"
    assert given["batches"].balanced
    assert model.network.get_layer("dropout").rate == 0.125
    saved, _ = model_file.load_model(tmp_path / "best.weights.h5")
    assert all(np.all(np.asarray(weight) == 0.5) for weight in saved.weights)
    assert not any(np.all(np.asarray(weight) == 0.5) for weight in model.network.weights)


def test_a_run_says_what_its_loss_is_and_ends_with_what_comes_next(whole_run, data_dir, capfd):
    again = settings(data_dir, whole_run, epochs=EPOCHS)
    result, folder = experiment.train_and_report(again)
    lines = experiment.closing_lines(result, folder, again).splitlines()
    best = read_history(folder)[result["best_epoch"] - 1]
    assert f"{result['best_epoch']} of 4: accuracy {best['val_accuracy']:.2%} on val" in lines[0]
    assert f"synthetic/test: accuracy {result['accuracy']:.2%}" in lines[1] and f"{folder}/" in lines[2]
    commands = " ".join(lines[4:]).replace("\\", "").split("python ")[1:]
    weights = str(folder / "best.weights.h5")
    for words, wanted in zip(map(shlex.split, commands), ("evaluate", "recognize"), strict=True):
        assert words[:2] == ["test.py", wanted] and words[-2:] == ["--weights", weights]
    assert ["--data-dir", str(data_dir)] == shlex.split(commands[0])[6:8]
    model = TrainModel(DatasetName.synthetic, settings=again)
    capfd.readouterr()
    model.train()
    assert capfd.readouterr().out.endswith("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("w_eac", [0.0, 5.0])
def test_a_resumed_run_applies_its_left_over_gradients_to_the_same_weights(
    w_eac, data_dir, tmp_path, monkeypatch, capsys
):
    """8 steps, 3 per update: 2 are left over."""
    options = {"optimizer": config.OptimizerConfig(accumulate=3, average=0.5), "loss": config.LossConfig(w_eac=w_eac)}
    whole, stopped = (settings(data_dir, tmp_path / name, **options) for name in ("whole", "stopped"))
    experiment.train_and_evaluate(whole)
    formula = "loss = 7.14 ce + 1 fd + 1 md + 1 ed" + (" + 5 eac" if w_eac else "")
    assert f"{formula} (docs/loss.md)\nepoch 1/2  train: " in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(training.EpochOrder, "on_epoch_begin", stop_at_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            experiment.train_and_evaluate(stopped)
    experiment.train_and_evaluate(stopped)
    expected, found = read_state(tmp_path / "whole"), read_state(tmp_path / "stopped")
    for (name, left), right in zip(expected.items(), found.values(), strict=True):  # Keras counts layers in the names
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert not any(values.any() for name, values in expected.items() if "gradient_accumulator" in name)


def test_a_refused_command_leaves_nothing(data_dir, whole_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for folder in ("new/deeper/run", "mine"):
        for options, facts in (
            ({"optimizer": config.OptimizerConfig(accumulate=9)}, "--accumulate: expected at most 8, .*received 9"),
            ({"model": config.ModelConfig(arch="moon")}, "moon"),
            ({"soft_labels": True}, "--soft-labels"),
        ):
            with pytest.raises(UserError, match=facts):
                experiment.train_and_evaluate(settings(data_dir, tmp_path / folder, **options))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left - {"mine/.lock"} == {"mine", "mine/notes.txt"}
    before = sorted(whole_run.iterdir())
    with pytest.raises(UserError, match="epochs: 4 -> 2"):
        experiment.train_and_evaluate(settings(data_dir, whole_run))
    assert sorted(whole_run.iterdir()) == before


def test_a_run_sent_to_the_current_folder_gets_one_below_it(tmp_path, monkeypatch):
    """As by the published ``weight_path="./"``; a run that is there already continues there."""
    monkeypatch.chdir(tmp_path)
    identity = run_identity.RunIdentity(run_identity.options_of(TrainConfig()), {})
    wanted = tmp_path / "runs" / identity.name
    for here in ("./", str(tmp_path)):
        assert experiment._folder_of(TrainConfig(run_dir=here), identity).resolve() == wanted
    assert experiment._folder_of(TrainConfig(run_dir=str(ROOT)), identity) == ROOT / "runs" / identity.name
    assert experiment._folder_of(TrainConfig(run_dir="elsewhere"), identity) == Path("elsewhere")
    (tmp_path / "config.json").write_text(json.dumps(identity.to_dict()))
    assert experiment._folder_of(TrainConfig(run_dir="./"), identity) == Path("./")


@pytest.mark.slow
def test_the_network_can_learn_one_batch_by_heart(data_dir):
    """14 faces, no augmentation, no dropout: the loss falls and every face is recognised."""
    import keras

    import cnn_model
    import custom_loss
    from data_helper import open_split

    keras.utils.set_random_seed(0)
    split = open_split(data_dir, "synthetic", "train")
    images, labels = np.asarray(split.images[:14]), split.labels[:14].astype(np.int32)
    model = training.AdCorreTrainer(
        cnn_model.build_model("mini_xcp", num_embeddings=3, embedding_size=16, input_size=24, dropout=0.0),
        custom_loss.AdCorreLoss(7),
    )
    model.compile(keras.optimizers.Adam(3e-3), jit_compile=False)
    first = model.train_on_batch(images, labels, return_dict=True)
    for _ in range(60):
        model.reset_metrics()
        last = model.train_on_batch(images, labels, return_dict=True)
    assert last["accuracy"] == 1.0
    for term in ("loss", "ce", "fd", "md"):  # ED starts near its minimum
        assert last[term] < first[term], term


@pytest.mark.slow
def test_jax_trains_without_tensorflow(data_dir, tmp_path):
    code = "import sys, runpy; sys.argv[0] = 'train.py'; sys.modules['tensorflow'] = None\n"
    code += "runpy.run_path('train.py', run_name='__main__')"
    options = command(data_dir, tmp_path / "run")[2:]
    options[options.index("--epochs") + 1] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--backend", "jax"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert "jax" in env and "tensorflow" not in env
    assert np.isfinite(read_history(tmp_path / "run")[0]["loss"])


# --- votes instead of labels ----------------------------------------------------------------------------------------


@pytest.fixture
def voted_data_dir(data_dir, tmp_path) -> Path:
    """The synthetic faces, with 0.7 of the votes on each for its label and the rest shared by all classes."""
    folder = shutil.copytree(data_dir, tmp_path / "voted")
    for labels in folder.glob("*/*/labels.npy"):
        votes = 0.7 * np.eye(7)[np.load(labels)] + 0.3 / 7
        np.save(labels.with_name("votes.npy"), votes.astype(np.float32))
    forget_digests(folder)  # the votes are new
    return folder


@pytest.mark.slow
def test_soft_labels_train_and_a_stopped_run_goes_on(voted_data_dir, tmp_path, capsys, monkeypatch):
    run_dir, loss = tmp_path / "run", config.LossConfig(label_smoothing=0.0)
    soft = settings(voted_data_dir, run_dir, epochs=2, soft_labels=True, loss=loss)
    with monkeypatch.context() as stopped:
        stopped.setattr(training.EpochOrder, "on_epoch_begin", stop_at_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            experiment.train_and_evaluate(soft)
    with prepared_otherwise(voted_data_dir), pytest.raises(UserError, match="data of the train split"):
        experiment.train_and_evaluate(soft)
    result = experiment.train_and_evaluate(soft)
    assert "going on after epoch 1 of 2" in capsys.readouterr().out
    assert result["n"] == 35 and result["config"]["soft_labels"] is True
    # 0.7 + 0.3/7 = 0.743 for the label and 0.043 for each other class have this entropy: no network gets below it.
    entropy = -(0.743 * math.log(0.743) + 6 * 0.043 * math.log(0.043))
    rows = read_history(run_dir)
    assert len(rows) == 2
    for row in rows:
        assert row["ce"] > 0.99 * entropy and row["val_ce"] > 0.99 * entropy
        assert row["loss"] == pytest.approx(50 / 7 * row["ce"] + row["fd"] + row["md"] + row["ed"], rel=1e-5)
        assert row["val_accuracy"] * 42 == pytest.approx(round(row["val_accuracy"] * 42), abs=1e-3)


@contextlib.contextmanager
def prepared_otherwise(data_dir: Path):
    """The train split prepared again with one other label while the block runs."""
    folder = data_dir / "synthetic" / "train"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    labels, votes = np.load(folder / "labels.npy"), np.load(folder / "votes.npy")
    labels[0] = (labels[0] + 1) % 7
    votes[0] = 0.7 * np.eye(7, dtype=np.float32)[labels[0]] + 0.3 / 7
    np.save(folder / "labels.npy", labels)
    np.save(folder / "votes.npy", votes)
    forget_digests(data_dir)
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def forget_digests(data_dir: Path) -> None:
    for path in data_dir.glob("*/*/meta.json"):
        meta = json.loads(path.read_text())
        meta.pop("digest", None)
        labels = np.load(path.with_name("labels.npy"))
        meta["class_counts"] = np.bincount(labels, minlength=len(meta["class_names"])).tolist()
        path.write_text(json.dumps(meta))


def stop_at_second_epoch(self, epoch, logs=None):
    if epoch == 1:
        raise KeyboardInterrupt
    self.batches.epoch = epoch


def test_soft_labels_want_votes(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"--soft-labels: .*found none for synthetic/val"):
        experiment.train_and_evaluate(settings(data_dir, tmp_path / "run", soft_labels=True))


# --- blended targets ------------------------------------------------------------------------------------------------


def test_mixup_blends_images_and_targets(data_dir):
    """Shares of 0.75 from a stand-in: the cross-entropy is that of votes blended as the images are."""
    import keras

    import cnn_model
    import custom_loss
    from data_helper import open_split

    class Shares(augmentation.Mixup):
        def call(self, pixels):
            shares = np.full(pixels.shape[0], 0.75, "float32")
            return augmentation.blend(pixels, shares), shares

    split = open_split(data_dir, "synthetic", "train")
    images, labels = np.asarray(split.images[:14], "float32"), split.labels[:14].astype(np.int32)
    network = cnn_model.build_model("mini_xcp", num_embeddings=3, embedding_size=16, input_size=24, dropout=0.0)
    model = training.AdCorreTrainer(network, custom_loss.AdCorreLoss(7, w_fd=0, w_md=0, w_ed=0), mixup=Shares(1, 0))
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False, run_eagerly=True)
    hot = np.eye(7)[labels]
    votes = 0.75 * hot + 0.25 * np.roll(hot, 1, axis=0)
    blended = 0.75 * images + 0.25 * np.roll(images, 1, axis=0)
    logits = np.asarray(network(blended, training=True)["logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for targets in (labels, hot.astype(np.float32)):
        step = model.train_on_batch(images, targets, return_dict=True)
        assert float(step["ce"]) == pytest.approx(-(votes * log_p).sum(axis=1).mean(), rel=1e-4)
    assert "shares" not in model(images, training=False)


def test_votes_for_one_class_train_as_its_label(data_dir):
    """The same step from labels and from votes that all went to the label: same terms, same accuracy, same weights."""
    import keras

    import cnn_model
    import custom_loss
    from data_helper import open_split

    split = open_split(data_dir, "synthetic", "train")
    images, labels = np.asarray(split.images[:14]), split.labels[:14].astype(np.int32)
    logs, weights = [], []
    for targets in (labels, np.eye(7, dtype=np.float32)[labels]):
        keras.utils.set_random_seed(0)
        model = training.AdCorreTrainer(
            cnn_model.build_model("mini_xcp", num_embeddings=3, embedding_size=16, input_size=24, dropout=0.0),
            custom_loss.AdCorreLoss(7, label_smoothing=0.1),
        )
        model.compile(keras.optimizers.SGD(0.01), jit_compile=False)
        step = model.train_on_batch(images, targets, return_dict=True)
        logs.append({name: float(value) for name, value in step.items()})
        weights.append([np.asarray(variable) for variable in model.variables])
    of_labels, of_votes = logs
    assert of_votes == pytest.approx(of_labels, rel=1e-5)
    assert "accuracy" in of_votes
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
