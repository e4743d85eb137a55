"""Are prepared files checked before use, and do batches come in the order that (seed, epoch) alone decides?"""

from __future__ import annotations

import json
import math
import os
import pickle

import keras
import numpy as np
import pytest
from conftest import write_split
from keras import ops

from data_helper import open_split, prepared_splits
from dataset_class import Batches
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


# Opening


@pytest.mark.parametrize(("shape", "num_classes"), [((8, 8, 1), 7), ((5, 9, 3), 8)])
def test_a_split_is_what_was_prepared(tmp_path, shape, num_classes):
    labels = [3, 0, 0, num_classes - 1]
    write_split(tmp_path, labels, split="val", shape=shape, num_classes=num_classes)
    split = open_split(str(tmp_path), "synthetic", "val")
    assert split.images.shape == (4, *shape) and split.images.dtype == np.uint8
    assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
    assert split.labels.tolist() == labels and split.labels.dtype == np.int64
    assert rows_of(split.images).tolist() == [0, 1, 2, 3]
    assert (len(split), split.name, split.num_classes) == (4, "synthetic/val", num_classes)
    assert split.class_names[:3] == ("Neutral", "Happy", "Sad") and len(split.class_names) == num_classes
    assert split.class_counts.tolist() == [2, 0, 0, 1, 0, 0] + ([1] if num_classes == 7 else [0, 1])


def test_prepared_splits_are_listed_in_order(tmp_path):
    assert prepared_splits(tmp_path / "nowhere") == []
    for dataset, split in (("synthetic", "val"), ("fer2013", "train"), ("synthetic", "test")):
        write_split(tmp_path, [0], dataset=dataset, split=split)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert prepared_splits(tmp_path) == [("fer2013", "train"), ("synthetic", "test"), ("synthetic", "val")]


@pytest.mark.parametrize(("dataset", "source"), [("fer2013", " --source PATH"), ("synthetic", "")])
def test_what_is_not_prepared_names_the_command(tmp_path, dataset, source):
    with pytest.raises(UserError) as caught:
        open_split(tmp_path, dataset, "train")
    assert str(caught.value) == (
        f"{dataset}/train is not prepared in {tmp_path} (found: nothing); "
        f"run: python prepare_data.py {dataset}{source} --data-dir {tmp_path}"
    )
    write_split(tmp_path, [0, 1], dataset=dataset, split="val")
    with pytest.raises(UserError, match=rf"found: {dataset}/val"):
        open_split(tmp_path, dataset, "train")


def replace(name, array):
    return lambda folder: np.save(folder / name, array)


def cut(name, length):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return damage


def edit_meta(**values):
    def damage(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def as_csv(name):
    return lambda folder: (folder / name).write_text("emotion,pixels\n0,70 80 82\n")


IMAGES, INTS = np.zeros((23, 8, 8, 1), np.uint8), np.zeros(23, np.int64)
DAMAGES = {
    "fewer labels": (replace("labels.npy", INTS[:22]), r"23 images, labels\.npy 22 labels and meta\.json says 23"),
    "fewer images": (replace("images.npy", IMAGES[:5]), r"images\.npy holds 5 images"),
    "meta counts others": (edit_meta(num_images=24), r"meta\.json says 24"),
    "images cut off": (cut("images.npy", -10), r"images\.npy: not a whole \.npy array"),
    "images cut in the header": (cut("images.npy", 40), r"images\.npy: not a whole \.npy array"),
    "images empty": (cut("images.npy", 0), r"images\.npy: not a whole \.npy array"),
    "labels cut off": (cut("labels.npy", -1), r"labels\.npy: not a whole \.npy array"),
    "images are text": (as_csv("images.npy"), r"images\.npy: not a whole \.npy array"),
    "labels are objects": (replace("labels.npy", np.array([None] * 23)), r"labels\.npy: not a whole .* plain numbers"),
    "images are floats": (replace("images.npy", IMAGES / 255), r"expected uint8 with 4 axes, found float64 with 4"),
    "images lack channels": (replace("images.npy", IMAGES[..., 0]), r"expected uint8 with 4 axes, found uint8 with 3"),
    "labels are int32": (replace("labels.npy", INTS.astype(np.int32)), r"expected int64 with 1 axes, found int32"),
    "labels are one-hot": (replace("labels.npy", np.eye(23, 7, dtype=np.int64)), r"expected int64 with 1 axes, found"),
    "a label too large": (replace("labels.npy", INTS + 7 * (np.arange(23) == 9)), r"codes 0\.\.6, found 7 at row 9"),
    "a label below 0": (replace("labels.npy", INTS - (np.arange(23) == 22)), r"codes 0\.\.6, found -1 at row 22"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), r"labels\.npy: the file is missing"),
    "no images": (lambda folder: (folder / "images.npy").unlink(), r"images\.npy: the file is missing"),
    "another format": (edit_meta(format_version=2), r"meta\.json: expected format version 1, found 2"),
    "no format": (edit_meta(format_version=None), r"meta\.json: expected format version 1, found None"),
    "meta lacks the classes": (edit_meta(class_names=None), r"meta\.json"),
    "meta is a list": (lambda folder: (folder / "meta.json").write_text("[1]"), r"meta\.json"),
    "meta cut off": (cut("meta.json", 50), r"meta\.json: expected JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, damage):
    make, message = DAMAGES[damage]
    make(write_split(tmp_path, LABELS))
    with pytest.raises(UserError, match=message):
        open_split(tmp_path, "synthetic", "train")


class Planted:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_a_pickle_is_refused_and_not_run(tmp_path, name, kind):
    path = write_split(tmp_path / "data", LABELS) / name
    planted = Planted(tmp_path / "planted")
    if kind == "object array":
        np.save(path, np.array([planted], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(planted))
    with pytest.raises(UserError, match=f"{name}: not a whole"):
        open_split(tmp_path / "data", "synthetic", "train")
    assert not (tmp_path / "planted").exists()
    with pytest.raises(FileNotFoundError):  # the trap works
        (tmp_path / "planted").rmdir()
    np.load(path, allow_pickle=True)
    assert (tmp_path / "planted").is_dir()


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


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5, 5, 5, 3]), (23, [23]), (24, [23]), (1, [1] * 23)])
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


# Votes


@pytest.fixture
def voted(tmp_path):
    """A split of 23 images, each with its own distribution of the votes."""
    folder = write_split(tmp_path, LABELS)
    votes = np.random.default_rng(0).dirichlet(np.ones(7), len(LABELS)) * 0.49
    votes[np.arange(len(LABELS)), LABELS] += 0.51
    np.save(folder / "votes.npy", votes.astype(np.float32))
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


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 3)])
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
