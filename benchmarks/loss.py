"""Measures what the Ad-Corre terms cost in time and memory, and how that grows with the batch.

``python benchmarks/loss.py [--backend jax]`` measures FD + MD + ED with their gradients in the embeddings (B, k, d),
compiled as the backend trains (TensorFlow without XLA on a CPU), against one matrix product of the size that the pairs
of a batch would need: (B, k d) x (k d, B), without a gradient. From batch 16,384 on, whose product alone has 1 GB, the
product is left out.

Time: the two take turns in one process (`timing.py`); medians, and the spread of their ratio. Memory: each in a process
of its own, by how much the highest resident set (Linux's ``VmHWM``, reset before the run) rises in one run over the
backend, the inputs and a first run with 2 faces; the results count. On JAX beside it what the compiled program takes
besides inputs and results (``temp_size_in_bytes``), which has no noise. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime
from files import UserError, run_command

# isort: split
import timing

BATCHES = (50, 256, 1024, 4096, 16384)
EMBEDDINGS = (7, 10)
SIZE = 256
NUM_CLASSES = 7
PRODUCT_UP_TO = 4096
LEAST_ROUNDS = 5
SIDES = ("terms", "product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax"))
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help=f"default {BATCHES}")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring a row's time, five rounds at least")
    parser.add_argument("--quick", action="store_true", help="one small batch, k = 7, a tenth of a second")
    # How the benchmark calls itself: one side's memory, printed as JSON.
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batches, ks, seconds = options.batches or BATCHES, EMBEDDINGS, options.seconds
    if options.quick:
        batches, ks, seconds = options.batches or (64,), EMBEDDINGS[:1], 0.1
    if min(batches) < 2:
        raise UserError(f"--batches: expected 2 faces or more, received {min(batches)}")
    if not 0 < options.seconds < float("inf"):
        raise UserError(f"--seconds: expected a number above 0, received {options.seconds}")
    runtime.choose_backend(options.backend)
    if options.memory_of:
        side, batch_size, k = options.memory_of
        print(json.dumps(measure_memory(side, int(batch_size), int(k))))
        return
    import evaluation

    rows = []
    print("  batch   k  terms ms  product ms  terms/product  spread  terms MB  product MB  compiled MB")
    for batch_size in batches:
        for k in ks:
            rows.append(measure(options.backend, batch_size, k, seconds))
            print(format_row(rows[-1]), flush=True)
    print(json.dumps({"rows": rows, "commit": evaluation.commit(), **runtime.versions()}))


def measure(backend: str, batch_size: int, k: int, seconds: float) -> dict:
    """One row: median seconds of each side, their ratio, and bytes."""
    sides = SIDES if batch_size <= PRODUCT_UP_TO else SIDES[:1]
    arrays = make_arrays(batch_size, k)
    steps = {side: compiled(program(side, k)) for side in sides}
    turns = {side: functools.partial(step, *arrays) for side, step in steps.items()}
    found = timing.take_turns(turns, LEAST_ROUNDS, seconds=seconds)
    row = {"batch_size": batch_size, "k": k, "d": SIZE, "rounds": len(found["terms"])}
    for side, samples in found.items():
        row |= {f"{side}_s": samples.median(), f"{side}_spread": samples.spread()}
        row |= {f"{side}_{name}": size for name, size in memory_of(backend, side, batch_size, k).items()}
    if len(sides) == 2:
        row["terms_over_product"], row["ratio_spread"] = timing.ratio(found["terms"], found["product"])
    return row


def format_row(row: dict) -> str:
    def cell(name: str, scale: float, width: int, digits: int) -> str:
        return f"{row[name] * scale:>{width}.{digits}f}" if name in row else f"{'-':>{width}}"

    return (
        f"{row['batch_size']:>7}{row['k']:>4}"
        f"{cell('terms_s', 1e3, 10, 2)}{cell('product_s', 1e3, 12, 2)}{cell('terms_over_product', 1, 15, 3)}"
        f"{cell('ratio_spread', 1, 8, 3)}{cell('terms_bytes', 1e-6, 10, 1)}{cell('product_bytes', 1e-6, 12, 1)}"
        f"{cell('terms_compiled_bytes', 1e-6, 13, 1)}"
    )


# --- the two sides --------------------------------------------------------------------------------------------------


def terms(embeddings, labels):
    """FD + MD + ED of (B, k, d), with an adaptive map as in training."""
    import custom_loss

    recall = np.linspace(0, 1, NUM_CLASSES, dtype=np.float32)
    return (
        custom_loss.feature_discriminator(embeddings, labels, recall)
        + custom_loss.mean_discriminator(embeddings, labels, NUM_CLASSES)
        + custom_loss.embedding_discriminator(embeddings)
    )


def product(embeddings, labels):
    """(B, k d) x (k d, B)."""
    from keras import ops

    x_bn = ops.reshape(embeddings, (ops.shape(embeddings)[0], -1))
    return ops.matmul(x_bn, ops.transpose(x_bn))


def make_arrays(batch_size: int, k: int) -> tuple:
    """Embeddings float32 (B, k, d) of length 1 and labels int32 (B,), on the device."""
    from keras import ops

    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((batch_size, k, SIZE), np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    labels = rng.integers(0, NUM_CLASSES, batch_size).astype(np.int32)
    return ops.convert_to_tensor(embeddings), ops.convert_to_tensor(labels)


def program(side: str, k: int):
    """The side as the backend's compiled function of embeddings and labels; the terms come with their gradient."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(jax.value_and_grad(terms) if side == "terms" else product)
    import tensorflow as tf

    def with_gradient(embeddings, labels):
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            value = terms(embeddings, labels)
        return value, tape.gradient(value, embeddings)

    signature = tf.TensorSpec((None, k, SIZE)), tf.TensorSpec((None,), tf.int32)
    function = with_gradient if side == "terms" else product
    return tf.function(function, input_signature=signature, jit_compile=runtime.jit_compile())


def compiled(run):
    """A `program` that returns when its result is there."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return lambda *arrays: jax.block_until_ready(run(*arrays))

    def step(*arrays):
        result = run(*arrays)
        # One number: a GPU returns before it is done, and a whole result would have to be copied.
        (result[0] if isinstance(result, tuple) else result[0, 0]).numpy()
        return result

    return step


# --- memory ---------------------------------------------------------------------------------------------------------


def memory_of(backend: str, side: str, batch_size: int, k: int) -> dict[str, int]:
    """`measure_memory` in a process of its own: what one case took would hide what the next one takes."""
    arguments = ["--backend", backend, "--memory-of", side, str(batch_size), str(k)]
    # glibc gives large blocks back at once, so that none freed before the run serves it unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"batch {batch_size}, k {k}: the process that measures memory failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(side: str, batch_size: int, k: int) -> dict[str, int]:
    """By how many bytes one run raises the highest resident set (not off Linux); on JAX the program's own too."""
    import keras

    run, sizes = program(side, k), {}
    compiled(run)(*make_arrays(2, k))  # threads, buffers that stay, what compiling loads
    arrays = make_arrays(batch_size, k)
    if keras.backend.backend() == "jax":
        run = run.lower(*arrays).compile()
        sizes["compiled_bytes"] = int(run.memory_analysis().temp_size_in_bytes)
    step = compiled(run)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
        before = highest_resident_set()
        result = step(*arrays)
        sizes["bytes"] = highest_resident_set() - before
        del result  # held until here: it counts
    return sizes


def highest_resident_set() -> int:
    """Bytes since the last reset. Not `getrusage`'s: a process inherits that of the one which started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(run_command(main))
