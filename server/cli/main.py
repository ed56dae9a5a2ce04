"""The `lightwell` command. Each subcommand is a module, here or in a part, which adds its parser.

A command imports what it needs only when it runs, so that help and usage errors appear at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from server.cli import chat, serve
from server.cli.parser import FAILURE, INTERRUPTED, USAGE_ERROR, Commands, Parser, fail
from server.cli.streams import StreamError, drop_output, open_standard_streams
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
    except StreamError as error:
        return fail(str(error))
    except OSError as error:
        drop_output(1)  # which it may be about
        is_reader_gone = isinstance(error, BrokenPipeError)  # as in `lightwell list | head`
        return FAILURE if is_reader_gone else fail(format_os_error(error))


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
