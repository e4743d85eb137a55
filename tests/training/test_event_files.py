"""TensorBoard's event files: the same on every backend, without TensorFlow, and whole after a run is resumed."""

from __future__ import annotations

import pytest
from conftest import run_python

# Trains for epochs first..last of 3; prints the logs that it saw and whether TensorFlow was loaded.
PROGRAM = """
import sys
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import keras, numpy as np
import runtime
class Shown(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print(epoch + 1, logs["loss"], logs["val_loss"])
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
rate = keras.optimizers.schedules.PolynomialDecay(0.5, 3, 0.0)
model.compile(keras.optimizers.SGD(rate), "mse")
x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
model.optimizer.iterations.assign(first - 1)
callbacks = [*runtime.tensorboard(folder), Shown()]
model.fit(x, y, validation_data=(x, y), initial_epoch=first - 1, epochs=last, verbose=0, callbacks=callbacks)
print(keras.backend.backend(), "tensorflow" in sys.modules)
"""


def train(backend, *args, **environment):
    done = run_python("-c", PROGRAM, *args, env_changes={"KERAS_BACKEND": backend, **environment})
    assert done.returncode == 0, done.stderr
    *epochs, loaded = [line.split() for line in done.stdout.splitlines()]
    assert loaded == [backend, str(backend == "tensorflow")]
    return {int(epoch): (float(loss), float(val)) for epoch, loss, val in epochs}, done.stderr


def read(folder):
    """Step and value of every scalar, by part and tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for part in sorted(path.name for path in folder.iterdir()):
        events = EventAccumulator(str(folder / part)).Reload()
        for tag in events.Tags()["scalars"]:
            found[part, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_resumed_run_has_each_epoch_once(tmp_path, backend):
    first, _ = train(backend, tmp_path, 1, 2)
    second, _ = train(backend, tmp_path, 2, 3)  # killed after the events of epoch 2, before its state
    seen = {**first, **second}
    assert first[2] != second[2] and sorted(seen) == [1, 2, 3]
    found = read(tmp_path)
    assert found.keys() == {
        *((part, "epoch_loss") for part in ("train", "validation")),
        ("train", "epoch_learning_rate"),
    }
    for i, part in enumerate(("train", "validation")):
        assert [step for step, _ in found[part, "epoch_loss"]] == [1, 2, 3]
        assert [value for _, value in found[part, "epoch_loss"]] == pytest.approx([seen[step][i] for step in (1, 2, 3)])
    rates = [value for _, value in found["train", "epoch_learning_rate"]]
    assert rates == pytest.approx([1 / 3, 1 / 6, 0.0], abs=1e-6)  # after one step per epoch


def test_without_the_package_one_line_reports_it_and_the_run_goes_on(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard.compat.proto'] = None; from pathlib import Path; import runtime; "
        "print(runtime.tensorboard(Path(sys.argv[1])))"
    )
    done = run_python("-c", code, tmp_path / "tensorboard", env_changes={"KERAS_BACKEND": "jax"})
    assert done.stdout == "[]\n" and done.stderr.count("\n") == 1 and not (tmp_path / "tensorboard").exists()
