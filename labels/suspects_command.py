"""The command ``python test.py suspects``: lists labels that are likely wrong."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from command_line import Range
from config import DatasetName, OnSplitConfig
from data_helper import Split
from files import only_writer


@dataclasses.dataclass(frozen=True)
class SuspectsConfig(OnSplitConfig):
    """Lists labels that are likely wrong (confident learning), for train.py --without: CSV, image grid and table."""

    weights: tuple[str, ...] = ()
    """Model files, as for evaluate; their mean probabilities are used."""
    folds: bool = False
    """The files of --weights are of train.py --fold 1/N to N/N: each predicts the images that it has not seen."""
    probabilities: str | None = None
    """File of test.py teach to use instead of --weights."""
    dataset: DatasetName = DatasetName.fer2013
    """Prepared data set whose labels are doubted."""
    split: Split = "train"
    """Its split."""
    also: DatasetName | None = None
    """Another prepared data set with the same images, whose labels judge the suspects."""
    output: str | None = None
    """Folder to write; None is runs/suspects-<dataset>-<split>."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of control.csv, as many images that are no suspects."""


def suspects(settings: SuspectsConfig) -> dict[str, Any]:
    """Lists the labels of a split that are likely wrong, and prints how many there are.

    Returns:
        What `suspects.json` holds (`labels.suspects.write_report`).

    Raises:
        UserError: data not prepared, no or two sources of probabilities, or files that do not fit the split.
    """
    from data_helper import open_split
    from labels import confident_learning, second_labels
    from labels import suspects as listing
    from labels.probabilities import split_probabilities

    split = open_split(settings.data_dir, settings.dataset.value, settings.split)
    also = settings.also and second_labels.find_second_labels(settings.data_dir, settings.also.value, split)
    given = (settings.weights, settings.probabilities, settings.folds)
    probabilities = split_probabilities(split, *given, batch_size=settings.batch_size)
    found = confident_learning.find_suspects(split.labels, probabilities)
    folder = settings.output or f"runs/suspects-{settings.dataset.value}-{settings.split}"
    with only_writer(folder):
        summary = listing.write_report(folder, split, probabilities, found, also or None, settings.seed)
    print(f"\n{listing.format_table(summary)}\n\nwrote {folder}/")
    return summary
