"""The order of the batches, which (seed, epoch) decides; balanced classes; votes as targets; batches in `fit`."""

from __future__ import annotations

import dataclasses
import math
import os

import keras
import numpy as np
import pytest
from conftest import write_split
from keras import ops

from data_helper import open_split
from dataset_class import Batches
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError
from trainer import EpochOrder

LABELS = np.array([0] * 10 + [1] * 3 + [2] * 6 + [6] * 4)  # 23 images; classes 3, 4 and 5 are absent


@pytest.fixture
def split(tmp_path):
    write_split(tmp_path, LABELS)
    return open_split(tmp_path, "synthetic", "train")


def rows_of(images: np.ndarray) -> np.ndarray:
    """Which rows of the split the images are: `write_split` fills image i with i."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].astype(int)


def epoch_of(batches: Batches) -> np.ndarray:
    return np.concatenate([rows_of(batches[i][0]) for i in range(len(batches))])


# Order


def test_an_epoch_is_a_permutation(split):
    batches = Batches(split, 1, seed=3)
    for batches.epoch in range(3):
        assert sorted(epoch_of(batches)) == list(range(23))
        assert epoch_of(batches).tolist() == batches.order().tolist() != list(range(23))


def test_labels_belong_to_their_images(split):
    for training in (False, True):
        images, labels = Batches(split, 6, seed=1, training=training)[1]
        assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 1)
        assert labels.dtype == np.int32 and labels.tolist() == LABELS[rows_of(images)].tolist()


@pytest.mark.parametrize("balanced", [False, True])
def test_order_is_a_function_of_seed_and_epoch(split, balanced):
    """Whatever was asked before, and however large the batches are."""
    first = Batches(split, 4, seed=5, balanced=balanced)
    orders = []
    for first.epoch in (0, 1, 2, 3):
        orders.append(first.order().tolist())
    for epoch in (2, 0, 3, 3, 1):
        other = Batches(split, 7, seed=5, balanced=balanced)
        first.epoch = other.epoch = epoch
        np.random.default_rng(epoch).random()
        np.random.seed(epoch)
        assert first.order().tolist() == other.order().tolist() == orders[epoch]
    assert len({tuple(order) for order in orders}) == 4
    assert Batches(split, 4, seed=6, balanced=balanced).order().tolist() != orders[0]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_rows_that_are_left_out_never_appear(split, balanced, resident):
    """What is left is ordered as a split of these images alone would be; labels stay with their images."""
    kept = np.flatnonzero(~np.isin(np.arange(23), [0, 4, 11, 12, 22]))
    small = dataclasses.replace(split, images=split.images[kept], labels=LABELS[kept])
    batches = Batches(split, 6, seed=5, kept=kept, balanced=balanced, resident=resident)
    alone = Batches(small, 6, seed=5, balanced=balanced)
    batches.steps_per_call = 2 if resident else 1
    assert batches.steps == alone.steps == 3
    for batches.epoch in range(3):
        alone.epoch = batches.epoch
        found, targets = zip(*(batches[index] for index in range(len(batches))), strict=True)
        rows, labels = (np.concatenate([part.ravel() for part in parts]) for parts in (found, targets))
        if resident:
            rows, labels = rows[rows >= 0], labels[rows >= 0]
        else:
            rows = np.concatenate([rows_of(images) for images in found])
        assert rows.tolist() == kept[alone.order()].tolist()
        assert labels.tolist() == LABELS[rows].tolist()


def test_each_process_reads_its_share_of_what_is_left(split):
    kept = np.array([1, 2, 3, 5, 8, 13, 21, 22])
    groups = [ProcessGroup(processes=2, process_id=rank) for rank in range(2)]
    alone, *shared = (Batches(split, 4, seed=2, kept=kept, group=group) for group in (GROUP_OF_ONE, *groups))
    for index in range(2):
        images, targets = alone[index]
        assert np.concatenate([each[index][0] for each in shared]).tolist() == images.tolist()
        assert all(each[index][1].tolist() == targets.tolist() for each in shared)
    assert sorted(epoch_of(alone)) == kept.tolist()


def test_epochs_of_neighbouring_seeds_are_not_the_same(split):
    """Seeding by seed + epoch would make seed 0's second epoch seed 1's first."""
    seen = set()
    for seed in range(4):
        batches = Batches(split, 4, seed=seed)
        for batches.epoch in range(4):
            seen.add(tuple(batches.order()))
    assert len(seen) == 16


def test_training_leaves_out_a_short_last_batch_other_images_each_epoch(split):
    batches = Batches(split, 5, seed=0)
    assert len(batches) == 4
    left_out = set()
    for batches.epoch in range(4):
        seen = epoch_of(batches)
        assert len(seen) == len(set(seen)) == 20
        left_out.add(frozenset(range(23)) - frozenset(seen))
    assert len(left_out) > 1


def test_training_with_a_batch_larger_than_the_split_sees_all_of_it(split):
    batches = Batches(split, 100, seed=0)
    assert len(batches) == 1 and sorted(epoch_of(batches)) == list(range(23))


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [3, 5, 5, 5, 5]), (23, [23]), (24, [23]), (1, [1] * 23)])
def test_evaluation_sees_every_image_once_in_one_mixed_order(split, batch_size, sizes):
    batches = Batches(split, batch_size, seed=2, training=False)
    assert [len(batches[i][1]) for i in range(len(batches))] == sizes
    first = epoch_of(batches).tolist()
    assert sorted(first) == list(range(23)) != first
    batches.epoch = 1
    assert epoch_of(batches).tolist() == first
    assert len(set(LABELS[first[:5]])) > 1  # the file is sorted by class, a batch is not


def test_balanced_epochs_draw_present_classes_equally(split):
    """Of n draws a class gets n/4 on average, with a binomial deviation of sqrt(n * 1/4 * 3/4); 5 of them is 1e-6."""
    batches = Batches(split, 23, seed=0, balanced=True)
    drawn = []
    for batches.epoch in range(200):
        rows = epoch_of(batches)
        assert len(rows) == 23
        drawn += rows.tolist()
    bound = 5 * math.sqrt(len(drawn) * 3 / 16)
    counts = np.bincount(LABELS[drawn], minlength=7)
    assert counts[[3, 4, 5]].tolist() == [0, 0, 0]
    assert np.abs(counts[[0, 1, 2, 6]] - len(drawn) / 4).max() < bound
    # ... and within a class its images equally: each of the 10 neutral ones n/40 of the time.
    neutral = np.bincount(drawn, minlength=23)[:10]
    assert np.abs(neutral - len(drawn) / 40).max() < 5 * math.sqrt(len(drawn) / 40)


def test_a_file_that_is_cut_during_training_is_an_error(tmp_path):
    folder = write_split(tmp_path, LABELS)
    batches = Batches(open_split(tmp_path, "synthetic", "train"), 23, seed=1)
    os.truncate(folder / "images.npy", 1000)
    with pytest.raises(UserError, match=r"images.npy: ends before row \d+.*prepare the data set again"):
        batches[0]


# Votes


@pytest.fixture
def voted(tmp_path):
    """A split of 23 images, each with its own distribution of the votes."""
    votes = np.random.default_rng(0).dirichlet(np.ones(7), len(LABELS)) * 0.49
    votes[np.arange(len(LABELS)), LABELS] += 0.51
    write_split(tmp_path, LABELS, votes=votes.astype(np.float32))
    return open_split(tmp_path, "synthetic", "train"), votes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_soft_labels_are_the_votes_on_the_images_that_the_labels_would_come_with(voted, training, balanced):
    split, votes = voted
    hard = Batches(split, 6, seed=1, training=training, balanced=balanced)
    soft = Batches(split, 6, seed=1, training=training, balanced=balanced, soft_labels=True)
    assert len(hard) == len(soft)
    for index in range(len(soft)):
        images, found = soft[index]
        assert images.tolist() == hard[index][0].tolist()
        assert (found.dtype, found.shape) == (np.float32, (len(images), 7))
        np.testing.assert_allclose(found, votes[rows_of(images)], rtol=1e-6)
        assert found.argmax(axis=1).tolist() == hard[index][1].tolist()


def test_soft_labels_want_votes(split):
    with pytest.raises(
        UserError, match=r"--soft-labels: .* votes\.npy, found none for synthetic/train; train on ferplus"
    ):
        Batches(split, 4, seed=0, soft_labels=True)


# In training


class Seen(keras.Model):
    """A model that notes the rows of each training step of 4 images, in the step itself."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.step = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.seen = self.add_weight(shape=(100, 4), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x):
        return self.dense(ops.mean(ops.cast(x, "float32"), axis=(1, 2)))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        if training:
            rows = ops.cast(x[:, 0, 0, 0], "int32")
            self.seen.assign(ops.scatter_update(self.seen, ops.reshape(self.step, (1, 1)), rows[None]))
            self.step.assign(self.step + 1)
        return ops.mean(y_pred)


@pytest.mark.parametrize(("built", "first", "last"), [(True, 1, 3), (False, 0, 3)])
def test_fit_sees_each_epoch_in_its_own_order(tmp_path, built, first, last):
    """Whatever Keras and tf.data read ahead: an epoch's batches have that epoch's order, after a resume too."""
    write_split(tmp_path, np.arange(103) % 7)
    split = open_split(tmp_path, "synthetic", "train")
    batches = Batches(split, 4, seed=11)
    model = Seen()
    model.compile(optimizer="sgd", jit_compile=False)
    if built:
        model(np.zeros((4, 8, 8, 1), np.uint8))
    model.fit(
        batches,
        validation_data=Batches(split, 10, seed=11, training=False),
        initial_epoch=first,
        epochs=last,
        shuffle=False,
        verbose=0,
        callbacks=[EpochOrder(batches)],
    )
    expected = []
    for epoch in range(first, last):
        fresh = Batches(split, 4, seed=11)
        fresh.epoch = epoch
        expected += fresh.order()[:100].reshape(25, 4).tolist()
    assert int(model.step) == len(expected)
    assert model.seen.numpy()[: len(expected)].tolist() == expected
