"""Compares the accuracy of float32, mixed_bfloat16 and mixed_float16 training on the synthetic faces.

``python benchmarks/precision.py --seeds 5 --epochs 12 --run-dir runs/precision`` trains every policy with every seed as
``train.py`` does (same data, same order, same first weights). It compares the accuracy on the test split with that of
float32: mean and standard deviation over the seeds, the mean difference from float32 with the same seed, and the p of
the paired t-test (`reporting.statistics.paired_t`). After a kill, the same command resumes; finished runs are not
repeated. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import runtime
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from files import UserError, run_command
from reporting.statistics import mean_and_std, paired_t

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, starting at 0")
    parser.add_argument("--epochs", type=int, default=config.TrainConfig.epochs)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/precision"), help="folder for the runs and their data"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch on a few small faces: a check, no measurement")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.seeds < 1 or options.epochs < 1:
        raise UserError(f"--seeds, --epochs: expected 1 or more, received {options.seeds} and {options.epochs}")
    sizes: dict[str, int] = {}
    model = config.ModelConfig()
    if options.quick:
        vars(options).update(epochs=1, seeds=1)
        sizes = {"num_train": 64, "num_val": 32, "num_test": 32, "size": 16}
        model = config.ModelConfig(input_size=16, embedding_size=8)
    runtime.choose_backend(options.backend)
    import evaluation

    data_dir = options.run_dir / "data"
    if not (data_dir / "synthetic" / "train").exists():
        write_synthetic_splits(PrepareSyntheticConfig(data_dir=str(data_dir), **sizes))
    shared = {"data_dir": str(data_dir), "epochs": options.epochs, "backend": options.backend, "model": model}
    accuracies, seconds, num_images = train_all(options, shared)
    rows = [summary(name, accuracies, seconds[name], num_images) for name in options.policies]
    print(format_table(rows))
    result = {"rows": rows, "epochs": options.epochs, "quick": options.quick}
    print(json.dumps({**result, "commit": evaluation.commit(), **runtime.versions()}))


def train_all(options: argparse.Namespace, shared: dict[str, Any]):
    """Test accuracy and training seconds (policy -> one value per seed), and the size of the test split."""
    import experiment

    accuracies: dict[str, list[float]] = {name: [] for name in options.policies}
    seconds: dict[str, list[float]] = {name: [] for name in options.policies}
    num_images = 0
    for seed in range(options.seeds):  # seeds outside, so that a stopped benchmark has complete pairs
        for name in options.policies:
            folder = options.run_dir / f"{name}-{seed}"
            settings = config.TrainConfig(precision=name, seed=seed, run_dir=str(folder), **shared)
            start = time.monotonic()
            result = experiment.train_and_evaluate(settings)
            accuracies[name].append(result["accuracy"])
            seconds[name].append(result["train_seconds"])
            num_images = result["n"]
            took = time.monotonic() - start
            print(f"{name}, seed {seed}: {result['accuracy']:.2%} of {num_images:,}, {took:.0f} s", flush=True)
    return accuracies, seconds, num_images


def summary(name: str, accuracies: dict[str, list[float]], seconds: list[float], num_images: int) -> dict[str, Any]:
    """One policy's row; the difference from float32 is None for float32 itself and if float32 was not trained."""
    mean, std = mean_and_std(accuracies[name])
    row = {"policy": name, "n": num_images, "seeds": len(accuracies[name]), "accuracies": accuracies[name]}
    row |= {"mean": mean, "std": std, "train_seconds": mean_and_std(seconds)[0]}
    difference = deviation = p = None
    if name != "float32" and "float32" in accuracies:
        pairs = list(zip(accuracies[name], accuracies["float32"], strict=True))
        difference, deviation = mean_and_std([ours - full for ours, full in pairs])
        p = paired_t(accuracies[name], accuracies["float32"])
    return {**row, "difference": difference, "difference_std": deviation, "p": p}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; accuracies in percent, differences in points."""
    lines = ["| precision | n | seeds | accuracy | std | minus float32, points | std | p | training, seconds |"]
    lines.append("|" + " --- |" * 9)
    for row in rows:
        cells = [row["policy"], f"{row['n']:,}", str(row["seeds"]), f"{row['mean']:.2%}", points(row["std"])]
        cells += [points(row["difference"], "+"), points(row["difference_std"])]
        cells += ["-" if row["p"] is None else f"{row['p']:.2f}", f"{row['train_seconds']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def points(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{100 * share:{sign}.2f}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
