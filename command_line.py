"""Command lines made of config classes: one field, one option, one default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")
_CLI_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse_options(config_class: type[Config], default: Config | None = None, args: list[str] | None = None) -> Config:
    """Makes a config from command-line options named after its fields.

    Args:
        config_class: a frozen dataclass of this module; nested sections add their options unprefixed.
        default: where unnamed options come from; None is the class's own defaults.
        args: the options; None is ``sys.argv[1:]``.

    Raises:
        SystemExit: with code 2 and a message for an unknown option or a value of the wrong type.
    """
    extra = {} if default is None else {"default": default}
    return tyro.cli(config_class, args=args, config=_CLI_STYLE, **extra)


def parse_command(commands: dict[str, type], description: str) -> Any:
    """Makes the config of the sub-command named first on the command line (`parse_options` for several).

    Args:
        commands: sub-command name to config class.
        description: what the program does, for ``--help``.
    """
    return parse_command_over({name: (cls, {}) for name, cls in commands.items()}, description)


def parse_command_over(
    commands: dict[str, tuple[type, dict[str, Any]]], description: str, args: list[str] | None = None
) -> Any:
    choices = tuple(Annotated[cls, tyro.conf.subcommand(name, **extra)] for name, (cls, extra) in commands.items())
    union: Any = choices[0]
    for choice in choices[1:]:
        union = union | choice
    return tyro.cli(union, description=description, config=_CLI_STYLE, args=args)


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
            args += [option(name), str(value)]
    return args
