"""The options of a training, their defaults, and recipes.

Frozen dataclasses: one field is one option, one default and one range. Imports no Keras, so that ``--help`` is
instant and the backend can still be chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_type_hints

import datasets
from command_line import Range, check_ranges, option, parse_options, parse_sections, parse_some_options, to_args
from files import UserError
from reading.text import printable

# The data sets that can be prepared, trained on and evaluated.
DatasetName = Enum("DatasetName", {name: name for name in datasets.NAMES}, type=str, module=__name__)


class DatasetType(str, Enum):
    """The published names of a data set's parts; ``_7`` leaves contempt out."""

    train = "train"
    train_7 = "train_7"
    eval = "eval"
    eval_7 = "eval_7"
    test = "test"

    @property
    def split(self) -> str:
        """The prepared split this part stands for: ``train``, ``val`` or ``test``."""
        return {"train": "train", "eval": "val", "test": "test"}[self.value.removesuffix("_7")]


Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]
Backend = Literal["tensorflow", "jax", "torch"]


def preferred_backend() -> Backend:
    """The backend of a command without ``--backend``: that of the variable ``KERAS_BACKEND``, or else TensorFlow.

    Raises:
        UserError: the variable names another one.
    """
    name = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if name not in get_args(Backend):
        raise UserError(f"KERAS_BACKEND: expected one of {', '.join(get_args(Backend))}, found {name!r}")
    return name


_LONGEST_OPTIONS = 300  # characters of them in a message
LAST_SEED = 2**31 - 1
MOST_NUMBERS = 2**18  # k * d of one face: after 2048 channels (xcp) that layer takes 2 GiB


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    arch: str = "mini_xcp"
    """mini_xcp (48 px, CPUs), xcp (Xception), resnet (ResNet50) or keras:<Name> of keras.applications."""
    num_embeddings: Annotated[int, Range(1, 1_024)] = 7
    """k, embedding vectors per face."""
    embedding_size: Annotated[int, Range(3, 65_536)] = 256
    """d, numbers per vector."""
    input_size: Annotated[int | None, Range(1, 4_096)] = None
    """The network's side in pixels; None is the architecture's own."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.5
    """Share of the embedding's numbers dropped before the classifier, 0..1."""
    pretrained: Literal["none", "imagenet"] = "none"
    """Initial weights of the backbone."""
    logit_scale: Annotated[float, Range(1e-3, 1e6)] = 1.0
    """Factor of the unit vectors before the classifier, the inverse of the logits' temperature."""


class Title(str):
    """The title of a term of the loss in tables and figures, beside its weight in `LossConfig`."""


WEIGHT = Range(0, 1e6)  # of a term of the loss


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The Ad-Corre loss; a weight of 0 switches its term off at no cost."""

    w_ce: Annotated[float | None, WEIGHT, Title("Cross-entropy")] = None
    """Weight of the cross-entropy; None is 50 / classes, the published 50 over a mean of batch and classes."""
    w_fd: Annotated[float, WEIGHT, Title("Feature Discriminator")] = 1.0
    """Weight of the Feature Discriminator."""
    w_md: Annotated[float, WEIGHT, Title("Mean Discriminator")] = 1.0
    """Weight of the Mean Discriminator."""
    w_ed: Annotated[float, WEIGHT, Title("Embedding Discriminator")] = 1.0
    """Weight of the Embedding Discriminator."""
    adaptive: bool = True
    """Weigh pairs by the recall of their classes (adaptive attention map)."""
    weight_floor: Annotated[float, Range(0, 1e6)] = 1.0
    """Floor of the adaptive map: 1 as in the published code, 0 as in the paper's notation."""
    history: Annotated[int, Range(1, 10_000_000)] = 1000
    """Predictions that the adaptive map's confusion matrix looks back on."""
    label_smoothing: Annotated[float, Range(0, 0.99)] = 0.1
    """Share of the target spread evenly over the classes, 0..1 (labels of expressions are noisy)."""
    ramp_epochs: Annotated[float, Range(0, 100_000)] = 0.0
    """Epochs over which the weights of all terms but the cross-entropy rise linearly from 0."""
    w_center: Annotated[float, WEIGHT, Title("Center loss")] = 0.0
    """Weight of the center loss, a baseline to compare with (baseline_losses.py)."""
    w_supcon: Annotated[float, WEIGHT, Title("Supervised contrastive")] = 0.0
    """Weight of the supervised contrastive loss, a baseline."""
    w_triplet: Annotated[float, WEIGHT, Title("Triplet, semi-hard")] = 0.0
    """Weight of the triplet loss with semi-hard negatives, a baseline."""
    w_eac: Annotated[float, WEIGHT, Title("Erasing-attention consistency")] = 0.0
    """Weight of the erasing-attention consistency, a baseline; a step then sees a mirror image too: twice the time."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its schedule."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW (weight decay apart from the gradient), the published Adam, or SGD with Nesterov momentum 0.9."""
    learning_rate: Annotated[float, Range(0, 1e30)] = 2e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "inverse_time", "constant"] = "cosine"
    """cosine: linear warm-up, then half a cosine to 0; inverse_time: rate / (1 + decay * step)."""
    warmup_epochs: Annotated[float, Range(0, 100_000)] = 2.0
    """Epochs of linear warm-up from 0 (cosine only)."""
    decay: Annotated[float, Range(0, 1e6)] = 1e-5
    """Decay per step (inverse_time only)."""
    weight_decay: Annotated[float, Range(0, 1e6)] = 0.05
    """Decoupled weight decay on kernels (adamw and sgd)."""
    accumulate: Annotated[int, Range(1, 1_000_000)] = 1
    """Batches whose gradients are averaged before one update (the published "virtual batch")."""
    average: Annotated[float, Range(0, 0.99999)] = 0.0
    """Decay per step of the moving average of the weights that is evaluated and saved, 0..1; 0 keeps none."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, inside the model on the device."""

    augment: bool = True
    """Use augmentation."""
    flip: bool = True
    """Mirror left and right with probability 1/2."""
    rotation: Annotated[float, Range(0, 180)] = 10.0
    """Largest rotation, degrees."""
    shift: Annotated[float, Range(0, 1)] = 0.1
    """Largest shift, share of the side."""
    zoom: Annotated[float, Range(0, 0.9)] = 0.1
    """Largest change of scale, share."""
    erase: Annotated[float, Range(0, 1)] = 0.5
    """Probability of erasing one random rectangle."""
    contrast: Annotated[float, Range(0, 0.95)] = 0.0
    """Largest change of brightness and contrast, share."""
    blur: Annotated[float, Range(0, 16)] = 0.0
    """Largest standard deviation of a Gaussian blur of half of the images, pixels of the prepared image."""
    noise: Annotated[float, Range(0, 255)] = 0.0
    """Largest standard deviation of Gaussian noise in half of the images, gray levels of 0..255."""
    mixup: Annotated[float, Range(0, 1_000)] = 0.0
    """Alpha of mixup: each image is blended with another, shares from Beta(alpha, alpha); 0 blends none."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that can be chosen for a training."""

    dataset: DatasetName = DatasetName.synthetic
    """Data set to train on, prepared by prepare_data.py; synthetic faces are drawn when they are missing."""
    data_dir: str = "data"
    """Folder of the prepared data sets."""
    run_dir: str | None = None
    """Folder of this run; None is runs/<id>, the same for the same options and data, so that it resumes."""
    weights: str | None = None
    """Weights file to start from."""
    teacher: str | None = None
    """Model file, or file of test.py teach, whose probabilities are blended into the targets (distillation)."""
    teacher_share: Annotated[float, Range(0, 1)] = 0.5
    """Share of the teacher in the targets, 0..1."""
    without: str | None = None
    """List of images to leave out of train (the CSV file of test.py suspects, or a part of it)."""
    fold: str | None = None
    """I/N: leave fold I of N out of train, for out-of-sample probabilities (test.py suspects --folds)."""
    epochs: Annotated[int, Range(1, 100_000)] = 12
    """Times that the training images are gone through."""
    minutes: Annotated[float | None, Range(0, 1_000_000)] = None
    """Train as many epochs as fit into so many minutes, instead of --epochs: the speed is measured at the start."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 128
    """Images per step; the loss compares the images of a batch."""
    seed: Annotated[int, Range(0, LAST_SEED)] = 0
    """Seed of the initial weights, the order, the augmentation and dropout."""
    balanced: bool = False
    """Draw every class equally often."""
    soft_labels: bool = False
    """Use the distribution of the annotators' votes (FER+) as the target of cross-entropy, instead of the label."""
    select_on: Literal["val", "test"] = "val"
    """Split that chooses the best epoch; test imitates the published practice and is marked in every report."""
    precision: Precision = "float32"
    """Numbers of the network: float32, or half precision on GPUs, where mixed_bfloat16 is the safer one."""
    backend: Backend = "tensorflow"
    """What Keras computes with; jax is the fastest on GPUs; KERAS_BACKEND sets the default."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Keep all images on the device; auto: on a GPU where they take at most 40% of its free memory."""
    save_seconds: Annotated[float, Range(0, 1_000_000)] = 600.0
    """Seconds between checkpoints within an epoch; one is saved after every epoch anyway."""
    devices: Annotated[int, Range(1, 1_024)] = 1
    """Devices that each process trains on (--backend jax): GPUs, or without a GPU shares of the processor."""
    processes: Annotated[int | None, Range(1, 65_536)] = None
    """Processes that train one network together (--backend jax); None is Slurm's tasks under srun, else 1."""
    process_id: Annotated[int | None, Range(0, 65_535)] = None
    """Rank of this process, 0..processes-1; None is Slurm's."""
    coordinator: str | None = None
    """HOST:PORT where process 0 can be reached; None is Slurm's first host."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augmentation: AugmentConfig = AugmentConfig()
    debug: bool = False
    """Show tracebacks."""


def _loss_terms() -> dict[str, str]:
    hints = get_type_hints(LossConfig, include_extras=True)
    return {
        name.removeprefix("w_"): extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Title)
    }


# The title of every term of the loss, in the order of the fields ``w_<term>`` of `LossConfig`.
LOSS_TERMS: dict[str, str] = _loss_terms()


def loss_weights(loss: LossConfig) -> dict[str, float | None]:
    """The weight of every term of the loss, in the order of `LOSS_TERMS`; None for ``ce`` is 50 / classes."""
    return {term: getattr(loss, f"w_{term}") for term in LOSS_TERMS}


# The published set-up, as far as the released code shows it; its augmentation is not known, so ours is used.
RECIPES: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    "published": TrainConfig(
        epochs=300,
        batch_size=50,
        model=ModelConfig(arch="xcp", input_size=224, pretrained="imagenet"),
        loss=LossConfig(label_smoothing=0.0),
        optimizer=OptimizerConfig(optimizer="adam", learning_rate=1e-3, schedule="inverse_time", decay=1e-5),
    ),
}


Recipe = Literal[tuple(RECIPES)]


@dataclasses.dataclass(frozen=True)
class RecipeOption:
    """The choice of a recipe, for the commands that offer it."""

    recipe: Recipe | None = None
    """Set-up that gives the defaults of the other options; None is default, or the one of the experiments."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(TrainConfig, RecipeOption):
    """Trains a network with the Ad-Corre loss and reports how good it is.

    Examples:
      python train.py
          draws synthetic faces and trains mini_xcp on them for 12 epochs: a
          minute on two cores
      python train.py --dataset fer2013 --epochs 40 --run-dir runs/first
          FER-2013, once prepare_data.py has prepared it: 20 minutes on two
          cores; the same command continues a run that was stopped
      python train.py --recipe published --dataset affectnet --backend jax
          the published set-up (Xception from ImageNet at 224 px, Adam, batch
          50, 300 epochs): a day or more on one GPU
    """


# The options that one needs first, in the order of `--help`.
FIRST_OPTIONS = (
    *("dataset", "data_dir", "arch", "epochs", "batch_size", "learning_rate", "seed"),
    *("weights", "run_dir", "recipe"),
)


def help_sections() -> dict[str, list[str]]:
    """The sections of ``train.py --help``: title to names of options."""
    whole = TrainConfig()
    machine = (
        *("precision", "backend", "resident", "save_seconds"),
        *("devices", "processes", "process_id", "coordinator", "debug"),
    )
    nested = {field.name for field in dataclasses.fields(whole) if dataclasses.is_dataclass(getattr(whole, field.name))}
    own = [field.name for field in dataclasses.fields(whole) if field.name not in (*nested, *machine)]
    sections = {
        "target and selection": own,
        "network": options_by_name(whole.model),
        "loss": options_by_name(whole.loss),
        "optimizer": options_by_name(whole.optimizer),
        "augmentation": options_by_name(whole.augmentation),
        "machine": machine,
    }
    others = {title: [name for name in names if name not in FIRST_OPTIONS] for title, names in sections.items()}
    return {"most used": list(FIRST_OPTIONS), **others}


def check(settings: TrainConfig) -> None:
    """Checks every number of ``settings``.

    Raises:
        UserError: a number outside its field's `Range`, embeddings that no machine holds, or a loss whose weights are
            all 0.
    """
    check_ranges(settings)
    k, d = settings.model.num_embeddings, settings.model.embedding_size
    if k * d > MOST_NUMBERS:
        raise UserError(
            f"--num-embeddings times --embedding-size: expected at most {MOST_NUMBERS:,}, received {k:,} x {d:,}"
        )
    if not any(weight is None or weight > 0 for weight in loss_weights(settings.loss).values()):
        options = ", ".join(option(f"w_{term}") for term in LOSS_TERMS)
        raise UserError(f"{options}: expected at least one above 0, received only 0")


def parse_train_options(args: Sequence[str] | None = None) -> TrainConfig:
    """The options of ``train.py``: ``--recipe NAME`` sets the defaults, the other options override them.

    Args:
        args: the command line; None is ``sys.argv[1:]``.
    """
    recipe = dataclasses.replace(RECIPES[chosen_recipe(args) or "default"], backend=preferred_backend())
    return training_options(parse_sections(TrainOptions, help_sections(), TrainOptions(**_fields(recipe)), args))


def chosen_recipe(args: Sequence[str] | None = None) -> str | None:
    """The value of ``--recipe`` anywhere on the command line; None without it."""
    return parse_some_options(RecipeOption, args).recipe


def training_options(settings: TrainConfig) -> TrainConfig:
    """The plain `TrainConfig` in the options of a command that adds some of its own."""
    return TrainConfig(**_fields(settings))


def _fields(settings: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainConfig)}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready nested dictionaries (enums by value)."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: v.value if isinstance(v, Enum) else v for k, v in items}
    )


def options_by_name(settings: Any) -> dict[str, Any]:
    """Every option by its command-line name, the sections unfolded, enums by value."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            options |= options_by_name(value)
        else:
            options[field.name] = value.value if isinstance(value, Enum) else value
    return options


def changed_options(settings: TrainConfig) -> dict[str, Any]:
    """The options in which ``settings`` differ from train.py's defaults, by their command-line names."""
    normal = options_by_name(TrainConfig())
    return {name: value for name, value in options_by_name(settings).items() if value != normal[name]}


def with_options(settings: TrainConfig, options: Mapping[str, Any], place: str) -> TrainConfig:
    """Settings with some options changed, each by its command-line name.

    Args:
        settings: values of all other options.
        options: name to value, such as ``{"w_fd": 0}``.
        place: name of the options' source in messages.

    Raises:
        UserError: an unknown name, a value of the wrong type or a number outside its range.
    """
    shown = printable(dict(options), _LONGEST_OPTIONS)
    if unknown := set(options) - set(options_by_name(settings)):
        near = {close for name in unknown for close in difflib.get_close_matches(name, options_by_name(settings))}
        hint = f"; did you mean {' or '.join(map(option, sorted(near)))}?" if near else ""
        names = ", ".join(map(option, sorted(unknown)))
        raise UserError(f"{place}: cannot use the options {shown} (train.py has no option {names}{hint})")
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            return parse_options(TrainConfig, settings, to_args(options))
    except SystemExit:
        words = re.sub("[^\\x20-\\x7e]|-{4,}", " ", screen.getvalue()).split()  # without tyro's frames
        reason = printable(" ".join(words), 2 * _LONGEST_OPTIONS)
        raise UserError(f"{place}: cannot use the options {shown} ({reason})") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The entries in which two nested dictionaries differ, as ``name: left -> right``."""
    found = []
    for name in sorted(set(left) | set(right)):
        a, b = left.get(name), right.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found


# Options that do not change the result. Runs that differ only in these are the same run.
PLACES = (
    *("run_dir", "data_dir", "debug", "resident", "save_seconds"),
    *("devices", "processes", "process_id", "coordinator"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnSplitConfig:
    """The options of every command that runs networks over a prepared split."""

    data_dir: str = "data"
    """Folder of the prepared data sets."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 256
    """Images per batch; the result depends on it by rounding only."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras computes with; the results are the same to rounding."""
    debug: bool = False
    """Show tracebacks."""
