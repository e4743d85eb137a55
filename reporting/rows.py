"""The runs behind the rows of a report, and records of their raw numbers; needs no Keras.

A record is a flat dictionary of raw numbers, one line of a CSV file; `reporting.tables` formats it. A measure that a
result of an older version lacks is None.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
from files import UserError
from measuring.views import Views, views_of
from metrics import MEASURES
from reading import run_files
from reading.arrays import read_npz
from reading.run_files import CORRELATIONS
from reporting.statistics import bootstrap_interval, holm, mcnemar, mean_and_std, paired_bootstrap, paired_t

_PREDICTIONS = {"labels": ("iu", 1), "probabilities": ("f", 2), "tsne_rows": ("iu", 1), "tsne_places": ("f", 2)}

# The name of the full loss's row. The paper's number is shown there.
AD_CORRE = "Ad-Corre"
# Without these a result cannot be compared with another; every other entry may be absent.
_NEEDED = ("dataset", "split", "n", "accuracy", "class_names")
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class RunFiles:
    """The files of a finished run.

    Attributes:
        folder: the run's, as `experiment.train_and_evaluate` leaves it.
        result: the content of ``result.json``; entries that its version did not have are absent.
        predictions: ``labels`` (N,), ``probabilities`` (N, C), ``tsne_rows`` (M,), ``tsne_places`` (M, 2).
        history: the columns of ``history.csv`` by name, float64 (epochs,), NaN for a blank; empty without the file.
    """

    folder: Path
    result: dict[str, Any]
    predictions: dict[str, np.ndarray]
    history: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: str | Path, views: Views | None = None) -> RunFiles:
        """Reads the files of a run.

        Args:
            folder: the run's.
            views: take the measures and predictions of ``<folder>/<views>/``, which ``test.py evaluate`` has written;
                None takes the run's own.

        Raises:
            UserError: a file is missing or damaged, or the files are of different runs, images or views.
        """
        folder = Path(folder)
        result, measured = _read_result(folder / "result.json"), folder
        if views not in (None, views_of(result)):
            measured = folder / views
            result = _with_views(result, _read_result(measured / "result.json"), measured)
        predictions = _read_predictions(measured / "predictions.npz", result)
        return cls(folder, result, predictions, _read_history(folder / "history.csv"))

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Bool (N,): True for each image that the run predicts correctly."""
        return self.predictions["probabilities"].argmax(axis=1) == self.predictions["labels"]


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return run_files.read_result(path, _NEEDED)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the result of a finished run") from None
    except UserError as error:
        raise UserError(f"{error}; run it again") from None


def _with_views(result: dict[str, Any], measured: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a run with the measures of an evaluation of its weights; what describes the training stays."""
    for name in ("dataset", "split", "n", "class_names", "parameters"):
        if measured.get(name) != result.get(name):
            raise UserError(
                f"{folder}: expected {name} {result.get(name)} as in {folder.parent}, found {measured.get(name)}"
            )
    if views_of(measured) != folder.name:
        raise UserError(f"{folder}: expected the views {folder.name}, found {views_of(measured)}; evaluate again")
    scores = (*MEASURES, "intervals", "per_class", "confusion_matrix", "correlations", "views")
    return {**result, **{name: measured[name] for name in scores if name in measured}}


def _read_predictions(path: Path, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        found = read_npz(path, _PREDICTIONS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run it again") from None
    labels, (num_images, num_classes) = found["labels"], found["probabilities"].shape
    rows, places = found["tsne_rows"], found["tsne_places"]
    if not len(labels) == num_images > 0 or not num_classes:
        raise UserError(f"{path}: expected as many labels as probabilities, one or more; run it again")
    if num_classes != len(result["class_names"]) or not np.isin(labels, np.arange(num_classes)).all():
        raise UserError(
            f"{path}: expected labels and probabilities of the {len(result['class_names'])} classes of result.json, "
            "found others; run it again"
        )
    if places.shape != (len(rows), 2) or not np.isin(rows, np.arange(num_images)).all():
        raise UserError(f"{path}: expected a place (x, y) for each of tsne_rows, which are its images; run it again")
    accuracy = np.mean(found["probabilities"].argmax(axis=1) == found["labels"])
    if len(found["labels"]) != result["n"] or abs(accuracy - result["accuracy"]) > 1e-9:
        raise UserError(
            f"{path}: expected {result['n']} images and accuracy {result['accuracy']} as in result.json, "
            f"found {len(found['labels'])} and {accuracy}: the files are of different runs; run it again"
        )
    return found


def _read_history(path: Path) -> dict[str, np.ndarray]:
    try:
        return run_files.read_history(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of a report: one way to train, with several seeds.

    Attributes:
        name: its name in the tables.
        dataset: its data set; the rows of one data set are compared with the first of them.
        options: the options of train.py in which it differs from the defaults.
        seeds: those wanted.
        runs: the finished ones by seed.
        failures: seed to the message of a run that failed or cannot be read.
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
        wanted = config.options_by_name(config.TrainConfig()) | dict(self.options)
        return wanted | (run_files.unfolded(self.results[0].get("config") or {}) if self.runs else {})

    def correct(self, seeds: Sequence[int]) -> np.ndarray:
        """Bool (seeds, N): True for each image that a run predicts correctly."""
        return np.stack([self.runs[seed].correct for seed in seeds])

    def values(self, *path: str) -> list[Any] | None:
        """An entry of every result, in the order of the seeds; None where a result lacks it.

        Args:
            path: the keys that lead to the entry, such as ``"correlations", "class_means"``.
        """
        found = []
        for result in self.results:
            entry: Any = result
            for key in path:
                if not isinstance(entry, Mapping) or key not in entry:
                    return None
                entry = entry[key]
            found.append(entry)
        return found or None

    def mean(self, *path: str, scale: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray | None:
        """Mean over the seeds of an array of the results, NaN where all seeds have None; None without the entry.

        Args:
            path: see `values`.
            scale: applied to each seed's array first.
        """
        found = self.values(*path)
        if found is None or any(entry is None for entry in found):
            return None
        arrays = np.array([scale(np.array(entry, np.float64)) for entry in found])
        present = ~np.isnan(arrays)
        count = present.sum(axis=0)
        return np.where(count > 0, np.where(present, arrays, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def check_same_images(rows: Sequence[Row]) -> None:
    """Checks that every run of these rows was measured on the same images.

    Raises:
        UserError: another split, other classes or other labels, so that the runs cannot be compared.
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
    """One record per seed; ``status`` is done, failed or not run."""
    records = []
    for seed in sorted({*row.seeds, *row.runs, *row.failures}):
        record: Record = {"dataset": row.dataset, "row": row.name, "seed": seed}
        if seed not in row.runs:
            records.append(record | {"status": "failed" if seed in row.failures else "not run"})
            continue
        result = row.runs[seed].result
        names = ("split", "n", *MEASURES, "best_epoch", "selected_on", "parameters", "train_seconds", "commit")
        record |= {"status": "done"} | {name: result.get(name) for name in names} | {"views": views_of(result)}
        for key, prefix in (("correlations", ""), ("correlations_untrained", "untrained_")):
            record |= {prefix + name: (result.get(key) or {}).get(name) for name in CORRELATIONS}
        records.append(record | {"run": row.runs[seed].folder.name})
    return records


def summary_record(row: Row, reference: Row) -> Record:
    """Means and deviations over the seeds of a row, and its difference to the reference row.

    The difference and its tests are over the seeds that both rows have; they are absent for the reference itself and
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
        # A mean over fewer seeds than the row has would be read as one over all of them.
        values = row.values(name) or [None]
        mean, std = (None, None) if None in values else mean_and_std(values)
        record |= {f"{name}_mean": mean, f"{name}_std": std}
    record["train_seconds_mean"] = mean_train_seconds(row)
    record["accuracy_low"], record["accuracy_high"] = bootstrap_interval(row.correct(sorted(row.runs)))
    return record | (_difference_record(row, reference) if row is not reference else {})


def summary_records(rows: Sequence[Row]) -> list[Record]:
    """The `summary_record` of every row against the first, `with_corrected`."""
    return with_corrected([summary_record(row, rows[0]) for row in rows])


def with_corrected(records: Sequence[Record]) -> list[Record]:
    """The records, the reference first, with ``p_seeds_holm`` and ``p_images_holm`` beside the p values that they have.

    They are corrected for the number of the other records, also of those without a p.
    """
    changed = [dict(record) for record in records]
    for name in ("p_seeds", "p_images"):
        corrected = holm([record.get(name) for record in records[1:]])
        for record, p in zip(changed[1:], corrected, strict=True):
            if name in record:
                record[f"{name}_holm"] = p
    return changed


def mean_train_seconds(row: Row) -> float | None:
    """The mean over the seeds whose result has them; None without any."""
    return mean_and_std([result["train_seconds"] for result in row.results if result.get("train_seconds")])[0]


def _difference_record(row: Row, reference: Row) -> Record:
    seeds = sorted(set(row.runs) & set(reference.runs))
    if not seeds:
        return {"seeds_shared": 0}
    correct, other = row.correct(seeds), reference.correct(seeds)
    over_images = paired_bootstrap(correct, other)
    record: Record = {
        "seeds_shared": len(seeds),
        "difference": over_images.difference,
        "difference_std": mean_and_std(correct.mean(axis=1) - other.mean(axis=1))[1],
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
    """One record per class: the recall over the seeds, and its change against the reference over the shared seeds."""
    seeds = sorted(set(row.runs) & set(reference.runs)) if row is not reference else []
    records = []
    for name in row.results[0]["class_names"] if row.runs else ():
        n = row.values("per_class", name, "n")
        recall = _recall(row, name, sorted(row.runs))
        before, after = _recall(reference, name, seeds), _recall(row, name, seeds)
        mean, std = mean_and_std(recall)
        record = {"dataset": row.dataset, "row": row.name, "class": name, "n": n and n[0], "recall_mean": mean}
        change = float(np.mean(after) - np.mean(before)) if before and after else None
        records.append(record | {"recall_std": std, "change": change})
    return records


def _recall(row: Row, name: str, seeds: Sequence[int]) -> list[float]:
    """A class's recall of every seed; none where a result lacks it or the class has no images."""
    entries = [(row.runs[seed].result.get("per_class") or {}).get(name) for seed in seeds]
    found = [(entry or {}).get("recall") for entry in entries]
    return [] if None in found else found


def correlation_record(row: Row) -> Record:
    """Every correlation that the discriminators act on, before training and at the best epoch, over the seeds."""
    record: Record = {"dataset": row.dataset, "row": row.name, "seeds_done": len(row.runs)}
    for name in CORRELATIONS if row.runs else ():
        for key, prefix in (("correlations_untrained", "untrained_"), ("correlations", "")):
            values = row.values(key, name) or []
            mean, std = mean_and_std([value for value in values if value is not None])
            record |= {f"{prefix}{name}_mean": mean, f"{prefix}{name}_std": std}
    return record
