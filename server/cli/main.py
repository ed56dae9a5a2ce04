"""The `lightwell` command. Each subcommand is a module, here or in a part, which adds its parser.

A command imports what it needs only when it runs, so that help and usage errors appear at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from server.cli import chat, serve
from server.cli.parser import FAILURE, INTERRUPTED, USAGE_ERROR, CommandError, Commands, Parser, drop_output, fail
from server.format import format_os_error
from server.part_table import PARTS, is_installed, load_module
from server.settings.setting import SettingsError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    open_standard_streams()
    try:
        try:
            arguments = make_parser().parse_args(argv)
            command: Command = arguments.run
            return command(arguments)
        finally:
            sys.stdout.flush()
    except SettingsError as error:
        return fail(str(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return INTERRUPTED
    except CommandError as error:
        return fail(str(error))
    except OSError as error:
        drop_output(1)  # which it may be about
        is_reader_gone = isinstance(error, BrokenPipeError)  # as in `lightwell list | head`
        return FAILURE if is_reader_gone else fail(format_os_error(error))


def open_standard_streams() -> None:
    """Open the null device for standard streams that are closed.

    The next file or connection would get the number of a closed one, and logs would be written into it. Output that
    the encoding of the terminal lacks is escaped.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # in the locale C, bytes that are no text are not noticed otherwise
            stream.reconfigure(errors=errors)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightwell",
        description="Serve language models through APIs compatible with OpenAI's, Anthropic's and Ollama's.",
    )
    parser.add_argument("--version", action="version", version=f"lightwell {version('lightwell')}")
    parser.set_defaults(run=_no_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    parts = [load_module(name, "commands") for name, part in PARTS.items() if part.commands and is_installed(name)]
    for module in (serve, chat, *parts):
        module.add(commands)
    _add_doctor(commands)
    return parser


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, what would run, and what is missing",
        description="Report what this machine has, what would run on it, and how to mend what is missing.",
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("--json", action="store_true", help="Print the report as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from server.cli.doctor import doctor

    return doctor(as_json=arguments.json)


def _no_command(arguments: argparse.Namespace) -> int:
    make_parser().print_help(sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
