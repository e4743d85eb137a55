"""The saved state of a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import small_trainer, write_split

import trainer
from data_helper import open_split
from dataset_class import Batches
from files import UserError
from model_files import safe_hdf5
from training.run_state import RunState, _LatestOnly


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after three epochs, its saved state, and the epochs that were the best so far."""
    model = small_trainer()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (28, 24, 24, 1), np.uint8), np.arange(28, dtype=np.int32) % 7
    best = []
    folder = tmp_path_factory.mktemp("run")
    state = RunState(folder, monitor="val_accuracy", save_best=lambda row: lambda: best.append(row["epoch"]))
    model.fit(images, labels, batch_size=14, epochs=3, validation_data=(images, labels), verbose=0, callbacks=[state])
    state.close()
    return model, state, best


@pytest.fixture
def saved(trained, tmp_path):
    """`trained`, its files copied into ``tmp_path``."""
    model, state, best = trained
    shutil.copytree(state.path.parent, tmp_path, dirs_exist_ok=True)
    state = copy.copy(state)
    state.path = tmp_path / state.path.name
    return model, state, best


def test_every_random_and_remembered_thing_is_restored(saved, tmp_path):
    model, state, _ = saved
    other = small_trainer()
    restored = RunState(tmp_path, monitor="val_accuracy", save_best=print)
    restored.restore(other)
    assert restored.history == state.history
    assert int(other.optimizer.iterations) == 6
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    assert np.all(np.asarray(other.loss_layer.history_h2) >= 0), "28 predictions an epoch fill a history of 20"


def test_the_best_epoch_is_the_first_of_equals():
    saved = []
    state = RunState("unused", "val_accuracy", save_best=lambda row: saved.append(row["epoch"]), writes=False)
    state.set_model(small_trainer())
    for epoch, score in enumerate((0.5, 0.7, 0.7, 0.6)):
        state.on_epoch_begin(epoch)
        state.on_epoch_end(epoch, {"val_accuracy": score})
    assert saved == [1, 2] and state.best()["epoch"] == 2


def test_a_damaged_state_is_refused(saved, tmp_path):
    path = tmp_path / "state.h5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state.h5: .*delete the folder to start again"):
        RunState(tmp_path, "val_accuracy", print).restore(small_trainer())


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"steps_done": -1}, "steps_done: .*found -1"),
        ({"steps_done": True}, "steps_done: .*found True"),
        ({"seconds": "1"}, "seconds: .*found '1'"),
        ({"epochs": 0}, "epochs: .*found 0"),
        ({"history": [{"epoch": 2}]}, r"history: .*\{'epoch': 2\} for epoch 1"),
        ({"history": [{"epoch": 1}, {"epoch": 2, "loss": 1.0}]}, "history: .*for epoch 2"),
        ({"history": [{"epoch": 1, "loss": "\x1b"}]}, "history: expected finite numbers"),
        ({"history": {}}, "history: expected a valid array"),
    ],
)
def test_a_state_of_other_types_is_refused_although_its_digest_is_right(saved, tmp_path, changes, fact):
    path = tmp_path / "state.h5"
    content = safe_hdf5.read_arrays(path)
    notes = json.loads(content.attributes["notes"])
    safe_hdf5.write_arrays(path, content.arrays, {"notes": json.dumps({**notes, **changes})})
    with pytest.raises(UserError, match=rf"state.h5: {fact}.*delete the folder to start again"):
        RunState(tmp_path, "val_accuracy", print).restore(small_trainer())


def test_the_state_of_another_network_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="choose another --run-dir"):
        RunState(tmp_path, "val_accuracy", print).restore(small_trainer(embedding_size=9))


def test_a_failed_save_keeps_the_state_before(saved, tmp_path, monkeypatch):
    _, state, _ = saved
    before = (tmp_path / "state.h5").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        state._save(steps_done=0)
        state.close()
    assert (tmp_path / "state.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "state.h5"]


class Killed(BaseException):
    """Stands for the end of the process."""


class KillWithin(keras.callbacks.Callback):
    """Ends a fit before a call of an epoch, when the checkpoint before it is written."""

    def __init__(self, state, epoch, batch):
        super().__init__()
        self.state, self.place = state, (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            self.state.close()
            raise Killed


@pytest.mark.parametrize("steps_per_call", [0, 1, 3])
def test_a_run_that_is_stopped_within_an_epoch_goes_on_to_the_same_bits(tmp_path, steps_per_call):
    """Streaming (0) and resident; 7 batches per epoch, so that calls of 3 steps end with one of 1."""
    rng = np.random.default_rng(0)
    write_split(tmp_path, np.arange(100) % 7, shape=(24, 24, 1))
    write_split(tmp_path, np.arange(31) % 7, shape=(24, 24, 1), split="val")
    splits = [open_split(tmp_path, "synthetic", name) for name in ("train", "val")]
    splits = [dataclasses.replace(s, images=rng.integers(0, 256, s.images.shape, np.uint8)) for s in splits]

    def engine():
        keras.utils.set_random_seed(3)
        resident = bool(steps_per_call)
        model = small_trainer(average=0.9, images=[s.images for s in splits] if resident else ())
        train, val = (Batches(split, 14, seed=3, training=split is splits[0], resident=resident) for split in splits)
        for batches in (train, val):
            batches.steps_per_call = steps_per_call or 1
        return trainer.Engine(model, train, val)

    def run(folder, stop=None):
        whole = engine()
        state = RunState(
            tmp_path / folder, "val_accuracy", lambda row: print, whole.train.steps_of, save_seconds=0, run="this"
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        state.restore(whole.model)
        place = (state.epochs_done, state.steps_done)
        whole.fit(2, [state, *([KillWithin(state, *stop)] if stop else [])], *place)
        state.close()
        return whole.model, state, place

    expected, kept, _ = run("whole")
    call = 2 if steps_per_call == 3 else 5
    with pytest.raises(Killed):
        run("stopped", stop=(1, call))
    found, state, place = run("stopped")
    assert place == (1, 6 if steps_per_call == 3 else 5)
    for left, right in zip(expected.state_variables(), found.state_variables(), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=left.path)
    for left, right in zip(kept.history, state.history, strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


def test_the_state_of_another_run_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"state.h5: .*another run"):
        RunState(tmp_path, "val_accuracy", print, run="synthetic-mini_xcp-seed1-01234567").restore(small_trainer())


def test_the_table_of_the_history_follows_from_the_state(saved, tmp_path):
    """As after a kill between the two files."""
    table = (tmp_path / "history.csv").read_text()
    (tmp_path / "history.csv").unlink()
    RunState(tmp_path, "val_accuracy", print).restore(small_trainer())
    assert (tmp_path / "history.csv").read_text() == table


def test_a_folder_that_is_gone_is_not_made_again(saved, tmp_path):
    _, state, _ = saved
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="gone"):
        state._save(steps_done=0)
    assert not tmp_path.exists()


def test_saves_that_come_while_one_is_written_become_one_and_lose_no_best_weights():
    begun, released, written = threading.Event(), threading.Event(), []

    def write(value):
        begun.set()
        released.wait(10)
        written.append(value)

    writer = _LatestOnly(write)
    writer.put(1)
    assert begun.wait(10)
    writer.put(2)
    assert writer.take_back() == 2
    writer.put(3)
    released.set()
    writer.close()
    assert written == [1, 3]
