"""Every option of every command, with absurd values: one message, or a value inside its range."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

import command_line
import config
import datasets
import demo
import prepare_data
import test
from command_line import Range
from config import TrainConfig
from distributed.process_group import process_group
from files import UserError, run_command
from grids.options import ListGridConfig, ReportGridConfig, RunGridConfig, parse_grid_command

COMMANDS = {
    "train": config.TrainOptions,
    "reproduce run": RunGridConfig,
    "reproduce list": ListGridConfig,
    "reproduce report": ReportGridConfig,
    "demo": demo.DemoConfig,
    "prepare inspect": prepare_data.InspectConfig,
    **{f"prepare {name}": datasets.get(name).options for name in datasets.NAMES},
    **{f"test {name}": cls for name, (cls, _) in test._COMMANDS.items()},
}
# The last but one is an integer that no float holds, the last one more than Python reads.
ABSURD = ("0", "-1", str(10**30), "1e308", "nan", "-inf", "", "\udce9", "x" * 10_000, "9" * 4_000, "9" * 5_000)


def options_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Name and type of every option, those of nested sections included."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name])
        else:
            yield field.name, hints[field.name]


def distinct_options() -> dict[tuple[str, str], tuple[str, Any]]:
    """(name, type) to command and type: options that several commands inherit are tried once."""
    found = {}
    for command, cls in COMMANDS.items():
        for name, hint in options_of(cls):
            found.setdefault((name, str(hint)), (command, hint))
    return found


def one_of(hint: Any) -> Any:
    """The type of one value: of a tuple that of its elements."""
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


def is_number(hint: Any) -> bool:
    hint = one_of(hint)
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return bool({int, float} & {kind, *get_args(kind)})


def range_of(hint: Any) -> Range | None:
    return next((extra for extra in getattr(one_of(hint), "__metadata__", ()) if isinstance(extra, Range)), None)


def test_every_number_of_every_command_has_a_smallest_and_a_largest_value():
    for (name, _), (command, hint) in distinct_options().items():
        if is_number(hint):
            limits = range_of(hint)
            assert limits and math.isfinite(limits.low) and math.isfinite(limits.high), f"{command}: {name}"


def with_value(name: str, value: Any) -> TrainConfig:
    """The default options of a training with one changed."""

    def changed(section: Any) -> Any:
        values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
        nested = {key: changed(each) for key, each in values.items() if dataclasses.is_dataclass(each)}
        return dataclasses.replace(section, **nested, **({name: value} if name in values else {}))

    return changed(TrainConfig())


@pytest.mark.slow  # 1,000 parses
@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value[:6]))
def test_an_absurd_value_is_one_message_or_inside_its_range(value):
    trainings = {name for name, _ in options_of(TrainConfig)}
    for (name, _), (command, hint) in distinct_options().items():
        one = dataclasses.make_dataclass("One", [(name, hint)], frozen=True)
        is_positional = "Positional" in str(hint)
        words = [value] if is_positional else [f"{command_line.option(name)}={value}"]
        screen = io.StringIO()
        try:
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                parsed = getattr(command_line.parse_options(one, args=words), name)
            if name in trainings:
                settings = with_value(name, parsed)
                config.check(settings)
                process_group(settings, {})
        except UserError as error:
            assert len(str(error)) < 5_000 and "\n" not in str(error), (command, name)
            continue
        except SystemExit as stop:
            assert stop.code == 2 and screen.getvalue(), (command, name)
            continue
        if is_number(hint):
            numbers = parsed if isinstance(parsed, tuple) else (parsed,)
            assert all(each is None or each in range_of(hint) for each in numbers), (command, name, parsed)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--seed", "4294967296"), "--seed"),
        (("--epochs", str(10**30)), "--epochs"),
        (("--history", str(10**12)), "--history"),
        (("--embedding-size", str(10**9)), "--embedding-size"),
        (("--embedding-size", "65536", "--num-embeddings", "1024"), "--num-embeddings times --embedding-size"),
        (("--batch-size", "9" * 4_000), "--batch-size"),
    ],
)
def test_a_training_beyond_every_machine_is_one_line_and_exit_code_2(monkeypatch, capsys, words, option):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert run_command(lambda: config.check(config.parse_train_options())) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {option}: expected ") and printed.count("\n") == 1 and len(printed) < 200


def test_an_empty_text_is_refused_where_it_is_not_the_default():
    """A shell makes it of a variable that is not set."""
    own = datasets.get("folders").options
    assert command_line.parse_options(own, args=["--source", "a"]).mapping == ""
    for cls, words, name in (
        (own, ["--source", ""], "--source"),
        (TrainConfig, ["--weights", ""], "--weights"),
        (test.RecognizeConfig, ["a.png", ""], "images"),
    ):
        with pytest.raises(UserError, match=f"^{name}: expected a value, received an empty one"):
            command_line.parse_options(cls, args=words)


def test_seeds_of_a_grid_end_before_the_last_one(monkeypatch):
    for seed, fits in ((2**31 - 3, True), (2**31 - 2, False)):
        monkeypatch.setattr("sys.argv", ["reproduce.py", "run", "--seed", str(seed), "--seeds", "3"])
        if fits:
            assert parse_grid_command({"run": RunGridConfig}, "", "default").seeds == 3
        else:
            with pytest.raises(UserError, match="--seed: expected 2147483645 or less with --seeds 3"):
                parse_grid_command({"run": RunGridConfig}, "", "default")
