"""Run folders as `experiment.py` leaves them, without training: scored probabilities of a chosen quality."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np

import config
import metrics
from config import TrainConfig
from datasets import CLASS_NAMES
from reporting.rows import AD_CORRE, Row, RunFiles

CLASSES = CLASS_NAMES[:7]


def labels_of(n: int, num_classes: int = 7) -> np.ndarray:
    """The same n labels for every run; some classes are rarer than others."""
    share = np.linspace(2, 0.5, num_classes)
    return np.random.default_rng(99).choice(num_classes, n, p=share / share.sum())


def write_run(
    folder,
    *,
    seed=0,
    quality=2.0,
    n=210,
    options=None,
    dataset="fer2013",
    split="val",
    selected_on="val",
    class_names=CLASSES,
    labels=None,
    epochs=3,
    commit="c" * 40,
) -> Path:
    """Writes result.json, predictions.npz and history.csv; a larger ``quality`` has more correct images."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_classes = len(class_names)
    labels = labels_of(n, num_classes) if labels is None else np.asarray(labels)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(labels), num_classes)) + quality * np.eye(num_classes)[labels]
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    settings = dataclasses.replace(TrainConfig(), epochs=epochs, seed=seed)
    settings = config.with_options(settings, {"dataset": dataset, **(options or {})}, "test")
    centers = rng.normal(size=(num_classes, 2, 8))
    embeddings = quality * centers[labels] + rng.normal(size=(len(labels), 2, 8))
    tsne_rows = rng.permutation(len(labels))[: min(len(labels), 150)]
    np.savez_compressed(
        folder / "predictions.npz",
        labels=labels.astype(np.int64),
        probabilities=probabilities,
        class_names=np.array(class_names),
        tsne_rows=tsne_rows,
        tsne_places=embeddings[tsne_rows, 0, :2].astype(np.float32),
    )
    terms = [name for name, weight in zip(("fd", "md", "ed"), _weights(settings), strict=True) if weight]
    _write_history(folder, rng, quality, epochs, ["ce", *terms])
    result = {
        "dataset": dataset,
        "split": split,
        **metrics.score(labels, probabilities, class_names, num_resamples=50),
        "correlations": metrics.correlations(labels, embeddings, num_classes),
        "class_names": list(class_names),
        "views": "none",
        "parameters": 485_759,
        "seed": seed,
        "commit": commit,
        "selected_on": selected_on,
        "best_epoch": epochs,
        "train_seconds": 12.5,
        "correlations_untrained": metrics.correlations(labels, rng.normal(size=embeddings.shape) + 3, num_classes),
        "config": {k: v for k, v in config.to_dict(settings).items() if k not in ("run_dir", "data_dir", "debug")},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def _weights(settings):
    return settings.loss.w_fd, settings.loss.w_md, settings.loss.w_ed


def _write_history(folder, rng, quality, epochs, terms):
    with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
        names = ["accuracy", *terms, "loss"]
        writer = csv.writer(file)
        writer.writerow(["epoch", *names, *(f"val_{name}" for name in names), "learning_rate", "seconds"])
        for epoch in range(1, epochs + 1):
            progress = 1 - np.exp(-epoch / 4)
            values = [0.1 + 0.25 * quality * progress, *(1.9 - progress for _ in terms), 9 - 4 * progress]
            noisy = [value + rng.normal(scale=0.02) for value in [*values, *values]]
            writer.writerow([epoch, *noisy, 0.002, 60.5])


def make_row(folder, name, qualities, *, wanted=None, options=None, failures=None, **run) -> Row:
    """A row with one finished run per quality, seeds 0, 1, ...; ``wanted`` seeds in all."""
    options = options or {}
    runs = {
        seed: RunFiles.read(
            write_run(
                Path(folder) / f"{run.get('dataset', 'fer2013')}-{name}-{seed}".replace("/", "_"),
                seed=seed,
                quality=quality,
                options=options,
                **run,
            )
        )
        for seed, quality in enumerate(qualities)
    }
    seeds = tuple(range(wanted or len(qualities)))
    return Row(name, run.get("dataset", "fer2013"), options, seeds, runs, failures or {})


CE = {"w_fd": 0, "w_md": 0, "w_ed": 0}


def with_seeds(row, *seeds) -> Row:
    """The row with only these of its runs."""
    return dataclasses.replace(row, runs={seed: row.runs[seed] for seed in seeds})


def make_two_rows(folder) -> list[Row]:
    """Cross-entropy and Ad-Corre on FER-2013, two seeds each."""
    return [make_row(folder, "CE", [1.0, 1.4], options=CE), make_row(folder, AD_CORRE, [1.6, 1.5])]
