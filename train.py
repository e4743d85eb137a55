"""Train a network with the Ad-Corre loss: ``python train.py --dataset fer2013 --arch mini_xcp --epochs 40``."""

from __future__ import annotations

import dataclasses
from typing import Any

import config
import runtime
from config import DatasetName, DatasetType, TrainConfig
from data_helper import open_split
from distributed.process_group import team_of
from files import UserError, run_command


class TrainModel:
    """Trains on one prepared data set.

    Args:
        dataset_name: which data set.
        ds_type: ``train``, or ``train_7`` as the published code names the seven-class part.
        settings: everything else that can be chosen; ``dataset_name`` overrides its data set.

    Raises:
        UserError: ``ds_type`` is not a training part.

    Example:
        >>> model = TrainModel(dataset_name=DatasetName.fer2013, ds_type=DatasetType.train)
        >>> result = model.train(arch="mini_xcp", weight_path="./runs/first")
    """

    def __init__(
        self,
        dataset_name: DatasetName,
        ds_type: DatasetType = DatasetType.train,
        settings: TrainConfig = config.RECIPES["default"],
    ):
        if DatasetType(ds_type).split != "train":
            raise UserError(f"ds_type: expected train or train_7, received {DatasetType(ds_type).value}")
        self.settings = dataclasses.replace(settings, dataset=DatasetName(dataset_name))
        self.ds_type = DatasetType(ds_type)

    def train(self, arch: str | None = None, weight_path: str | None = None) -> dict[str, Any]:
        """Trains, or goes on with a run that was stopped, and evaluates the best epoch.

        Args:
            arch: ``mini_xcp``, ``xcp``, ``resnet`` or ``keras:<Name>``; None is the settings' own.
            weight_path: a model file (``.h5``, ``.keras``) to start from; or a folder (``"./"``): the run found there
                goes on, otherwise a new one is written there. None is the settings' own.

        Returns:
            What `result.json` holds (`evaluation.evaluate`).

        Raises:
            UserError: see `experiment.train_and_evaluate`.
        """
        settings = self.settings
        if arch is not None:
            settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, arch=arch))
        if weight_path is not None:
            place = "weights" if str(weight_path).endswith((".h5", ".keras")) else "run_dir"
            settings = dataclasses.replace(settings, **{place: str(weight_path)})
        if self.ds_type == DatasetType.train_7 and settings.dataset != DatasetName.synthetic:
            train = open_split(settings.data_dir, settings.dataset.value, "train")
            if train.num_classes != 7:
                raise UserError(
                    f"{train.name}: expected 7 classes for train_7, found {train.num_classes}; "
                    "prepare it with --classes 7"
                )
        return _train(settings)


def _train(settings: TrainConfig) -> dict[str, Any]:
    # Imported late: `--help` stays instant, and the backend can be chosen until here.
    import evaluation
    import experiment

    result = experiment.train_and_evaluate(settings)
    if team_of(settings).leads:
        print(evaluation.format_table(result))
    return result


def main() -> None:
    settings = config.parse_train_options()
    config.check(settings)  # before Keras is imported: a slip is told at once
    team_of(settings)
    runtime.choose_backend(settings.backend)
    _train(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
