"""Measures a training step on this machine: its parts, its loss, its data, its backends, and what ``fit`` costs.

``python benchmarks/step.py`` measures all of the following, and each option (``--loss``, ...) only its own. The backend
is TensorFlow or that of ``--backend``.

- ``--loss``: the step of mini_xcp at 48 px and xcp at 96 px; Ad-Corre over cross-entropy alone; ``fit`` with batches
  from memory-mapped files over the same step on a batch in memory;
- ``--fit``: `train.py`'s own ``fit`` of mini_xcp over a bare compiled loop on the same data (TensorFlow, JAX);
- ``--parts``: the step built up part by part, with the time that each part adds; the rate of the network's
  multiply-adds, compared with one large matrix product;
- ``--kernels``: the kernels that take most of the step (TensorFlow's profiler);
- ``--backends``: the same step on the installed backends, each in its own process.

Everything that is compared takes turns in one process (`timing.py`); medians count, and the spread is half the
interquartile range. The last line is JSON.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import runtime
from files import UserError, run_command

# isort: split
import timing
from flops import forward_flops
from workload import CROSS_ENTROPY, make_batch, make_fit, make_trainer, step_clock, write_split

CASES = {"mini_xcp": (48, 64), "xcp": (96, 32)}  # side in pixels, batch
LOSS_CASES = {"mini_xcp": (48, 128), "xcp": (96, 32)}
FIT_CASE = (48, 128, 60)  # side, batch, steps per epoch
FIT_AIM = 1.03  # seconds of fit over those of the bare loop
STEPS = 12  # of an epoch of fit from files
MATRIX = 2048  # side of the matrix product that measures the cores' peak rate
KERNELS = 10  # number of kernels in the profile
MEASURES = ("loss", "fit", "parts", "kernels", "backends")
BACKENDS = ("tensorflow", "jax", "torch")


def main() -> None:
    options = parse_options()
    if options.serve:
        arch, size, batch_size = options.serve
        serve(options.backend, arch, int(size), int(batch_size))
        return
    runtime.choose_backend(options.backend)
    import evaluation

    chosen = [name for name in MEASURES if getattr(options, name)] or [
        name for name in MEASURES if name != "kernels" or options.backend == "tensorflow"
    ]
    networks, toy = options.networks, options.quick
    result: dict[str, Any] = {}
    if "loss" in chosen:
        result["loss"] = measure_losses(cases_of(LOSS_CASES, networks, toy), options.rounds)
    if "fit" in chosen and options.backend != "torch":
        result["fit"] = measure_fit(*((16, 8, 3) if toy else FIT_CASE), options.rounds)
    for arch, (size, batch_size) in cases_of(CASES, networks, toy).items():
        row: dict[str, Any] = {}
        if "parts" in chosen:
            row |= measure_parts(arch, size, batch_size, options.rounds)
        if "kernels" in chosen:
            row["kernels"] = print_kernels(arch, size, batch_size)
        if "backends" in chosen:
            row["backends"] = compare(options.compare, arch, size, batch_size, options.rounds)
        if row:
            result[arch] = {"size": size, "batch_size": batch_size, **row}
    facts = {"backend": options.backend, "rounds": options.rounds, "quick": toy, "commit": evaluation.commit()}
    print(json.dumps({**result, **facts, **runtime.versions()}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in MEASURES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--backend", default="tensorflow", choices=BACKENDS)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--compare", nargs="+", default=list(BACKENDS), choices=BACKENDS, help="those of --backends")
    parser.add_argument("--quick", action="store_true", help="2 rounds of the small network at 16 px: a check")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)  # a worker of the comparison
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.rounds < 1:
        raise UserError(f"--rounds: expected 1 or more, received {options.rounds}")
    if options.fit and options.backend == "torch":
        raise UserError("--fit: expected --backend tensorflow or jax, received torch")
    if options.kernels and options.backend != "tensorflow":
        raise UserError(f"--kernels: expected --backend tensorflow, received {options.backend}")
    if options.quick:
        options.rounds = 2
    return options


def cases_of(cases: dict[str, tuple[int, int]], networks: list[str], toy: bool) -> dict[str, tuple[int, int]]:
    return {"mini_xcp": (16, 8)} if toy else {name: cases[name] for name in networks}


# --- the loss, and whether the step waits for data ------------------------------------------------------------------


def measure_losses(cases: dict[str, tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    rows = []
    print(f"{'':<16}{'step ms':>9}{'spread':>8}{'images/s':>10}{'fit/memory':>12}{'ad-corre/ce':>13}{'spread':>8}")
    for arch, (size, batch_size) in cases.items():
        row = measure_loss(arch, size, batch_size, rounds)
        rows.append(row)
        print(
            f"{f'{arch} {size} px':<16}{1e3 * row['step_s']:>9.1f}{row['step_spread']:>8.1%}"
            f"{batch_size / row['step_s']:>10.0f}{row['fit_over_memory']:>12.3f}{row['ad_corre_over_ce']:>13.3f}"
            f"{row['ad_corre_over_ce_spread']:>8.1%}",
            flush=True,
        )
    return rows


def measure_loss(arch: str, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """One row: seconds per step, throughput of fit / of the step in memory, time of Ad-Corre / of cross-entropy."""
    import keras

    from dataset_class import Batches

    ad_corre, ce = make_trainer(arch, size, {}), make_trainer(arch, size, CROSS_ENTROPY)
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(write_split(folder, (size, size, 3), batch_size * STEPS), batch_size, seed=0)
        in_memory = [keras.ops.convert_to_tensor(array) for array in batches[0]]
        clock = step_clock()

        def fit() -> dict[str, float]:
            ad_corre.fit(batches, shuffle=False, verbose=0, callbacks=[clock])
            return {timing.SECONDS: float(np.median(clock.seconds))}

        sides = {
            "fit": fit,
            "ad_corre": lambda: ad_corre.train_on_batch(*in_memory),
            "ce": lambda: ce.train_on_batch(*in_memory),
        }
        found = timing.take_turns(sides, rounds)
    over_ce, over_ce_spread = timing.ratio(found["ad_corre"], found["ce"])
    return {
        "arch": arch,
        "size": size,
        "batch_size": batch_size,
        "step_s": found["ad_corre"].median(),
        "step_spread": found["ad_corre"].spread(),
        "fit_over_memory": timing.ratio(found["ad_corre"], found["fit"])[0],
        "ad_corre_over_ce": over_ce,
        "ad_corre_over_ce_spread": over_ce_spread,
    }


# --- fit over a bare loop -------------------------------------------------------------------------------------------


def measure_fit(size: int, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds per step of ``fit`` and of the bare loop, one epoch per turn, and their ratio."""
    from bare_loop import Parts, make_loop

    settings = config.TrainConfig(batch_size=batch_size, model=config.ModelConfig(input_size=size))
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(folder, (size, size, 1), batch_size * steps)
        fit_seconds = make_fit(settings, split)
        loop = make_loop(Parts(settings, split.class_names, {}), split.images, split.labels, batch_size)

        def bare() -> dict[str, float]:
            start = time.perf_counter()
            loop(steps)
            return {timing.SECONDS: (time.perf_counter() - start) / steps}

        sides = {"fit": lambda: {timing.SECONDS: fit_seconds(1)[0] / steps}, "bare": bare}
        found = timing.take_turns(sides, rounds, warm_up=2)
    over, spread = timing.ratio(found["fit"], found["bare"])
    row = {f"{name}_s": samples.median() for name, samples in found.items()}
    print(
        f"fit, mini_xcp {size} px: {1e3 * row['fit_s']:.1f} ms per step, bare loop {1e3 * row['bare_s']:.1f} ms: "
        f"ratio {over:.3f} ± {spread:.1%} (aim: at most {FIT_AIM})",
        flush=True,
    )
    facts = {"size": size, "batch_size": batch_size, "steps_per_epoch": steps}
    return {**facts, **row, "fit_over_bare": over, "fit_over_bare_spread": spread, "aim": FIT_AIM}


# --- the parts of a step --------------------------------------------------------------------------------------------


def measure_parts(arch: str, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Median seconds of the step, built up part by part, and of the matrix product.

    Returns:
        ``parts``: name to seconds; each entry includes the parts before it, except ``inference``, which is the
        network's forward pass and loss alone. ``matrix_rate`` and ``training_rate``: floating-point operations per
        second.
    """
    import keras

    whole = "+ Ad-Corre (the whole step)"
    growing = {
        "network, cross-entropy, gradients": make_trainer(arch, size, CROSS_ENTROPY, augment=False, optimizer="sgd"),
        "+ AdamW": make_trainer(arch, size, CROSS_ENTROPY, augment=False),
        "+ augmentation": make_trainer(arch, size, CROSS_ENTROPY),
        whole: make_trainer(arch, size, {}),
    }
    network = next(iter(growing.values()))
    product, factor = keras.ops.matmul, keras.random.uniform((MATRIX, MATRIX))
    batch = [keras.ops.convert_to_tensor(array) for array in make_batch(size, batch_size)]
    sides: dict[str, timing.Side] = {"inference": lambda: network.test_on_batch(*batch)}
    sides |= {name: lambda model=model: model.train_on_batch(*batch) for name, model in growing.items()}
    sides["matrix"] = lambda: keras.ops.convert_to_numpy(product(factor, factor)[0, 0])
    found = timing.take_turns(sides, rounds)
    median = {name: samples.median() for name, samples in found.items()}
    # The backward pass has twice the products of the forward pass: gradients of the inputs and of the weights.
    operations = 3 * forward_flops(network.network) * batch_size
    row = {
        "matrix_rate": 2 * MATRIX**3 / median.pop("matrix"),
        "training_rate": operations / median[whole],
        "parts": median,
        "spread": {name: samples.spread() for name, samples in found.items()},
    }
    print(f"\n{arch}, {size} px, batch {batch_size}")
    print_parts(row)
    return row


def print_parts(row: dict[str, Any]) -> None:
    print(f"  {'part':<46}{'ms':>9}{'spread':>8}{'adds ms':>9}")
    before = 0.0
    for name, value in row["parts"].items():
        added = f"{1e3 * (value - before):>9.1f}" if name.startswith("+") else ""
        print(f"  {name:<46}{1e3 * value:>9.1f}{row['spread'][name]:>8.1%}{added}")
        before = value
    rates = row["training_rate"], row["matrix_rate"]
    print(
        f"  network arithmetic in the whole step: {rates[0] / 1e9:.1f} GFLOP/s, {rates[0] / rates[1]:.0%} of the "
        f"{rates[1] / 1e9:.1f} GFLOP/s of a {MATRIX} x {MATRIX} matrix product",
        flush=True,
    )


# --- kernels --------------------------------------------------------------------------------------------------------


def print_kernels(arch: str, size: int, batch_size: int) -> dict[str, float]:
    kernels = profile(arch, size, batch_size)
    print(f"  {f'kernel of {arch}':<46}{'share of kernel time':>20}")
    for kernel, share in kernels.items():
        print(f"  {kernel:<46}{share:>20.1%}")
    return kernels


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


# --- backends -------------------------------------------------------------------------------------------------------


def compare(backends: list[str], arch: str, size: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Median seconds of the whole step on each installed backend; one process per backend, and they take turns."""
    there = [name for name in backends if importlib.util.find_spec(name)]
    with tempfile.TemporaryFile("w+") as errors, contextlib.ExitStack() as ends:

        def side(name: str) -> timing.Side:
            command = [sys.executable, __file__, "--backend", name, "--serve", arch, str(size), str(batch_size)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            worker = ends.enter_context(subprocess.Popen(command, **pipes, text=True))

            def step() -> dict[str, float]:
                worker.stdin.write("\n")
                worker.stdin.flush()
                if not (answer := worker.stdout.readline()):
                    errors.seek(0)
                    raise UserError(f"the step on {name} failed:\n{errors.read()[-2000:]}")
                return {timing.SECONDS: float(answer)}

            return step

        found = timing.take_turns({name: side(name) for name in there}, rounds, warm_up=2)
    for name, samples in found.items():
        whole = f"whole step of {arch} on {name}"
        rate = batch_size / samples.median()
        print(f"  {whole:<46}{1e3 * samples.median():>9.1f} ms {rate:>8.0f} images/s {samples.spread():>8.1%}")
    return {name: samples.median() for name, samples in found.items()}


def serve(backend: str, arch: str, size: int, batch_size: int) -> None:
    """Times one whole step for each line of standard input."""
    runtime.choose_backend(backend)
    model, batch = make_trainer(arch, size, {}), make_batch(size, batch_size)
    for _ in sys.stdin:
        start = time.perf_counter()
        model.train_on_batch(*batch)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
