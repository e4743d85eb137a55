"""Do the options mean what they say: names, defaults, recipes, round trips, refusals?"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT, run_python

import command_line
import config
from command_line import Range
from config import (
    RECIPES,
    AugmentConfig,
    DatasetName,
    DatasetType,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from datasets import CLASS_NAMES
from datasets.shared import expressions
from files import UserError
from grids.options import ListGridConfig, ReportGridConfig, RunGridConfig, parse_grid_command
from test import EvaluateConfig, RecognizeConfig

# No field has its default here, so that a forgotten one shows.
UNUSUAL = TrainConfig(
    dataset=DatasetName.fer2013,
    data_dir="/elsewhere",
    run_dir="here",
    weights="some.weights.h5",
    teacher="a.weights.h5",
    teacher_share=0.37,
    without="suspects.csv",
    fold="2/5",
    epochs=3,
    minutes=2.5,
    batch_size=7,
    seed=5,
    balanced=True,
    soft_labels=True,
    select_on="test",
    precision="mixed_bfloat16",
    backend="jax",
    resident="no",
    save_seconds=31.0,
    devices=2,
    processes=6,
    process_id=4,
    coordinator="there:29500",
    model=ModelConfig("keras:MobileNetV2", 3, 66, 96, 0.23, "imagenet", 4.5),
    loss=LossConfig(2.5, 0.0, 0.53, 3.1, False, 0.17, 53, 0.07, 1.7, 0.61, 0.71, 0.81, 0.91),
    optimizer=OptimizerConfig("adam", 0.13, "constant", 0.57, 0.29, 0.19, 4, 0.99),
    augmentation=AugmentConfig(False, False, 1.0, 0.21, 0.31, 0.41, 0.43, 0.47, 0.49, 0.51),
    debug=True,
)
UNUSUAL_ARGS = shlex.split("""
    --dataset fer2013 --data-dir /elsewhere --run-dir here --weights some.weights.h5 --epochs 3 --batch-size 7 --seed 5
    --balanced --soft-labels --select-on test --precision mixed_bfloat16 --backend jax
    --arch keras:MobileNetV2 --num-embeddings 3 --embedding-size 66 --input-size 96 --dropout 0.23 --pretrained imagenet
    --logit-scale 4.5 --ramp-epochs 1.7 --w-center 0.61 --w-supcon 0.71 --w-triplet 0.81 --w-eac 0.91 --average 0.99
    --w-ce 2.5 --w-fd 0 --w-md 0.53 --w-ed 3.1 --no-adaptive --weight-floor 0.17 --history 53 --label-smoothing 0.07
    --optimizer adam --learning-rate 0.13 --schedule constant --warmup-epochs 0.57 --decay 0.29
    --weight-decay 0.19 --accumulate 4 --no-augment --no-flip --rotation 1 --shift 0.21 --zoom 0.31 --erase 0.41 --debug
    --mixup 0.51 --contrast 0.43 --blur 0.47 --noise 0.49 --teacher a.weights.h5 --teacher-share 0.37
    --without suspects.csv --fold 2/5
    --minutes 2.5 --resident no --save-seconds 31 --devices 2 --processes 6 --process-id 4 --coordinator there:29500
""")


def train_options(*args) -> TrainConfig:
    return config.parse_train_options(args)


def leaves(values: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def help_of(program, *words) -> str:
    """The help that a terminal of 80 columns shows."""
    done = run_python(ROOT / program, *words, "--help", env_changes={"COLUMNS": "80"})
    assert done.returncode == 0 and not done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    return done.stdout


def options_in(text: str) -> list[str]:
    return re.findall(r"^\W*(--[a-z][a-z0-9-]*)", text, re.MULTILINE)


def test_the_help_begins_with_examples_and_the_ten_options_one_needs_first():
    shown = help_of("train.py")
    head, *sections = shown.split("╭─ ")
    examples = [line for line in head.splitlines() if line.strip().startswith("python train.py")]
    assert len(examples) == 3
    for example in examples:  # the options of each exist
        train_options(*shlex.split(example)[2:])
    assert options_in(sections[1]) == [
        *("--dataset", "--data-dir", "--arch", "--epochs", "--batch-size", "--learning-rate", "--seed"),
        *("--weights", "--run-dir", "--recipe"),
    ]
    named = [name for section in sections[1:] for name in options_in(section)]
    assert sorted(named) == sorted(command_line.option(name) for name in ("recipe", *config.options_by_name(UNUSUAL)))


def test_every_option_of_a_training_has_a_description():
    missing = [
        name
        for name, hint, _ in command_line._options(config.TrainOptions, config.TrainOptions())
        if not [mark for mark in getattr(hint, "__metadata__", ()) if getattr(mark, "help", None)]
    ]
    assert not missing


@pytest.mark.slow
def test_the_help_of_a_grid_says_where_the_options_of_a_training_are():
    for command in ("run", "list", "report"):
        shown = help_of("reproduce.py", command)
        assert "train.py --help" in " ".join(shown.split())
        assert {"--seeds", "--run-dir", "--dataset", "--recipe"} <= set(options_in(shown))
        assert not {"--w-fd", "--rotation", "--devices"} & set(options_in(shown))


# Dictionaries


def test_the_unusual_example_has_no_default():
    unusual, usual = leaves(config.to_dict(UNUSUAL)), leaves(config.to_dict(TrainConfig()))
    assert [name for name in usual if unusual[name] == usual[name]] == []


@pytest.mark.parametrize("options", [TrainConfig(), UNUSUAL, RECIPES["published"]])
def test_options_survive_json(options):
    values = config.to_dict(options)
    assert json.loads(json.dumps(values)) == values


def test_dictionaries_hold_plain_values():
    values = config.to_dict(UNUSUAL)
    assert values["dataset"] == "fer2013" and type(values["dataset"]) is str
    assert values["model"]["arch"] == "keras:MobileNetV2" and values["loss"]["w_fd"] == 0.0


def test_differences_name_what_changed():
    left, right = config.to_dict(TrainConfig()), config.to_dict(UNUSUAL)
    assert config.differences(left, left) == []
    found = config.differences(left, right)
    assert len(found) == len(leaves(left))
    assert f"epochs: {TrainConfig().epochs} -> 3" in found and "loss.w_ce: None -> 2.5" in found


def test_differences_see_names_that_one_side_lacks():
    left, right = {"same": 1, "gone": 2, "deep": {"old": 3}}, {"same": 1, "new": 4, "deep": {"old": 5}}
    assert config.differences(left, right) == ["deep.old: 3 -> 5", "gone: 2 -> None", "new: None -> 4"]


def test_a_message_about_options_is_short():
    with pytest.raises(UserError, match="grid: cannot use the options") as error:
        config.with_options(TrainConfig(), {"arch": "x" * 5_000, "adaptive": "9" * 5_000}, "grid")
    assert len(str(error.value)) < 1_500


# The command line


def test_every_training_option_can_be_set(monkeypatch):
    assert train_options(*UNUSUAL_ARGS) == UNUSUAL


def test_options_come_back_from_the_words_that_say_them(monkeypatch):
    options = config.changed_options(UNUSUAL)
    assert len(options) == len(leaves(config.to_dict(UNUSUAL)))  # all of them differ
    assert train_options(*command_line.to_args(options)) == UNUSUAL
    assert command_line.to_args({"w_fd": 0.5, "adaptive": False, "augment": True, "w_ce": None}) == [
        *("--w-fd", "0.5", "--no-adaptive", "--augment", "--w-ce", "None")
    ]
    assert config.changed_options(TrainConfig()) == {}


def test_with_options_changes_those_and_keeps_the_others():
    changed = config.with_options(UNUSUAL, {"w_fd": 0.25, "epochs": 9}, "here")
    assert changed == dataclasses.replace(UNUSUAL, epochs=9, loss=dataclasses.replace(UNUSUAL.loss, w_fd=0.25))
    with pytest.raises(UserError, match=r"here: cannot use the options {'epoch_count': 3} \(.*epoch-count"):
        config.with_options(UNUSUAL, {"epoch_count": 3}, "here")


# The commands of reproduce.py


def grid_options(monkeypatch, *args, recipe="default"):
    monkeypatch.setattr("sys.argv", ["reproduce.py", *args])
    commands = {"run": RunGridConfig, "list": ListGridConfig, "report": ReportGridConfig}
    return parse_grid_command(commands, "", recipe)


def test_a_grid_takes_all_options_of_a_training(monkeypatch):
    args = [word for word in UNUSUAL_ARGS if word not in ("--run-dir", "here")]
    settings = grid_options(monkeypatch, "run", "mine.yaml", "--seeds", "5", "--jobs", "3", "--run-dir", "all", *args)
    assert (settings.experiments, settings.seeds, settings.jobs, settings.run_dir) == ("mine.yaml", 5, 3, "all")
    assert settings.training() == dataclasses.replace(UNUSUAL, run_dir=None)


@pytest.mark.parametrize(("words", "recipe"), [((), "published"), (("--recipe", "published"), "default")])
def test_a_grid_starts_from_a_recipe(monkeypatch, words, recipe):
    settings = grid_options(monkeypatch, "list", "paper", "--epochs", "4", *words, recipe=recipe)
    assert settings.training() == dataclasses.replace(RECIPES["published"], epochs=4)
    assert (settings.experiments, settings.seeds, settings.run_dir) == ("paper", 3, "runs")


def test_no_options_are_the_default_recipe(monkeypatch):
    assert train_options() == train_options("--recipe", "default") == TrainConfig()


def test_a_recipe_sets_defaults_that_options_override(monkeypatch):
    assert train_options("--recipe", "published") == RECIPES["published"]
    published = RECIPES["published"]
    expected = dataclasses.replace(published, epochs=1, loss=dataclasses.replace(published.loss, w_fd=0.0))
    for args in (
        ("--recipe", "published", "--epochs", "1", "--w-fd", "0"),
        ("--epochs", "1", "--recipe", "published", "--w-fd", "0"),
        ("--epochs", "1", "--w-fd", "0", "--recipe", "published"),
        ("--epochs", "1", "--recipe=published", "--w-fd=0"),
    ):
        assert train_options(*args) == expected


def test_keras_backend_sets_the_default_of_every_command(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert train_options().backend == train_options("--recipe", "published").backend == "jax"
    assert train_options("--backend", "tensorflow").backend == "tensorflow"
    assert grid_options(monkeypatch, "run").backend == EvaluateConfig("w").backend == "jax"
    assert TrainConfig().backend == "tensorflow"  # what a run's identity is compared with
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    with pytest.raises(UserError, match="KERAS_BACKEND: expected one of tensorflow, jax, torch, found 'numpy'"):
        train_options()


def test_the_published_recipe_is_the_published_one():
    published = RECIPES["published"]
    assert (published.epochs, published.batch_size) == (300, 50)
    assert (published.model.arch, published.model.num_embeddings, published.model.input_size) == ("xcp", 7, 224)
    assert (published.optimizer.optimizer, published.optimizer.learning_rate) == ("adam", 1e-3)
    assert published.loss.label_smoothing == 0


@pytest.mark.parametrize("command", ["train.py", "reproduce.py"])
def test_help_offers_the_recipes(command):
    done = run_python(ROOT / command, *(["run"] if command == "reproduce.py" else []), "--help")
    assert done.returncode == 0
    assert re.search(r"--recipe {None,default,published}", done.stdout)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("--epoch-count", "3"), "--epoch-count"),
        (("--epochs", "many"), "many"),
        (("--select-on", "train"), "train"),
        (("--dataset", "cifar10"), "cifar10"),
        (("--no-augment", "stray"), "stray"),
        (("--recipe", "best"), "best"),
        (("--epochs", "3", "--recipe"), "--recipe"),
    ],
)
def test_what_cannot_be_an_option_exits_with_2_and_says_so(monkeypatch, capsys, args, hint):
    with pytest.raises(SystemExit) as stop:
        train_options(*args)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["recognize", "a.png", "b.png", "--json"], RecognizeConfig(("a.png", "b.png"), json=True)),
        (["recognize", "a.png", "--no-detect-face"], RecognizeConfig(("a.png",), detect_face=False)),
        (["evaluate", "--weights", "w", "--split", "test"], EvaluateConfig("w", split="test")),
    ],
)
def test_the_first_word_chooses_the_command(monkeypatch, args, expected):
    monkeypatch.setattr("sys.argv", ["test.py", *args])
    commands = {"recognize": RecognizeConfig, "evaluate": EvaluateConfig}
    assert command_line.parse_command(commands, description="") == expected


@pytest.mark.parametrize("args", [["guess", "a.png"], ["evaluate"], []])
def test_a_command_that_is_unknown_or_incomplete_exits_with_2(monkeypatch, capsys, args):
    monkeypatch.setattr("sys.argv", ["test.py", *args])
    with pytest.raises(SystemExit) as stop:
        command_line.parse_command({"recognize": RecognizeConfig, "evaluate": EvaluateConfig}, description="")
    assert stop.value.code == 2 and capsys.readouterr().err


# Names


@pytest.mark.parametrize(
    ("part", "split"), [("train", "train"), ("train_7", "train"), ("eval", "val"), ("eval_7", "val"), ("test", "test")]
)
def test_published_parts_are_our_splits(part, split):
    assert DatasetType(part).split == split


def test_class_codes_are_the_places_of_their_names():
    named = {name: getattr(expressions, name.upper()) for name in CLASS_NAMES}
    assert list(named.items()) == [(name, code) for code, name in enumerate(CLASS_NAMES)]


def test_every_option_has_a_unique_name():
    """Sections add their options unprefixed: two of one name would be one option."""
    names = [name.split(".")[-1] for name in leaves(config.to_dict(TrainConfig()))]
    assert len(set(names)) == len(names)


# Numbers that cannot be trained with


def changed(name, value):
    for section in ("model", "loss", "optimizer", "augmentation"):
        part = getattr(TrainConfig(), section)
        if hasattr(part, name):
            return dataclasses.replace(TrainConfig(), **{section: dataclasses.replace(part, **{name: value})})
    return dataclasses.replace(TrainConfig(), **{name: value})


def test_the_recipes_can_be_trained_with():
    for recipe in RECIPES.values():
        config.check(recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("batch_size", 0), ("seed", -1), ("history", 0), ("accumulate", 0), ("embedding_size", 2)),
        *(("label_smoothing", 1.5), ("label_smoothing", -1.0), ("w_fd", -1.0), ("w_md", float("nan")), ("erase", 2.0)),
        *(("zoom", 1.5), ("zoom", -1.0), ("shift", -0.5), ("learning_rate", -1.0), ("learning_rate", float("inf"))),
        *(("warmup_epochs", -1.0), ("weight_decay", -1.0), ("weight_floor", -1.0), ("dropout", 1.0)),
    ],
)
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')}: expected .*, received {value}"):
        config.check(changed(name, value))


def test_a_loss_without_terms_is_refused():
    nothing = LossConfig(w_ce=0.0, w_fd=0.0, w_md=0.0, w_ed=0.0)
    with pytest.raises(UserError, match="at least one above 0"):
        config.check(TrainConfig(loss=nothing))
    config.check(TrainConfig(loss=dataclasses.replace(nothing, w_ed=1.0)))


def test_every_number_of_a_training_has_a_range():
    whole = TrainConfig()
    for section in (whole, whole.model, whole.loss, whole.optimizer, whole.augmentation):
        for name, hint in get_type_hints(type(section), include_extras=True).items():
            kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            is_number = {int, float} & {kind, *get_args(kind)}
            assert bool(is_number) == any(isinstance(extra, Range) for extra in extras), name


@dataclasses.dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    how_many: Annotated[int | None, Range(1, None)] = None
    inner: Inner = Inner()
    shares: tuple[Annotated[float, Range(0, 10)], ...] = ()
    name: str | None = None
    note: str = ""


@pytest.mark.parametrize("options", [Outer(), Outer(1), Outer(10**9, Inner(0)), Outer(3, Inner(1))])
def test_numbers_inside_their_ranges_pass(options):
    command_line.check_ranges(options)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (Outer(0), "--how-many.*1 or more.* 0"),
        (Outer(float("inf")), "--how-many.*1 or more.*inf"),
        (Outer(1, Inner(1.5)), "--share.*0 to 1.*1.5"),
        (Outer(1, Inner(float("nan"))), "--share.*0 to 1.*nan"),
        (Outer(1, Inner(), (1.0, float("inf"))), "--shares.*0 to 10.*inf"),
        (Outer(name=""), "--name: expected a value, received an empty one"),
    ],
)
def test_a_number_outside_its_range_is_refused_in_every_section(options, facts):
    with pytest.raises(UserError, match=facts):
        command_line.check_ranges(options)


def test_a_command_checks_its_numbers(monkeypatch):
    monkeypatch.setattr("sys.argv", ["a.py", "outer", "--share", "2"])
    with pytest.raises(UserError, match="--share"):
        command_line.parse_command({"outer": Outer, "inner": Inner}, description="")


def test_a_term_of_the_loss_is_one_field():
    """Each field ``w_<term>`` has a title, in the order of the fields, and nothing else is a term."""
    names = [field.name for field in dataclasses.fields(LossConfig) if field.name.startswith("w_")]
    assert [f"w_{term}" for term in config.LOSS_TERMS] == names
    assert config.LOSS_TERMS["md"] == "Mean Discriminator"
    assert config.loss_weights(UNUSUAL.loss) == {name.removeprefix("w_"): getattr(UNUSUAL.loss, name) for name in names}
