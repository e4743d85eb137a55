"""Measures how much the maps of the k embedding vectors overlap, and draws ``explain_overlap.png`` beside this file.

    python docs/figures/explain_overlap.py --data-dir data --with-ed A0.weights.h5 A1.weights.h5 A2.weights.h5 \\
        --without C0.weights.h5 C1.weights.h5 C2.weights.h5

``--with-ed`` and ``--without`` list one weights file per seed, in the same order of seeds. Writes
``explain_overlap.json`` with all numbers, and prints the tables of docs/explain.md. TensorFlow; about 20 seconds per
network on two idle cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, Python looks in docs/figures only

import runtime
from files import UserError, run_command, sha256, write_json
from reporting.statistics import t_interval

HERE = Path(__file__).resolve().parent
NAMES = {"with_ed": "Ad-Corre (FD + MD + ED)", "without": "Cross-entropy", "untrained": "Untrained"}
COVERED = 0.25  # share of the pixels that the test of the maps covers
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-ed", nargs="+", required=True, metavar="WEIGHTS", help="one per seed")
    parser.add_argument("--without", nargs="+", required=True, metavar="WEIGHTS", help="the same seeds")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--dataset", default="fer2013")
    parser.add_argument("--split", default="val")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of explain_overlap.json and .png")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if len(options.with_ed) != len(options.without):
        raise UserError(
            f"--with-ed, --without: expected as many files on both sides, "
            f"received {len(options.with_ed)} and {len(options.without)}"
        )
    runtime.choose_backend("tensorflow")
    from data_helper import open_split
    from evaluation import commit

    split = open_split(options.data_dir, options.dataset, options.split)
    networks = {
        "with_ed": [_load(path) for path in options.with_ed],
        "without": [_load(path) for path in options.without],
        "untrained": [_untrained(options.without[0], seed) for seed in range(len(options.without))],
    }
    measured = {side: [_measure(network, split) for network in found] for side, found in networks.items()}
    per_image = {side: np.array([one.pop("per_image") for one in rows]) for side, rows in measured.items()}
    result = {
        "data": split.name,
        "n": len(split),
        "commit": commit(),
        "sha256": {"with_ed": [*map(sha256, options.with_ed)], "without": [*map(sha256, options.without)]},
        "networks": measured,
        "difference": _difference(per_image["with_ed"], per_image["without"]),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "explain_overlap.json", result)
    _draw(options.output / "explain_overlap.png", measured, per_image)
    print(_tables(result))


def _load(path: str):
    from model_files import model_file

    return model_file.load_model(path)[0]


def _untrained(path: str, seed: int):
    """The network of a weights file with weights as they are before training."""
    import keras

    import cnn_model
    from model_files import model_file

    info = model_file.read_info(path)
    keras.utils.set_random_seed(seed)
    names = ("num_embeddings", "embedding_size", "input_size", "scaling", "logit_scale")
    options = {name: getattr(info, name) for name in names}
    return cnn_model.build_model(info.arch, num_classes=len(info.class_names), **options)


def _measure(network, split) -> dict:
    """Overlaps of one network's maps, what independent maps would give, and whether the maps mean something."""
    import evaluation
    import explain
    import metrics

    rng = np.random.default_rng(0)
    _, embeddings = evaluation.predict(network, split.images)
    found = explain.maps(network, split.images, batch_size=256)
    maps = found.vector_maps
    # Every image gets another one's maps: the next one in a random cycle through all.
    cycle = rng.permutation(len(maps))
    others = np.empty_like(maps)
    others[cycle] = maps[np.roll(cycle, 1)]
    shuffled = rng.permuted(maps.reshape(*maps.shape[:2], -1), axis=2).reshape(maps.shape)
    centred = found.signed_maps - found.signed_maps.mean(axis=(2, 3), keepdims=True)
    true_label = explain.maps(network, split.images, split.labels, batch_size=256)
    per_image = explain.overlap(maps)
    return {
        "overlap": float(np.nanmean(per_image)),
        "overlap_of_another_image": float(np.nanmean(explain.overlap(maps, others))),
        "overlap_of_shuffled_cells": float(np.nanmean(explain.overlap(shuffled))),
        "overlap_for_the_true_label": float(np.nanmean(explain.overlap(true_label.vector_maps))),
        "correlation_of_signed_maps": float(np.nanmean(explain.overlap(centred))),
        "overlap_by_predicted_class": {
            name: _mean_or_none(per_image[found.labels == code]) for code, name in enumerate(split.class_names)
        },
        "empty_maps": int((maps.max(axis=(2, 3)) == 0).sum()),
        "images_without_overlap": int(np.isnan(per_image).sum()),
        "correlation_of_embeddings": metrics.correlations(split.labels, embeddings, split.num_classes)[
            "between_embeddings"
        ],
        "accuracy": float(np.mean(found.labels == split.labels)),
        "covered": _covered(network, split, found, others=cycle),
        "per_image": per_image,
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _covered(network, split, found, others: np.ndarray) -> dict[str, float]:
    """Mean loss of the label's probability when a quarter of the face is covered with its mean gray.

    Covered is where the label's map is largest, where it is smallest, or where the map of another image is largest.
    """
    import evaluation

    maps = found.full_size(found.label_maps)
    foreign = np.empty_like(maps)
    foreign[others] = maps[np.roll(others, 1)]
    rows = np.arange(len(split))
    lost = {}
    for name, ranked in (("largest", maps), ("smallest", -maps), ("largest_of_another_image", foreign)):
        # Ties, most often the zeros of a map, in random order.
        ranked = ranked + 1e-6 * np.random.default_rng(1).random(maps.shape, np.float32)
        limit = np.quantile(ranked, 1 - COVERED, axis=(1, 2), keepdims=True)
        images = np.array(split.images)
        mean = images.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8)
        images = np.where((ranked > limit)[..., None], mean, images)
        probabilities, _ = evaluation.predict(network, images)
        lost[name] = float(np.mean(found.probabilities[rows, found.labels] - probabilities[rows, found.labels]))
    return lost


def _difference(with_ed: np.ndarray, without: np.ndarray) -> dict:
    """Overlaps (S, N) of two sides: the mean difference, with its interval over the images and over the seeds."""
    per_seed = np.nanmean(with_ed, axis=1) - np.nanmean(without, axis=1)
    per_image = np.nanmean(with_ed - without, axis=0)
    per_image = per_image[~np.isnan(per_image)]
    rng = np.random.default_rng(0)
    resampled = [rng.choice(per_image, len(per_image)).mean() for _ in range(RESAMPLES)]
    return {
        "mean": float(per_seed.mean()),
        "per_seed": per_seed.tolist(),
        "interval_over_seeds": t_interval(per_seed),
        "interval_over_images": np.quantile(resampled, (0.025, 0.975)).tolist(),
    }


def _tables(result: dict) -> str:
    rows = {
        "overlap": "overlap",
        "overlap_of_another_image": "of another image",
        "overlap_of_shuffled_cells": "of shuffled cells",
        "overlap_for_the_true_label": "for the true label",
        "correlation_of_signed_maps": "correlation, signed maps",
        "correlation_of_embeddings": "correlation, embeddings",
        "accuracy": "accuracy",
    }
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for key, title in rows.items():
        cells = (", ".join(f"{one[key]:.3f}" for one in result["networks"][side]) for side in NAMES)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for key in ("largest", "smallest", "largest_of_another_image"):
        cells = (", ".join(f"{one['covered'][key]:.3f}" for one in result["networks"][side]) for side in NAMES)
        lines.append(f"| probability lost, covered: {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    for name in result["networks"]["with_ed"][0]["overlap_by_predicted_class"]:
        cells = (_mean_of_class(result["networks"][side], name) for side in NAMES)
        lines.append(f"| overlap, {name} predicted | " + " | ".join(cells) + " |")
    difference = result["difference"]
    lines += ["", f"difference {difference['mean']:+.3f}, per seed {difference['per_seed']}"]
    lines.append(f"95% over seeds {difference['interval_over_seeds']}, images {difference['interval_over_images']}")
    return "\n".join(lines)


def _mean_of_class(networks: list[dict], name: str) -> str:
    found = [one["overlap_by_predicted_class"][name] for one in networks]
    found = [value for value in found if value is not None]
    return f"{np.mean(found):.3f}" if found else "-"


def _draw(path: Path, measured: dict, per_image: dict[str, np.ndarray]) -> None:
    import plots

    colors = {"with_ed": plots.BLUE, "without": plots.ORANGE, "untrained": plots.GRAY}
    with plots.new_figure(path, 6.4, 2.9) as figure:
        axes = figure.add_subplot()
        for side, name in NAMES.items():
            for seed, values in enumerate(per_image[side]):
                # One step curve per network: which share of the images has at most this overlap.
                ordered = np.sort(values[~np.isnan(values)])
                share = np.arange(1, len(ordered) + 1) / len(ordered)
                axes.plot(ordered, share, color=colors[side], linewidth=1.3, label=None if seed else name)
        chances = {
            "overlap_of_another_image": ("maps of\nother images", "left"),
            "overlap_of_shuffled_cells": ("shuffled\ncells", "right"),
        }
        for key, (text, side_of_text) in chances.items():
            chance = np.mean([one[key] for side in ("with_ed", "without") for one in measured[side]])
            axes.axvline(chance, color="black", linewidth=0.9, linestyle=":")
            shift = 0.012 if side_of_text == "left" else -0.012
            axes.text(chance + shift, 0.6, text, ha=side_of_text, va="center", fontsize=8)
        axes.set(
            xlabel="Mean overlap of an image's maps (cosine)",
            ylabel="Images up to this overlap",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1, decimals=0))
        axes.grid(True)
        figure.legend(loc="outside upper center", ncols=len(NAMES))


if __name__ == "__main__":
    sys.exit(run_command(main))
