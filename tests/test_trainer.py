"""The engine: the loss's means, resident images, many steps per call, the measured length of a run."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import small_trainer, write_split

import custom_loss
import trainer as training
from data_helper import open_split
from dataset_class import Batches
from files import UserError


def test_the_losses_of_an_epoch_are_means_over_its_images():
    """Batches of 7 and 2 images: each batch's mean counts by its size."""
    model = training.AdCorreTrainer(keras.layers.Identity(), custom_loss.AdCorreLoss(7))
    rng, batches = np.random.default_rng(0), []
    for size in (7, 2):
        labels = keras.ops.arange(size, dtype="int32")
        shapes = {"logits": (size, 7), "embeddings": (size, 2, 4)}
        outputs = {name: keras.ops.convert_to_tensor(rng.normal(size=s), "float32") for name, s in shapes.items()}
        model.compute_loss(y=labels, y_pred=outputs, training=False)
        batches.append(model.loss_layer(labels, **outputs, training=False))
    for name, mean in {"loss": model.total, **{mean.name: mean for mean in model.term_means}}.items():
        large, small = (float(values[name]) for values in batches)
        assert float(mean.result()) == pytest.approx((7 * large + 2 * small) / 9, rel=1e-6), name
        assert large != pytest.approx(small, rel=1e-3), name


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(loss):
    calls = {2: range(2, 3), 3: range(8, 12)}
    stop = training.StopAtNaN(SimpleNamespace(steps_of=calls.__getitem__))
    stop.on_epoch_begin(1)
    stop.on_train_batch_end(2, {"loss": 1e30})
    with pytest.raises(UserError, match=f"{loss} at step 3 of epoch 2"):
        stop.on_train_batch_end(2, {"loss": loss})
    with pytest.raises(UserError, match=f"{loss} at steps 9 to 12 of epoch 2"):
        stop.on_train_batch_end(3, {"loss": loss})
    stop.on_epoch_end(1, {"loss": 1.0})
    with pytest.raises(UserError, match=f"{loss} at the validation after epoch 2"):
        stop.on_epoch_end(1, {"loss": 1.0, "val_loss": loss})


@pytest.fixture
def splits(tmp_path):
    """A training split of 103 images and a validation split of 31, with votes."""
    rng = np.random.default_rng(0)
    found = []
    for name, size in (("train", 103), ("val", 31)):
        write_split(tmp_path, np.arange(size) % 7, split=name, shape=(24, 24, 1))
        split = open_split(tmp_path, "synthetic", name)
        votes = rng.dirichlet(np.ones(7), size).astype(np.float32)
        images = rng.integers(0, 256, split.images.shape, np.uint8)
        found.append(dataclasses.replace(split, images=images, votes=votes))
    return found


def make_engine(splits, steps_per_call=0, **options):
    """An engine of `small_trainer`, streaming (0) or with resident images."""
    keras.utils.set_random_seed(3)
    resident = bool(steps_per_call)
    model = small_trainer(average=0.9, images=[split.images for split in splits] if resident else ())
    train, val = splits
    shared = {"seed": 3, "resident": resident, "soft_labels": options.get("soft_labels", False)}
    engine = training.Engine(model, Batches(train, 14, **shared, **{k: v for k, v in options.items() if k == "balanced"}),
                             Batches(val, 14, **shared, training=False))  # fmt: skip
    for batches in (engine.train, engine.validation):
        batches.steps_per_call = steps_per_call or 1
    return engine


@pytest.mark.parametrize("options", [{}, {"soft_labels": True, "balanced": True}])
def test_resident_images_and_many_steps_per_call_change_no_bit(splits, options):
    """32 steps per call are the 7 of an epoch; 3 make calls of 3, 3 and 1."""
    results = {}
    for steps_per_call in (0, 1, 3, 32):
        engine = make_engine(splits, steps_per_call, **options)
        history = keras.callbacks.History()
        engine.fit(2, [history])
        results[steps_per_call] = engine.model.state_variables(), history.history
    variables, history = results.pop(0)
    for steps_per_call, (found, logs) in results.items():
        assert logs == history, steps_per_call
        for left, right in zip(variables, found, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=left.path)


def test_resident_images_are_no_part_of_the_state(splits):
    model = make_engine(splits, 3).model
    names = [variable.path for variable in model.state_variables()]
    assert not [name for name in names if "images" in name] and len(names) == len(set(map(id, model.state_variables())))
    assert sum("images" in variable.path for variable in model.variables) == 2


def test_measuring_the_speed_changes_nothing(splits):
    for steps_per_call in (0, 3):
        engine = make_engine(splits, steps_per_call)
        before = [np.array(variable) for variable in engine.model.state_variables()]
        assert 0 < engine.seconds_per_step() < 60 and 0 < engine.seconds_per_validation() < 60
        for left, right in zip(before, engine.model.state_variables(), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=right.path)
        assert len(engine.train) == (7 if not steps_per_call else -(-7 // engine.train.steps_per_call))


@pytest.mark.parametrize(
    ("step_seconds", "expected"), [(5.0, [1, 1]), (0.3, [3, 3]), (1e-4, [7, 3])]
)
def test_a_call_takes_about_a_second_and_never_more_than_an_epoch(splits, step_seconds, expected):
    engine = make_engine(splits, 1)
    engine.choose_steps_per_call(step_seconds)
    assert [engine.train.steps_per_call, engine.validation.steps_per_call] == expected


def test_epochs_that_fit_into_the_time():
    """10 minutes less 5%, 30 s that are gone and 20 + 2 * 5 s for the report are 510 s; an epoch is 100 * 0.1 + 5 s."""
    assert training.epochs_in(10, used_s=30, step_s=0.1, validation_s=5, steps=100) == 34
    with pytest.raises(UserError, match=r"--minutes: expected 1\.3 or more .*15 s.*received 1"):
        training.epochs_in(1, used_s=30, step_s=0.1, validation_s=5, steps=100)


@pytest.mark.parametrize(
    ("choice", "free", "expected"),
    [("no", 10**9, False), ("yes", None, True), ("yes", 10**9, True), ("auto", None, False), ("auto", 10**9, True)],
)
def test_images_are_resident_where_they_fit(monkeypatch, choice, free, expected):
    monkeypatch.setattr(training.runtime, "free_gpu_bytes", lambda: free)
    assert training.resident(choice, 10**8) is expected


def test_images_that_do_not_fit_are_not_resident(monkeypatch, capsys):
    monkeypatch.setattr(training.runtime, "free_gpu_bytes", lambda: 10**9)
    assert training.resident("auto", 5 * 10**8) is False
    assert "500 MB" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--resident yes: 2,000 MB .* 1,000 MB"):
        training.resident("yes", 2 * 10**9)
