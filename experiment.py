"""Executes one run: data, network, loss, training, report.

A run is a folder: `config.json`, `env.json`, `state.h5` (to continue after an interruption), `history.csv`,
`best.weights.h5`, and at the end `result.json`, `predictions.npz` and the figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import augmentation
import command_line
import config
import custom_loss
import datasets
import evaluation
import metrics
import plots
import run_identity
import runtime
from config import DatasetName, TrainConfig
from data_helper import PreparedSplit, open_split, prepared_splits
from dataset_class import Batches
from datasets.synthetic import PrepareSyntheticConfig, ensure_synthetic_splits
from distributed import exchange
from distributed.process_group import GROUP_OF_ONE, ProcessGroup, process_group
from files import UserError, write_json
from model_files import calibrate, model_file
from reading import run_files
from reading.arrays import Rows
from reading.json_files import read_json
from trainer import AdCorreTrainer, Engine, epochs_in, resident
from training import optimization
from training.distillation import blended_targets
from training.left_out import kept_rows
from training.progress import EpochLines
from training.run_state import STATE, RunState, read_history

BEST_WEIGHTS, ENVIRONMENT = "best.weights.h5", "env.json"
UNTRAINED = "untrained.json"
_MOST_THREADS = 1_024
_SHARED = "every process must see one shared --run-dir"
Splits = dict[str, PreparedSplit]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
        identity: what it is.
        group: the processes that do it.
        started: `time.monotonic` at its beginning.
    """

    identity: run_identity.RunIdentity
    group: ProcessGroup
    started: float


def train_and_evaluate(settings: TrainConfig) -> dict[str, Any]:
    """The result of `train_and_report`, for callers that do not need the folder."""
    return train_and_report(settings)[0]


def train_and_report(settings: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Trains with ``settings``, or continues a run that was stopped, and evaluates the best epoch.

    Returns:
        What `result.json` holds (`evaluation.evaluate`): the test split where it is prepared, otherwise the
        split that selected the epoch. A finished run is not repeated; its result is returned. And the run's folder.

    Raises:
        UserError: data not prepared, unknown architecture, a folder that holds another run, a loss that is not finite.
    """
    started = time.monotonic()
    config.check(settings)
    with exchange.connected(process_group(settings)) as group:
        splits = group.rank0_first(_open_splits, settings)
        identity = run_identity.identity_of(settings, splits)
        group.check_agreement("options and data", identity.to_dict(), "start every process with the same")
        folder = Path(group.broadcast(str(_folder_of(settings, identity))))
        with _claimed(folder, group):
            done = group.on_rank0(run_identity.claim_folder)(folder, identity, _evaluated(settings, splits))
            if group.broadcast(bool(done)):
                print(f"{folder} holds this run, finished; delete it or choose another --run-dir to train again")
                return group.broadcast(done), folder
            trained_on = _train(settings, folder, splits, Run(identity, group, started))
            return group.broadcast(_report(settings, folder, splits, identity, group, trained_on)), folder


def _folder_of(settings: TrainConfig, identity: run_identity.RunIdentity) -> Path:
    """The folder of a run: that of the options, or one below ``runs``.

    The current folder and the project's own are no folders for the dozen files of a run: a run that is sent there
    (the published ``weight_path="./"``) gets a folder of its own below ``runs`` in them.
    """
    if not settings.run_dir:
        return run_identity.default_folder(identity, "runs")
    wanted = Path(settings.run_dir)
    is_here = wanted.exists() and any(map(wanted.samefile, (Path.cwd(), Path(__file__).parent)))
    if not is_here or run_identity.read_identity(wanted):
        return wanted
    folder = run_identity.default_folder(identity, wanted / "runs")
    print(f"--run-dir {settings.run_dir}: holds other files, so the run gets {folder} below it")
    return folder


@contextlib.contextmanager
def _claimed(folder: Path, group: ProcessGroup) -> Iterator[None]:
    """Holds the folder; a command that is refused before its run began to train leaves nothing of its own there."""
    with group.only_writer(folder):
        before = set(folder.glob("*"))
        try:
            yield
        except UserError:
            if group.is_rank0 and not (folder / UNTRAINED).exists():
                with contextlib.suppress(OSError):
                    for path in set(folder.glob("*")) - before:
                        path.unlink()
            raise
        except FileNotFoundError:
            if folder.is_dir():
                raise
            raise UserError(f"{folder}: the folder of the run is gone; start the run again") from None


def _train(settings: TrainConfig, folder: Path, splits: Splits, run: Run) -> int:
    """Trains from the saved state, or from the start, to the last epoch; leaves the best weights in the folder.

    Returns:
        How many images it trained on.
    """
    print(f"{settings.model.arch} on {splits['train'].name}: {len(splits['train'])} images, in {folder}")
    _use_threads_of(folder)
    runtime.set_up(settings.seed, settings.precision)
    runtime.keep_compiled_programs()
    group = run.group
    engine, described = make_engine(settings, splits, group)
    model, network = engine.model, engine.model.network

    # what is saved: the state, the best weights, and what the discriminators start from
    origin = f"train.py, started from {Path(settings.weights).name}" if settings.weights else "train.py"
    save_model, save_json = group.on_rank0(model_file.save_model), group.on_rank0(write_json)

    def save_best(row: dict[str, float]) -> Callable[[], None]:
        measured = {"split": settings.select_on, "accuracy": row["val_accuracy"], "epoch": row["epoch"]}
        measured |= {"fold": settings.fold} if settings.fold else {}
        info = model_file.ModelInfo(described, splits["train"].name, measured, runtime.versions(), origin)
        values = optimization.saved_weights(network, model.average)

        def write() -> None:
            # The network itself is trained further meanwhile; the scope, which is this thread's, shows the copies.
            with keras.StatelessScope(zip(network.weights, values, strict=True)):
                save_model(folder / BEST_WEIGHTS, network, info)

        return write

    state = RunState(
        folder,
        monitor="val_accuracy",
        save_best=save_best,
        steps_of_call=engine.train.steps_of,
        save_seconds=settings.save_seconds,
        run=run.identity.name,
        writes=group.is_rank0,
    )
    state.restore(model)
    place = {"epoch": state.epochs_done, "step": state.steps_done, "epochs": state.epochs}
    group.check_agreement(f"{state.path}", place, _SHARED)
    epochs = _length(settings, engine, state, run)
    if state.epochs_done or state.steps_done:
        within = f" and {state.steps_done} of {engine.train.steps} steps" if state.steps_done else ""
        print(f"going on after epoch {state.epochs_done} of {epochs}{within}")
    else:
        for name in {"train", settings.select_on}:
            splits[name].verify()  # reads all pixels: once per run
        validation = engine.validation.split
        _, embeddings = evaluation.predict(network, validation.rows, group=group)
        save_json(folder / UNTRAINED, metrics.correlations(validation.labels, embeddings, validation.num_classes))
    save_json(folder / ENVIRONMENT, {**runtime.versions(), "threads": runtime.threads()})

    # fit
    print(_formula(model.loss_layer), flush=True)
    lines = EpochLines(state, engine.train, epochs, shown=group.is_rank0)
    with contextlib.closing(state), contextlib.closing(lines):
        callbacks = [
            *(runtime.tensorboard(folder / "tensorboard") if group.is_rank0 else []),
            optimization.LastUpdate(epochs),
            *([optimization.AveragedWeights(model.average)] if model.average else []),
            state,
            lines,
        ]
        engine.fit(epochs, callbacks, first_epoch=state.epochs_done, first_step=state.steps_done)
    return len(engine.train.kept)


def _use_threads_of(folder: Path) -> None:
    """Continues a run with the number of threads that it began with, because the last bits depend on it."""
    try:
        begun = read_json(folder / ENVIRONMENT)["threads"] if (folder / STATE).exists() else None
    except (OSError, UserError, KeyError, TypeError):  # of an older version, or damaged: `env.json` decides nothing
        return
    if type(begun) is not int or not 1 <= begun <= _MOST_THREADS or begun == runtime.threads():
        return
    if runtime.use_threads(begun):
        print(f"{begun} threads, as at the start of the run")
    elif not runtime.has_gpu():
        print(f"the run began with {begun} threads and goes on with {runtime.threads()}: the last bits may differ")


def make_engine(
    settings: TrainConfig, splits: Splits, group: ProcessGroup = GROUP_OF_ONE
) -> tuple[Engine, model_file.NetworkDescription]:
    """The engine that trains with ``settings`` on these splits, and the description of its network.

    Args:
        settings: of a training; folders are not read.
        splits: ``train`` and the one that selects the epoch.
        group: the processes that train together.

    Raises:
        UserError: see `model_file.new_network` and `dataset_class.Batches`.
    """
    train, soft = splits["train"], settings.soft_labels
    measured = splits[settings.select_on]
    on_device = group.broadcast(resident(settings.resident, train.images.nbytes + measured.images.nbytes))
    shared = {"batch_size": settings.batch_size, "seed": settings.seed, "resident": on_device, "group": group}
    validation = Batches(measured, **shared, soft_labels=soft, training=False)
    if settings.teacher:
        train = blended_targets(train, settings.teacher, settings.teacher_share, soft, group)
        soft = True
    kept = kept_rows(train, settings.without, settings.fold)
    batches = Batches(train, **shared, soft_labels=soft, balanced=settings.balanced, kept=kept)
    network, described = model_file.new_network(settings.model, train.class_names, settings.weights)
    model = _build_trainer(settings, network, batches, (train.rows, measured.rows) if on_device else ())
    engine = Engine(model, batches, validation)
    if on_device:
        engine.choose_steps_per_call(engine.seconds_per_step())
    return engine, described


def _length(settings: TrainConfig, engine: Engine, state: RunState, run: Run) -> int:
    """The epochs of the run: those of the options, or what fits into ``--minutes``, which its state remembers."""
    if settings.minutes is not None and state.epochs is None:
        step, validation = engine.seconds_per_step(), engine.seconds_per_validation()
        used = time.monotonic() - run.started
        epochs = run.group.broadcast(epochs_in(settings.minutes, used, step, validation, engine.train.steps))
        print(f"{1e3 * step:.1f} ms per step, {validation:.1f} s per validation: {epochs} epochs in the time")
        state.epochs = epochs
    epochs = state.epochs or settings.epochs
    _check_accumulation(settings, epochs, engine.train.steps)
    engine.set_length(epochs)
    return epochs


def _check_accumulation(settings: TrainConfig, epochs: int, steps_per_epoch: int) -> None:
    """Refuses to accumulate more batches than the run has."""
    steps = epochs * steps_per_epoch
    if settings.optimizer.accumulate > steps:
        raise UserError(
            f"--accumulate: expected at most {steps}, the batches of this run ({epochs} epochs of "
            f"{steps_per_epoch}), received {settings.optimizer.accumulate}; use a smaller one, or more --epochs"
        )


def _formula(loss: custom_loss.AdCorreLoss) -> str:
    """How the total is made of the terms, which are shown unweighted: ``loss = 7.14 ce + 1 fd (docs/loss.md)``."""
    weighted = " + ".join(f"{loss.weights_by_term[term]:.3g} {term}" for term in loss.terms)
    ramp = f"; all but ce rise from 0 over {loss.ramp_steps} batches" if loss.ramp_steps else ""
    return f"loss = {weighted} (docs/loss.md{ramp})"


def closing_lines(result: dict[str, Any], folder: Path, settings: TrainConfig) -> str:
    """The last lines of a run: its best epoch, what was measured, where everything is, and what to do next.

    Args:
        result: of the run; what an old one lacks is left out.
        folder: of the run.
        settings: its options; the folder of the data is read.
    """
    weights = f"  --weights {shlex.quote(str(folder / BEST_WEIGHTS))}"
    data = {} if settings.data_dir == TrainConfig.data_dir else {"data_dir": settings.data_dir}
    measured = command_line.to_args({"dataset": result["dataset"], "split": result["split"], **data, "flip": True})
    lines = []
    with contextlib.suppress(OSError, UserError, KeyError):
        chosen = {row["epoch"]: row["val_accuracy"] for row in read_history(folder)}
        accuracy = f"accuracy {chosen[result['best_epoch']]:.2%} on {result['selected_on']}, which selected it"
        lines.append(f"best epoch  {result['best_epoch']} of {len(chosen)}: {accuracy}")
    return "\n".join(
        [
            *lines,
            f"measured    {result['dataset']}/{result['split']}: accuracy {result['accuracy']:.2%}",
            f"all files   {folder}/",
            "next        measure with mirror images averaged, and recognise a face:",
            f"python test.py evaluate {shlex.join(measured)} \\",
            weights,
            "python test.py recognize examples/astronaut.png \\",
            weights,
        ]
    )


def _report(
    settings: TrainConfig,
    folder: Path,
    splits: Splits,
    identity: run_identity.RunIdentity,
    group: ProcessGroup,
    trained_on: int,
) -> dict[str, Any]:
    """Evaluates the best weights and draws the figures; the result file comes last and marks the run as finished."""
    runtime.set_up(precision="float32")
    group.wait()  # until rank 0 has written the weights
    network, info = calibrate.calibrate(folder / BEST_WEIGHTS, splits[settings.select_on], group=group)
    group.check_agreement(f"{folder / BEST_WEIGHTS}", info.metrics, _SHARED)
    split = _evaluated(settings, splits)
    extra = group.on_rank0(_training_report)(settings, folder, info, trained_on)
    digests = {"digests": run_identity.result_digests(identity, split)}
    extra = extra and {**extra, "config": identity.options, **digests}
    return evaluation.evaluate(network, split, folder, seed=settings.seed, extra=extra, group=group)


def _training_report(
    settings: TrainConfig, folder: Path, info: model_file.ModelInfo, num_images: int
) -> dict[str, Any]:
    """What `result.json` says of the training; draws its history."""
    history = read_history(folder)
    title = f"{datasets.title(settings.dataset.value)}, train, n = {num_images:,}"
    plots.save_history(folder / "history.png", history, title, info.metrics["epoch"])
    return {
        "selected_on": settings.select_on,
        "train_images": num_images,
        "best_epoch": info.metrics["epoch"],
        "epochs": len(history),
        "train_seconds": sum(row["seconds"] for row in history),
        "correlations_untrained": run_files.read_correlations(folder / UNTRAINED),
        **evaluation.calibration(info),
    }


def _open_splits(settings: TrainConfig) -> Splits:
    """Opens every split that is prepared; draws the synthetic set first where it is wanted and missing."""
    name = settings.dataset.value
    if settings.dataset == DatasetName.synthetic:
        ensure_synthetic_splits(PrepareSyntheticConfig(data_dir=settings.data_dir))
    there = {split for dataset, split in prepared_splits(settings.data_dir) if dataset == name}
    wanted = there | {"train", settings.select_on}
    return {split: open_split(settings.data_dir, name, split) for split in sorted(wanted)}


def _evaluated(settings: TrainConfig, splits: Splits) -> PreparedSplit:
    """The split that the report measures: test where it is prepared, otherwise the one that selects the epoch."""
    return splits["test" if "test" in splits else settings.select_on]


def _build_trainer(
    settings: TrainConfig, network: keras.Model, train: Batches, on_device: tuple[np.ndarray | Rows, ...]
) -> AdCorreTrainer:
    """The compiled model that `fit` trains, all its variables made; ``on_device`` are the images to keep there."""
    mixup, average = settings.augmentation.mixup, settings.optimizer.average
    model = AdCorreTrainer(
        network,
        _build_loss(settings, train.split.num_classes, train.steps),
        augmentation.Augmentation(settings.augmentation, seed=settings.seed),
        augmentation.Mixup(mixup, seed=settings.seed + 1) if mixup else None,
        optimization.MovingAverage(network, average) if average else None,
        batch_size=train.batch_size,
    )
    if on_device:
        model.keep_on_device(*on_device)
    optimizer = optimization.make_optimizer(settings.optimizer, train.steps, settings.epochs)
    model.compile(optimizer=optimizer, jit_compile=runtime.jit_compile())
    model.build((None, *train.split.images.shape[1:]))
    model.optimizer.build(model.trainable_variables)  # mixed_float16 wraps it in one that scales the loss
    return model


def _build_loss(settings: TrainConfig, num_classes: int, steps_per_epoch: int) -> custom_loss.AdCorreLoss:
    options = dataclasses.asdict(settings.loss)
    ramp_steps = round(options.pop("ramp_epochs") * steps_per_epoch)
    shape = (settings.model.num_embeddings, settings.model.embedding_size)
    return custom_loss.AdCorreLoss(num_classes, ramp_steps=ramp_steps, embedding_shape=shape, **options)
