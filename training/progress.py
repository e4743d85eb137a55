"""Shows the progress of a training: a bar within an epoch, and one line after it."""

from __future__ import annotations

import time

import keras
from tqdm import tqdm

from dataset_class import Batches
from training.run_state import RunState


class EpochLines(keras.callbacks.Callback):
    """Prints one line per epoch, at most 80 columns wide; a terminal shows a bar within the epoch.

    Args:
        state: the run's state, which holds the line's numbers: place this callback behind it.
        batches: the training batches.
        epochs: of the whole run.
        shown: False prints nothing; True in one process of a group.
    """

    async_safe = True  # Keras then runs it beside the steps and never waits for the device

    def __init__(self, state: RunState, batches: Batches, epochs: int, shown: bool = True):
        super().__init__()
        self.state = state
        self.batches = batches
        self.epochs = epochs
        self.shown = shown
        self.bar: tqdm | None = None

    def on_epoch_begin(self, epoch, logs=None):
        self.title = f"epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}"
        self.bar = tqdm(
            total=self.batches.steps,
            initial=self.batches.first_step,
            desc=self.title,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
            dynamic_ncols=True,
            leave=False,
            disable=None if self.shown else True,  # None: only on a terminal
        )
        self.drawn = 0.0

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self.drawn > 0.5:
            self.bar.set_postfix_str(_bar_text(logs), refresh=False)
            self.drawn = time.monotonic()
        self.bar.update(self.batches.steps_of(batch)[-1] + 1 - self.bar.n)

    def on_epoch_end(self, epoch, logs=None):
        self.close()
        if self.shown:
            row = self.state.history[-1]
            print(epoch_line(self.title, row, is_best=self.state.best() is row), flush=True)

    def close(self) -> None:
        """Takes the bar off the terminal, so that a message does not follow it on its line."""
        if self.bar:
            self.bar.close()


def epoch_line(title: str, row: dict[str, float], is_best: bool) -> str:
    """``epoch 3/12  train: loss 14.23, 35.1%  val: loss 12.35, 40.2%  12.3 s  best``.

    Args:
        title: of the epoch.
        row: of the history; its loss and accuracy with and without ``val_``, and its seconds.
        is_best: whether the epoch is the best so far.
    """
    parts = [title]
    for name, prefix in (("train", ""), ("val", "val_")):
        parts.append(f"{name}: loss {_four_digits(row[prefix + 'loss'])}, {row[prefix + 'accuracy']:5.1%}")
    seconds = row["seconds"]
    parts.append(f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s")
    return "  ".join(parts + ["best"] * is_best)


def _four_digits(value: float) -> str:
    return f"{value:#.4g}" if abs(value) < 1_000 else f"{value:.0f}"


def _bar_text(logs: dict[str, float]) -> str:
    terms = [f"{name} {value:.3g}" for name, value in logs.items() if name not in ("loss", "accuracy")]
    return f"loss {_four_digits(logs['loss'])}, {logs['accuracy']:.1%} ({' '.join(terms)})"
