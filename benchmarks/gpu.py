"""Measures training on one GPU: `train.py`'s own ``fit`` on JAX, beside a bare loop and a peer, and its start.

``python benchmarks/gpu.py --minutes 8 --output gpu.json`` measures, in this order, each row in its own process:

- speed: images per second of ``fit`` for mini_xcp at 48 px, xcp at 96 px and xcp at 224 px, in bfloat16, with data
  that is resident on the device; beside it a bare compiled loop of the same steps (`bare_loop.py`), with Ad-Corre and
  with cross-entropy alone; the sides take turns (`timing.py`). Share of the device's peak rate, and peak memory;
- start: seconds from the start of the process to the end of the first step, cold (no compiled program kept) and with
  kept programs, split into import, Python tracing, lowering, XLA's compilation and the rest; and for xcp at 96 px cold
  without XLA's autotuning;
- peer: PyTorch with timm's Xception, channels_last, bfloat16 autocast, torch.compile, cross-entropy and AdamW, at the
  same size and batch, with resident data (`torch_peer.py`).

Rows are printed as Markdown when they are ready, and ``--output`` is written whole after each row. A row that the
minutes do not reach, or whose packages are not installed, is "not run". Without a GPU the program uses a toy size, and
its numbers mean nothing. Needs Keras and JAX; no TensorFlow.

FLOPs are counted from the network's layers: 2 for each product of a convolution or dense layer (`flops.py`), and three
times the forward pass for a training step (once forward, twice backward). Nothing else is counted, and nothing that is
recomputed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from files import UserError, run_command, write_json

# isort: split
from flops import peak_tflops

# Keras's policy, and JAX's precision of float32 products. JAX rounds the factors of float32 products to 11 bits (TF32)
# by default on an A100 or newer, so `train.py --precision float32` means `tf32` there.
PRECISIONS = {
    "mixed_bfloat16": ("mixed_bfloat16", None),
    "tf32": ("float32", "tensorfloat32"),
    "float32": ("float32", "highest"),
}
# FER-2013's training images as they are prepared, and some of AffectNet's: an epoch of about a second or less.
FER2013 = {"pixels": [48, 48, 1], "images": 28_709}
AFFECTNET = {"pixels": [224, 224, 3], "images": 4_096}
NETWORKS = {
    "mini_xcp": {"arch": "mini_xcp", "size": 48, "batch": 256, **FER2013},
    "xcp 96": {"arch": "xcp", "size": 96, "batch": 256, **FER2013},
    "xcp 224": {"arch": "xcp", "size": 224, "batch": 128, **AFFECTNET},
}
TOY = {"arch": "mini_xcp", "size": 16, "batch": 8, "pixels": [16, 16, 1], "images": 64}
PARTS = ("speed", "start", "peer")
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"

FIT_OVER_BARE = 0.95  # images/s; at least
AD_CORRE_OVER_CE = {"mini_xcp": 1.05, "xcp": 1.02}  # seconds; at most
FIT_OVER_PEER = 1.0  # images/s; at least
FIRST_STEP_S = {"cold": 60.0, "kept": 10.0}  # at most

NOT_RUN = "not run"
LEAST_S = 15.0  # no row starts with less time left
TITLES = ("what", "network", "batch", "images/s", "ms per step", "spread", "of peak", "peak GB", "notes")


def main() -> None:
    options = parse_options()
    if options.row:
        import gpu_rows

        print(json.dumps(gpu_rows.measure(json.loads(options.row))))
        return
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        device = run_row({"what": "device", "cache": "device"}, folder, 300.0)
        if "failed" in device:
            raise UserError(f"JAX finds no device ({device['failed']})")
        toy = options.toy or device["platform"] != "gpu"
        size = "a toy size, no measurement" if toy else options.precision
        print(f"JAX on {device['kind']} ({device['platform']}): {size}\n")
        print(row_of(TITLES), row_of(["---"] * len(TITLES)), sep="\n", flush=True)
        result = {"device": device, "toy": toy, "minutes": options.minutes, "precision": options.precision, "rows": []}
        for case in plan(toy, options.parts, options.precision):
            left = ends - time.monotonic()
            row = {**case, **(run_row(case, folder, left) if left > LEAST_S else {"failed": NOT_RUN})}
            compare(row, result["rows"], peak_tflops(device["kind"], options.precision, options.peak_tflops))
            result["rows"].append(row)
            print(row_of(cells(row)), flush=True)
            if options.output:
                write_json(options.output, result)
    print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for all rows together")
    parser.add_argument("--output", type=Path, help="JSON file for the rows measured so far")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="mixed_bfloat16")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak; replaces the built-in table")
    parser.add_argument("--toy", action="store_true", help="mini_xcp at 16 px: a check of the script, no measurement")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one case, in this process
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    for name in ("minutes", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected more than 0, received {value}")
    return options


def plan(toy: bool, parts: list[str], precision: str) -> list[dict[str, Any]]:
    """The rows in order, the most informative first.

    ``cache`` names the folder of the compiled programs that a row finds: a cold start has one of its own.
    """
    small, middle, large = [TOY] * 3 if toy else NETWORKS.values()
    rounds = {"turn_s": 0.05, "rounds": 3} if toy else {"turn_s": 1.0, "rounds": 8}
    cold, kept = {"what": "start", "start": "cold"}, {"what": "start", "start": "kept"}
    cases = [
        {"what": "speed", **small, "cache": "speed"},
        {**cold, **middle, "cache": "start"},
        {**kept, **middle, "cache": "start"},
        {"what": "speed", **middle, "cache": "start"},
        {"what": "peer", **middle, "cache": "peer"},
        {"what": "speed", **large, "cache": "speed"},
        {"what": "peer", **large, "cache": "peer"},
        {**cold, **middle, "cache": "untuned", "xla_flags": NO_AUTOTUNING},
        {**cold, **small, "cache": "small"},
        {**kept, **small, "cache": "small"},
    ]
    if toy:  # the others would repeat these at the one toy size, and the flag is a GPU's
        cases = cases[:3] + cases[4:5]
    return [{**case, **rounds, "precision": precision} for case in cases if case["what"] in parts]


def run_row(case: dict[str, Any], folder: str, seconds: float) -> dict[str, Any]:
    """The result of `gpu_rows.measure` from its own process, or ``failed`` with the reason."""
    cache = Path(folder, case["cache"])
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "xla_gpu_per_fusion_autotune_cache_dir",
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }
    if products := PRECISIONS[case.get("precision", "mixed_bfloat16")][1]:
        environment["JAX_DEFAULT_MATMUL_PRECISION"] = products
    if flags := case.get("xla_flags"):
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    told = {**case, "spawned": time.time(), "seconds_left": seconds}
    command = [sys.executable, __file__, "--debug", "--row", json.dumps(told)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"{NOT_RUN} to its end: no time left"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": why_failed(done.stderr) or f"ended with exit code {done.returncode}"}


def why_failed(stderr: str) -> str:
    """``out of memory``, or the last line of a process's stderr, cut to fit a table cell."""
    if "RESOURCE_EXHAUSTED" in stderr or "out of memory" in stderr.lower():
        return "out of memory"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:120] if lines else ""


def compare(row: dict[str, Any], before: list[dict[str, Any]], peak: float | None) -> None:
    """Adds to a row its share of the device's peak, and to a peer's row the speed of ``fit`` over the peer's."""
    if peak and "flops_per_s" in row:
        row["utilisation"] = row["flops_per_s"] / (1e12 * peak)
    same = [each for each in before if each["what"] == "speed" and each["arch"] == row["arch"]]
    rates = [each["images_per_s"] for each in same if each["size"] == row["size"] and "images_per_s" in each]
    if row["what"] == "peer" and "images_per_s" in row and rates:
        row["fit_over_peer"] = rates[0] / row["images_per_s"]


def row_of(cells) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cells(row: dict[str, Any]) -> list[str]:
    flags = f" {row['xla_flags']}" if "xla_flags" in row else ""
    start = [f"{row['what']}{' ' * ('start' in row)}{row.get('start', '')}{flags}"]
    start += [f"{row['arch']}, {row['size']} px", f"{row['batch']:,}"]
    if "failed" in row:
        return [*start, *["-"] * (len(TITLES) - len(start) - 1), row["failed"]]
    if row["what"] == "start":
        rates = ["-"] * 3
    else:
        rates = [f"{row['images_per_s']:,.0f}", f"{1e3 * row['seconds']:,.2f}", f"{row['spread']:.1%}"]
    share = f"{row['utilisation']:.1%}" if "utilisation" in row else "-"
    memory = f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else "-"
    return [*start, *rates, share, memory, "; ".join(notes(row)) or "-"]


def notes(row: dict[str, Any]) -> list[str]:
    """What a row found beside its rate, each with its aim."""
    found = []
    if "fit_over_bare" in row:
        found.append(
            f"fit / bare loop {row['fit_over_bare']:.3f} ± {row['fit_over_bare_spread']:.1%} (aim {FIT_OVER_BARE})"
        )
    if "ad_corre_over_ce" in row:
        spread, aim = row["ad_corre_over_ce_spread"], AD_CORRE_OVER_CE[row["arch"]]
        found.append(f"time of Ad-Corre / CE {row['ad_corre_over_ce']:.3f} ± {spread:.1%} (aim {aim})")
    if "bare_stages" in row:
        found.append("bare loop: " + seconds_of(row["bare_stages"]))
    if "fit_over_peer" in row:
        found.append(f"fit / peer {row['fit_over_peer']:.3f} (aim {FIT_OVER_PEER:.0f} for xcp)")
    if "first_step_s" in row:
        aim = "" if "xla_flags" in row else f" (aim {FIRST_STEP_S[row['start']]:.0f} s)"
        found.append(f"first step after {row['first_step_s']:.1f} s{aim}: {seconds_of(row['stages'])}")
        found.append("the step's own program: " + seconds_of(row["step_program"]))
        found.append(f"{row['programs']} programs")
    if "versions" in row:
        found.append(", ".join(f"{name} {version}" for name, version in row["versions"].items()))
    return found


def seconds_of(stages: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in stages.items())


if __name__ == "__main__":
    raise SystemExit(run_command(main))
