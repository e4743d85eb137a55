"""Saves all that a run needs to continue after a kill, in the background, and reads it again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
from keras import ops
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

import runtime
from files import UserError, write_text
from model_files import safe_hdf5
from reading import run_files
from reading.json_files import OPEN, parse_json
from reading.run_files import HISTORY
from reading.text import printable

STATE = "state.h5"
_REMEDY = "delete the folder to start again"


@dataclasses.dataclass
class _Snapshot:
    """What one save writes.

    Attributes:
        arrays: of all variables.
        notes: the JSON-ready rest of the state.
        save_best: writes the best weights that are new since the save before; None where there are none.
    """

    arrays: list[np.ndarray]
    notes: dict[str, Any]
    save_best: Callable[[], None] | None


class RunState(keras.callbacks.Callback):
    """Saves the whole state of a run after each epoch, and every so many seconds within one.

    `state.h5` holds every variable of the model (weights, batch-norm statistics, the confusion history, the
    states of the dropout and augmentation generators), of the optimiser (moments, step) and of the metrics, with the
    place in the run and the history; it is written whole or not at all. The order of the batches needs no
    state (`dataset_class.Batches`). `history.csv` repeats the history as a table.

    A save copies the variables; a thread writes them while training goes on. A save that comes while the one before
    waits replaces it.

    Args:
        folder: the run's folder.
        monitor: the history's column whose highest value marks the best epoch.
        save_best: called with the history's row of a new best epoch. It copies the weights and returns a function that
            writes them, which is called before the state is written: a process killed between the two repeats the
            epoch and writes the same best weights again.
        steps_of_call: the steps of a call's index, `Batches.steps_of`; None saves nothing within an epoch.
        save_seconds: between saves within an epoch.
        run: what names the run; a state of another one is refused.
        writes: whether this process writes the files; True in one process of a group.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str,
        save_best: Callable[[dict[str, float]], Callable[[], None]],
        steps_of_call: Callable[[int], range] | None = None,
        save_seconds: float = 600.0,
        run: str = "",
        writes: bool = True,
    ):
        super().__init__()
        self.writes = writes
        self.path = Path(folder) / STATE
        self.monitor = monitor
        self.save_best = save_best
        self.steps_of_call = steps_of_call
        self.save_seconds = save_seconds
        self.run = run
        self.history: list[dict[str, float]] = []
        self.steps_done = 0  # of the epoch that the restored state is in
        self.epochs: int | None = None  # of the whole run, where it was decided by its speed
        self._seconds_before = 0.0  # of that epoch
        self._restored_metrics: list[np.ndarray] = []
        self._unwritten_best: Callable[[], None] | None = None
        self._writer = _LatestOnly(self._write)

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def best(self) -> dict[str, float] | None:
        """The history's row of the best epoch so far (the first of equals); None before the first epoch."""
        return max(self.history, key=lambda row: row[self.monitor], default=None)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: the disk refused.
        """
        self._writer.close()

    def on_epoch_begin(self, epoch, logs=None):
        self.started = self.saved = time.monotonic()
        for metric, value in zip(self.model.metrics_variables, self._restored_metrics, strict=False):
            metric.assign(value)  # Keras has just set it to 0
        self._restored_metrics = []

    def on_train_batch_begin(self, batch, logs=None):
        # Not at the end of a call: Keras would then wait for every call before it starts the next.
        if not batch or not self.steps_of_call or time.monotonic() - self.saved < self.save_seconds:
            return
        self.saved = time.monotonic()
        self._save(steps_done=self.steps_of_call(batch)[0])

    def on_epoch_end(self, epoch, logs=None):
        best = self.best()
        row = {
            "epoch": epoch + 1,
            **logs,
            "learning_rate": float(ops.convert_to_numpy(self.model.optimizer.learning_rate)),
        }
        row["seconds"] = round(self._seconds_before + time.monotonic() - self.started, 3)
        self._seconds_before = 0.0
        self.history.append(row)
        if best is None or row[self.monitor] > best[self.monitor]:
            self._unwritten_best = self.save_best(row)
        self._save(steps_done=0)

    def _save(self, steps_done: int) -> None:
        if not self.writes:
            self._unwritten_best = None
            return
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: the folder of the run is gone; start the run again")
        model = self.model
        variables = model.state_variables()
        arrays = runtime.host_copies(variables)
        if not all(np.all(np.isfinite(sums)) for sums in arrays[len(arrays) - len(model.metrics_variables) :]):
            return  # `StopAtNaN` is about to stop the run: the state before stays
        notes = {
            "run": self.run,
            "history": list(self.history),
            "steps_done": steps_done,
            "seconds": self._seconds_before + time.monotonic() - self.started if steps_done else 0.0,
            "epochs": self.epochs,
            "paths": [variable.path for variable in variables],
        }
        waiting = self._writer.take_back()
        if waiting and self._unwritten_best is None:
            self._unwritten_best = waiting.save_best
        self._writer.put(_Snapshot(arrays, notes, self._unwritten_best))
        self._unwritten_best = None

    def _write(self, snapshot: _Snapshot) -> None:
        if snapshot.save_best:
            snapshot.save_best()
        # Numbered, because Keras does not keep the paths of variables unique.
        arrays = {f"{i:05d}": array for i, array in enumerate(snapshot.arrays)}
        safe_hdf5.write_arrays(self.path, arrays, {"notes": json.dumps(snapshot.notes)})
        self._write_history(snapshot.notes["history"])

    def _write_history(self, history: list[dict[str, float]]) -> None:
        if history:
            table = io.StringIO()
            writer = csv.DictWriter(table, history[0])
            writer.writeheader()
            writer.writerows(history)
            write_text(self.path.with_name(HISTORY), table.getvalue())

    def restore(self, model: keras.Model) -> None:
        """Loads the saved state, if there is one, into a compiled, built model and its built optimiser.

        The history's table is written again: a kill may have come between the two files.

        Raises:
            UserError: the file is damaged, or of another run, network or optimiser.
        """
        if not self.path.exists():
            return
        variables = model.state_variables()
        content = safe_hdf5.read_arrays(self.path, kind="state file", remedy=_REMEDY)
        arrays = [content.arrays[name] for name in sorted(content.arrays)]
        notes = _read_notes(self.path, content.attributes.get("notes"))
        if notes["run"] != self.run:
            raise UserError(f"{self.path}: holds the state of another run; choose another --run-dir")
        if [(array.shape, array.dtype.name) for array in arrays] != [(tuple(v.shape), v.dtype) for v in variables]:
            raise UserError(
                f"{self.path}: expected {len(variables)} arrays of this network and optimiser, found {len(arrays)} "
                "others; choose another --run-dir"
            )
        for variable, array in zip(variables, arrays, strict=True):
            if not np.all(np.isfinite(array)):
                raise UserError(f"{self.path}: {variable.path} holds numbers that are not finite; {_REMEDY}")
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        self.steps_done, self.epochs, self._seconds_before = notes["steps_done"], notes["epochs"], notes["seconds"]
        self.history = notes["history"]
        if self.steps_done:
            self._restored_metrics = arrays[len(arrays) - len(model.metrics_variables) :]
        if self.writes:
            self._write_history(self.history)


def _checked_history(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for i, row in enumerate(history, 1):
        if not all(type(value) in (int, float) and math.isfinite(value) for value in row.values()):
            raise ValueError(f"expected finite numbers, found {printable(row, 80)}")
        if row.keys() != history[0].keys() or row.get("epoch") != i:
            raise ValueError(f"expected the same columns for every epoch, found {printable(row, 80)} for epoch {i}")
    return history


class _Notes(TypedDict):
    """What `RunState` writes beside the arrays."""

    __pydantic_config__ = OPEN
    run: str
    history: Annotated[list[dict[str, Any]], AfterValidator(_checked_history)]
    steps_done: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    epochs: Annotated[int, Field(ge=1)] | None


def _read_notes(path: Path, text: Any) -> dict[str, Any]:
    """The notes of a state file, with the types that `RunState` writes.

    Raises:
        UserError: others.
    """
    if text is None:
        raise UserError(f"{path}: was written by an older version, which alone can continue the run; {_REMEDY}")
    try:
        return parse_json(text, path, _Notes)
    except UserError as error:
        raise UserError(f"{error}: the state is damaged; {_REMEDY}") from None


class _LatestOnly:
    """Calls a function in a thread of its own, with the value that was put last; one that still waits is replaced."""

    def __init__(self, function: Callable[[Any], None]):
        self._function = function
        self._changed = threading.Condition()
        self._waiting: Any = None
        self._busy = False
        self._error: BaseException | None = None

    def put(self, value: Any) -> None:
        """Hands over a value.

        Raises:
            Exception: what the function raised for a value before.
        """
        with self._changed:
            self._raise()
            self._waiting = value
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work).start()  # no daemon: the process ends after its last file

    def take_back(self) -> Any:
        """The value that still waits, which is then not used; None where there is none."""
        with self._changed:
            value, self._waiting = self._waiting, None
            return value

    def close(self) -> None:
        """Waits until the last value is used."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                value, self._waiting = self._waiting, None
                if value is None or self._error:
                    self._busy = False
                    self._changed.notify_all()
                    return
            try:
                self._function(value)
            except BaseException as error:
                self._error = error


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """The rows of a run's `history.csv`, one per epoch.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is damaged.
    """
    columns = run_files.read_history(Path(folder) / HISTORY)
    return [dict(zip(columns, row, strict=True)) for row in zip(*map(np.ndarray.tolist, columns.values()), strict=True)]
