"""Which runs stand behind a row of a report, and what do they say together? Raw numbers only; no Keras.

A record is a flat dictionary of raw numbers, a line of a CSV file; the tables (`report_tables`) print from it.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
from files import UserError, read_json
from reporting.statistics import bootstrap_interval, mcnemar, mean_and_std, paired_bootstrap, paired_t

MEASURES = ("accuracy", "mean_class_recall", "macro_f1", "ece")
CORRELATIONS = ("same_class", "different_classes", "between_class_means", "between_embeddings")
_NEEDED = ("dataset", "split", "n", *MEASURES, "per_class", "confusion_matrix", "correlations", "class_names", "config")
Record = dict[str, Any]


class RunFiles:
    """The folder of a finished run: its result at once, its large files when they are asked for.

    Args:
        folder: what `experiment.train_and_evaluate` left.

    Raises:
        UserError: no ``result.json`` there, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "result.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; expected the folder of a finished run")
        self.result: dict[str, Any] = read_json(path)
        missing = [name for name in _NEEDED if name not in self.result] if isinstance(self.result, dict) else _NEEDED
        if missing:
            raise UserError(f"{path}: expected the result of a run, found none of {', '.join(missing)}; run it again")

    @functools.cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """``labels`` (N,), ``probabilities`` (N, C), ``tsne_rows`` (M,), ``tsne_places`` (M, 2).

        Raises:
            UserError: ``predictions.npz`` is missing, damaged, or does not give the accuracy of ``result.json``.
        """
        path = self.folder / "predictions.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("labels", "probabilities", "tsne_rows", "tsne_places")}
            accuracy = np.mean(found["probabilities"].argmax(axis=1) == found["labels"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run {self.folder.name} again") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: expected the predictions of a run, found a damaged file ({error})") from None
        if len(found["labels"]) != self.result["n"] or abs(accuracy - self.result["accuracy"]) > 1e-9:
            raise UserError(
                f"{path}: expected {self.result['n']} images and accuracy {self.result['accuracy']} as in result.json, "
                f"found {len(found['labels'])} and {accuracy}: the two are of different runs; run it again"
            )
        return found

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Bool (N,): which images it has right."""
        return self.predictions["probabilities"].argmax(axis=1) == self.predictions["labels"]

    @functools.cached_property
    def history(self) -> dict[str, np.ndarray]:
        """The columns of ``history.csv`` by name, float64 (epochs,).

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / "history.csv"
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            return {name: np.array([float(row[name]) for row in rows]) for name in (rows[0] if rows else ())}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run {self.folder.name} again") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: expected numbers, an epoch a line, found something else ({error})") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a report: one way to train, with several seeds.

    Attributes:
        name: how the tables call it.
        dataset: its data set; the rows of one data set are compared with the first of them.
        options: the options of train.py in which it differs from the defaults.
        seeds: those wanted.
        runs: the finished ones by seed.
        failures: seed to the error of a run that failed.
    """

    name: str
    dataset: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    runs: Mapping[int, RunFiles]
    failures: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results, in the order of their seeds."""
        return [self.runs[seed].result for seed in sorted(self.runs)]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Every option of train.py by its command-line name: as run, or as wanted where nothing has run."""
        default = config.options_by_name(config.TrainConfig()) | dict(self.options)
        return default | (_unfolded(self.results[0]["config"]) if self.runs else {})

    def correct(self, seeds: Sequence[int]) -> np.ndarray:
        """Bool (seeds, N): which images these runs have right."""
        return np.stack([self.runs[seed].correct for seed in seeds])

    def mean(self, read: Callable[[dict[str, Any]], Any]) -> np.ndarray:
        """Mean over the seeds of an array that ``read`` takes from a result; None counts as absent (NaN)."""
        found = np.array([np.asarray(read(result), np.float64) for result in self.results])
        present = ~np.isnan(found)
        count = present.sum(axis=0)
        return np.where(count > 0, np.where(present, found, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _unfolded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as one flat dictionary."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _unfolded(value) if isinstance(value, Mapping) else {name: value}
    return flat


def check_same_images(rows: Sequence[Row]) -> None:
    """Checks that every run of these rows was measured on the same images.

    Raises:
        UserError: another split, other classes or other labels: no difference between such runs means anything.
    """
    first = None
    for run in (row.runs[seed] for row in rows for seed in sorted(row.runs)):
        first = first or run
        same = all(run.result[name] == first.result[name] for name in ("split", "n", "class_names"))
        if not (same and np.array_equal(run.predictions["labels"], first.predictions["labels"])):
            raise UserError(
                f"{run.folder}: expected the images of {first.folder} ({_measured_on(first)}), found others "
                f"({_measured_on(run)}); run one of the two again on the data of the other"
            )


def _measured_on(run: RunFiles) -> str:
    return f"{run.result['dataset']}/{run.result['split']}, {run.result['n']} images"


def run_records(row: Row) -> list[Record]:
    """A record a seed, whatever became of it: ``status`` is done, failed or not run."""
    records = []
    for seed in sorted({*row.seeds, *row.runs, *row.failures}):
        record: Record = {"dataset": row.dataset, "row": row.name, "seed": seed}
        if seed not in row.runs:
            records.append(record | {"status": "failed" if seed in row.failures else "not run"})
            continue
        result = row.runs[seed].result
        names = ("split", "n", *MEASURES, "best_epoch", "selected_on", "parameters", "train_seconds", "commit", "flip")
        record |= {"status": "done"} | {name: result.get(name) for name in names}
        for key, prefix in (("correlations", ""), ("correlations_untrained", "untrained_")):
            record |= {prefix + name: (result.get(key) or {}).get(name) for name in CORRELATIONS}
        records.append(record | {"run": row.runs[seed].folder.name})
    return records


def summary_record(row: Row, reference: Row) -> Record:
    """What the seeds of a row say together, and its difference to the reference row.

    The difference and its tests are over the seeds that both have; they are absent for the reference itself and
    where no seed is shared.
    """
    results = row.results
    record: Record = {
        "dataset": row.dataset,
        "row": row.name,
        "seeds_wanted": len(row.seeds),
        "seeds_done": len(row.runs),
        "seeds_failed": len(set(row.failures) - set(row.runs)),
    }
    if not results:
        return record
    record |= {"split": results[0]["split"], "n": results[0]["n"]}
    for name in MEASURES:
        mean, std = mean_and_std([result[name] for result in results])
        record |= {f"{name}_mean": mean, f"{name}_std": std}
    record["accuracy_low"], record["accuracy_high"] = bootstrap_interval(row.correct(sorted(row.runs)))
    return record | (_difference_record(row, reference) if row is not reference else {})


def _difference_record(row: Row, reference: Row) -> Record:
    seeds = sorted(set(row.runs) & set(reference.runs))
    if not seeds:
        return {"seeds_shared": 0}
    correct, other = row.correct(seeds), reference.correct(seeds)
    over_images = paired_bootstrap(correct, other)
    record: Record = {
        "seeds_shared": len(seeds),
        "difference": over_images.difference,
        "difference_low": over_images.low,
        "difference_high": over_images.high,
        "p_seeds": paired_t(correct.mean(axis=1), other.mean(axis=1)),
        "p_images": over_images.p,
    }
    for seed, a, b in zip(seeds, correct, other, strict=True):
        only_row, only_reference, p = mcnemar(a, b)
        record |= {
            f"only_row_seed{seed}": only_row,
            f"only_reference_seed{seed}": only_reference,
            f"p_mcnemar_seed{seed}": p,
        }
    return record


def recall_records(row: Row, reference: Row) -> list[Record]:
    """A record a class: the recall over the seeds, and its change against the reference over the seeds both have."""
    seeds = sorted(set(row.runs) & set(reference.runs)) if row is not reference else []
    records = []
    for name in row.results[0]["class_names"] if row.runs else ():
        recall = {seed: run.result["per_class"][name]["recall"] for seed, run in row.runs.items()}
        mean, std = mean_and_std([value for _, value in sorted(recall.items()) if value is not None])
        change = None
        if seeds and recall[seeds[0]] is not None:
            before = [reference.runs[seed].result["per_class"][name]["recall"] for seed in seeds]
            change = float(np.mean([recall[seed] for seed in seeds]) - np.mean(before))
        n = row.results[0]["per_class"][name]["n"]
        record = {"dataset": row.dataset, "row": row.name, "class": name, "n": n, "recall_mean": mean}
        records.append(record | {"recall_std": std, "change": change})
    return records


def correlation_record(row: Row) -> Record:
    """Every correlation that the discriminators push on, before training and at the best epoch, over the seeds."""
    record: Record = {"dataset": row.dataset, "row": row.name, "seeds_done": len(row.runs)}
    for name in CORRELATIONS if row.runs else ():
        for key, prefix in (("correlations_untrained", "untrained_"), ("correlations", "")):
            found = [(result.get(key) or {}).get(name) for result in row.results]
            mean, std = mean_and_std([value for value in found if value is not None])
            record |= {f"{prefix}{name}_mean": mean, f"{prefix}{name}_std": std}
    return record
