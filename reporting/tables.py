"""The tables of a report: accuracy, differences with their tests, recall of the classes, correlations, other methods.

The numbers come from the records of `reporting.rows` and from `paper_results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from metrics import MEASURES
from reading.json_files import read_json
from reporting.formats import DAGGER, DOUBLE_DAGGER, Table
from reporting.rows import AD_CORRE, CORRELATIONS, Record, Row, correlation_record, recall_records, summary_records

PAPER_RESULTS = Path(__file__).with_name("paper_results.json")
NOT_RUN, FAILED = "not run", "failed"

_CORRELATION_TITLES = {
    "same_class": "Same class (FD:\u00a0to\u00a01)",
    "different_classes": "Different classes (FD:\u00a0to\u00a0\u22121)",
    "between_class_means": "Between class means (MD:\u00a0to\u00a0\u22121)",
    "between_embeddings": "Between embeddings (ED:\u00a0to\u00a0\u22121)",
}

_COLUMNS = [name for name, measure in MEASURES.items() if measure.has_column]


def measured_on(rows: Sequence[Row]) -> str:
    """The data set and, where a run is finished, its split and number of images: ``FER-2013, val, n = 3,589``."""
    result = next((result for row in rows for result in row.results), None)
    return datasets.title(rows[0].dataset) + (f", {result['split']}, n = {result['n']:,}" if result else "")


class Paper:
    """The published numbers (`paper_results.json`) for the rows of one data set.

    Args:
        rows: of one data set; AffectNet has published numbers for 7 classes only.
    """

    def __init__(self, rows: Sequence[Row]):
        self._content = read_json(PAPER_RESULTS, dict[str, Any])
        num_classes = next((len(result["class_names"]) for row in rows for result in row.results), 7)
        self._key = datasets.get(rows[0].dataset).paper_key(num_classes)

    @property
    def ad_corre(self) -> Mapping[str, Any] | None:
        """``accuracy`` 0..1, ``confusion_percent`` (C, C) and ``source``; None where none is known."""
        found = self._content["ad_corre"].get(self._key)
        return found if isinstance(found, dict) and "accuracy" in found else None

    @property
    def class_order(self) -> list[str]:
        return self._content["class_order"]

    @property
    def ablation(self) -> str:
        """The reason why the cells of the ablation are empty."""
        return self._content["ad_corre"]["ablation"]

    @property
    def reference_methods(self) -> list[Record]:
        """``method``, ``accuracy`` and ``source`` of other methods on this data set."""
        return [method for method in self._content["reference_methods"] if method["dataset"] == self._key]

    def accuracy_of(self, row: Row) -> float | None:
        """The published accuracy of a row: only the full loss has one."""
        return self.ad_corre["accuracy"] if self.ad_corre and row.name == AD_CORRE else None


def percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign and a true minus; no sign where it rounds to 0."""
    if value is None:
        return ""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\u2212")


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def with_std(mean: float | None, std: float | None) -> str:
    return percent(mean) + ("" if std is None else f" \u00b1 {percent(std)}")


def _number_with_std(mean: float | None, std: float | None) -> str:
    return "" if mean is None else f"{mean:.3f}" + ("" if std is None else f" \u00b1 {std:.3f}")


def seeds_text(row: Row) -> str:
    """The finished and the wanted seeds of a row: "2 of 3", "2 of 3, 1 failed"."""
    failed = len(set(row.failures) - set(row.runs))
    return f"{len(row.runs)} of {len(row.seeds)}" + (f", {failed} failed" if failed else "")


def why_empty(row: Row) -> str:
    """The text in the cells of a row without a finished run."""
    return FAILED if row.failures else NOT_RUN


def marks(row: Row) -> str:
    """A dagger where the test split selected the epoch, a double dagger where these images did."""
    chosen = any(result.get("selected_on") == "test" for result in row.results)
    same = any(result.get("selected_on") == result["split"] for result in row.results)
    return DAGGER * chosen + DOUBLE_DAGGER * same


def accuracy_table(rows: Sequence[Row]) -> tuple[Table, list[Record]]:
    """Every row's accuracy, recall and F1 beside the paper's number, where it has one for the data set.

    Args:
        rows: of one data set, the reference first.

    Returns:
        The table, and one record per row with the raw numbers, also those of `difference_table`.
    """
    paper = Paper(rows)
    records = [
        record | {"paper_accuracy": paper.accuracy_of(row)}
        for row, record in zip(rows, summary_records(rows), strict=True)
    ]
    columns = (
        "Row",
        "Seeds",
        *(head for name in _COLUMNS for head in _heads(name)),
        *(["Paper, accuracy\u00a0%"] if paper.ad_corre else []),
    )
    cells = []
    for row, record in zip(rows, records, strict=True):
        published = [percent(record["paper_accuracy"])] if paper.ad_corre else []
        cells.append((row.name + marks(row), seeds_text(row), *_accuracy_cells(row, record), *published))
    title = f"Accuracy on {measured_on(rows)}"
    return Table("accuracy", title, columns, tuple(cells), tuple(_accuracy_notes(rows, paper))), records


def _heads(name: str) -> list[str]:
    measure = MEASURES[name]
    head = measure.title[0].upper() + measure.title[1:] + (",\u00a0%" if measure.is_share else "")
    return [head, "95% interval"] if name == "accuracy" else [head]


def _accuracy_cells(row: Row, record: Record) -> list[str]:
    cells = []
    for name in _COLUMNS:
        form = with_std if MEASURES[name].is_share else _number_with_std
        cells.append(form(record[f"{name}_mean"], record[f"{name}_std"]) if row.runs else why_empty(row))
        if name == "accuracy":
            interval = (percent(record["accuracy_low"]), percent(record["accuracy_high"])) if row.runs else ()
            cells.append(" to ".join(interval) or why_empty(row))
    return cells


def _accuracy_notes(rows: Sequence[Row], paper: Paper) -> list[str]:
    notes = [
        "\u00b1: sample standard deviation over seeds. 95% interval: bootstrap over the images, of the mean over seeds."
    ]
    found = "".join(marks(row) for row in rows)
    if DAGGER in found:
        notes.append(f"{DAGGER} The epoch was selected on the test split, as in the published practice.")
    if DOUBLE_DAGGER in found:
        notes.append(f"{DOUBLE_DAGGER} Measured on the split that selected the epoch: the number is slightly too high.")
    if any(paper.accuracy_of(row) for row in rows):
        notes.append(f"The paper's number: {paper.ad_corre['source']}.")
    if paper.ad_corre and any(row.name != AD_CORRE for row in rows):
        notes.append(f"Other cells of the paper's column are empty: {paper.ablation}.")
    if left := unfinished(rows):
        notes.append(f"Missing runs: {left}.")
    for row in rows:
        notes += [f"Failed: {row.name}, seed {seed}: {error}" for seed, error in sorted(row.failures.items())]
    return notes


def difference_table(rows: Sequence[Row], records: Sequence[Record]) -> Table:
    """Every other row against the first: the difference in accuracy with three tests (`reporting.statistics`).

    Args:
        rows: of one data set, the reference first; two or more.
        records: of these rows, from `accuracy_table`.
    """
    reference = rows[0]
    cells = []
    for row, record in zip(rows[1:], records[1:], strict=True):
        if not row.runs or not reference.runs:
            texts = [why_empty(row) if not row.runs else f"{reference.name}: {why_empty(reference)}"] * 8
        elif not record["seeds_shared"]:
            texts = ["no shared seed"] * 8
        else:
            texts = _difference_cells(record)
        cells.append((row.name + marks(row), *texts))
    columns = (
        "Row",
        "Shared seeds",
        "Difference, points",
        "95% interval",
        "p, seeds (paired\u00a0t)",
        "p, seeds, corrected",
        "p, images (bootstrap)",
        "p, images, corrected",
        "p, McNemar, per seed",
    )
    title = f"Difference in accuracy to {reference.name} on {datasets.title(reference.dataset)}"
    notes = (
        f"Each seed is paired with the same seed of {reference.name}. p over seeds covers the randomness of training; "
        "it needs two pairs or more. The interval and the bootstrap p cover the choice of test images, for these "
        "networks. McNemar: exact, over the images, one p per seed, not corrected.",
        corrected_note(rows),
    )
    return Table("differences", title, columns, tuple(cells), notes)


def corrected_note(rows: Sequence[Row]) -> str:
    """What the corrected p values of a table are corrected for."""
    return (
        f"Number of comparisons in this table: {len(rows) - 1}, one per other row. Corrected: by Holm's method, for "
        "all of them, also those that have no p yet."
    )


def unfinished(rows: Sequence[Row]) -> str:
    """The runs that are missing: "not run (2 of 5 seeds): CE, CE + FD; failed (1 of 5 seeds): CE"; empty if none is."""
    names: dict[str, list[str]] = {}
    for row in rows:
        failed = set(row.failures) - set(row.runs)
        for why, seeds in ((NOT_RUN, set(row.seeds) - set(row.runs) - failed), (FAILED, failed)):
            if seeds:
                names.setdefault(f"{why} ({len(seeds)} of {len(row.seeds)} seeds)", []).append(row.name)
    return "; ".join(f"{why}: {', '.join(which)}" for why, which in names.items())


def _difference_cells(record: Record) -> list[str]:
    low, high = (signed(100 * record[f"difference_{side}"]) for side in ("low", "high"))
    mcnemar = [p for name, p in record.items() if name.startswith("p_mcnemar_seed")]
    return [
        str(record["seeds_shared"]),
        signed(100 * record["difference"]),
        f"{low} to {high}",
        p_value(record["p_seeds"]),
        p_value(record["p_seeds_holm"]),
        p_value(record["p_images"]),
        p_value(record["p_images_holm"]),
        "; ".join(map(p_value, mcnemar)),
    ]


def recall_table(rows: Sequence[Row]) -> tuple[Table, list[Record]]:
    """The recall of every class, the mean over seeds, and its change in points against the first row.

    Args:
        rows: of one data set, the reference first; at least one run.
    """
    records = [recall_records(row, rows[0]) for row in rows]
    class_names = next(row.results[0]["class_names"] for row in rows if row.runs)
    counts = {record["class"]: record["n"] for classes in records for record in classes if record["n"] is not None}
    cells = []
    for row, classes in zip(rows, records, strict=True):
        texts = [_recall_cell(record) for record in classes]
        cells.append((row.name + marks(row), *(texts or [why_empty(row)] * len(class_names))))
    title = f"Recall of each expression on {datasets.title(rows[0].dataset)}, %, and change against {rows[0].name}"
    heads = [f"{name} (n\u00a0=\u00a0{counts[name]:,})" if name in counts else name for name in class_names]
    notes = ("Mean over seeds; in brackets the change in points, over the seeds that both rows have.",)
    table = Table("recall", title, ("Row", *heads), tuple(cells), notes)
    return table, [record for classes in records for record in classes]


def _recall_cell(record: Record) -> str:
    if record["recall_mean"] is None:
        return "no images" if record["n"] == 0 else ""
    change = "" if record["change"] is None else f" ({signed(100 * record['change'], 1)})"
    return percent(record["recall_mean"], 1) + change


def correlation_table(rows: Sequence[Row]) -> tuple[Table, list[Record]]:
    """The correlations that FD, MD and ED act on: before training, and at the best epoch."""
    records = [correlation_record(row) for row in rows]
    cells = tuple(
        (row.name, *(_correlation_cell(row, record, name) for name in CORRELATIONS))
        for row, record in zip(rows, records, strict=True)
    )
    title = f"Correlations of the embeddings on {datasets.title(rows[0].dataset)}: untrained \u2192 trained"
    notes = (
        "Pearson's correlation over the coordinates, mean over pairs and embeddings, then over seeds (\u00b1 sample "
        "standard deviation). The column heads name the term of the loss that acts on it, and its target.",
    )
    return Table("correlations", title, ("Row", *_CORRELATION_TITLES.values()), cells, notes), records


def _correlation_cell(row: Row, record: Record, name: str) -> str:
    if not row.runs:
        return why_empty(row)
    mean, std, before = (record[f"{key}"] for key in (f"{name}_mean", f"{name}_std", f"untrained_{name}_mean"))
    if mean is None:
        return "no pairs" if row.values("correlations", name) else ""
    after = signed(mean) + ("" if std is None else f" \u00b1 {std:.2f}")
    return after if before is None else f"{signed(before)} \u2192 {after}"


def reference_table(rows: Sequence[Row]) -> tuple[Table, list[Record]] | None:
    """Published results of other methods on this data set, with sources; None where none is known."""
    methods = Paper(rows).reference_methods
    if not methods:
        return None
    cells = tuple((method["method"], percent(method["accuracy"]), method["source"]) for method in methods)
    title = f"Published methods on {datasets.title(rows[0].dataset)}"
    notes = ("Numbers from the named sources, with their own data and protocols.",)
    table = Table("references", title, ("Method", "Accuracy,\u00a0%", "Source"), cells, notes, text_columns=(0, 2))
    return table, [method | {"dataset": rows[0].dataset} for method in methods]
