"""Compares Ad-Corre with cross-entropy in all trainings there are, and draws ``loss_difference.png`` beside this file.

    python docs/figures/loss_difference.py

Reads the predictions of reports/fer2013-components and ``gpu_runs.npz`` beside this file, which holds what the six
networks of the GPU training (docs/gpu.md) predict for PublicTest. Prints the table of docs/findings.md and writes every
number to ``loss_difference.json``. A few seconds.

    python docs/figures/loss_difference.py --pack RUNS --data-dir data

writes ``gpu_runs.npz`` again from ``RUNS/mini-seed<S>/<ce|ad_corre>/[flip/]predictions.npz`` of `test.py evaluate`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, Python looks in docs/figures only

import plots
from datasets.shared.expressions import CLASS_NAMES
from files import UserError, run_command, whole_file, write_json
from reporting.statistics import mcnemar, paired_bootstrap, paired_t, t_interval

HERE = Path(__file__).resolve().parent
COMPONENTS = HERE.parents[1] / "reports" / "fer2013-components"
SEEDS = (0, 1, 2)
LOSSES = ("ce", "ad_corre")
VIEWS = {"none": "", "flip": ", flip"}
# PrivateTest was not at hand here. These are the numbers of the one measurement there was (docs/findings.md).
PRIVATE_TEST = [
    ("PrivateTest, 160 epochs", [68.32, 69.30, 67.85], [68.82, 68.74, 68.74], 0.28, [-0.43, 0.98]),
    ("PrivateTest, 160 epochs, flip", [69.16, 69.91, 68.74], [69.46, 69.96, 70.02], 0.55, [-0.10, 1.23]),
    ("PrivateTest, 160 epochs, ensemble", [70.60], [71.27], 0.67, None),
    ("PrivateTest, 160 epochs, flip, ensemble", [70.77], [71.86], 1.09, None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", metavar="RUNS", help="make gpu_runs.npz from the runs of this folder, and stop")
    parser.add_argument("--data-dir", default="data", help="with --pack: finds the images that have a copy in train")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of loss_difference.json and .png")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.pack:
        return _pack(Path(options.pack), options.data_dir)
    with np.load(HERE / "gpu_runs.npz") as found:
        runs = dict(found)
    comparisons = [_components(), *_gpu(runs), *_private_test()]
    options.output.mkdir(parents=True, exist_ok=True)
    recalls = _recalls(runs)
    write_json(options.output / "loss_difference.json", {"comparisons": comparisons, "recalls": recalls})
    _draw(options.output / "loss_difference.png", comparisons)
    print(_table(comparisons), _recall_table(recalls), sep="\n\n")


def _pack(runs: Path, data_dir: str) -> None:
    from data_helper import open_split
    from datasets.shared.duplicates import find_duplicates

    train, val = (open_split(data_dir, "fer2013", name) for name in ("train", "val"))
    packed = {"has_copy": find_duplicates([val, train]).near["val", "train"].repeated}
    for seed in SEEDS:
        for loss in LOSSES:
            for views in VIEWS:
                folder = runs / f"mini-seed{seed}" / loss
                with np.load((folder / "flip" if views == "flip" else folder) / "predictions.npz") as found:
                    if not np.array_equal(found["labels"], val.labels):
                        raise UserError(f"{folder}: expected predictions of {val.name}, found those of other images")
                    packed[f"{loss}-{seed}-{views}"] = found["probabilities"].astype(np.float16)
    with whole_file(HERE / "gpu_runs.npz") as temporary:
        np.savez_compressed(temporary, labels=val.labels.astype(np.uint8), **packed)


def _components() -> dict:
    """The runs of reports/fer2013-components."""
    correct = {"CE": [], "Ad-Corre": []}
    with open(COMPONENTS / "results.csv", newline="", encoding="utf-8") as file:
        for line in sorted(csv.DictReader(file), key=lambda line: int(line["seed"])):
            if line["row"] in correct:
                with np.load(COMPONENTS / "runs" / line["run"] / "predictions.npz") as found:
                    correct[line["row"]].append(found["probabilities"].argmax(axis=1) == found["labels"])
    return _compared("PublicTest, 36 px, 12 epochs", np.array(correct["Ad-Corre"]), np.array(correct["CE"]))


def _gpu(runs: dict[str, np.ndarray]) -> list[dict]:
    """The six networks of the GPU training: alone and as the mean of the seeds, with and without the mirror image."""
    labels, is_new = runs["labels"], ~runs["has_copy"]
    compared = []
    for split, images in (("PublicTest", slice(None)), ("PublicTest without copies", is_new)):
        for views, title in VIEWS.items():
            name = f"{split}, 160 epochs{title}"
            found = {loss: np.array([runs[f"{loss}-{seed}-{views}"] for seed in SEEDS], float) for loss in LOSSES}
            alone = {loss: (found[loss].argmax(axis=2) == labels)[:, images] for loss in LOSSES}
            together = {loss: (found[loss].mean(axis=0).argmax(axis=1) == labels)[None, images] for loss in LOSSES}
            compared.append(_compared(name, alone["ad_corre"], alone["ce"]))
            compared.append(_compared(f"{name}, ensemble", together["ad_corre"], together["ce"]))
    return compared


def _recalls(runs: dict[str, np.ndarray]) -> list[dict]:
    """Recall of each expression, 0..100, of the six networks of the GPU training on PublicTest, one per seed."""
    of_class = [runs["labels"] == code for code in range(7)]  # without Contempt
    right = {loss: [runs[f"{loss}-{seed}-none"].argmax(axis=1) == runs["labels"] for seed in SEEDS] for loss in LOSSES}
    return [
        {"name": name, "n": int(rows.sum())}
        | {loss: [100 * float(one[rows].mean()) for one in right[loss]] for loss in LOSSES}
        for name, rows in zip(CLASS_NAMES[:7], of_class, strict=True)
    ]


def _recall_table(recalls: list[dict]) -> str:
    lines = ["| expression | n | cross-entropy, % | Ad-Corre, % | difference, by seed |", "|---" * 5 + "|"]
    for one in recalls:
        sides = (f"{np.mean(one[loss]):.1f}" for loss in LOSSES)
        gain = np.subtract(one["ad_corre"], one["ce"])
        by_seed = ", ".join(f"{value:+.1f}" for value in gain)
        lines.append(f"| {one['name']} | {one['n']} | {' | '.join(sides)} | {gain.mean():+.1f} ({by_seed}) |")
    return "\n".join(lines)


def _private_test() -> list[dict]:
    return [
        {"name": name, "n": 3589, "seeds": len(ce), "ce": ce, "ad_corre": ad_corre, "difference": difference}
        | {"interval_over_images": interval, "interval_over_seeds": t_interval(np.subtract(ad_corre, ce))}
        for name, ce, ad_corre, difference, interval in PRIVATE_TEST
    ]


def _compared(name: str, ad_corre: np.ndarray, ce: np.ndarray) -> dict:
    """One comparison of two bool (S, N): every number in points of accuracy, 0..100, or a p."""
    gain = 100 * (ad_corre.mean(axis=1) - ce.mean(axis=1))
    over_images = paired_bootstrap(ad_corre, ce)
    one = mcnemar(ad_corre[0], ce[0]) if len(gain) == 1 else None
    return {
        "name": name,
        "n": ce.shape[1],
        "seeds": len(gain),
        "ce": (100 * ce.mean(axis=1)).tolist(),
        "ad_corre": (100 * ad_corre.mean(axis=1)).tolist(),
        "difference": 100 * over_images.difference,
        "interval_over_images": [100 * over_images.low, 100 * over_images.high],
        "interval_over_seeds": t_interval(gain),
        "p_over_seeds": paired_t(ad_corre.mean(axis=1), ce.mean(axis=1)),
        "p_over_images": one.p if one else over_images.p,
    }


def _table(comparisons: list[dict]) -> str:
    titles = ("measured on, training", "n", "cross-entropy, %", "Ad-Corre, %", "difference", "over images", "seeds")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in comparisons:
        sides = (", ".join(f"{value:.2f}" for value in one[side]) for side in LOSSES)
        lines.append(
            f"| {one['name']} | {one['n']:,} | {' | '.join(sides)} | {one['difference']:+.2f} | "
            f"{_interval(one['interval_over_images'])} | {_interval(one['interval_over_seeds'])} |"
        )
    return "\n".join(lines)


def _interval(ends: list[float] | None) -> str:
    return "{:+.2f} to {:+.2f}".format(*ends) if ends else "-"


def _draw(path: Path, comparisons: list[dict]) -> None:
    title = "FER-2013, mini_xcp, three seeds per loss, n = 3,589 (3,170 without copies)"
    with plots.new_figure(path, 7.2, 0.9 + 0.28 * len(comparisons), title) as figure:
        axes = figure.add_subplot()
        for place, one in enumerate(comparisons):
            if interval := one["interval_over_images"]:
                axes.plot(interval, [place] * 2, color=plots.PALE, linewidth=6, solid_capstyle="round")
            seeds = np.subtract(one["ad_corre"], one["ce"])
            if len(seeds) > 1:
                axes.plot(seeds, [place] * len(seeds), color=plots.BLUE, marker="o", markersize=4, linestyle="")
            axes.plot([one["difference"]] * 2, [place - 0.28, place + 0.28], color=plots.ORANGE, linewidth=2.2)
        axes.axvline(0, color="black", linewidth=0.9)
        axes.set_yticks(range(len(comparisons)), [one["name"] for one in comparisons])
        axes.set_ylim(len(comparisons) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(True, axis="x")
        axes.set_xlabel("Ad-Corre minus cross-entropy, points")
        handles = [
            Line2D([], [], color=plots.BLUE, marker="o", markersize=4, linestyle="", label="one seed"),
            Line2D([], [], color=plots.ORANGE, linewidth=2.2, label="mean of the seeds, or their ensemble"),
            Line2D([], [], color=plots.PALE, linewidth=6, label="95% interval over images"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)


if __name__ == "__main__":
    sys.exit(run_command(main))
