"""The command ``python test.py suspects``: lists labels that are likely wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Annotated, Any

from command_line import Range
from config import DatasetName, OnSplitConfig
from data_helper import PreparedSplit, Split
from files import only_writer, sha256


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
    """Folder to write; None is runs/suspects-<dataset>-<split>-<8 hex digits>, another one for every other list."""
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
    folder = settings.output or _default_folder(settings, split, also.digest if also else "")
    with only_writer(folder):
        summary = listing.write_report(folder, split, probabilities, found, also or None, settings.seed)
    print(f"\n{listing.format_table(summary)}\n\nwrote {folder}/")
    return summary


def _default_folder(settings: SuspectsConfig, split: PreparedSplit, also: str) -> str:
    """A folder of its own for each list: the digits depend on the bytes of all files, the split and the options."""
    from model_files import hub

    files = [sha256(hub.local_file(path)) for path in (*settings.weights, *filter(None, [settings.probabilities]))]
    content = " ".join([*files, split.digest, also, str(settings.folds), str(settings.seed)])
    return f"runs/suspects-{split.name.replace('/', '-')}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
