"""Measures the speed of training and inference on one GPU, and how much of the GPU they use.

``python benchmarks/gpu.py --minutes 25 --output gpu.json`` measures xcp at 224 px on Keras with JAX (no TensorFlow):

- train: images per second, model FLOP utilisation and peak memory of a whole training step (augmentation, network,
  Ad-Corre, AdamW) on a batch that is on the device, in three precisions, with batches of 64 to 1,024;
- ratios: the same step compared with cross-entropy alone, with no augmentation, and with batches from the host's
  memory; the variants take turns in one process, and the median of the turns counts;
- inference: images per second of the network alone.

Each row runs in its own process. So its peak memory is its own, and a batch that does not fit costs that row only.
Rows are printed as Markdown when they are ready, and ``--output`` is written whole after each row. When the minutes are
used up, the remaining rows are "not run". Without a GPU the program uses a toy size and reports that.

FLOPs are counted from the network's layers: 2 for each product of a convolution or dense layer (`multiply_adds`), and
three times the forward pass for a training step (once forward, twice backward). Nothing else is counted, and nothing
that is recomputed. Precisions: ``float32`` computes products in float32 (JAX's ``highest``); with ``tf32`` the tensor
cores round their factors to 11 bits, which is JAX's default for float32 on such a GPU and therefore what
``train.py --precision float32`` uses there; ``mixed_bfloat16`` is Keras's policy.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import train_step

import runtime
from files import UserError, run_command, write_json

# Peak TFLOP/s without sparsity, by a part of the device's name in JAX; the first match counts.
# Sources: NVIDIA's data sheets of the H100 (SXM, PCIe and NVL), H200 (SXM and NVL) and A100 Tensor Core GPUs. They give
# TF32 and BF16 of the H100 and H200 with sparsity; the values here are half of those.
PEAKS = {
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "mixed_bfloat16": 756.5},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "mixed_bfloat16": 835.5},
    "H100": {"float32": 67.0, "tf32": 494.5, "mixed_bfloat16": 989.5},
    "H200 NVL": {"float32": 60.0, "tf32": 417.5, "mixed_bfloat16": 835.5},
    "H200": {"float32": 67.0, "tf32": 494.5, "mixed_bfloat16": 989.5},
    "A100": {"float32": 19.5, "tf32": 156.0, "mixed_bfloat16": 312.0},
}
# Keras's policy and JAX's precision of float32 products.
PRECISIONS = {
    "tf32": ("float32", "tensorfloat32"),
    "mixed_bfloat16": ("mixed_bfloat16", None),
    "float32": ("float32", "highest"),
}
PARTS = ("train", "ratios", "inference")
NOT_RUN = "not run"
TITLES = ("what", "precision", "batch", "images/s", "ms", "model TFLOP/s", "of peak", "peak GB", "notes")
TURN_S = 1.0  # about the length of a turn of steps; long enough that its start and end do not count
LEAST_S = 20.0  # no row starts with less time left


def main() -> None:
    options = parse_options()
    if options.row:
        print(json.dumps(measure(json.loads(options.row))))
        return
    ends = time.monotonic() + 60 * options.minutes
    device = run_row({"what": "device"}, 300.0)
    if "failed" in device:
        raise UserError(f"JAX finds no device ({device['failed']})")
    toy = options.toy or device["platform"] != "gpu"
    result = {"device": device, "toy": toy, "minutes": options.minutes, "rows": []}
    size = "a toy size, no measurement" if toy else "xcp at 224 px"
    print(f"JAX on {device['kind']} ({device['platform']}): {size}\n")
    print(row_of(TITLES), row_of(["---"] * len(TITLES)), sep="\n", flush=True)
    peaks = peaks_of(device["kind"], options.peak_tflops)
    for case in plan(toy, options.parts):
        left = ends - time.monotonic()
        row = {**case, **(run_row(case, left) if left > LEAST_S else {"failed": NOT_RUN})}
        peak = peaks.get(case["precision"])
        if peak and "flops_per_s" in row:
            row["utilisation"] = row["flops_per_s"] / (1e12 * peak)
        result["rows"].append(row)
        print(row_of(cells(row)), flush=True)
        if options.output:
            write_json(options.output, result)
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="time limit for all rows together")
    parser.add_argument("--output", type=Path, help="JSON file for the rows measured so far")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's peak, for all precisions; replaces the built-in table"
    )
    parser.add_argument(
        "--toy", action="store_true", help="mini_xcp at 16 px, batches of 4: a check of the script, no measurement"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one case, in this process
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    for name in ("minutes", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected more than 0, received {value}")
    return options


def plan(toy: bool, parts: list[str]) -> list[dict[str, Any]]:
    """The rows in order, the most informative first."""
    shared = {"arch": "mini_xcp", "size": 16, "turns": 2} if toy else {"arch": "xcp", "size": 224, "turns": 8}
    batches, answers = ((4,), (4,)) if toy else ((256, 64, 128, 512, 1024), (1, 64, 1024))

    def rows(what: str, batch: int, precisions) -> list[dict[str, Any]]:
        return [{"what": what, "precision": name, "batch": batch, **shared} for name in precisions if what in parts]

    first, *others = batches
    cases = rows("train", first, PRECISIONS) + rows("ratios", first, ["mixed_bfloat16"])
    for batch in answers:
        cases += rows("inference", batch, ["mixed_bfloat16", "tf32"])
    for batch in others:
        cases += rows("train", batch, PRECISIONS)
    return cases


def peaks_of(kind: str, chosen: float | None) -> dict[str, float]:
    """Peak TFLOP/s by precision; empty for an unknown device."""
    if chosen:
        return dict.fromkeys(PRECISIONS, chosen)
    return next((peaks for name, peaks in PEAKS.items() if name in kind), {})


def run_row(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The result of `measure` from its own process, or ``failed`` with the reason."""
    command = [sys.executable, __file__, "--debug", "--row", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": "stopped: no time left"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": why_failed(done.stderr) or f"ended with exit code {done.returncode}"}


def why_failed(stderr: str) -> str:
    """``out of memory``, or the last line of a process's stderr, cut to fit a table cell."""
    if "RESOURCE_EXHAUSTED" in stderr or "out of memory" in stderr.lower():
        return "out of memory"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:120] if lines else ""


def row_of(cells) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cells(row: dict[str, Any]) -> list[str]:
    start = [row["what"], row["precision"], f"{row['batch']:,}"]
    if "failed" in row:
        return [*start, *["-"] * (len(TITLES) - len(start) - 1), row["failed"]]
    notes = [f"{name} {row[key]:.3f}" for key, name in RATIOS.items() if key in row]
    if "input_share" in row:
        notes.append(f"input {row['input_share']:.1%} of the time")
    return [
        *start,
        f"{row['images_per_s']:,.0f}",
        f"{1e3 * row['seconds']:,.2f}",
        f"{row['flops_per_s'] / 1e12:,.3g}",
        f"{row['utilisation']:.1%}" if "utilisation" in row else "-",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        ", ".join(notes) or "-",
    ]


RATIOS = {"ad_corre_over_ce": "Ad-Corre / CE", "augmentation_over_none": "augmentation / none"}

# --- one row, in its process ----------------------------------------------------------------------------------------


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measures one row on this process's first device."""
    runtime.choose_backend("jax")
    import jax

    device = jax.devices()[0]
    if case["what"] == "device":
        import evaluation

        memory = device.memory_stats() or {}
        found = {"kind": device.device_kind, "platform": device.platform, "bytes": memory.get("bytes_limit")}
        return {**found, "versions": runtime.versions(), "commit": evaluation.commit()}
    measures = {"train": measure_training, "ratios": measure_ratios, "inference": measure_inference}
    policy, products = PRECISIONS[case["precision"]]
    with jax.default_matmul_precision(products):
        row = measures[case["what"]](case, policy)
    memory = device.memory_stats() or {}  # None on a CPU
    return {**row, "peak_bytes": memory.get("peak_bytes_in_use")}


class Training:
    """The step that ``train.py`` runs on JAX, compiled, with its state on the device."""

    def __init__(self, case: dict[str, Any], policy: str, loss_options: dict[str, float], augment: bool):
        import jax

        model = train_step.make_trainer(case["arch"], case["size"], loss_options, policy, augment)
        model.build((None, case["size"], case["size"], 3))
        model.optimizer.build(model.trainable_variables)
        variables = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        # The step reuses this memory for its result, as `fit` does, so the model's own variables are no longer valid.
        self.state = jax.tree.map(lambda variable: variable.value, variables)
        self.network = model.network
        self.step = jax.jit(model.train_step, donate_argnums=0)

    def run(self, batches) -> None:
        import jax

        for batch in batches:
            _, self.state = self.step(self.state, batch)
        jax.block_until_ready(self.state)


def measure_training(case: dict[str, Any], policy: str) -> dict[str, Any]:
    training = Training(case, policy, {}, augment=True)
    batch = on_device(make_batch(case))
    (seconds,) = take_turns([lambda steps: training.run([batch] * steps)], case["turns"])
    return rates(case, seconds, 3 * forward_flops(training.network))


def measure_ratios(case: dict[str, Any], policy: str) -> dict[str, Any]:
    whole, ce, plain = (
        Training(case, policy, options, augment)
        for options, augment in (({}, True), (train_step.CE_ALONE, True), ({}, False))
    )
    in_memory = [make_batch(case, seed) for seed in range(4)]  # several, so that none stays in a cache
    batch = on_device(in_memory[0])

    def fed(steps: int) -> None:
        whole.run(one_ahead(in_memory[i % len(in_memory)] for i in range(steps)))

    sides = [lambda steps, side=side: side.run([batch] * steps) for side in (whole, ce, plain)]
    of_whole, of_ce, of_plain, of_fed = take_turns([*sides, fed], case["turns"])
    row = rates(case, of_whole, 3 * forward_flops(whole.network))
    row |= {"ad_corre_over_ce": of_whole / of_ce, "augmentation_over_none": of_whole / of_plain}
    return {**row, "fed_seconds": of_fed, "input_share": 1 - of_whole / of_fed}


def measure_inference(case: dict[str, Any], policy: str) -> dict[str, Any]:
    import jax

    import cnn_model

    runtime.set_up(0, policy)
    network = cnn_model.build_model(case["arch"], input_size=case["size"])
    weights = [variable.value for variable in network.variables]

    @jax.jit
    def answer(values, pixels):
        import keras

        with keras.StatelessScope(state_mapping=zip(network.variables, values, strict=True)):
            return network(pixels, training=False)["logits"]

    pixels, _ = on_device(make_batch(case))

    def run(steps: int) -> None:
        jax.block_until_ready([answer(weights, pixels) for _ in range(steps)])

    (seconds,) = take_turns([run], case["turns"])
    return rates(case, seconds, forward_flops(network))


def make_batch(case: dict[str, Any], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels uint8 (B, size, size, 3), and labels int32 (B,)."""
    rng = np.random.default_rng(seed)
    shape = (case["batch"], case["size"], case["size"], 3)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 7, case["batch"], np.int32)


def on_device(batch):
    import jax

    return jax.block_until_ready(jax.device_put(batch))


def one_ahead(batches):
    """Yields batches on the device, each sent during the step before it, as Keras's ``fit`` does on JAX."""
    import jax

    waiting = None
    for batch in batches:
        sent = jax.device_put(batch)
        if waiting is not None:
            yield waiting
        waiting = sent
    yield waiting


def take_turns(sides, turns: int) -> list[float]:
    """Median seconds per step of each side. The sides take turns; the first steps compile and set a turn's length."""
    lengths = []
    for run in sides:
        run(1)
        lengths.append(max(1, min(1000, int(TURN_S / timed(run, 2)))))
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(turns):
        for run, length, found in zip(sides, lengths, seconds, strict=True):
            found.append(timed(run, length))
    return [statistics.median(found) for found in seconds]


def timed(run, steps: int) -> float:
    """Seconds per step."""
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def rates(case: dict[str, Any], seconds: float, flops: int) -> dict[str, Any]:
    """Speed and arithmetic of a step that takes ``seconds``; ``flops`` is per image."""
    images_per_s = case["batch"] / seconds
    return {
        "seconds": seconds,
        "images_per_s": images_per_s,
        "flops_per_image": flops,
        "flops_per_s": flops * images_per_s,
    }


def forward_flops(network) -> int:
    """FLOPs of the forward pass per image: two for each product."""
    return 2 * multiply_adds(network)


def multiply_adds(network) -> int:
    """Products (each with its addition) per image in a Keras model's convolutions and dense layers.

    The sum over kernels of `size(kernel) * positions`, where the positions are the layer's output without batch and
    channels. Xception with its classifier at 299 px has 8.36e9 (timm's model card of legacy_xception: 8.4e9). Other
    layers (batch normalisation, pooling, activations) are not counted.
    """
    total = 0
    for layer in network.layers:
        if hasattr(layer, "layers"):  # the backbone
            total += multiply_adds(layer)
            continue
        for name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            if (kernel := getattr(layer, name, None)) is not None:
                total += math.prod(kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total


if __name__ == "__main__":
    raise SystemExit(run_command(main))
