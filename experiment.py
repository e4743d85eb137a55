"""What is a run, from its options to its report?

A run is a folder: `config.json`, `env.json`, `state.h5` (to go on after a kill), `history.csv`,
`best.weights.h5`, and in the end `result.json`, `predictions.npz` and the figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

import augmentation
import config
import custom_loss
import evaluation
import metrics
import plots
import runtime
import trainer as training
from config import DatasetName, TrainConfig
from data_helper import PreparedSplit, open_split, prepared_splits
from dataset_class import Batches
from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits
from distributed import exchange
from distributed.process_group import Team, team_of
from files import UserError, only_writer, read_json, write_json
from model_files import model_file

BEST_WEIGHTS = "best.weights.h5"
UNTRAINED = "untrained.json"


def train_and_evaluate(settings: TrainConfig) -> dict[str, Any]:
    """Trains as ``settings`` say, or goes on with a run that was stopped, and evaluates the best epoch.

    Returns:
        What `result.json` holds (`evaluation.evaluate`): the test split where it is prepared, otherwise the
        split that selected the epoch. A finished run is not repeated; its result is returned.

    Raises:
        UserError: data not prepared, unknown architecture, a folder that holds another run, a loss that is not finite.
    """
    config.check(settings)
    team = team_of(settings)
    folder = Path(settings.run_dir or Path("runs") / config.run_id(settings))
    with exchange.together(team), only_writer(folder) if team.leads else contextlib.nullcontext():
        return exchange.told(_run(settings, folder, team))


def _run(settings: TrainConfig, folder: Path, team: Team) -> dict[str, Any]:
    """`train_and_evaluate` in one process of a team; the result of process 0 is the one that counts."""
    splits = None
    if team.leads:
        _check_same_run(folder, settings)
        splits = None if (folder / "result.json").exists() else _open_splits(settings)
    start = {"options": config.identity(settings), "finished": splits is None}
    led = exchange.told(start)  # by now the synthetic set is drawn
    if changed := config.differences(led["options"], start["options"]):
        raise UserError(f"expected the options of process 0 in every process, received others ({'; '.join(changed)})")
    if led["finished"]:
        print(f"{folder} holds this run, finished; delete it or choose another --run-dir to train again")
        return read_json(folder / "result.json")
    splits = splits or _open_splits(settings)
    if team.leads:
        write_json(folder / "config.json", config.identity(settings))
    print(f"{settings.model.arch} on {splits['train'].name}: {len(splits['train'])} images, in {folder}")
    _fit(settings, folder, splits, team)
    return _report(settings, folder, splits, team)


def _check_same_run(folder: Path, settings: TrainConfig) -> None:
    """Checks that the run in the folder, if there is one, is the one that ``settings`` describe."""
    path = folder / "config.json"
    if path.exists() and (changed := config.differences(read_json(path), config.identity(settings))):
        raise UserError(
            f"{folder} holds a run with other options ({'; '.join(changed)}); "
            "repeat its own command to go on with it, or choose another --run-dir"
        )


def _open_splits(settings: TrainConfig) -> dict[str, PreparedSplit]:
    """Opens every split that is prepared; draws the synthetic set first when it is wanted and not there."""
    name = settings.dataset.value
    if settings.dataset == DatasetName.synthetic and (name, "train") not in prepared_splits(settings.data_dir):
        write_synthetic_splits(PrepareSyntheticConfig(data_dir=settings.data_dir))
    there = {split for dataset, split in prepared_splits(settings.data_dir) if dataset == name}
    wanted = there | {"train", settings.select_on}
    return {split: open_split(settings.data_dir, name, split) for split in sorted(wanted)}


def _fit(settings: TrainConfig, folder: Path, splits: dict[str, PreparedSplit], team: Team) -> None:
    """Trains from the folder's saved state, or from the start, to the last epoch; leaves the best weights there."""
    runtime.set_up(settings.seed, settings.precision)
    train = splits["train"]
    shared = {"batch_size": settings.batch_size, "seed": settings.seed, "team": team}
    soft = settings.soft_labels
    validation = Batches(splits[settings.select_on], **shared, soft_labels=soft, training=False)
    if settings.teacher:
        train, soft = _taught(train, settings, team), True
    batches = Batches(train, **shared, soft_labels=soft, balanced=settings.balanced)
    network, described = model_file.new_network(settings.model, train.class_names, settings.weights)
    model = _build_trainer(settings, network, train, len(batches))
    averaged = training.AveragedWeights() if settings.optimizer.average else None

    def save_best(row: dict[str, float]) -> None:
        measured = {"split": settings.select_on, "accuracy": row["val_accuracy"], "epoch": row["epoch"]}
        with averaged.in_place() if averaged else contextlib.nullcontext():  # in every process, as all must agree
            if not team.leads:
                return
            origin = f"train.py, started from {Path(settings.weights).name}" if settings.weights else "train.py"
            info = model_file.ModelInfo(described, train.name, measured, runtime.versions(), origin)
            model_file.save_model(folder / BEST_WEIGHTS, network, info)

    state = training.RunState(folder, monitor="val_accuracy", save_best=save_best, writes=team.leads)
    state.restore(model)
    if (led := exchange.told(state.epochs_done)) != state.epochs_done:
        raise UserError(
            f"{state.path}: expected the state after epoch {led}, as process 0 finds it, found {state.epochs_done}; "
            "every process must see one shared --run-dir"
        )
    if state.epochs_done:
        print(f"going on after epoch {state.epochs_done} of {settings.epochs}")
    else:
        # What the discriminators start from, to be read beside what they reach.
        _, embeddings = evaluation.predict(network, validation.split.images, team=team)
        before = metrics.correlations(validation.split.labels, embeddings, train.num_classes)
        if team.leads:
            write_json(folder / UNTRAINED, before)
    if team.leads:
        write_json(folder / "env.json", runtime.versions())
    spoken = [training.ProgressBar(), *runtime.tensorboard(folder / "tensorboard")] if team.leads else []
    model.fit(
        batches,
        validation_data=validation,
        epochs=settings.epochs,
        initial_epoch=state.epochs_done,
        shuffle=False,  # `Batches` orders them
        verbose=0,
        callbacks=[
            training.EpochOrder(batches),
            training.StopAtNaN(),
            *spoken,
            *([averaged] if averaged else []),
            state,
        ],
    )


def _taught(train: PreparedSplit, settings: TrainConfig, team: Team) -> PreparedSplit:
    """The split with targets blended of its labels (or votes) and what the teacher, with flip, says of each image."""
    teacher, info = model_file.load_model(settings.teacher)
    if info.network.class_names != train.class_names:
        raise UserError(
            f"{settings.teacher}: expected a teacher of the classes {', '.join(train.class_names)}, found one of "
            f"{', '.join(info.network.class_names)}"
        )
    said, _ = evaluation.predict(teacher, train.images, flip=True, team=team)
    known = train.votes if settings.soft_labels else np.eye(train.num_classes, dtype=np.float32)[train.labels]
    share = np.float32(settings.teacher_share)
    return dataclasses.replace(train, votes=(1 - share) * known + share * said)


def _build_trainer(
    settings: TrainConfig, network: keras.Model, train: PreparedSplit, steps_per_epoch: int
) -> training.AdCorreTrainer:
    """The compiled model that `fit` trains, all its variables made."""
    mixup = settings.augmentation.mixup
    model = training.AdCorreTrainer(
        network,
        _build_loss(settings, train.num_classes, steps_per_epoch),
        augmentation.Augmentation(settings.augmentation, seed=settings.seed),
        augmentation.Mixup(mixup, seed=settings.seed + 1) if mixup else None,
    )
    optimizer = training.make_optimizer(settings.optimizer, steps_per_epoch, settings.epochs)
    model.compile(optimizer=optimizer, jit_compile=runtime.jit_compile())
    model.build((None, *train.images.shape[1:]))
    model.optimizer.build(model.trainable_variables)  # mixed_float16 wraps it in one that scales the loss
    return model


def _build_loss(settings: TrainConfig, num_classes: int, steps_per_epoch: int) -> custom_loss.AdCorreLoss:
    options = dataclasses.asdict(settings.loss)
    ramp_steps = round(options.pop("ramp_epochs") * steps_per_epoch)
    shape = (settings.model.num_embeddings, settings.model.embedding_size)
    return custom_loss.AdCorreLoss(num_classes, ramp_steps=ramp_steps, embedding_shape=shape, **options)


def _report(settings: TrainConfig, folder: Path, splits: dict[str, PreparedSplit], team: Team) -> dict[str, Any]:
    """Evaluates the best weights and draws the figures; the result file comes last and marks the run as finished."""
    runtime.set_up(precision="float32")
    exchange.told(None)  # the weights are there once process 0 is here
    network, info = model_file.load_model(folder / BEST_WEIGHTS)
    if (led := exchange.told(info.metrics)) != info.metrics:
        raise UserError(
            f"{folder / BEST_WEIGHTS}: expected the weights of epoch {led['epoch']}, as process 0 finds them, found "
            f"those of epoch {info.metrics['epoch']}; every process must see one shared --run-dir"
        )
    extra = {}
    if team.leads:
        history = training.read_history(folder)
        plots.save_history(folder / "history.png", history)
        extra = {
            "selected_on": settings.select_on,
            "best_epoch": info.metrics["epoch"],
            "train_seconds": sum(row["seconds"] for row in history),
            "correlations_untrained": read_json(folder / UNTRAINED),
            "config": config.identity(settings),
        }
    split = splits["test" if "test" in splits else settings.select_on]
    return evaluation.evaluate(network, split, folder, seed=settings.seed, extra=extra, team=team)
