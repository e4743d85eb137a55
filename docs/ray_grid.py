"""Runs a grid on a Ray cluster: ``python docs/ray_grid.py --cpus 4 components --dataset fer2013 --seeds 3``.

Every machine sees the project, the data and ``--run-dir`` under the same paths (a shared folder). All other options go
to ``python reproduce.py list``, and each command that it prints becomes one Ray task.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import ray

PROJECT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="address of a running cluster (auto); none starts Ray on this machine")
    parser.add_argument("--cpus", type=float, default=1, help="cores per run")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per run; 0.5 puts two runs on one GPU")
    options, grid = parser.parse_known_args()
    listed = subprocess.run(
        [sys.executable, "reproduce.py", "list", *grid], cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True
    )
    commands = [line for line in listed.stdout.splitlines() if line.startswith("python ")]
    ray.init(address=options.address, log_to_driver=False)
    # The runs of a lost machine are started again elsewhere and continue after their last checkpoint.
    train = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=3)(run_one)
    waiting = {train.remote(command): command for command in commands}
    failed = 0
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        code, last_line = ray.get(done)
        failed += code != 0
        print(f"{'done' if code == 0 else f'failed ({last_line})'}: {waiting.pop(done)}", flush=True)
    print(f"{len(commands) - failed} of {len(commands)} runs done")
    raise SystemExit(2 if failed else 0)


def run_one(command: str) -> tuple[int, str]:
    """Does one run on the machine that Ray chose; returns its exit code and its error message, or its last line."""
    words = [sys.executable, *shlex.split(command)[1:]]
    # Ray sets the number of cores in OMP_NUM_THREADS; TensorFlow reads its own names.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads}
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return done.returncode, (errors or lines or [""])[-1]


if __name__ == "__main__":
    main()
