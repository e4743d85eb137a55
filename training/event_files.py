"""Writes TensorBoard's event files on every backend, without TensorFlow."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import keras

try:
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter
except ImportError:
    event_pb2 = None


def is_available() -> bool:
    """Whether the package ``tensorboard`` is installed; if it is not, one line on standard error reports that."""
    if event_pb2 is None:
        print("no TensorBoard files: the package is missing (pip install tensorboard)", file=sys.stderr)
    return event_pb2 is not None


class EventFiles(keras.callbacks.Callback):
    """Writes the logs and the learning rate of each epoch into ``folder/train`` and ``folder/validation``.

    The tags are those of Keras's own callback: ``epoch_<name>`` for every log, under the same name for both parts, so
    that TensorBoard draws the two in one chart. The step is the epoch, counted from 1 as in `history.csv`. Each process
    writes a file of its own, which begins with a notice to discard what earlier files hold from its first epoch on:
    a run that was killed after an epoch's events and before its state shows that epoch once.

    Args:
        folder: of the event files; made with the first epoch's end.
    """

    async_safe = True  # it writes only at the end of an epoch, so steps need not wait for it

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}

    def on_epoch_end(self, epoch, logs=None):
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        train = {name: value for name, value in logs.items() if not name.startswith("val_")}
        self._append("train", epoch + 1, {**train, "learning_rate": rate})
        self._append("validation", epoch + 1, {name[4:]: logs[name] for name in logs if name not in train})

    def _append(self, part: str, step: int, values: Mapping[str, float]) -> None:
        if not values:
            return
        events = []
        if part not in self.files:
            (self.folder / part).mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self.files[part] = self.folder / part / name
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events = [event_pb2.Event(file_version="brain.Event:2"), event_pb2.Event(step=step, session_log=log)]
        scalars = [summary_pb2.Summary.Value(tag=f"epoch_{name}", simple_value=values[name]) for name in values]
        events.append(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=scalars)))
        with open(self.files[part], "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                event.wall_time = time.time()
                writer.write(event.SerializeToString())
