"""Train a network with the Ad-Corre loss: ``python train.py --dataset fer2013 --arch mini_xcp --epochs 40``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import config
import runtime
from config import Backend, DatasetName, DatasetType, TrainConfig
from data_helper import open_split
from distributed.process_group import process_group
from files import UserError, run_command


class TrainModel:
    """Trains on one prepared data set.

    Args:
        dataset_name: the data set.
        ds_type: ``train``, or ``train_7`` as the published code names the seven-class part.
        settings: all other options; ``dataset_name`` overrides its data set.

    Raises:
        UserError: no such data set, or ``ds_type`` is not a training part.

    Example:
        >>> model = TrainModel(dataset_name=DatasetName.fer2013, ds_type=DatasetType.train)
        >>> result = model.train(arch="mini_xcp", weight_path="./runs/first", epochs=5, w_fd=0)
    """

    def __init__(
        self,
        dataset_name: DatasetName,
        ds_type: DatasetType = DatasetType.train,
        settings: TrainConfig = config.RECIPES["default"],
    ):
        self.ds_type = _member(DatasetType, "ds_type", ds_type)
        if self.ds_type.split != "train":
            raise UserError(f"ds_type: expected train or train_7, received {self.ds_type.value}")
        self.settings = dataclasses.replace(settings, dataset=_member(DatasetName, "dataset_name", dataset_name))

    def train(self, arch: str | None = None, weight_path: str | None = None, **options: Any) -> dict[str, Any]:
        """Trains, or continues a run that was stopped, and evaluates the best epoch.

        Args:
            arch: ``mini_xcp``, ``xcp``, ``resnet`` or ``keras:<Name>``; None keeps that of the settings.
            weight_path: a model file (``.h5``, ``.keras``) to start from, or the folder of the run (``"./"``), where a
                stopped run continues. None keeps those of the settings.
            options: any other option of train.py by name, such as ``epochs=5``.

        Returns:
            The content of `result.json` (`evaluation.evaluate`).

        Raises:
            UserError: an unknown option or value; see `experiment.train_and_evaluate` for others.
        """
        if arch is not None:
            options["arch"] = arch
        if weight_path is not None:
            is_file = str(weight_path).endswith((".h5", ".keras"))
            options["weights" if is_file else "run_dir"] = weight_path
        settings = config.with_options(self.settings, options, "train")
        settings = dataclasses.replace(settings, backend=_chosen_backend(settings, "backend" in options))
        if self.ds_type == DatasetType.train_7 and settings.dataset != DatasetName.synthetic:
            _check_seven_classes(settings)
        return _train(settings)


def _member(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name}: expected one of {', '.join(kind)}, received {value!r}") from None


def _chosen_backend(settings: TrainConfig, named: bool) -> Backend:
    """The backend of a call from Python: the named one, or else the one that Keras runs on."""
    if named or settings.backend != TrainConfig.backend:
        runtime.choose_backend(settings.backend)
    runtime.import_keras()
    return sys.modules["keras"].backend.backend()


def _check_seven_classes(settings: TrainConfig) -> None:
    train = open_split(settings.data_dir, settings.dataset.value, "train")
    if train.num_classes != 7:
        raise UserError(
            f"{train.name}: expected 7 classes for train_7, found {train.num_classes}; prepare it with --classes 7"
        )


def _train(settings: TrainConfig) -> dict[str, Any]:
    # Imported late: `--help` stays instant, and the backend can be chosen until here.
    runtime.import_keras()
    import evaluation
    import experiment

    result, folder = experiment.train_and_report(settings)
    print(f"\n{evaluation.format_table(result)}\n\n{experiment.closing_lines(result, folder, settings)}")
    return result


def main() -> None:
    settings = config.parse_train_options()
    process_group(settings)  # before Keras is imported: a wrong option is refused at once
    runtime.choose_backend(settings.backend)
    _train(settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
