"""Builds, trains, saves, loads and exports the networks of keras.applications, each in a process of its own.

    python tests/backbones.py               # every name of backbones.csv, the smallest first
    python tests/backbones.py --missing     # those that have not been tried with this limit of memory
    python tests/backbones.py NAME ...      # these
    python tests/backbones.py --memory 16   # GiB that a process may take; one that takes more is ended

Each network has the smallest input that its backbone takes, and a batch of two images. Prints one line per network.
With ``--record`` the outcomes are written to backbones.csv, the list of what ``keras:<Name>`` was tried with. The exit
code is 1 if a network fails for another reason than memory.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".csv")
_SIZES = (32, 64, 96, 128, 224)  # the first that the backbone takes
_GIB = 1 << 30


@dataclasses.dataclass
class Row:
    """What became of one network.

    Attributes:
        name: as after ``keras:``.
        parameters: of the network with a head of 2 vectors of 8; empty before it was built.
        size: side of its input in pixels.
        memory: the most that its process took, in GiB.
        outcome: ``works``, ``fails``, ``needs more than N GiB`` or ``not tried``.
        onnx_difference: the largest difference of the exported network's outputs.
    """

    name: str
    parameters: str = ""
    size: str = ""
    memory: str = ""
    outcome: str = "not tried"
    onnx_difference: str = ""


def read_record() -> dict[str, Row]:
    """The rows of backbones.csv by name, in its order."""
    with open(RECORD, newline="") as file:
        return {row["name"]: Row(**row) for row in csv.DictReader(file)}


def write_record(rows: dict[str, Row]) -> None:
    with open(RECORD, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows.values()))


# --- one network, in a process of its own


def build(name: str):
    """The network of the smallest size that its backbone takes, and its description."""
    from datasets import CLASS_NAMES
    from files import UserError
    from model_files import model_file
    from model_files.description import NetworkDescription

    for size in _SIZES:
        described = NetworkDescription(f"keras:{name}", CLASS_NAMES[:7], 2, 8, size)
        try:
            return model_file.build_network(described), described
        except UserError:
            if size == _SIZES[-1]:
                raise
    raise AssertionError


def try_out(name: str, folder: Path) -> None:
    """Takes one network through its life; prints what was measured, as ``name value`` on each line.

    Raises:
        Exception: what went wrong.
    """
    import numpy as np

    import evaluation
    from model_files import model_file
    from model_files.export import export_network

    network, described = build(name)
    size = described.input_size
    print("size", size, "\nparameters", network.count_params(), flush=True)
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    _train_one_step(network, images)

    info = model_file.ModelInfo(described)
    path = folder / f"{name}.weights.h5"
    model_file.save_model(path, network, info)
    expected = evaluation.predict(network, images)
    del network
    loaded, _ = model_file.load_model(path)
    for before, after in zip(expected, evaluation.predict(loaded, images), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-6)
    differences = export_network(loaded, info, folder / f"{name}.onnx", "onnx")
    print("onnx_difference", f"{max(differences.values()):.1e}", flush=True)


def _train_one_step(network, images) -> None:
    """Trains a network on two images."""
    import numpy as np

    import custom_loss
    import trainer
    from config import OptimizerConfig
    from training import optimization

    model = trainer.AdCorreTrainer(network, custom_loss.AdCorreLoss(7, history=20), batch_size=2)
    model.compile(optimization.make_optimizer(OptimizerConfig(), 10, 1), jit_compile=False)
    model.build((None, *images.shape[1:]))
    model.optimizer.build(model.trainable_variables)
    measured = model.train_on_batch(images, np.array([0, 1]), return_dict=True)
    assert all(np.isfinite(value) for value in measured.values()), measured


# --- all of them


def run(name: str, memory: float) -> tuple[Row, str]:
    """Tries a network out in a process that may take ``memory`` GiB; returns its row, and the errors it printed."""
    row, most = Row(name), 0
    environment = {
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",
        **os.environ,
        "PYTHONPATH": str(ROOT),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        command = [sys.executable, __file__, "--one", folder, name]
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        while process.poll() is None:
            most = max(most, _resident(process.pid))
            if most > memory * _GIB:
                process.kill()
            time.sleep(0.05)
        output.seek(0)
        errors.seek(0)
        for line in output:
            key, _, value = line.strip().partition(" ")
            setattr(row, key, value)
        reason = errors.read()
    row.memory = f"{most / _GIB:.1f}"
    too_much = f"needs more than {memory:g} GiB" if most > memory * _GIB else "fails"
    row.outcome = "works" if process.returncode == 0 else too_much
    return row, reason


def _resident(process: int) -> int:
    """The bytes of memory that a process holds; 0 where the system does not say it in /proc."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a process may take")
    parser.add_argument("--missing", action="store_true", help="leave out what works, or needs more memory than that")
    parser.add_argument("--record", action="store_true", help="write the outcomes to backbones.csv")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        try_out(options.names[0], options.one)
        return 0
    rows, failed = read_record(), 0
    settled = {"works", f"needs more than {options.memory:g} GiB"}
    for name in options.names or list(rows):
        if options.missing and rows[name].outcome in settled:
            continue
        started = time.monotonic()
        row, errors = run(name, options.memory)
        print(
            f"{name}: {row.outcome}; {row.parameters} parameters, {row.size} px, {row.memory} GiB, "
            f"ONNX differs by {row.onnx_difference}; {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if row.outcome == "fails":
            failed = 1
            print(errors[-3000:], flush=True)
        rows[name] = row
        if options.record:
            write_record(rows)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
