"""Measures the parts of a training step, its arithmetic rate, and the same step on each backend.

``python benchmarks/step.py`` prints for mini_xcp at 48 px and xcp at 96 px (TensorFlow, or the given ``--backend``):

- the step built up part by part, with the time that each part adds, and ``fit`` with several steps per execution;
- the rate of the network's multiply-adds in that time, compared with one large matrix product;
- the kernels that take most of the step (TensorFlow only, from its profiler);
- the same step on the installed backends (``--compare tensorflow jax torch``), each in its own process.

Everything that is compared takes turns, and the median counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import forward_flops
from train_step import CE_ALONE, make_trainer, seconds, step_clock, write_split

import runtime
from files import UserError, run_command

CASES = {"mini_xcp": (48, 64), "xcp": (96, 32)}  # side in pixels, batch
TOGETHER = 8  # steps per execution
MATRIX = 2048  # side of the matrix product that measures the cores' peak rate
KERNELS = 10  # number of kernels in the profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compare", nargs="*", default=["tensorflow", "jax", "torch"], metavar="BACKEND")
    parser.add_argument("--quick", action="store_true", help="2 rounds of the small network at 16 px")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)  # a worker of the comparison
    options = parser.parse_args()
    if options.serve:
        arch, size, batch_size = options.serve
        serve(options.backend, arch, int(size), int(batch_size))
        return
    cases = {name: CASES[name] for name in options.networks}
    if options.quick:
        cases, options.rounds = {"mini_xcp": (16, 8)}, 2
    runtime.choose_backend(options.backend)
    import evaluation

    rows = []
    for arch, (size, batch_size) in cases.items():
        print(f"\n{arch}, {size} px, batch {batch_size}, {options.backend}")
        row = {"arch": arch, "size": size, "batch_size": batch_size}
        row |= measure_parts(arch, size, batch_size, options.rounds)
        print_parts(row)
        if options.backend == "tensorflow":
            row["kernels"] = profile(arch, size, batch_size)
            print(f"  {'kernel':<46}{'share of kernel time':>20}")
            for kernel, share in row["kernels"].items():
                print(f"  {kernel:<46}{share:>20.1%}")
        row["backends"] = compare(options.compare, arch, size, batch_size, options.rounds)
        for name, step in row["backends"].items():
            print(f"  whole step on {name:<32}{1e3 * step:>9.1f} ms {batch_size / step:>8.0f} images/s")
        rows.append(row)
    print(json.dumps({"rows": rows, "rounds": options.rounds, "commit": evaluation.commit(), **runtime.versions()}))


def measure_parts(arch: str, size: int, batch_size: int, rounds: int) -> dict:
    """Median seconds of the step, built up part by part, and of the matrix product.

    Returns:
        ``parts``: name to seconds; each entry includes the parts before it, except ``inference``, which is the
        network's forward pass and loss alone. ``matrix_rate`` and ``training_rate``: floating-point operations per
        second.
    """
    import keras

    from dataset_class import Batches

    growing = {
        "network, cross-entropy, gradients": make_trainer(arch, size, CE_ALONE, augment=False, optimizer="sgd"),
        "+ AdamW": make_trainer(arch, size, CE_ALONE, augment=False),
        "+ augmentation": make_trainer(arch, size, CE_ALONE),
        "+ Ad-Corre (the whole step)": make_trainer(arch, size, {}),
    }
    network = next(iter(growing.values()))
    loops = {"fit from files": 1, f"fit, {TOGETHER} steps together": TOGETHER}
    fits = {name: make_trainer(arch, size, {}, steps_per_execution=steps) for name, steps in loops.items()}
    product, factor = keras.ops.matmul, keras.random.uniform((MATRIX, MATRIX))
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(write_split(folder, size, batch_size * 2 * TOGETHER), batch_size, seed=0)
        in_memory = [keras.ops.convert_to_tensor(array) for array in batches[0]]
        times = collections.defaultdict(list)
        for turn in range(rounds + 1):
            if turn == 1:  # the first turn compiled
                times.clear()
            times["inference"].append(seconds(lambda: network.test_on_batch(*in_memory)))
            for name, model in growing.items():
                times[name].append(seconds(lambda model=model: model.train_on_batch(*in_memory)))
            for name, model in fits.items():
                clock = step_clock()
                model.fit(batches, shuffle=False, verbose=0, callbacks=[clock])
                times[name] += [second / loops[name] for second in clock.seconds]
            times["matrix"].append(seconds(lambda: keras.ops.convert_to_numpy(product(factor, factor)[0, 0])))
    median = {name: float(np.median(values)) for name, values in times.items()}
    # The backward pass has twice the products of the forward pass: gradients of the inputs and of the weights.
    operations = 3 * forward_flops(network.network) * batch_size
    return {
        "matrix_rate": 2 * MATRIX**3 / median.pop("matrix"),
        "training_rate": operations / median["+ Ad-Corre (the whole step)"],
        "parts": median,
    }


def print_parts(row: dict) -> None:
    print(f"  {'part':<46}{'ms':>9}{'adds ms':>9}")
    before = 0.0
    for name, value in row["parts"].items():
        added = f"{1e3 * (value - before):>9.1f}" if name.startswith("+") else ""
        print(f"  {name:<46}{1e3 * value:>9.1f}{added}")
        before = value
    rates = row["training_rate"], row["matrix_rate"]
    print(
        f"  network arithmetic in the whole step: {rates[0] / 1e9:.1f} GFLOP/s, {rates[0] / rates[1]:.0%} of the "
        f"{rates[1] / 1e9:.1f} GFLOP/s of a {MATRIX} x {MATRIX} matrix product"
    )


def profile(arch: str, size: int, batch_size: int, steps: int = 5) -> dict[str, float]:
    """The kernels with the largest shares of all kernels' time in the whole step, from TensorFlow's profiler."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    model, batch = make_trainer(arch, size, {}), make_batch(size, batch_size)
    model.train_on_batch(*batch)
    with tempfile.TemporaryDirectory() as folder, runtime.notices_hidden():
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            model.train_on_batch(*batch)
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    nanoseconds: collections.Counter[str] = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name, _, kernel = plane.event_metadata[event.metadata_id].name.rpartition(":")
                named = name and not name.endswith(":") and kernel.isidentifier()  # not ExecutorState::Process
                if named and plane.name.startswith("/host"):
                    nanoseconds[kernel] += event.duration_ps // 1000
    whole = sum(nanoseconds.values())
    return {kernel: value / whole for kernel, value in nanoseconds.most_common(KERNELS)}


def make_batch(size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch_size, size, size, 3), np.uint8), np.arange(batch_size, dtype=np.int32) % 7


def compare(backends: list[str], arch: str, size: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Median seconds of the whole step on each installed backend; one process per backend, and they take turns."""
    there = [name for name in backends if importlib.util.find_spec(name)]
    times = {name: [] for name in there}
    with tempfile.TemporaryFile("w+") as errors, contextlib.ExitStack() as ends:
        workers = {}
        for name in there:
            command = [sys.executable, __file__, "--backend", name, "--serve", arch, str(size), str(batch_size)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            workers[name] = ends.enter_context(subprocess.Popen(command, **pipes, text=True))
        for turn in range(rounds + 2):
            for name, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    errors.seek(0)
                    raise UserError(f"the step on {name} failed:\n{errors.read()[-2000:]}")
                if turn >= 2:  # the first two turns compiled
                    times[name].append(float(answer))
    return {name: float(np.median(values)) for name, values in times.items()}


def serve(backend: str, arch: str, size: int, batch_size: int) -> None:
    """Times one whole step for each line of standard input."""
    runtime.choose_backend(backend)
    model, batch = make_trainer(arch, size, {}), make_batch(size, batch_size)
    for _ in sys.stdin:
        print(seconds(lambda: model.train_on_batch(*batch)), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
