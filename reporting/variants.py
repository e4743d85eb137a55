"""Tables of the same runs in another light: the mean of the seeds, and the images without a copy in train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from files import UserError
from metrics import MEASURES
from reporting.formats import Table
from reporting.rows import Record, Row, RunFiles, summary_record, summary_records, with_corrected
from reporting.tables import (
    corrected_note,
    marks,
    measured_on,
    p_value,
    percent,
    seeds_text,
    signed,
    why_empty,
    with_std,
)

_COLUMNS = (
    *("Accuracy,\u00a0%", "95% interval", "Mean class recall,\u00a0%", "Difference, points", "95% interval of it"),
    *("p, seeds (paired\u00a0t)", "p, seeds, corrected", "p, images (bootstrap)", "p, images, corrected"),
)
_ENSEMBLE_NOTE = (
    "The probabilities of a row's seeds are averaged, and their largest is the prediction: one answer of several "
    "networks. A difference is between the means of the seeds that both rows have. No p covers other seeds."
)


def mean_of_seeds(row: Row, seeds: Sequence[int]) -> Row:
    """The row with one run, seed 0: the mean of the probabilities of these seeds."""
    runs = [row.runs[seed] for seed in seeds]
    mean = np.mean([run.predictions["probabilities"] for run in runs], axis=0, dtype=np.float64)
    return dataclasses.replace(row, seeds=(0,), runs={0: _scored(runs[0], runs[0].predictions["labels"], mean)})


def on_images(row: Row, chosen: np.ndarray) -> Row:
    """The row as if only the chosen images, bool (N,), had been measured.

    The measures of the tables are those of these images; what else a result holds is left as it is.
    """
    runs = {
        seed: _scored(run, run.predictions["labels"][chosen], run.predictions["probabilities"][chosen])
        for seed, run in row.runs.items()
    }
    return dataclasses.replace(row, runs=runs)


def _scored(run: RunFiles, labels: np.ndarray, probabilities: np.ndarray) -> RunFiles:
    measures = {name: measure.of(labels, probabilities) for name, measure in MEASURES.items()}
    predictions = {"labels": labels, "probabilities": probabilities}
    return RunFiles(run.folder, {**run.result, "n": len(labels), **measures}, predictions, {})


def ensemble_table(rows: Sequence[Row], name: str = "ensembles", images: str = "") -> tuple[Table, list[Record]] | None:
    """Every row as the mean of its seeds, and its difference to the first row; None where no row has two runs.

    Args:
        rows: of one data set, the reference first.
        name: of the table.
        images: the end of the title, where the rows have some of the images only.
    """
    if all(len(row.runs) < 2 for row in rows):
        return None
    records = []
    for row in rows:
        record: Record = {"dataset": row.dataset, "row": row.name, "networks": len(row.runs)}
        if row.runs:
            alone = mean_of_seeds(row, sorted(row.runs))
            record |= _measures(summary_record(alone, alone))
        if shared := sorted(set(row.runs) & set(rows[0].runs)) if row is not rows[0] else []:
            compared = summary_record(mean_of_seeds(row, shared), mean_of_seeds(rows[0], shared))
            record |= {
                key: value for key, value in compared.items() if key.startswith("difference") and value is not None
            }
            record |= {"seeds_shared": len(shared), "p_images": compared["p_images"]}
        records.append(record)
    records = with_corrected(records)
    cells = [_cells(row, record, str(record["networks"])) for row, record in zip(rows, records, strict=True)]
    title = f"Mean of the seeds on {measured_on(rows)}{images}"
    return _table(name, title, "Networks", cells, (_ENSEMBLE_NOTE, *_corrected(rows))), records


def clean_tables(rows: Sequence[Row], copied: np.ndarray) -> list[tuple[Table, list[Record]]]:
    """Every row on the images without a copy in train: the mean over seeds, and as the mean of its seeds.

    Args:
        rows: of one data set, the reference first; one run or more.
        copied: bool (N,), True for each measured image that has a copy in train.

    Raises:
        UserError: of another number of images, or of all.
    """
    n = next(result["n"] for row in rows for result in row.results)
    if len(copied) != n or copied.all():
        raise UserError(f"{rows[0].dataset}: expected {n} images, some without a copy, received {len(copied)}")
    clean = [on_images(row, ~copied) for row in rows]
    records = summary_records(clean)
    images = f", without the {int(copied.sum()):,} images that have a copy in train"
    cells = [_cells(row, record, seeds_text(row)) for row, record in zip(clean, records, strict=True)]
    table = _table("clean", f"Accuracy on {measured_on(clean)}{images}", "Seeds", cells, _corrected(rows))
    ensembles = ensemble_table(clean, "clean-ensembles", images)
    return [(table, records), *([ensembles] if ensembles else [])]


def _corrected(rows: Sequence[Row]) -> tuple[str, ...]:
    return (corrected_note(rows),) if len(rows) > 1 else ()


def _measures(record: Record) -> Record:
    """What `_cells` shows of a row by itself."""
    names = ("split", "n", "accuracy_mean", "accuracy_low", "accuracy_high", "mean_class_recall_mean")
    return {name: record[name] for name in names}


def _table(name: str, title: str, count: str, cells: Sequence[Sequence[str]], notes: tuple[str, ...]) -> Table:
    """The table without the columns that are empty in all rows."""
    columns = ("Row", count, *_COLUMNS)
    used = [i for i in range(len(columns)) if any(texts[i] for texts in cells)]
    return Table(name, title, tuple(columns[i] for i in used), tuple(tuple(t[i] for i in used) for t in cells), notes)


def _cells(row: Row, record: Mapping[str, object], count: str) -> tuple[str, ...]:
    if not row.runs:
        return (row.name, count, *[why_empty(row)] * 3, *[""] * 6)
    interval = f"{percent(record['accuracy_low'])} to {percent(record['accuracy_high'])}"
    own = (
        with_std(record["accuracy_mean"], record.get("accuracy_std")),
        interval,
        percent(record["mean_class_recall_mean"]),
    )
    if "difference" not in record:
        return (row.name + marks(row), count, *own, *[""] * 6)
    low, high = (signed(100 * record[f"difference_{side}"]) for side in ("low", "high"))
    p_values = (p_value(record.get(name)) for name in ("p_seeds", "p_seeds_holm", "p_images", "p_images_holm"))
    return (row.name + marks(row), count, *own, signed(100 * record["difference"]), f"{low} to {high}", *p_values)
