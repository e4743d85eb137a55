"""Batches of a prepared split, in an order that (seed, epoch) decides."""

from __future__ import annotations

import keras
import numpy as np

from data_helper import PreparedSplit
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError


class Batches(keras.utils.PyDataset):
    """Batches of a prepared split, in an order that only (seed, epoch) decides.

    Set `epoch` before an epoch begins; the same (seed, epoch) gives the same batches in any process,
    which is what lets a killed run resume to the same weights. Hand it to ``fit`` with ``shuffle=False``.

    An item is what one call of the compiled step gets: a batch of images, or, when the images are resident on the
    device, the row numbers of the next `steps_per_call` batches.

    Args:
        split: the images and labels.
        batch_size: images per batch.
        seed: seed of the order.
        training: each epoch has its own order and leaves out a short last batch, so that every step has the same
            shape. Otherwise every image appears once, in one shuffled order for all epochs: the loss compares the
            images of a batch, and releases are often sorted by class.
        balanced: draw every class of the split equally often (with repetition); the epoch keeps its length.
        soft_labels: the targets are the votes on each image instead of its label.
        resident: the images are on the device (`trainer.AdCorreTrainer.keep_on_device`).
        group: the processes that share each batch. This process reads its own share of the images, and all targets.
        kept: the rows of the split that take part, int (M,), increasing; None is all of them.

    Attributes:
        epoch: number of the epoch, from 0.
        images: where the images are read from.
        first_step: steps of this epoch that have been done already; its first item comes after them.
        steps_per_call: steps of an item, 1 where the images are not resident.

    Raises:
        UserError: soft labels of a split without votes, or fewer training images than a batch that
            all devices can share.
    """

    def __init__(
        self,
        split: PreparedSplit,
        batch_size: int,
        *,
        seed: int,
        training: bool = True,
        balanced: bool = False,
        soft_labels: bool = False,
        resident: bool = False,
        group: ProcessGroup = GROUP_OF_ONE,
        kept: np.ndarray | None = None,
    ):
        super().__init__()
        if soft_labels and split.votes is None:
            raise UserError(
                f"--soft-labels: expected a data set with votes.npy, found none for {split.name}; train on ferplus, "
                "or without --soft-labels"
            )
        self.split = split
        self.images = split.rows
        self.kept = np.arange(len(split)) if kept is None else kept
        self.batch_size = min(batch_size, len(self.kept))
        if training and self.batch_size % group.all_devices:
            raise UserError(
                f"--batch-size {batch_size}: expected a multiple of {group.all_devices}, the devices of all processes, "
                f"and at most {len(self.kept)}, the images of {split.name}"
            )
        self.seed = seed
        self.training = training
        self.balanced = balanced
        self.resident = resident
        self.group = group
        self.targets = split.votes if soft_labels else split.labels.astype(np.int32)
        self.epoch = 0
        self.first_step = 0
        self.steps_per_call = 1
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return self._full_steps + self._has_short_batch

    @property
    def _full_steps(self) -> int:
        return len(self.kept) // self.batch_size

    @property
    def _has_short_batch(self) -> bool:
        return not self.training and len(self.kept) % self.batch_size > 0

    def __len__(self) -> int:
        """Items of this epoch."""
        return self._has_short_batch + -(-(self._full_steps - self.first_step) // self.steps_per_call)

    def steps_of(self, index: int) -> range:
        """The steps of this epoch that item ``index`` holds.

        A short batch has an item of its own, the first: TensorFlow takes the shapes from there.
        """
        if self._has_short_batch and index == 0:
            return range(self._full_steps, self.steps)
        first = self.first_step + (index - self._has_short_batch) * self.steps_per_call
        return range(first, min(first + self.steps_per_call, self._full_steps))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Item ``index`` of this epoch.

        Returns:
            One batch: uint8 images (B, H, W, C), and int32 labels (B,) or float32 votes (B, C). In a process group the
            images are this process's share (`ProcessGroup.share`), filled up with black images.

            Of resident images S batches: int32 row numbers (S, B), and the targets (S, B) or (S, B, C). S is that of a
            whole epoch, because another shape would be compiled again; rows of -1 fill up what is not used.
        """
        steps = self.steps_of(index)
        if not self.resident:
            rows = self._rows(steps[0])
            return self.group.take(self.images, rows), self.targets[rows]
        used = np.stack([self._rows(step) for step in steps])
        rows = np.full((self._full_steps if steps[0] < self._full_steps else 1, used.shape[1]), -1, np.int32)
        rows[: len(used)] = used
        return rows, self.targets[rows]

    def _rows(self, step: int) -> np.ndarray:
        return self.order()[step * self.batch_size : (step + 1) * self.batch_size]

    def order(self) -> np.ndarray:
        """The rows of this epoch in their order, int64 (M,)."""
        wanted = self.epoch
        drawn, order = self._order  # read once: Keras may ask from two threads
        if drawn != wanted:
            order = self._draw_order(wanted)
            self._order = (wanted, order)
        return order

    def _draw_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch if self.training else 0))
        if not self.balanced:
            return self.kept[rng.permutation(len(self.kept))]
        labels = self.split.labels[self.kept]
        share = 1.0 / np.bincount(labels)[labels]
        return self.kept[rng.choice(len(labels), size=len(labels), p=share / share.sum())]
