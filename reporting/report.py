"""Writes the report of a grid: tables as Markdown, CSV and LaTeX, figures, and one HTML page.

It reads run folders only: no weights, no data set, no Keras.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import command_line
import datasets
from files import UserError, write_text
from measuring.views import views_of
from reporting.figures import save_figures
from reporting.formats import Table, csv_text, latex_tables
from reporting.page import Section, html_page, markdown_page
from reporting.rows import AD_CORRE, Record, Row, check_same_images, mean_train_seconds, run_records
from reporting.tables import (
    NOT_RUN,
    accuracy_table,
    correlation_table,
    difference_table,
    p_value,
    recall_table,
    reference_table,
    signed,
    unfinished,
)
from reporting.variants import clean_tables, ensemble_table

# The names of the CSV files where they are not the table's.
_CSV_NAMES = {"accuracy": "summary"}


def write_report(
    name: str,
    about: str,
    rows: Sequence[Row],
    folder: str | Path,
    command: str,
    copied: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Writes the report of the runs of a grid.

    The other rows of each data set are compared with its first. A row without a finished run is marked as such.

    Args:
        name: of the report, its title.
        about: the question that the rows answer.
        rows: of one data set or several.
        folder: the report's; gets ``index.html`` (holds everything, opens without a server), ``report.md``,
            ``results.csv`` (one line per run), ``summary.csv`` (one line per row), ``recall.csv``,
            ``correlations.csv``, ``references.csv``, each table as ``.tex``, and ``figures/``.
        command: the command lines that make these runs and this report again.
        copied: data set to bool (N,), the measured images that have a copy in train; adds the tables without them.

    Returns:
        The files written.

    Raises:
        UserError: no rows, two rows with the same name, or runs on different images.
    """
    if not rows:
        raise UserError(f"report {name}: expected one row or more, received none")
    folder = Path(folder)
    groups = {dataset: [row for row in rows if row.dataset == dataset] for dataset in {r.dataset: None for r in rows}}
    for dataset, group in groups.items():
        names = [row.name for row in group]
        if len(set(names)) < len(names):
            raise UserError(f"report {name}: {dataset}: expected a name per row, received {', '.join(names)}")
        check_same_images(group)
    made = [_make_section(group, folder, (copied or {}).get(dataset)) for dataset, group in groups.items()]
    sections = [section for section, _ in made]
    written = {"results.csv": csv_text([record for row in rows for record in run_records(row)])}
    written |= _table_files(name, sections, [records for _, records in made])
    raw = [file for file in written if file.endswith(".csv")]
    written["report.md"] = markdown_page(name, about, command, sections, raw)
    written["index.html"] = html_page(name, about, command, sections, raw)
    for file, text in written.items():
        write_text(folder / file, text)
    return [folder / file for file in written] + [figure.path for section in sections for figure in section.figures]


def _make_section(
    rows: Sequence[Row], folder: Path, copied: np.ndarray | None
) -> tuple[Section, dict[str, list[Record]]]:
    """The tables and figures of one data set, and the records of the tables by name."""
    accuracy, summaries = accuracy_table(rows)
    tables, records = [accuracy], {accuracy.name: summaries}
    if len(rows) > 1:
        tables.append(difference_table(rows, summaries))
    more = []
    if any(row.runs for row in rows):
        clean = [] if copied is None else clean_tables(rows, copied)
        more = [ensemble_table(rows), *clean, recall_table(rows), correlation_table(rows)]
    for found in (*more, reference_table(rows)):
        if found:
            tables.append(found[0])
            records[found[0].name] = found[1]
    section = Section(
        dataset=rows[0].dataset,
        title=datasets.title(rows[0].dataset),
        finding=_finding(rows, summaries),
        facts=_facts(rows),
        tables=tables,
        figures=save_figures(folder / "figures", rows),
    )
    return section, records


def _table_files(name: str, sections: Sequence[Section], records: Sequence[dict[str, list[Record]]]) -> dict[str, str]:
    """LaTeX and CSV text of each kind of table, all data sets in one file."""
    files = {}
    for kind in dict.fromkeys(table.name for section in sections for table in section.tables):
        tables: list[tuple[Table, str]] = [
            (table, f"{name}-{section.dataset}-{kind}")
            for section in sections
            for table in section.tables
            if table.name == kind
        ]
        files[f"{kind}.tex"] = latex_tables([table for table, _ in tables], [label for _, label in tables])
        if lines := [record for group in records for record in group.get(kind, ())]:
            files[f"{_CSV_NAMES.get(kind, kind)}.csv"] = csv_text(lines)
    return files


def _finding(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """One sentence: Ad-Corre, or the last row, against the first."""
    compared = [(row, record) for row, record in zip(rows, records, strict=True) if record.get("seeds_shared")]
    if not compared:
        return "No two rows with a seed in common have finished yet: there is no difference to report."
    row, record = next((pair for pair in compared if pair[0].name == AD_CORRE), compared[-1])
    p = p_value(record["p_seeds"]) or "none, too few seeds"
    corrected = p_value(record["p_seeds_holm"])
    low, high = (signed(100 * record[f"difference_{side}"]) for side in ("low", "high"))
    also = f"; corrected for {len(rows) - 1} comparisons: {corrected}" if corrected and len(rows) > 2 else ""
    done, wanted = (sum(map(len, counted)) for counted in ([row.runs for row in rows], [row.seeds for row in rows]))
    left = f" {done} of {wanted} runs are finished." if unfinished(rows) else ""
    return (
        f"{row.name} against {rows[0].name}: {signed(100 * record['difference'])} points of accuracy "
        f"(95% interval over the images {low} to {high}; p over seeds, {record['seeds_shared']} shared: {p}{also})."
        f"{left}"
    )


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Names and texts of what the numbers are based on: images, seeds, epochs, network, commits, options."""
    results = [result for row in rows for result in row.results]
    settings = [row.settings for row in rows if row.runs]
    shared = {k: v for k, v in rows[0].options.items() if all(row.options.get(k) == v for row in rows)}
    measured = {f"{result['split']}, {result['n']:,} images" for result in results}
    facts = [
        ("Measured on", _listed(measured) or NOT_RUN),
        ("Epoch selected on", _listed(result.get("selected_on") for result in results)),
        ("Seeds wanted", _listed(seed for row in rows for seed in row.seeds)),
        ("Epochs", _listed(options["epochs"] for options in settings)),
        ("Network", _listed(options["arch"] for options in settings)),
        ("Parameters", _listed((result.get("parameters") for result in results), ",")),
        ("Mean training time", _minutes(rows)),
        ("Views averaged", _listed({views_of(result) for result in results} - {"none"})),
        ("Commit", _listed(result.get("commit") for result in results)),
        ("Options of all rows", " ".join(command_line.to_args(shared))),
    ]
    facts += [
        (
            f"Options of {row.name}",
            " ".join(command_line.to_args({k: v for k, v in row.options.items() if k not in shared})) or "no others",
        )
        for row in rows
    ]
    return [(title, text) for title, text in facts if text]


def _minutes(rows: Sequence[Row]) -> str:
    """The mean of each row, such as ``CE 17.0, Ad-Corre 17.2 minutes per run``."""
    seconds = [(row.name, mean_train_seconds(row)) for row in rows]
    means = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds if value)
    return f"{means} minutes per run" if means else ""


def _listed(values: Iterable[Any], form: str = "") -> str:
    """Every value that occurs, sorted."""
    found = {value for value in values if value is not None}
    return ", ".join(format(value, form) for value in sorted(found))
