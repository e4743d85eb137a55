"""The lines and the bar of a training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from conftest import small_trainer

from training import progress
from training.run_state import RunState

ROW = {"loss": 14.2345, "accuracy": 0.3512, "val_loss": 0.0123456, "val_accuracy": 1.0, "seconds": 12.34}


def test_an_epoch_is_one_line_of_80_columns():
    line = progress.epoch_line("epoch  3/12", ROW, is_best=True)
    assert line == "epoch  3/12  train: loss 14.23, 35.1%  val: loss 0.01235, 100.0%  12.3 s  best"
    long = {"loss": 12345.6, "accuracy": 1.0, "val_loss": 999.94, "val_accuracy": 1.0, "seconds": 1234.5}
    assert len(progress.epoch_line("epoch 300/300", long, is_best=True)) <= 80


def test_a_log_holds_the_lines_of_the_epochs_and_no_bar(capsys):
    model = small_trainer()
    images, labels = np.zeros((14, 24, 24, 1), np.uint8), np.arange(14, dtype=np.int32) % 7
    state = RunState("unused", "val_accuracy", save_best=lambda row: None, writes=False)
    batches = SimpleNamespace(steps=1, first_step=0, steps_of=lambda call: range(call, call + 1))
    for shown in (True, False):
        model.fit(
            images, labels, batch_size=14, epochs=2, validation_data=(images, labels), verbose=0,
            callbacks=[state, progress.EpochLines(state, batches, 2, shown)],
        )  # fmt: skip
        printed = capsys.readouterr()
        assert printed.err == ""
        assert [line[:9] for line in printed.out.splitlines()] == ["epoch 1/2", "epoch 2/2"] * shown
        if shown:
            best = [line.endswith("  best") for line in printed.out.splitlines()]
            scores = [row["val_accuracy"] for row in state.history]
            assert best == [True, scores[1] > scores[0]]
