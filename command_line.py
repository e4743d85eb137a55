"""Makes command lines from config classes: one field is one option with its default and range."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import docstring_parser
import tyro

from files import UserError
from reading.text import printable

Config = TypeVar("Config")
_CLI_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse_options(
    config_class: type[Config], default: Config | None = None, args: Sequence[str] | None = None
) -> Config:
    """Makes a config from command-line options named after its fields.

    Args:
        config_class: a frozen dataclass; nested sections add their options unprefixed.
        default: values of the options that are not given; None is the class's own defaults.
        args: the options; None is ``sys.argv[1:]``.

    Raises:
        SystemExit: with code 2 and a message for an unknown option or a value of the wrong type.
        UserError: a number outside its field's `Range`.
    """
    extra = {} if default is None else {"default": default}
    options = tyro.cli(config_class, args=args, config=_CLI_STYLE, **extra)
    check_ranges(options)
    return options


def parse_sections(
    config_class: type[Config],
    sections: Mapping[str, Sequence[str]],
    default: Config,
    args: Sequence[str] | None = None,
) -> Config:
    """`parse_options` with the options of ``--help`` in sections of their own, whatever the config's nesting is.

    Args:
        config_class: a frozen dataclass whose docstring begins the help.
        sections: title to the names of its options.
        default: values of the options that are not given.
        args: the options; None is ``sys.argv[1:]``.
    """
    shown = sectioned(config_class, sections, default)
    options = from_sections(config_class, tyro.cli(shown, args=args, config=_CLI_STYLE, description=shown.__doc__))
    check_ranges(options)
    return options


def sectioned(
    config_class: type, sections: Mapping[str, Sequence[str]], default: Any, hidden: Sequence[str] = ()
) -> type:
    """A dataclass of the same options with one nested dataclass per section, for `tyro.cli`.

    Args:
        config_class: a frozen dataclass; its nested ones are unfolded.
        sections: title to the names of options; those of the title "" stand at the top level.
        default: an instance with the values of the options that are not given.
        hidden: the titles of sections that are neither shown nor parsed: for ``--help`` only.
    """
    options = {name: (hint, value) for name, hint, value in _options(config_class, default)}
    fields: list[Any] = [(name, *options[name]) for name in sections.get("", ())]
    for title, names in sections.items():
        if title:
            shown = [(name, *options[name]) for name in names]
            if title in hidden:
                shown = [(name, Annotated[hint, tyro.conf.Suppress], value) for name, hint, value in shown]
            section = dataclasses.make_dataclass(title, shown, frozen=True)
            section.__doc__ = ""
            fields.append((f"section_{len(fields)}", Annotated[section, tyro.conf.arg(name=title)], section()))
    made = dataclasses.make_dataclass(config_class.__name__, fields, frozen=True)
    made.__doc__ = inspect.cleandoc(config_class.__doc__ or "")
    return made


def from_sections(config_class: type[Config], options: Any) -> Config:
    """The ``config_class`` with the values of an instance of its `sectioned` class."""
    return _nested(config_class, dict(_leaves(options)))


def _options(config_class: type, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type with help text, and default of every option of a config, nested ones included."""
    hints = get_type_hints(config_class, include_extras=True)
    helps = {
        param.arg_name: " ".join(str(param.description).split())
        for parent in reversed(config_class.__mro__[:-1])
        for param in docstring_parser.parse_from_object(parent).params
    }
    for field in dataclasses.fields(config_class):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value)
        elif field.name in helps:
            yield field.name, Annotated[hints[field.name], tyro.conf.arg(help=helps[field.name])], value
        else:
            yield field.name, hints[field.name], value


def _leaves(options: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def _nested(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    kinds = get_type_hints(config_class)
    return config_class(
        **{
            field.name: _nested(kinds[field.name], values)
            if dataclasses.is_dataclass(kinds[field.name])
            else values[field.name]
            for field in dataclasses.fields(config_class)
        }
    )


def parse_some_options(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Makes a config from its own options, wherever they stand among others, which are ignored.

    Args:
        config_class: a frozen dataclass; see `parse_options`.
        args: the options; None is ``sys.argv[1:]``.

    Raises:
        SystemExit: with code 2 and a message for a value of the wrong type.
    """
    return tyro.cli(config_class, args=args, config=_CLI_STYLE, add_help=False, return_unknown_args=True)[0]


def parse_command(commands: dict[str, type], description: str) -> Any:
    """Makes the config of the sub-command named first on the command line (`parse_options` for several).

    Args:
        commands: sub-command name to config class.
        description: what the program does, for ``--help``.
    """
    return parse_command_over({name: (cls, {}) for name, cls in commands.items()}, description)


def parse_command_over(
    commands: dict[str, tuple[type, dict[str, Any]]], description: str, args: Sequence[str] | None = None
) -> Any:
    choices = tuple(Annotated[cls, tyro.conf.subcommand(name, **extra)] for name, (cls, extra) in commands.items())
    union: Any = choices[0]
    for choice in choices[1:]:
        union = union | choice
    options = tyro.cli(union, description=description, config=_CLI_STYLE, args=args)
    check_ranges(options)
    return options


@dataclasses.dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a numeric option, as ``epochs: Annotated[int, Range(1, None)]``.

    Attributes:
        low: the smallest value; None is no bound.
        high: the largest value; None is no bound.
    """

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        is_finite = isinstance(value, int) or math.isfinite(value)  # which fails for an int beyond 1e308
        return is_finite and above and below

    def __str__(self) -> str:
        if self.low is None and self.high is None:
            return "a finite number"
        if self.low is None:
            return f"{self.high} or less"
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"


def check_ranges(options: Any) -> None:
    """Checks every number of a config, its nested sections and tuples included, against the `Range` beside it.

    Args:
        options: a config (dataclass instance); None fits every range.

    Raises:
        UserError: a number outside its range, or not finite; it names the option, the range and the value. Or an empty
            text: it is what a shell makes of a variable that is not set, and would silently mean the default.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        # In the type of a tuple, the range belongs to the type of its elements.
        values, hints = (value, get_args(hint)) if isinstance(value, tuple) else ((value,), (hint,))
        if "" in values and getattr(type(options), name, None) != "":
            is_positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
            raise UserError(f"{name if is_positional else option(name)}: expected a value, received an empty one")
        for extra in (extra for each in hints for extra in getattr(each, "__metadata__", ())):
            for number in values:
                if isinstance(extra, Range) and number is not None and number not in extra:
                    raise UserError(f"{option(name)}: expected {extra}, received {printable(number, 40)}")


def option(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def to_args(options: Mapping[str, Any]) -> list[str]:
    """Options by name as command-line words: ``{"w_fd": 0, "adaptive": False}`` is ``--w-fd 0 --no-adaptive``."""
    args = []
    for name, value in options.items():
        if isinstance(value, bool):
            args.append(option(name if value else f"no-{name}"))
        else:
            args += [option(name), str(value.value if isinstance(value, Enum) else value)]
    return args
