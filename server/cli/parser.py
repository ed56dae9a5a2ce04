"""The argument parser of all commands: errors in one line, and readable help."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from server.part_table import missing_command
from server.settings.setting import ValueType, did_you_mean
from server.settings.table import REPEAT_LORA_MODULES, SETTINGS

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class CommandError(Exception):
    """A command cannot go on. The message is one line for the user."""


def drop_output(fd: int) -> None:
    """Let nothing more be written to a standard stream, which has failed: Python would try so again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def fail(message: str, status: int = FAILURE) -> int:
    """Print an error and return the exit status."""
    try:
        print(f"lightwell: error: {message}", file=sys.stderr, flush=True)
    except OSError:
        drop_output(2)
    return status


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_Formatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments, or exit: unlike in argparse, none may be left."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_arguments(unknown))
        return namespace, unknown

    def _unknown_arguments(self, unknown: list[str]) -> str:
        """Return the usage error. It names flags without their values, which might be secrets."""
        flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        if flags:
            return f"unknown flag {flags[0]}{did_you_mean(flags[0].replace('_', '-'), self._option_string_actions)}"
        is_adapter = "=" in unknown[0] or unknown[0].startswith("{")
        return f"unexpected argument {unknown[0]!r}" + (f": {REPEAT_LORA_MODULES}" if is_adapter else "")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggest the nearest choice, and list all only if none is near."""
        if action.choices is not None and value not in action.choices:
            if (error := missing_command(str(value))) is not None:
                raise argparse.ArgumentError(None, f"{value}: {error}")
            hint = did_you_mean(str(value), action.choices) or f" (choose from {', '.join(action.choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help or a version. Raises OSError, which argparse would ignore."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(fail(f"{message} (see {self.prog} --help)", USAGE_ERROR))


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return the flags of an action, without the `--no-` flag of a switch that is off by default."""
        is_off = isinstance(action, argparse.BooleanOptionalAction) and SETTINGS[action.dest].default is False
        return action.option_strings[0] if is_off else super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap help text, but do not break flags at their hyphens."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS, False, True)
        return f"{text} [%(default)s]" if has_default else text


def argument_type(value_type: ValueType) -> Callable[[str], Any]:
    """Return an argparse type that parses as the settings do."""

    def parse(text: str) -> Any:
        try:
            return value_type.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {value_type.expected}, got {text!r}") from None

    return parse
